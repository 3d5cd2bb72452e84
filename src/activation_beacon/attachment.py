"""What stands on a model while beacons are attached, and how it is put on and taken off again."""

import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from activation_beacon import decoder_inputs
from activation_beacon.causal import tell_layer
from activation_beacon.config import BeaconConfig
from activation_beacon.dense import dense_weight, packed_buffers
from activation_beacon.errors import AttachError, ConfigError
from activation_beacon.projection import (
    BeaconProjection,
    OneDnnLinear,
    PassState,
    forget_beacon_slots,
    replace_beacon_rows,
    take_beacon_slots,
)
from activation_beacon.ratios import RatioPolicy
from activation_beacon.recurrent import hand_on_tokens, read_beacons
from activation_beacon.sites import DecoderSite


def new_token() -> str:
    """A name that nothing else has."""
    return secrets.token_hex(8)


@dataclass
class Attachment:
    """What has been put on a model, and what is needed to take it off again."""

    config: BeaconConfig
    site: DecoderSite
    state: PassState
    base_class: type[PreTrainedModel]
    frozen: list[nn.Parameter]  # parameters that required gradients before
    handles: list[Any]
    own_forward: Callable[..., Any] | None  # a forward that another library had put on the instance
    policy: RatioPolicy
    cuda_graphs: bool = False
    cpu_matmul: str = "auto"
    linears: list[nn.Linear] = field(default_factory=list)  # of the base, which have become a class of ours
    token: str = field(default_factory=new_token)  # names this attaching, and what it was before each training
    known_base: tuple[int, str] | None = None  # fingerprint of the base, and a name for the state of its tensors
    quantised_base: str | None = None  # fingerprint of one that is, whose library may lay out weights anew in use


def put_on(model: nn.Module, attachment: Attachment) -> None:
    """Put everything on a model but its new class; what was done is in `attachment`, for `take_off`."""
    for module in model.modules():
        if type(module) is nn.Linear:  # not a class of somebody else's, which may not multiply at all
            attachment.linears.append(module)
            module.__class__ = OneDnnLinear
            module.beacon_state = attachment.state  # type: ignore[assignment]
    _put_branches(attachment, model.dtype)  # type: ignore[arg-type]


def _put_branches(attachment: Attachment, dtype: torch.dtype) -> None:
    """Hang a beacon projection and the hooks on every site; of this dtype, where the base's own are packed."""
    told: set[nn.Module] = set()  # a layer may be told for what it has side by side
    for index, layer in enumerate(attachment.site.layers):
        layer.attention.beacon_state = layer.told.beacon_state = attachment.state  # type: ignore[assignment]
        if is_new := layer.told not in told:
            attachment.handles.append(layer.told.register_forward_pre_hook(take_beacon_slots, with_kwargs=True))
        told.add(layer.told)
        if layer.num_states:
            layer.attention.beacon_num_states, layer.attention.beacon_index = layer.num_states, index  # type: ignore[assignment]
            attachment.handles.append(layer.attention.register_forward_pre_hook(hand_on_tokens, with_kwargs=True))
            attachment.handles.append(layer.attention.register_forward_hook(read_beacons, with_kwargs=True))
        if attachment.site.layers_differ and (layer.has_entries or layer.lender is not None):
            layer.attention.beacon_window, layer.attention.beacon_lender = layer.window, layer.lender  # type: ignore[assignment]
            attachment.handles.append(layer.attention.register_forward_pre_hook(tell_layer, with_kwargs=True))
        if is_new:
            attachment.handles.append(layer.told.register_forward_hook(forget_beacon_slots, always_call=True))
        for site in layer.projections:
            weight = dense_weight(site.linear, dtype, f"{site.name} of layer {index}")
            bias = getattr(site.linear, "bias", None)
            is_anchored = attachment.config.anchored and site.name != "o"
            site.linear.beacon = BeaconProjection(weight, bias, attachment.state, is_anchored=is_anchored)
            attachment.handles.append(site.linear.register_forward_hook(replace_beacon_rows))


def take_off(model: Any, attachment: Attachment) -> None:
    """Take everything off again, also what an attaching that failed half-way has left."""
    model.__class__ = attachment.base_class
    for linear in attachment.linears:
        if type(linear) is OneDnnLinear:  # else another library has since given it a class of its own, which is to last
            linear.__class__ = nn.Linear  # type: ignore[assignment]
        vars(linear).pop("beacon_state", None)
    for handle in attachment.handles:
        handle.remove()
    for layer in attachment.site.layers:
        for module in (layer.attention, layer.told):
            vars(module).pop("beacon_state", None)
            for name in ("beacon_num_states", "beacon_index", "beacon_window", "beacon_lender"):
                vars(module).pop(name, None)
        for site in layer.projections:
            site.linear._modules.pop("beacon", None)
    model._parameters.pop("beacon_embedding", None)
    if attachment.own_forward is not None:
        model.forward = attachment.own_forward
    vars(model).pop("_beacon", None)
    for parameter in attachment.frozen:
        parameter.requires_grad_(True)


def check_in_memory(model: PreTrainedModel) -> None:
    """Refuse a model some of whose weights are elsewhere: beacons begin as copies of them.

    Raises:
        AttachError: with their number.
    """
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise AttachError(
            f"{len(away)} of the model's weights are not in memory ({away[0]} is on the meta device, as offloading leaves it), and "
            "beacons begin as copies of them. Load the model without offloading to a CPU or a disk."
        )


def with_base(config: BeaconConfig, base_model: PreTrainedModel, base_print: str) -> BeaconConfig:
    """The configuration with what is known of the base model filled in."""
    name, revision = config.base_model, config.base_revision
    if name is None and base_model.name_or_path:
        name, revision = base_model.name_or_path, getattr(base_model.config, "_commit_hash", None)
        if Path(name).is_dir():  # wherever the adapter is loaded from
            name = str(Path(name).absolute())
    return dataclasses.replace(
        config, base_model=name, base_revision=revision, base_fingerprint=config.base_fingerprint or base_print
    )


def check_placement(config: BeaconConfig, site: DecoderSite) -> None:
    """Refuse beacons among the tokens of a chunk where layers carry a state: it is there at the chunk's end.

    Raises:
        ConfigError: with the way out.
    """
    if site.is_recurrent and config.placement != "append":
        raise ConfigError(
            f"placement must be 'append' for a base with recurrent layers, whose state beacons read at the end of a chunk; got "
            f"{config.placement!r}. Use BeaconConfig(placement='append'), or --placement append."
        )


def check_chunk_fits(config: BeaconConfig, site: DecoderSite) -> None:
    """Refuse chunks that not even the largest ratio makes fit.

    Raises:
        ConfigError: with the positions needed and there.
    """
    ratio = config.ratios[-1]
    needed = config.num_sinks + config.num_beacons(ratio) + config.chunk_size + config.local_tokens
    if site.max_positions is not None and needed > site.max_positions:
        fits_alone = needed - config.local_tokens <= site.max_positions
        kept = "".join(
            f", {count} {what}"
            for count, what in ((config.num_sinks, "sinks"), (config.local_tokens, "local tokens"))
            if count
        )
        raise ConfigError(
            f"A chunk of {config.chunk_size} tokens with its beacons at ratio {ratio}{kept} takes {needed} positions; "
            f"the base model has {site.max_positions}. Use {'fewer local tokens' if fits_alone else 'a smaller chunk_size'}."
        )


def first_embedding(model: PreTrainedModel) -> torch.Tensor:
    """The embedding (M,) that beacons start from: that of the eos token, else of bos, else of token 0."""
    config, embedding = model.config.get_text_config(decoder=True), model.get_input_embeddings()
    tokens: list[int] = []
    for named in (getattr(config, name, None) for name in ("eos_token_id", "bos_token_id")):  # not all have the names
        tokens += named if isinstance(named, (list, tuple)) else [] if named is None else [named]
    token = next((token for token in tokens if 0 <= token < embedding.weight.shape[0]), 0)
    with torch.no_grad():
        return decoder_inputs.embeddings(model, torch.tensor([token], device=embedding.weight.device))[0].clone()


def base_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's own parameters, and the buffers of quantised layers, with their names."""
    for name, tensor in itertools.chain(model.named_parameters(), packed_buffers(model)):
        if ".beacon." not in name and name != "beacon_embedding":
            yield name, tensor
