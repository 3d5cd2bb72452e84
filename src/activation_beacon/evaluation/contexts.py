"""A text as one method holds it, to be asked again and again: on the base model's own cache, or on beacons.

Answers are greedy and come from one loop, whatever the method, so that methods differ in what they hold and in nothing else.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from activation_beacon.row_ends import end_ids

# N new tokens · S cache entries

PIECE = 512  # tokens that the base model reads at a time: its mask is (PIECE, S)


class Context:
    """What a method holds of a text. Asking works on a copy that shares the tensors.

    Args:
        model: with beacons attached.
        cache: keys and values of what has been read.
        cache_length: entries held.
        cache_bytes: bytes of these.
        unread: ids that stand after them and that the model has not read yet.
    """

    def __init__(
        self, model: Any, cache: Any, *, cache_length: int, cache_bytes: int, unread: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.cache = cache
        self.cache_length = cache_length
        self.cache_bytes = cache_bytes
        self.unread = list(unread)
        self.seconds = 0.0

    def ask(self, ids: Sequence[int], *, max_new_tokens: int) -> tuple[list[int], Self]:
        """The greedy answer to ids that follow the text, without its end mark; and the context that has grown by both."""
        ends = end_ids(self.model.generation_config.eos_token_id)
        cache, logits = self._read(self._copied(), [*self.unread, *ids])
        answer: list[int] = []
        while (token := int(logits.argmax())) not in ends:
            answer.append(token)
            if len(answer) == max_new_tokens:
                return answer, self._grown(cache, answer[-1:])
            cache, logits = self._read(cache, [token])
        return answer, self._grown(cache, [])

    def _grown(self, cache: Any, unread: list[int]) -> Self:
        length, octets = self._size(cache)
        return type(self)(self.model, cache, cache_length=length, cache_bytes=octets, unread=unread)

    def _copied(self) -> Any:
        raise NotImplementedError

    def _read(self, cache: Any, ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """The cache after `ids`, and the logits (V,) of what comes next."""
        raise NotImplementedError

    def _size(self, cache: Any) -> tuple[int, int]:
        """Entries and bytes held."""
        raise NotImplementedError


class BaseContext(Context):
    """Keys and values as the base model makes them."""

    @classmethod
    def of(cls, model: Any, ids: Sequence[int]) -> "BaseContext":
        """The whole text, read in pieces; the base model's window is not heeded."""
        cache = None
        for start in range(0, len(ids), PIECE):
            cache, _ = base_read(model, cache, ids[start : start + PIECE])
        return cls.holding(model, cache)

    @classmethod
    def holding(cls, model: Any, cache: Any) -> "BaseContext":
        """What a cache of transformers holds."""
        return cls(model, cache, cache_length=cache.get_seq_length(), cache_bytes=base_cache_bytes(cache))

    def _copied(self) -> Any:
        return copied(self.cache)

    def _read(self, cache: Any, ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        return base_read(self.model, cache, ids)

    def _size(self, cache: Any) -> tuple[int, int]:
        return cache.get_seq_length(), base_cache_bytes(cache)


class BeaconContext(Context):
    """Beacons and a raw tail."""

    @classmethod
    def of(
        cls, model: Any, ids: Sequence[int], ratio: Any, *, bits: int | None = None, local_tokens: int | None = None
    ) -> "BeaconContext":
        """The text compressed; with `bits`, its beacons quantised; with `local_tokens`, as many kept raw as they say."""
        cache = model.compress(list(ids), cache=model.new_cache(ratio=ratio, local_tokens=local_tokens))
        if bits is not None:
            cache = cache.quantize(bits)
        return cls(model, cache, cache_length=cache.cache_length, cache_bytes=cache.cache_bytes)

    def _copied(self) -> Any:
        return self.cache.fork()

    @torch.no_grad()
    def _read(self, cache: Any, ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        row = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(row, past_key_values=cache, logits_to_keep=1)
        return cache, output.logits[0, -1]

    def _size(self, cache: Any) -> tuple[int, int]:
        return cache.cache_length, cache.cache_bytes


def copied(cache: Any) -> Any:
    """A cache of transformers that goes on by itself; keys and values are shared, since layers replace rather than change them."""
    other = copy.copy(cache)
    other.layers = [copy.deepcopy(layer) if has_states(layer) else copy.copy(layer) for layer in cache.layers]
    return other


def has_states(layer: Any) -> bool:
    """Whether a layer of a cache of transformers has states, which are written over."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def base_cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values of a cache of transformers, and of states."""
    tensors: list[Any] = []
    for layer in cache.layers:
        if has_states(layer):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def positions_on(cache: Any, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that has the base read ids (1, N) behind what a cache holds: not all (Bamba) ask the cache."""
    if cache is None:
        return {}
    first = cache.get_seq_length()
    return {"position_ids": torch.arange(first, first + row.shape[1], device=row.device)[None]}


@torch.no_grad()
def base_read(model: Any, cache: Any, ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
    """The base model's cache after reading `ids` on it, and the logits (V,) of what comes next."""
    row = torch.tensor([list(ids)], device=model.device)
    with model.beacon_disabled():
        output = model(row, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions_on(cache, row))
    return output.past_key_values, output.logits[0, -1]


def timed(context: Context, start: float) -> Context:
    """The context, with the seconds since `start` as the time that reading it took."""
    context.seconds = time.perf_counter() - start
    return context
