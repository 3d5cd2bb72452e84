"""The beacon cache: sinks | beacons | tail, for one text or a batch of them.

An ordinary transformers cache, held by the caller: the base model appends to it and attends to all of it. Rows of a batch
stand at the right end of the slots, with nothing but padding before them, so that position = slot - padding; how many of
a row's entries are sinks, beacons and tail is kept in integers (`rows`). Slots once filled are never written again: a fork
shares them at no cost.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from activation_beacon.config import BeaconConfig, is_same_fingerprint
from activation_beacon.context_checks import check_contents
from activation_beacon.context_header import BITS, ContextHeader
from activation_beacon.entries import BeaconLayer
from activation_beacon.errors import (
    BeaconError,
    FileFormatError,
    InputError,
    MismatchError,
    UnsupportedError,
    reason,
)
from activation_beacon.files import read_context_file, write_context_file
from activation_beacon.layouts import within
from activation_beacon.plan import Row, TextPlanner
from activation_beacon.ratios import RatioPolicy
from activation_beacon.recurrent import StateLayer
from activation_beacon.rows import merge, take
from activation_beacon.sizes import bytes_text

# B batch · S slots · N tokens seen · L layers

PER_ROW = ("rows", "policies", "context_lengths")


class BeaconCache(Cache):
    """Compressed contexts: what a model has read of one text or a batch of texts.

    Made by `model.compress`; goes into `generate(context=...)`, `compress(cache=...)` and `model(past_key_values=...)`.
    The last two read on in place; `generate` works on a fork.

    Attributes:
        config: settings of the adapter that made it.
        rows: for each row, what it holds, in numbers.
        policies: for each row, how its chunks to come get their ratios.
        token_ids: (B, N) ids of all tokens seen, right-aligned like the entries.
        base_fingerprint, adapter_fingerprint: of the weights that made it.
        checked_by: the weights that the fingerprints were last compared with; None for a cache that has not been used yet.
        context_lengths: for each row, tokens seen before the first prompt of the generation that made this cache: what
            `generate` was given as `context`, and did not return among its ids.
        recorded: the step of decoding that was last recorded on it, a `recorded.RecordedStep`; no copy has it.
        is_continued: whether the prompt of the generation in progress may open with the text seen (transformers'
            `past_key_values` convention) rather than follow it.
    """

    def __init__(
        self,
        config: BeaconConfig,
        *,
        num_layers: int,
        num_states: Mapping[int, int] | None = None,
        windows: Mapping[int, int] | None = None,
        batch_size: int = 1,
        policy: RatioPolicy | None = None,
        base_fingerprint: str = "",
        adapter_fingerprint: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(layers=[])
        states, windows = num_states or {}, windows or {}  # of each kind, of the layers without keys and values
        self.layers: list[Any] = [
            StateLayer(states[index]) if index in states else BeaconLayer(windows.get(index))
            for index in range(num_layers)
        ]
        self.config = config
        self.rows: tuple[Row, ...] = (Row(config.chunk_size),) * batch_size
        self.policies: tuple[RatioPolicy, ...] = (policy or RatioPolicy(),) * batch_size
        self.token_ids = torch.zeros((batch_size, 0), dtype=torch.long, device=device)
        self.base_fingerprint = base_fingerprint
        self.adapter_fingerprint = adapter_fingerprint
        self.checked_by: int | str | None = None
        self.is_continued = False
        self.recorded: Any = None
        self.context_lengths = (0,) * batch_size

    # --- numbers ---

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def policy(self) -> RatioPolicy:
        """How the chunks to come get their ratios (of each row; rows that differ: see `policies`)."""
        if len(set(self.policies)) > 1:
            raise InputError("policy differs among the rows of this batch. Read policies[b] instead.")
        return self.policies[0]

    @policy.setter
    def policy(self, policy: RatioPolicy) -> None:
        self.policies = (policy,) * self.batch_size

    def planner(self, max_positions: int | None, row: int = 0) -> TextPlanner:
        """Plans how a row of it is read on, in so many positions."""
        return TextPlanner(self.config, self.policies[row], max_positions)

    @property
    def num_slots(self) -> int:
        """Slots of the batch: the longest row's entries (padding included in shorter ones)."""
        return max(row.cache_length for row in self.rows)

    @property
    def slots_held(self) -> int:
        """Slots that its layers have filled, those that some have dropped included."""
        return next((layer.get_seq_length() for layer in self.layers if layer.has_entries), 0)

    @property
    def dense_keys(self) -> torch.Tensor | None:
        """Keys (B, K, S, D) of the first layer that has any, those that are not quantised; None before the first token."""
        return next((layer.keys for layer in self.layers if layer.keys is not None), None)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry states in the place of keys and values: these can be forked, and not be taken back."""
        return any(layer.number_of_states for layer in self.layers if not layer.has_entries)

    @property
    def is_ragged(self) -> bool:
        """Whether some row is padded."""
        return len({row.cache_length for row in self.rows}) > 1

    def _common(self, name: str) -> int:
        values = [getattr(row, name) for row in self.rows]
        if len(set(values)) > 1:
            raise InputError(f"{name} differs among the rows of this batch ({values}). Read rows[b].{name} instead.")
        return values[0]

    @property
    def tokens_seen(self) -> int:
        """Raw tokens read so far (of each row; rows that differ: see `rows`)."""
        return self._common("tokens_seen")

    @property
    def num_sinks(self) -> int:
        """Sink entries held."""
        return self._common("num_sinks")

    @property
    def num_beacons(self) -> int:
        """Beacons held."""
        return self._common("num_beacons")

    @property
    def memory_length(self) -> int:
        """Entries before the tail."""
        return self._common("memory_length")

    @property
    def tail_length(self) -> int:
        """Raw tokens after the last closed chunk."""
        return self._common("tail_length")

    @property
    def cache_length(self) -> int:
        """Entries held now."""
        return self._common("cache_length")

    @property
    def ratios(self) -> tuple[int, ...]:
        """Ratio of each closed chunk, of the first row."""
        return tuple(chunk.ratio for chunk in self.rows[0].chunks)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values held, and of states."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes that keys and values of all tokens seen would take uncompressed, in the same dtype, and states.

        In a layer with a sliding window, of those tokens that the next one would see.
        """
        total = 0
        for layer in self.layers:
            if not layer.has_entries:
                total += layer.state.num_bytes
            elif layer.keys is not None and layer.values is not None:
                heads_and_dims = layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3])
                num_entries = sum(within(row.tokens_seen, layer.window) for row in self.rows)
                total += heads_and_dims * layer.keys.element_size() * num_entries
        return total

    def __str__(self) -> str:
        lines = [f"BeaconCache: {_row_text(row)}" for row in self.rows]
        held, full = self.cache_bytes, self.uncompressed_bytes
        is_smaller = 0 < held <= full  # of a short text, states may be more than what is saved
        saved = f", {bytes_text(full - held)} saved of {bytes_text(full)} ({full / held:.1f}x)" if is_smaller else ""
        return "\n".join([*lines, f"{bytes_text(held)} held{saved}"])

    def __repr__(self) -> str:
        return f"<{' / '.join(str(self).splitlines())}>"

    # --- transformers' side ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots held, as transformers counts."""
        layer = self.layers[layer_idx]
        return layer.get_seq_length() if layer.has_entries else self.slots_held

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows that beam search goes on with: `beam_idx` (B,)."""
        is_mixed = len(set(self.rows)) > 1
        if is_mixed:
            self._select_rows(beam_idx.tolist())
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        if is_mixed:
            self._trim()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._select_rows([row for row in range(self.batch_size) for _ in range(repeats)])
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        kept = torch.arange(self.batch_size, device="cpu")[indices.cpu()].tolist()
        self._select_rows(kept)
        self._select(lambda tensor: tensor[kept])
        self._trim()

    def _select_rows(self, indices: Sequence[int]) -> None:
        self.rows = tuple(self.rows[index] for index in indices)
        self.policies = tuple(self.policies[index] for index in indices)
        self.context_lengths = tuple(self.context_lengths[index] for index in indices)

    def _select(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.layers = [layer.map(change) for layer in self.layers]
        self.token_ids = change(self.token_ids)

    def _trim(self) -> None:
        """Drop slots and columns that no row is in need of, as when the longest row has gone."""
        self.layers = self._layers_for(self.rows, [self.slots_held] * self.batch_size)
        self.token_ids = self.token_ids[:, self.token_ids.shape[1] - max(row.tokens_seen for row in self.rows) :]

    def _layers_for(self, rows: Sequence[Row], ends: Sequence[int]) -> list[Any]:
        """The layers as these rows need them: all of their entries before the slots `ends`, those apart that a window has dropped.

        What one row is in need of, the others hold as well, and it may be anything: no less than that is dropped.
        """
        length = max(row.cache_length for row in rows)

        def of(layer: Any) -> Any:
            most = max(row.entries_within(layer.window) for row in rows)
            is_cut = layer.get_seq_length() == length and set(ends) == {length}
            return layer if is_cut and length - layer.dropped <= most else layer.taken(ends, length, most=most)

        return [of(layer) if layer.has_entries else layer for layer in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back; they must still be in the tail.

        Raises:
            UnsupportedError: if a row's tail is shorter than that: closed chunks cannot be opened again; and of recurrent layers.
            InputError: for a positive number, which has meant different things to different releases of transformers.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop takes a negative number, of tokens to take back; got {tokens_to_remove}. Use crop({-tokens_to_remove})."
            )
        count = -tokens_to_remove
        if count == 0:
            return
        if self.is_recurrent:
            raise UnsupportedError(
                f"crop({-count}) cannot take tokens back from recurrent layers, which carry states. Keep a fork() to go back to."
            )
        if count > min(row.tail_length for row in self.rows):
            raise UnsupportedError(f"crop({-count}) reaches into closed chunks. Keep a fork() to go back to.")
        self.truncate(self.num_slots - count)
        self.token_ids = self.token_ids[:, :-count]
        self.rows = tuple(row.after_reading(-count) for row in self.rows)

    def take_back(self, counts: Sequence[int]) -> None:
        """Take back so many tokens of each row; they must still be in its tail, and no layer be recurrent."""
        assert not self.is_recurrent, "states cannot be taken back"
        rows = tuple(row.after_reading(-count) for row, count in zip(self.rows, counts, strict=True))
        columns = [self.token_ids.shape[1] - count for count in counts]
        token_ids = take(self.token_ids, range(len(rows)), columns, max(row.tokens_seen for row in rows), dim=1)
        self.align(rows, [self.slots_held - count for count in counts])
        self.token_ids = token_ids

    def without_tail(self) -> "BeaconCache":
        """The context of one text as it was when its last chunk was closed; one that has read nothing where none has been."""
        row = self.rows[0]
        other = self._like(self.token_ids[:, : row.tokens_seen - row.tail_length])
        other.layers = [layer.at_chunk_end(row.memory_length) for layer in self.layers]
        other.rows = (row.after_reading(-row.tail_length),)
        return other

    def reset(self) -> None:
        """Refused: a new text needs a new cache."""
        raise UnsupportedError("A BeaconCache cannot be reset. Make a new one with model.compress.")

    def truncate(self, num_slots: int) -> None:
        """Drop the slots from `num_slots` on, as after a pass that failed."""
        for layer in self.layers:
            layer.truncate(num_slots)

    @contextlib.contextmanager
    def under(self, policies: tuple[RatioPolicy, ...]) -> Iterator[None]:
        """A reading under these policies, which the cache keeps; on an error it has its own again."""
        before, self.policies = self.policies, policies
        try:
            yield
        except BaseException:
            self.policies = before
            raise

    # --- the caller's side ---

    def fork(self) -> "BeaconCache":
        """A cache of its own that begins with the same contents; tensors are shared, nothing is copied."""
        other = self._like(self.token_ids)
        other.layers = [layer.copy() for layer in self.layers]
        return other

    def __copy__(self) -> "BeaconCache":
        """As `fork`: layers are appended to in place."""
        return self.fork()

    def compacted(self) -> "BeaconCache":
        """The same contents in memory of their own size, without room to grow, or a batch that they were cut from."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

        other = self._like(own(self.token_ids))
        other.layers = [layer.map(own) for layer in self.layers]
        return other

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "BeaconCache":
        """A cache on another device, or with another float dtype for what is dense (and for what is made dense)."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = self._like(self.token_ids)
        moved.layers = [layer.copy() if dtype is None else layer.with_dtype(dtype) for layer in self.layers]
        if device is not None:
            moved._select(lambda tensor: tensor.to(device))
        return moved

    def follow(self, devices: Sequence[torch.device]) -> None:
        """Move each layer in place to where the model has it, of several GPUs one or another.

        Args:
            devices: one for each layer; a layer that is held on another kind of device stays there.
        """
        layers = []
        for layer, device in zip(self.layers, devices, strict=True):
            held = next((tensor.device for _, tensor in layer.named_tensors()), device)
            is_elsewhere = held != device and held.type == device.type
            layers.append(layer.map(functools.partial(torch.Tensor.to, device=device)) if is_elsewhere else layer)
        self.layers = layers

    def quantize(self, bits: int = 8) -> "BeaconCache":
        """A cache that holds its sinks and beacons in 8 or 4 bits; the tail stays as it is.

        The entries are made dense again layer by layer when a pass needs them. Beacons that come later are quantised too. A batch
        whose rows come to differ in length is dense from then on.

        Raises:
            InputError: if `bits` is neither.
            UnsupportedError: for a ragged batch (quantise its rows before stacking: they are stacked dense).
        """
        if type(bits) is not int or bits not in BITS:
            raise InputError(f"bits must be 8 or 4; got {bits!r}. Use quantize(8), or 4 for half the bytes.")
        if self.is_ragged or len({row.memory_length for row in self.rows}) > 1:
            raise UnsupportedError("A ragged batch cannot be quantised. Quantise each context before stacking.")
        other = self._like(self.token_ids)
        length = self.rows[0].memory_length
        other.layers = [layer.copy() if layer.keys is None else layer.quantized(bits, length) for layer in self.layers]
        return other

    @property
    def quantized_bits(self) -> int | None:
        """Bits that the memory is held in; None where it is dense."""
        stored = next((layer.stored for layer in self.layers if layer.has_entries), None)
        return None if stored is None else stored[0].bits

    @classmethod
    def stack(cls, contexts: Sequence["BeaconCache"]) -> "BeaconCache":
        """Make one batch of several contexts; each row goes on as it would alone.

        Raises:
            MismatchError: if they come from different models, adapters or settings.
            InputError: if there are none.
        """
        if not contexts:
            raise InputError("stack needs at least one context; got none.")
        first = contexts[0]
        for context in contexts[1:]:
            first.check_same_origin(context)
        if any(context.num_slots == 0 for context in contexts):
            raise InputError("An empty context cannot be stacked. Compress a text into it first.")
        stacked = first._like(_stacked([context.token_ids for context in contexts]))
        for name in PER_ROW:
            setattr(stacked, name, tuple(value for context in contexts for value in getattr(context, name)))
        layers = zip(*(context.layers for context in contexts), strict=True)
        stacked.layers = [parts[0].stack(parts) for parts in layers]
        return stacked

    concatenate = stack

    def row(self, index: int) -> "BeaconCache":
        """One row of a batch as a context of its own."""
        if not -self.batch_size <= index < self.batch_size:
            raise InputError(f"There is no row {index} in a batch of {self.batch_size}.")
        index %= self.batch_size
        single = self._like(self.token_ids[index : index + 1])
        single._select_rows([index])
        single.layers = [layer.map(lambda t: t[index : index + 1]) for layer in self.layers]
        single._trim()
        return single

    def check_same_origin(self, other: "BeaconCache") -> None:
        """Refuse to mix contexts of different makers.

        Raises:
            MismatchError: naming what differs.
        """
        same = {
            "base model": is_same_fingerprint(self.base_fingerprint, other.base_fingerprint),
            "adapter": is_same_fingerprint(self.adapter_fingerprint, other.adapter_fingerprint),
            "settings": self.config.fingerprint_settings == other.config.fingerprint_settings,
            "local_tokens": self.config.local_tokens == other.config.local_tokens,
        }
        for what, is_same in same.items():
            if not is_same:
                raise MismatchError(f"Contexts of one batch must share their {what}; these differ. Compress both anew.")

    # --- files ---

    def save(self, path: str | Path) -> int:
        """Write the contexts as one file; see docs/file-formats.md.

        Returns:
            Bytes written.

        Raises:
            StorageError: if it cannot be written; an older file at `path` is left as it was.
        """
        return write_context_file(path, self._header(), self._tensors())

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "BeaconCache":
        """Read contexts that `save` wrote.

        Args:
            path: the file; it is opened by mmap and checked against its SHA-256.
            model: the model that is to use them: its fingerprints are compared, and the contexts go to its device and dtype.

        Raises:
            StorageError: if the file cannot be opened.
            FileFormatError: if it is damaged, cut short, or another kind of file; before anything of it is used.
            MismatchError: if another base model or adapter made it.
        """
        header, tensors = read_context_file(path)
        with _refused_as_a_whole(path):
            context = cls._of(ContextHeader.of(header), tensors)
        if model is None:
            return context
        try:
            placed: BeaconCache = model.placed(context)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from error
        return placed

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"token_ids": self.token_ids}
        for index, layer in enumerate(self.layers):
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.named_tensors()}
        return tensors

    def _header(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "base_fingerprint": self.base_fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
            "policy": dataclasses.asdict(self.policies[0]),
            **({"policies": list(map(dataclasses.asdict, self.policies))} if len(set(self.policies)) > 1 else {}),
            **({"context_lengths": self.context_lengths} if any(self.context_lengths) else {}),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "num_layers": len(self.layers),
            **({"num_states": list(self.num_states.items())} if self.num_states else {}),
            **({"windows": list(self.windows.items())} if self.windows else {}),
            "quantized_bits": self.quantized_bits,
        }

    @property
    def num_states(self) -> dict[int, int]:
        """Of each layer without keys and values, how many states of a kind it carries."""
        return {index: layer.number_of_states for index, layer in enumerate(self.layers) if not layer.has_entries}

    @property
    def windows(self) -> dict[int, int]:
        """The window of each layer that has one."""
        return {index: layer.window for index, layer in enumerate(self.layers) if layer.window is not None}

    @classmethod
    def _of(cls, header: ContextHeader, tensors: Mapping[str, torch.Tensor]) -> "BeaconCache":
        context = cls(
            header.config,
            num_layers=header.num_layers,
            num_states=header.num_states,
            base_fingerprint=header.base_fingerprint,
            adapter_fingerprint=header.adapter_fingerprint,
        )
        for name in PER_ROW:
            setattr(context, name, getattr(header, name))
        if "token_ids" not in tensors:
            raise FileFormatError("token_ids are missing")
        context.token_ids = tensors["token_ids"]
        for index in range(header.num_layers):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if index in header.num_states:
                context.layers[index] = StateLayer.of_named(own, header.num_states[index])
            else:
                context.layers[index] = BeaconLayer.of_named(
                    own, header.quantized_bits, window=header.windows.get(index), num_slots=context.num_slots
                )
        check_contents(context, len(tensors))
        return context

    # --- the forward's side ---

    def still_holds(self, row: Row) -> bool:
        """Whether one text can be taken back to where it held `row`: not if a layer with a window has dropped what was seen there."""
        return all(row.cache_length - layer.dropped >= row.entries_within(layer.window) for layer in self.layers)

    def stays_raw(self, num_new: int) -> bool:
        """Whether no beacons are held, nor will be when so many tokens have been read: beacon weights do not matter then."""
        longest = self.config.untouched_length - num_new
        return all(not row.chunks and row.tokens_seen <= longest for row in self.rows)

    def emptied(self) -> "BeaconCache":
        """A cache of the same makers and settings that has read nothing."""
        other = self._like(self.token_ids[:, :0])
        other.layers = [layer.emptied() for layer in self.layers]
        other.rows = tuple(Row(row.chunk_size) for row in self.rows)
        return other

    def _like(self, token_ids: torch.Tensor) -> "BeaconCache":
        """A cache of the same rows and makers, without layers yet."""
        other = BeaconCache(
            self.config,
            num_layers=0,
            batch_size=self.batch_size,
            base_fingerprint=self.base_fingerprint,
            adapter_fingerprint=self.adapter_fingerprint,
        )
        for name in PER_ROW:
            setattr(other, name, getattr(self, name))
        other.token_ids = token_ids
        return other

    def adopt(self, other: "BeaconCache") -> None:
        """Become what `other` is, all at once."""
        self.recorded = None
        for name in ("layers", "token_ids", *PER_ROW):
            setattr(self, name, getattr(other, name))

    def align(self, rows: Sequence[Row], ends: Sequence[int]) -> None:
        """Become `rows`, whose last entries stand before the slots `ends`."""
        self.layers = self._layers_for(rows, ends)
        self.rows = tuple(rows)

    def memory_ends(self, rows: Sequence[int]) -> list[int]:
        """Slot after the memory of each of `rows`."""
        slots = self.slots_held
        return [slots - self.rows[row].tail_length for row in rows]


def _stacked(ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids (B, N) of several batches as those of one, rows aligned at the right."""
    starts = itertools.accumulate((each.shape[0] for each in ids), initial=0)
    return merge([(range(start, start + each.shape[0]), each) for start, each in zip(starts, ids, strict=False)], dim=1)


@contextlib.contextmanager
def _refused_as_a_whole(path: str | Path) -> Iterator[None]:
    """Turns what is wrong with a part of a file into an error that names the file."""
    try:
        yield
    except (BeaconError, KeyError, TypeError, ValueError, IndexError) as error:
        raise FileFormatError(
            f"{path} has a header that does not fit its contents ({reason(error)}). Compress the text again."
        ) from error


def _row_text(row: Row) -> str:
    ratios = sorted({chunk.ratio for chunk in row.chunks})
    ratio_text = f" (x{', x'.join(map(str, ratios))})" if ratios else ""
    num_raw = row.memory_length - row.num_sinks - row.num_beacons
    raw_text = f" | {num_raw:,} kept raw" if num_raw else ""
    return (
        f"{row.tokens_seen:,} tokens seen | {row.num_sinks} sinks | {row.num_beacons:,} beacons{ratio_text}{raw_text} | "
        f"{row.tail_length:,} in the tail"
    )
