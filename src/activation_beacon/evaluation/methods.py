"""Ways to hold a long text, at the cache size that beacons take at a ratio: what a user could do instead.

Each reads the text before any question is known. What is compared at ratio r holds as many entries as beacons do at r.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.evaluation.contexts import (
    PIECE,
    BaseContext,
    BeaconContext,
    Context,
    base_cache_bytes,
    base_read,
    timed,
)
from activation_beacon.evaluation.names import LOCAL_TOKENS
from activation_beacon.layouts import entries_held
from activation_beacon.quantized import Quantized
from activation_beacon.ratios import Ratio
from activation_beacon.rope import KeyMover

# B batch · K kv heads · S cache entries · D head dim

SINKS = 4  # first tokens that StreamingLLM keeps

Read = Callable[[Any, list[int], int, Any], Context]


@dataclass(frozen=True)
class Method:
    """A way to hold a text.

    Attributes:
        name: as the command line has it.
        description: one clause.
        read: of the model, the text's ids, how many of them stand before the text itself, and the ratio.
        has_ratio: whether the ratio decides its size.
    """

    name: str
    description: str
    read: Read
    has_ratio: bool


def read_context(
    model: Any, ids: Sequence[int], method: str, *, ratio: Ratio | None = None, opening: int = 0
) -> Context:
    """Read a text in one way; the context has the `seconds` that it took.

    Args:
        model: with beacons attached.
        ids: the text, opened by the chat template or by a beginning-of-text token.
        method: a key of `METHODS`.
        ratio: of beacons, or of the beacons that the method is to be no larger than.
        opening: how many ids open it; truncation keeps them.

    Raises:
        InputError: for an unknown method, or a ratio that is missing.
        CapacityError: where beacons do not fit the base model's positions.
    """
    chosen = check_method(method)
    if chosen.has_ratio and ratio is None:
        raise InputError(f"The method {method} needs a ratio, such as 8.")
    start = time.perf_counter()
    return timed(chosen.read(model, list(ids), opening, ratio), start)


def check_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: listing the known ones.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}. Use some of {', '.join(METHODS)}.")
    return METHODS[name]


def check_can_hold(model: Any, name: str) -> None:
    """Refuse a method that a base has no use for.

    Raises:
        UnsupportedError: where keys and values are to be dropped, and some layers carry a state.
    """
    if name == "streaming-llm" and model.decoder_site.is_recurrent:
        raise UnsupportedError(
            f"The method {name} drops keys and values, and {type(model).__name__} has layers that carry a state. Leave it out."
        )


def beacon_entries(model: Any, num_tokens: int, ratio: int) -> int:
    """Cache entries that beacons hold of a text at a ratio."""
    return entries_held(model.beacon_config, num_tokens, ratio)


# --- the methods -----------------------------------------------------------------------------------------------------


def _full(model: Any, ids: list[int], _opening: int, _ratio: Any) -> Context:
    return BaseContext.of(model, ids)


def _recent(model: Any, ids: list[int], opening: int, ratio: int) -> Context:
    count = beacon_entries(model, len(ids), ratio) - opening
    return BaseContext.of(model, [*ids[:opening], *ids[max(opening, len(ids) - count) :]])


def _head_tail(model: Any, ids: list[int], _opening: int, ratio: int) -> Context:
    count = beacon_entries(model, len(ids), ratio)
    head = (count + 1) // 2
    return BaseContext.of(model, ids if count >= len(ids) else [*ids[:head], *ids[len(ids) - (count - head) :]])


def _streaming(model: Any, ids: list[int], _opening: int, ratio: int) -> Context:
    """First tokens and last ones, read on a sliding window; keys are moved to their places in the cache (StreamingLLM)."""
    check_can_hold(model, "streaming-llm")
    count = beacon_entries(model, len(ids), ratio)
    cache: Any = DynamicCache()
    for start in range(0, len(ids), PIECE):
        cache, _ = base_read(model, cache, ids[start : start + PIECE])
        _evict(model, cache, count)
    return BaseContext.holding(model, cache)


def _evict(model: Any, cache: Any, count: int) -> None:
    """Drop all entries but the sinks and the last ones, `count` together, and close the gap."""
    surplus = cache.get_seq_length() - count
    if surplus <= 0:
        return
    shifts = torch.tensor([0] * SINKS + [-surplus] * (count - SINKS), device=cache.layers[0].keys.device)
    mover = KeyMover(model.decoder_site.ropes, shifts)
    for index, layer in enumerate(cache.layers):
        keys, values = (_without(states, surplus) for states in (layer.keys, layer.values))
        layer.keys, layer.values = mover.move_entries(keys, values, index)


def _without(entries: torch.Tensor, surplus: int) -> torch.Tensor:
    return torch.cat((entries[:, :, :SINKS], entries[:, :, SINKS + surplus :]), dim=2)


def _quantized(bits: int) -> Read:
    def read(model: Any, ids: list[int], _opening: int, _ratio: Any) -> Context:
        """The full cache as it is after a way through `bits` bits; its bytes are those of the codes and scales."""
        full = BaseContext.of(model, ids)
        saved = 0
        for layer in full.cache.layers:
            if getattr(layer, "keys", None) is not None:  # others have states, or nothing
                keys, values = Quantized.of(layer.keys, bits), Quantized.of(layer.values, bits)
                saved += layer.keys.nbytes + layer.values.nbytes - keys.num_bytes - values.num_bytes
                layer.keys, layer.values = keys.dense(), values.dense()
        assert base_cache_bytes(full.cache) == full.cache_bytes
        full.cache_bytes -= saved
        return full

    return read


def _beacons(bits: int | None = None, local_tokens: int | None = None) -> Read:
    def read(model: Any, ids: list[int], _opening: int, ratio: Any) -> Context:
        return BeaconContext.of(model, ids, ratio, bits=bits, local_tokens=local_tokens)

    return read


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "the base model with the whole text", _full, has_ratio=False),
        Method("shuffled", "the base model with another sample's text: chance", _full, has_ratio=False),
        Method("int8", "the whole text's cache in 8 bits", _quantized(8), has_ratio=False),
        Method("int4", "the whole text's cache in 4 bits", _quantized(4), has_ratio=False),
        Method("recent", "the text's last tokens", _recent, has_ratio=True),
        Method("head-tail", "the text's first and last tokens", _head_tail, has_ratio=True),
        Method("streaming-llm", "first tokens and a sliding window", _streaming, has_ratio=True),
        Method("beacons", "beacons", _beacons(), has_ratio=True),
        Method("beacons-int8", "beacons in 8 bits", _beacons(bits=8), has_ratio=True),
        Method("beacons-int4", "beacons in 4 bits", _beacons(bits=4), has_ratio=True),
        *(
            Method(name, f"beacons, and {number or 'no'} local tokens", _beacons(local_tokens=number), has_ratio=True)
            for name, number in LOCAL_TOKENS.items()
        ),
    )
}
