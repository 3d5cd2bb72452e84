"""A decoder put to the test: a few tokens are read, and what layers keep of them must be what is thought of them here.

A moved key must equal the key that the model itself makes at the new position, a state must go on where it was left, and
embeddings must be taken for the tokens that they are of.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from activation_beacon import decoder_inputs
from activation_beacon.families import unsupported
from activation_beacon.projection import PassState
from activation_beacon.recurrent import StateLayer, hand_on_tokens, read_beacons
from activation_beacon.sites import DecoderSite

MOVED_BY = 7  # positions, in the trial of moved keys
STILL = 1e-3  # of their size, by which keys that are not rotated may differ there
READ_FIRST, READ_THEN, PADDING = 5, 3, 4  # tokens, in the trial of states
LEAST_TRACE = (
    1e-4  # of a state's largest value, by which padding before a text may change it: what kernels round differently
)


def check_keys_move(model: PreTrainedModel, site: DecoderSite, *, tolerance: float = 2e-2) -> DecoderSite:
    """Compare moved keys with the model's own at the new position, in every layer.

    A token that stands alone attends to itself wherever it stands, so that its keys differ by their rotation only.

    Returns:
        The site, as the trial has found it: layers whose keys are the same at both positions have no rotary embedding in it
        (Cohere 2 has some), and layers that keep from their attention what they are told are told themselves (Nemotron's).

    Raises:
        UnsupportedModelError: naming the layer whose keys differ by more than `tolerance`, relative to their size; or if
            neither attention modules nor layers are handed the keyword argument that tells where the beacons are.
    """
    (here, told), (there, _) = (_lone_token_entries(model, site, position) for position in (0, MOVED_BY))
    layers = [dataclasses.replace(layer, told=module) for layer, module in zip(site.layers, told, strict=True)]
    for index, (rope, before, after) in enumerate(zip(site.ropes, here, there, strict=True)):
        if not layers[index].has_entries:
            continue
        if rope is not None and _difference(before, after) <= STILL:
            layers[index] = dataclasses.replace(layers[index], rope=None)
            continue
        try:
            moved = before
            if rope is not None:
                moved = rope.move_entries(*before, rope.rotation(torch.tensor([MOVED_BY], device=before[0].device)))
        except (RuntimeError, TypeError, AttributeError) as failure:
            raise unsupported(model, f"the keys of layer {index} cannot be moved by rotation ({failure})") from failure
        error = _difference(moved, after)
        if not error <= tolerance:
            raise unsupported(model, f"moving the keys of layer {index} by rotation misses its own keys by {error:.0%}")
    return dataclasses.replace(site, layers=tuple(layers))


@torch.no_grad()
def check_embeddings_are_taken(model: PreTrainedModel, *, tolerance: float = 2e-2) -> None:
    """Compare a text that is given as embeddings, as passes with beacons are, with the same given as ids.

    Raises:
        UnsupportedModelError: if what the decoder makes of them differs by more than `tolerance`, relative to its size, as where
            embeddings are scaled that it looks up itself, and those that it is given are not.
    """
    embedding, decoder = model.get_input_embeddings().weight, model.get_decoder()
    ids = torch.arange(READ_FIRST, device=embedding.device)[None] % embedding.shape[0]
    with _trial(model, "a trial pass on embeddings", ()):
        expected = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        given = {
            "inputs_embeds": decoder_inputs.embeddings(model, ids),
            **decoder_inputs.layer_embeddings(decoder, ids),
        }
        found = decoder(**given, use_cache=False).last_hidden_state.float()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    if not error <= tolerance:
        raise unsupported(
            model, f"it makes of embeddings not what it makes of their ids, but misses that by {error:.0%}"
        )


def _difference(entries: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """By which keys, or values if it is more, differ from others, relative to their size."""
    pairs = zip(entries, others, strict=True)
    return torch.stack([(one - two).norm() / two.norm().clamp(min=1e-30) for one, two in pairs]).max()


@torch.no_grad()
def _lone_token_entries(
    model: PreTrainedModel, site: DecoderSite, position: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[nn.Module]]:
    """Keys and values that each layer keeps of a token by itself, and the module in each that keyword arguments reach."""
    embedding = model.get_input_embeddings().weight
    reached: set[nn.Module] = set()
    device = embedding.device

    def note(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if kwargs.pop("beacon_slots", None) is not None:
            reached.add(attention)
        return args, kwargs

    def note_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        if kwargs.get("beacon_slots") is not None:
            reached.add(layer)

    decoder = model.get_decoder()
    layers = [decoder.layers[index if one.beside is None else one.beside] for index, one in enumerate(site.layers)]
    token = torch.linspace(-1, 1, embedding.shape[-1], dtype=model.dtype, device=device)[None, None]
    given = decoder_inputs.layer_embeddings(decoder, torch.zeros((1, 1), dtype=torch.long, device=device))
    cache = _trial_cache(site)
    handles = [layer.attention.register_forward_pre_hook(note, with_kwargs=True) for layer in site.layers]
    handles += [layer.register_forward_pre_hook(note_layer, with_kwargs=True) for layer in layers]
    with _trial(model, "a trial pass with an ordinary cache", handles), _on_states(site):
        decoder(
            inputs_embeds=token,
            position_ids=torch.tensor([[position]], device=device),
            past_key_values=cache,
            use_cache=True,
            beacon_slots=torch.zeros(1, dtype=torch.long, device=device),
            **given,
        )
        entries = [
            (held.keys.float(), held.values.float()) if layer.has_entries else (torch.zeros(0), torch.zeros(0))
            for layer, held in zip(site.layers, cache.layers, strict=False)
        ]
    told = [
        one.attention if one.attention in reached else layer for one, layer in zip(site.layers, layers, strict=True)
    ]
    if not reached.issuperset(told):
        raise unsupported(model, "it does not hand keyword arguments (`beacon_slots`) down to its layers")
    if len(cache.layers) != len(site.layers):
        raise unsupported(model, "not every layer keeps keys of its own")
    return entries, told


@torch.no_grad()
def check_states_go_on(model: PreTrainedModel, site: DecoderSite, *, tolerance: float = 2e-2) -> DecoderSite:
    """Compare a text that is read in two pieces with the same read in one.

    Returns:
        The site with the shapes of its states, and whether padding before a text leaves traces in them.

    Raises:
        UnsupportedModelError: if they differ by more than `tolerance`, relative to their size, or if a module cannot be called as it
            has to be.
    """
    embedding = model.get_input_embeddings().weight
    count = READ_FIRST + READ_THEN
    ids = torch.arange(count, device=embedding.device)[None] % embedding.shape[0]
    positions = torch.arange(count, device=embedding.device)[None]
    strange: list[nn.Module] = []

    def note(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, torch.Tensor) or len(args) + ("hidden_states" in kwargs) != 1:
            strange.append(mixer)

    def read(cache: Cache, start: int, stop: int, **options: Any) -> torch.Tensor:
        options = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop], **options}
        output = model.get_decoder()(**options, past_key_values=cache, use_cache=True)
        return output.last_hidden_state[:, -READ_THEN:].float()

    handles = [
        layer.attention.register_forward_hook(note, with_kwargs=True) for layer in site.layers if layer.num_states
    ]
    with _trial(model, "a trial pass on states", handles), _on_states(site) as state:
        pieces = _trial_cache(site)
        expected = read(_trial_cache(site), 0, count)
        read(pieces, 0, READ_FIRST)
        measured = [read(pieces, READ_FIRST, count)]
        state.runs = ((READ_FIRST, 0), (READ_THEN, 0))
        measured.append(read(_trial_cache(site), 0, count))
        state.runs = None
        alone, behind_padding = _trial_cache(site), _trial_cache(site)
        read(alone, 0, 1)
        first, mask = (torch.nn.functional.pad(each[:, :1], (PADDING, 0)) for each in (ids, torch.ones_like(ids)))
        read(behind_padding, 0, 1, input_ids=first, position_ids=torch.zeros_like(first), attention_mask=mask)
    if strange:
        raise unsupported(model, f"{type(strange[0]).__name__} is not called with hidden states for hidden states")
    missed_by = max((found - expected).norm() / expected.norm() for found in measured)
    first_state = next(index for index, layer in enumerate(site.layers) if layer.num_states)  # whose input is the same
    pairs = zip(*(cache.layers[first_state].named_tensors() for cache in (behind_padding, alone)), strict=True)
    changed_by = max(_changed_by(found.float(), due.float()) for (_, found), (_, due) in pairs)
    trace = max(LEAST_TRACE, 4 * torch.finfo(model.dtype).eps)
    if not missed_by <= tolerance:
        raise unsupported(model, f"a text read in two pieces misses the same read in one by {missed_by:.0%}")
    layers = tuple(
        layer if layer.has_entries else dataclasses.replace(layer, state_shapes=held.state.shapes)
        for layer, held in zip(site.layers, pieces.layers, strict=True)
    )
    return dataclasses.replace(site, layers=layers, padding_leaves_traces=changed_by > trace)


def _changed_by(found: torch.Tensor, due: torch.Tensor) -> float:
    """By which part of the largest value one differs from the other."""
    return float((found - due).abs().max() / due.abs().max().clamp(min=1e-30))


@contextlib.contextmanager
def _trial(model: PreTrainedModel, what: str, handles: Sequence[Any]) -> Iterator[None]:
    """A block of passes in evaluation, after which the model is as it was, and its hooks `handles` are gone.

    Raises:
        UnsupportedModelError: if a pass fails, but for want of memory.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise unsupported(model, f"{what} failed ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


@contextlib.contextmanager
def _on_states(site: DecoderSite) -> Iterator[PassState]:
    """Within the block, layers find their states in a trial's cache, and read a pass in the runs that `runs` of its state says."""
    state, mixers, handles = PassState(), [layer for layer in site.layers if layer.num_states], []
    try:
        for index, layer in enumerate(site.layers):
            if not layer.num_states:
                continue
            layer.attention.beacon_state, layer.attention.beacon_num_states = state, layer.num_states  # type: ignore[assignment]
            layer.attention.beacon_index = index  # type: ignore[assignment]
            handles.append(layer.attention.register_forward_pre_hook(hand_on_tokens, with_kwargs=True))
            handles.append(layer.attention.register_forward_hook(read_beacons, with_kwargs=True))
        yield state
    finally:
        for handle in handles:
            handle.remove()
        for layer in mixers:
            for name in ("beacon_state", "beacon_num_states", "beacon_index"):
                vars(layer.attention).pop(name, None)


def _trial_cache(site: DecoderSite) -> Cache:
    """A cache for a pass of the base alone."""
    if all(layer.has_entries for layer in site.layers):
        return DynamicCache()
    return Cache(
        layers=[DynamicLayer() if layer.num_states is None else StateLayer(layer.num_states) for layer in site.layers]
    )
