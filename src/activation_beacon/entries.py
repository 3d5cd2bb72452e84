"""Keys and values of one layer: held, quantised, lent to a pass, cut and joined. Knows nothing of what they stand for."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from activation_beacon.quantized import Quantized
from activation_beacon.room import Room
from activation_beacon.rows import merge, take

# B batch · K kv heads · S slots · P stored slots · T slots of a pass · D head dim

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class PassEnded(Exception):  # noqa: N818 - nothing went wrong
    """Raised in the last layer that keeps something when all that is wanted of a pass has been kept."""


class BeaconLayer(DynamicLayer):
    """One layer's entries: floats in `keys` and `values` (B, K, S, D), after quantised ones if there are any.

    Without gradients, what decoding appends goes into room behind them; a text that is read leaves no room. Of a layer with a
    sliding window, slots that no token to come sees are dropped: they are counted, and not held.

    Attributes:
        ends_pass: whether nothing is wanted of the pass in progress beyond this layer's entries.
        window: entries that a slot sees, its own the last; None for all before it.
        dropped: slots before the first that is held.
    """

    has_entries = True
    ends_pass = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.dropped = 0
        self.room: Room | None = None
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.stored: tuple[Quantized, Quantized] | None = None

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        stored: tuple[Quantized, Quantized] | None = None,
        *,
        window: int | None = None,
        dropped: int = 0,
    ) -> "BeaconLayer":
        """A layer that holds these tensors, not copies of them."""
        layer = cls(window)
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values, layer.stored, layer.dropped = keys, values, stored, dropped
        return layer

    def _holding(
        self, keys: torch.Tensor, values: torch.Tensor, stored: tuple[Quantized, Quantized] | None = None
    ) -> "BeaconLayer":
        """A layer that holds these tensors in place of its own."""
        return BeaconLayer.of(keys, values, stored, window=self.window, dropped=self.dropped)

    @property
    def is_sliding(self) -> bool:
        """Whether it has a window: transformers sizes the masks of such layers by one of them."""
        return self.window is not None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass of so many attends to, and those before them that are dropped."""
        return self.get_seq_length() - self.dropped + query_length, self.dropped

    @property
    def stored_length(self) -> int:
        """Slots held quantised."""
        return 0 if self.stored is None else self.stored[0].length

    def get_seq_length(self) -> int:
        """Slots up to the last, padding and those that are dropped included."""
        return (
            self.dropped + self.stored_length + (0 if self.keys is None or self.keys.dim() < 4 else self.keys.shape[-2])
        )

    @property
    def is_consistent(self) -> bool:
        """Whether all tensors have rows, heads and slots in common, and what is packed unpacks to floats like the dense ones."""
        dense = [tensor for tensor in (self.keys, self.values) if tensor is not None]
        packed = [part for half in self.stored or () for part in (half.codes, half.scale, half.least)]
        if any(tensor.dim() != 4 for tensor in dense + packed) or any(t.dtype not in FLOATS for t in dense):
            return False
        heads = {tensor.shape[:2] for tensor in dense + packed}
        slots = [{tensor.shape[2] for tensor in tensors} for tensors in (dense, packed)]
        fits = all(half.unpacks_to(tensor.shape[3]) for half, tensor in zip(self.stored or (), dense, strict=False))
        return len(heads) <= 1 and all(len(lengths) <= 1 for lengths in slots) and fits

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new entries (B, K, T, D); returns all that are held, dense.

        Raises:
            PassEnded: where it `ends_pass`.
        """
        self.room = self._room_for(key_states, value_states)
        if self.room is None:
            super().update(key_states, value_states)
        else:
            self.keys, self.values = self.room.append(key_states, value_states)
        if self.ends_pass:
            raise PassEnded
        return self.entries()

    def _room_for(self, *new: torch.Tensor) -> Room | None:
        """Room behind the entries held: what there is, or new room for a single entry, as decoding brings them.

        None where they have to be concatenated, which lets gradients through, joins dtypes, and leaves no slot to spare.
        """
        if torch.is_grad_enabled() or self.keys is None or self.values is None:
            return None
        for held, states in zip((self.keys, self.values), new, strict=True):
            if held.dim() != states.dim() or held.dtype != states.dtype or held.device != states.device:
                return None
        num_new = new[0].shape[2]
        if self.has_room(num_new):
            return self.room
        return Room(self.keys, self.values, num_new) if num_new == 1 else None

    def has_room(self, num_new: int) -> bool:
        """Whether the entries held stand in a room that has a place for so many more."""
        return self.room is not None and self.room.can_append_to(self.keys, self.values, num_new)

    def fill_next(self) -> None:
        """Hold one entry more: that which has been written into the next slot of the room."""
        assert self.room is not None, "it has been written somewhere"
        self.keys, self.values = self.room.fill(1)

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots held (B, K, S, D), dense."""
        assert self.keys is not None, "an empty layer has no entries"
        assert self.values is not None
        if self.stored is None:
            return self.keys, self.values
        keys, values = self.stored
        return torch.cat((keys.dense(), self.keys), dim=2), torch.cat((values.dense(), self.values), dim=2)

    def copy(self) -> "BeaconLayer":
        """A layer of its own that shares the tensors."""
        if self.keys is None or self.values is None:
            return self.emptied()
        return self._holding(self.keys, self.values, self.stored)

    def begun(self) -> "BeaconLayer":
        """The layer for a pass over what follows: itself, to be appended to."""
        return self

    def emptied(self) -> "BeaconLayer":
        """A layer of the kind without entries."""
        return BeaconLayer(self.window)

    def dense(self) -> "BeaconLayer":
        """The same entries with nothing quantised."""
        return self if self.stored is None else self._holding(*self.entries())

    def taken(
        self, ends: Sequence[int], length: int, *, rows: Sequence[int] | None = None, most: int | None = None
    ) -> "BeaconLayer":
        """The `length` slots before each row's own of `ends`, with nothing quantised; what lies before slot 0 is padding.

        Args:
            ends: counted from slot 0, whether that is held or not.
            rows: which these are; None for all.
            most: slots to hold, the last ones; None for all that there are.
        """
        if self.keys is None:
            return self.emptied()
        dropped = max(0, self.dropped + length - max(ends), 0 if most is None else length - most)
        keys, values = (
            take(tensor, rows or range(len(ends)), [end - self.dropped for end in ends], length - dropped, dim=2)
            for tensor in self.entries()
        )
        return BeaconLayer.of(keys, values, window=self.window, dropped=dropped)

    def cut(self, num_slots: int) -> "BeaconLayer":
        """The first slots."""
        return self.copy() if self.keys is None else self.taken([num_slots] * self.keys.shape[0], num_slots)

    def truncate(self, num_slots: int) -> None:
        """Keep the first slots, in place: the last of them are dense. Keys may have been appended to before values."""
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dim() == 4:
                setattr(self, name, tensor[:, :, : num_slots - self.dropped - self.stored_length])

    def at_chunk_end(self, num_slots: int) -> "BeaconLayer":
        """The first slots, as many as the last closed chunk has left."""
        return self.cut(num_slots)

    @staticmethod
    def stack(layers: Sequence["BeaconLayer"]) -> "BeaconLayer":
        """One layer of a batch out of those of several texts, rows aligned at the right."""
        counts = [layer.keys.shape[0] for layer in layers if layer.keys is not None]
        starts = itertools.accumulate(counts, initial=0)
        rows = [range(start, start + count) for start, count in zip(starts, counts, strict=False)]
        return BeaconLayer.merged(list(zip(rows, layers, strict=True)))

    @staticmethod
    def merged(parts: Sequence[tuple[Sequence[int], "BeaconLayer"]]) -> "BeaconLayer":
        """One layer of a batch out of layers that hold some of its rows each, aligned at the right."""
        entries = [layer.entries() for _, layer in parts]
        rows = [rows for rows, _ in parts]
        keys, values = (merge(list(zip(rows, tensors, strict=True)), dim=2) for tensors in zip(*entries, strict=True))
        dropped = max(layer.get_seq_length() for _, layer in parts) - keys.shape[2]
        window = next((layer.window for _, layer in parts if layer.window is not None), None)
        return BeaconLayer.of(keys, values, window=window, dropped=dropped)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "BeaconLayer":
        """The same change made to every tensor; it leaves the slots as they are."""
        if self.keys is None or self.values is None:
            return self.emptied()
        stored = None if self.stored is None else (self.stored[0].map(change), self.stored[1].map(change))
        return self._holding(change(self.keys), change(self.values), stored)

    def with_dtype(self, dtype: torch.dtype) -> "BeaconLayer":
        """The same entries in another float dtype; quantised ones stay as they are and become that dtype when used."""
        if self.keys is None or self.values is None:
            return self.emptied()
        stored = None
        if self.stored is not None:
            stored = (replace(self.stored[0], dtype=dtype), replace(self.stored[1], dtype=dtype))
        return self._holding(self.keys.to(dtype), self.values.to(dtype), stored)

    def quantized(self, bits: int, length: int) -> "BeaconLayer":
        """The first `length` slots in `bits` bits, those that are dropped among them, the rest dense."""
        keys, values = self.entries()
        length -= self.dropped
        stored = (Quantized.of(keys[:, :, :length], bits), Quantized.of(values[:, :, :length], bits))
        return self._holding(keys[:, :, length:].clone(), values[:, :, length:].clone(), stored)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by the names that they have in a file."""
        if self.keys is None or self.values is None:
            return
        yield from (("keys", self.keys), ("values", self.values))
        for what, part in zip(("keys", "values"), self.stored or (), strict=False):
            yield from ((f"{what}.codes", part.codes), (f"{what}.scale", part.scale), (f"{what}.least", part.least))

    @classmethod
    def of_named(
        cls,
        tensors: Mapping[str, torch.Tensor],
        bits: int | None,
        *,
        window: int | None = None,
        num_slots: int | None = None,
    ) -> "BeaconLayer":
        """The layer that `named_tensors` was called on.

        Args:
            tensors: by their names.
            bits: those of its quantised part, None without one.
            window: of the layer.
            num_slots: up to the last; what is missing of them has been dropped. None where nothing has been.
        """
        if "keys" not in tensors:
            return cls(window)
        keys, values = tensors["keys"], tensors["values"]

        def part(what: str, bits: int) -> Quantized:
            codes, scale, least = (tensors[f"{what}.{name}"] for name in ("codes", "scale", "least"))
            return Quantized(codes, scale, least, bits, keys.dtype)

        stored = None if bits is None else (part("keys", bits), part("values", bits))
        layer = cls.of(keys, values, stored, window=window)
        if window is not None and num_slots is not None:
            layer.dropped = max(0, num_slots - layer.get_seq_length())
        return layer

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values as they are held."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.nbytes + self.values.nbytes + sum(part.num_bytes for part in self.stored or ())


class ChunkLayer(DynamicLayer):
    """One layer during the pass that closes a chunk: lends what is held, and keeps the chunk's entries to itself.

    Args:
        held: makes the keys and values (B, K, m + h, D) that stand before the pass; called when the layer is reached, so that
            copies of one layer at a time are alive. None where nothing is held.
        length: of the text, entries before the chunk.
        lent: m, those of them that the layer's window reaches; None for all.
        num_held: h, tokens of the chunk that have been read already.
        num_repeated: first slots of the pass that are among these; their keys and values are dropped.
        is_sliding: whether it has a window.

    Attributes:
        ends_pass: whether nothing is wanted of the pass beyond this layer's keys and values.
    """

    has_entries = True

    def __init__(
        self,
        held: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None,
        length: int,
        *,
        lent: int | None = None,
        num_held: int = 0,
        num_repeated: int = 0,
        is_sliding: bool = False,
    ) -> None:
        super().__init__()
        self.held = held
        self.length = length
        self.lent = length if lent is None else lent
        self.is_sliding = is_sliding
        self.num_held = num_held
        self.num_repeated = num_repeated
        self.ends_pass = False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the entries of the pass (B, K, R, D), without the repeated ones; returns all that is attended to.

        Raises:
            PassEnded: where it `ends_pass`.
        """
        self.keys, self.values = key_states, value_states
        if self.num_repeated:
            self.keys, self.values = (states[:, :, self.num_repeated :] for states in (key_states, value_states))
        if self.ends_pass:
            raise PassEnded
        return self._behind(0)

    def memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (B, K, m, D) that stand before the chunk; not for a layer that holds nothing."""
        assert self.held is not None, "nothing is held"
        keys, values = self.held()
        return keys[:, :, : self.lent], values[:, :, : self.lent]

    def chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (B, K, T, D) of the chunk's slots, those read already among them."""
        return self._behind(self.lent) if self.num_held else (self.keys, self.values)

    def forget(self) -> None:
        """Let go of what the pass has left here."""
        del self.keys, self.values

    def _behind(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pass's keys and values behind what is held from slot `first` on."""
        if self.held is None:
            return self.keys, self.values
        keys, values = self.held()
        return torch.cat((keys[:, :, first:], self.keys), dim=2), torch.cat((values[:, :, first:], self.values), dim=2)

    def get_seq_length(self) -> int:
        """Entries before the chunk."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass of so many attends to, and those before them that it does not reach."""
        return self.lent + query_length, self.length - self.lent
