"""Shapes of models: of one's own, of which no more than the config is read; and a known one as a model.

Weights are random, for speed does not depend on their values, or none at all.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconConfig, attach
from activation_beacon.adapt import ROTARY_NAMES, find_decoder
from activation_beacon.base_models import DEFAULT_BASE_NAME
from activation_beacon.bench.cost import DEFAULT_SHAPE, SHAPES, ModelShape
from activation_beacon.config import DEFAULT_KIND
from activation_beacon.errors import BaseModelError, UnsupportedModelError, reason
from activation_beacon.persistence import CONFIG_FILE, load_adapter_config

FAMILIES = {  # the others are Llamas
    "qwen2-7b": "qwen2",
    "gemma-3-1b": "gemma3_text",
    "gemma-3-4b": "gemma3_text",
}
MANY_POSITIONS = 1 << 22  # so that no length is refused


def random_model(shape: str, *, chunk_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of one of `cost.SHAPES` with untrained beacons on, of the default adapter's kind, drawn on the device itself."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(known_config(shape), dtype=dtype, attn_implementation="sdpa").eval()
        return attach(model, BeaconConfig(chunk_size, **DEFAULT_KIND))


def known_config(shape: str) -> Any:
    """The transformers config of one of `cost.SHAPES`, without its limit of positions."""
    sizes = SHAPES[shape]
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
        **({"sliding_window": sizes.window} if sizes.window else {}),
    )


def read_shape(name: str) -> ModelShape:
    """The shape of a base model.

    Args:
        name: "default", a folder with config.json, or a hub id; neither weights nor a tokenizer are looked for.

    Raises:
        BaseModelError: if there is no config of that name, or none of a causal language model.
        UnsupportedModelError: if it cannot carry beacons, or is more than attention and one gated feed-forward part a layer.
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
    return dataclasses.replace(_counted(name, model, config, site.windows), max_positions=site.max_positions)


def _without_weights(config: Any) -> Any:
    """The model on the meta device, where weights take no memory; but for its frequencies, which `find_decoder` reads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    for name in ROTARY_NAMES:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, type(getattr(decoder, name))(config))
    return model


def _counted(name: str, model: Any, config: Any, windows: Mapping[int, int]) -> ModelShape:
    """The shape of a config, unless the model's matrices are not those that are counted, such as one's with experts."""
    there = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    try:
        shape = ModelShape.of(config, windows)
    except AttributeError as error:
        raise UnsupportedModelError(f"{name!r} cannot be planned for: {reason(error)}.") from error
    if there != shape.num_weights:
        raise UnsupportedModelError(
            f"{name!r} has {there:,} weights in matrices; attention and one gated feed-forward part a layer, which is what "
            f"is counted, would have {shape.num_weights:,}. Models with experts or other parts cannot be planned for."
        )
    return shape
