"""Shapes of models: of one's own, of which no more than the config is read; and a known one as a model.

Weights are random, for speed does not depend on their values, or none at all.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconConfig, attach
from activation_beacon.adapt import ROTARY_NAMES, find_decoder
from activation_beacon.base_models import DEFAULT_BASE_NAME
from activation_beacon.bench.cost import DEFAULT_SHAPE, SHAPES, ModelShape
from activation_beacon.config import DEFAULT_KIND
from activation_beacon.dense import is_linear
from activation_beacon.errors import BaseModelError, UnsupportedError, UnsupportedModelError, reason
from activation_beacon.persistence import CONFIG_FILE, load_adapter_config
from activation_beacon.sites import DecoderSite

FAMILIES = {  # the others are Llamas
    "qwen2-7b": "qwen2",
    "qwen3-30b-a3b": "qwen3_moe",
    "gemma-3-1b": "gemma3_text",
    "gemma-3-4b": "gemma3_text",
}
NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
MANY_POSITIONS = 1 << 22  # so that no length is refused


def random_model(shape: str, *, chunk_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of one of `cost.SHAPES` with untrained beacons on, of the default adapter's kind, drawn on the device itself."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(known_config(shape), dtype=dtype, attn_implementation="sdpa").eval()
        return attach(model, BeaconConfig(chunk_size, **DEFAULT_KIND))


def known_config(shape: str) -> Any:
    """The transformers config of one of `cost.SHAPES`, without its limit of positions."""
    sizes = SHAPES[shape]
    own: dict[str, Any] = {} if sizes.window is None else {"sliding_window": sizes.window}
    if sizes.expert_weights:
        of_one = sizes.intermediate_size // sizes.experts_per_token
        own |= {"num_experts": sizes.num_experts, "moe_intermediate_size": of_one}
        own |= {"num_experts_per_tok": sizes.experts_per_token}
    return CONFIG_MAPPING[FAMILIES.get(shape, "llama")](
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=MANY_POSITIONS,
        tie_word_embeddings=sizes.is_tied,
        **own,
    )


def read_shape(name: str) -> ModelShape:
    """The shape of a base model.

    Args:
        name: "default", a folder with config.json, or a hub id; neither weights nor a tokenizer are looked for.

    Raises:
        BaseModelError: if there is no config of that name, or none of a causal language model.
        UnsupportedModelError: if it cannot carry beacons, or has matrices outside its layers.
        UnsupportedError: as `shape_of`.
    """
    if name == DEFAULT_BASE_NAME:
        return SHAPES[DEFAULT_SHAPE]
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file():
        base = load_adapter_config(folder).base_model or "which it does not record"
        raise BaseModelError(
            f"{name!r} holds an adapter, not a base model. Name the model that it was made for: {base}."
        )
    # A foreign config can be wrong in any way, and transformers raises a dozen kinds of errors for it.
    try:
        config = AutoConfig.from_pretrained(str(folder) if name and folder.is_dir() else name, trust_remote_code=False)
        config = config.get_text_config(decoder=True)
        model = _without_weights(config)
    except Exception as error:
        raise BaseModelError(
            f"The config of {name!r} cannot be read as a causal language model's: {reason(error)}. "
            f'Give "{DEFAULT_BASE_NAME}", a folder with config.json, or a hub id such as "owner/model".'
        ) from error
    site = find_decoder(model, ("q", "k", "v"))
    return dataclasses.replace(_counted(name, model, site), max_positions=site.max_positions)


def _without_weights(config: Any) -> Any:
    """The model on the meta device, where weights take no memory; but for its frequencies, which `find_decoder` reads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    for name in ROTARY_NAMES:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, type(getattr(decoder, name))(config))
    return model


def shape_of(model: Any, site: DecoderSite) -> ModelShape:
    """The shape of a model with beacons or without: what its layers have in matrices is counted one by one.

    Raises:
        UnsupportedError: as `ModelShape.of`; where layers differ in their heads; and if the configuration does not name what is
            needed, as to how many of its experts a token is sent.
    """
    config = model.config.get_text_config(decoder=True)
    heads = {layer.entry_shapes for layer in site.layers} - {None}
    if len(heads) > 1:
        raise UnsupportedError(
            f"The operations of layers that differ in their heads ({config.model_type}) are not counted here."
        )
    try:
        shape = ModelShape.of(config, site.windows)
    except AttributeError as error:
        raise UnsupportedError(
            f"The sizes of {config.model_type} are not told by its config ({reason(error)})."
        ) from error
    for (num_kv_heads, head_dim), _ in filter(None, heads):
        shape = dataclasses.replace(shape, num_kv_heads=num_kv_heads, head_dim=head_dim)
    shared, experts = _weights_of_layers(model.get_decoder().layers)
    if shared != shape.num_layers * shape.layer_weights or experts:
        shape = dataclasses.replace(shape, shared_weights=shared)
    return _with_experts(shape, config, experts) if experts else shape


def _with_experts(shape: ModelShape, config: Any, num_weights: int) -> ModelShape:
    """The shape with so many weights in experts, of which a token goes through as many as the configuration says."""
    numbers = [getattr(config, name, None) for name in NUMBERS_OF_EXPERTS]
    num_experts = next((number for number in numbers if number), None)
    taken = getattr(config, "num_experts_per_tok", None)
    if num_experts is None or not taken:
        raise UnsupportedError(
            f"The configuration of {config.model_type} does not say how many of its experts a token takes."
        )
    return dataclasses.replace(
        shape,
        intermediate_size=taken * (getattr(config, "moe_intermediate_size", None) or shape.intermediate_size),
        expert_weights=num_weights,
        num_experts=num_experts,
        experts_per_token=taken,
    )


def _weights_of_layers(layers: nn.ModuleList) -> tuple[int, int]:
    """Weights in matrices, beacons' left out: those that every token goes through, and those of experts."""
    counts = {False: 0, True: 0}
    for name, module in layers.named_modules():
        if ".beacon" in name:
            continue
        matrices = [parameter.numel() for parameter in module._parameters.values() if _is_matrix(parameter)]
        own = (
            module.in_features * module.out_features if is_linear(module) else sum(matrices)
        )  # packed weights are fewer
        counts["experts" in name.split(".")] += own
    return counts[False], counts[True]


def _is_matrix(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > 1


def _counted(name: str, model: Any, site: DecoderSite) -> ModelShape:
    """The shape of a model, unless it has matrices outside its layers that are not counted."""
    there = sum(parameter.numel() for parameter in model.parameters() if _is_matrix(parameter))
    shape = shape_of(model, site)
    if there != shape.num_weights:
        raise UnsupportedModelError(
            f"{name!r} has {there:,} weights in matrices; its layers, embeddings and head, which is what is counted, have "
            f"{shape.num_weights:,}. Models with other parts cannot be planned for."
        )
    return shape
