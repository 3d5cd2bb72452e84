"""What to read and what to keep, decided in integers: ratio policies, chunk layouts, reading plans.

Knows nothing of torch. The semantics are those of section 3 of the paper: a text falls into chunks, a full chunk is read
with one beacon after each unit of `ratio` raw tokens, and afterwards only the beacons are held.
"""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from activation_beacon.config import BeaconConfig, Placement
from activation_beacon.errors import CapacityError, RatioError

Ratio = int | Sequence[int] | Literal["auto"]

# Slots of all texts that several chunks may have in one pass. On two cores more are no faster for each slot; a GPU waits for
# Python where they are few.
ROWS_TOGETHER = 1024
ROWS_TOGETHER_ON_CUDA = 8192  # not measured


class Span(NamedTuple):
    """Tokens `start..stop-1` of a text that deserve better: their chunks get at most `ratio`; None keeps them raw."""

    start: int
    stop: int
    ratio: int | None


class RawRun(NamedTuple):
    """Tokens `start..stop-1` of a chunk, counted from the chunk's first, that are kept raw beside its beacons."""

    start: int
    stop: int


@dataclass(frozen=True)
class RatioPolicy:
    """How a text's chunks get their compression ratios.

    Args:
        ratio: one ratio for all chunks; one for each chunk of the text (the last goes on for what is decoded later); or
            "auto", the smallest ratio of the adapter with which the text fits.
        budget: cache entries that the text may hold at most; needs "auto".
        spans: parts of the text that are kept raw or at a lower ratio.
    """

    ratio: int | tuple[int, ...] | Literal["auto"] = "auto"
    budget: int | None = None
    spans: tuple[Span, ...] = ()


def as_policy(
    config: BeaconConfig,
    ratio: Ratio = "auto",
    *,
    budget: int | None = None,
    spans: Sequence[Sequence[int | None]] = (),
) -> RatioPolicy:
    """Check what a caller asked for against the adapter.

    Raises:
        RatioError: if a ratio is not among the adapter's, the budget is too small to hold a chunk, or a span is empty.
    """
    if isinstance(ratio, str):
        if ratio != "auto":
            raise RatioError(f'ratio must be an int, a sequence of ints, or "auto"; got {ratio!r}.')
        checked: int | tuple[int, ...] | Literal["auto"] = "auto"
    elif hasattr(ratio, "__iter__"):
        values = ratio.tolist() if hasattr(ratio, "tolist") else list(ratio)
        is_scalar = not isinstance(values, list)  # a tensor of no dimension
        checked = check_ratio(config, values) if is_scalar else tuple(check_ratio(config, value) for value in values)
    else:
        checked = check_ratio(config, ratio)
    return RatioPolicy(checked, _check_budget(config, budget, checked), tuple(_check_span(config, s) for s in spans))


def revised(
    config: BeaconConfig,
    policy: RatioPolicy,
    *,
    ratio: Ratio | None = None,
    budget: int | None = None,
    spans: Sequence[Sequence[int | None]] = (),
) -> RatioPolicy:
    """A policy with what a caller names in place of what it says; spans are added to those that it has.

    A budget asks for "auto", and a ratio of its own ends it.

    Raises:
        RatioError: as `as_policy`.
    """
    if ratio is None:
        ratio = policy.ratio if budget is None else "auto"
    if budget is None and isinstance(ratio, str):
        budget = policy.budget
    new = [span for span in map(tuple, spans) if span not in policy.spans]
    return as_policy(config, ratio, budget=budget, spans=(*policy.spans, *new))


def check_ratio(config: BeaconConfig, ratio: Any) -> int:
    """One of the adapter's ratios, as an int.

    Raises:
        RatioError: if it is something else; the message lists the adapter's ratios.
    """
    known = ", ".join(map(str, config.ratios))
    if isinstance(ratio, list | tuple):
        raise RatioError(
            f"ratio names one for each chunk of a text, and the same ones for each text of a batch; got {ratio!r} among them. "
            "For ratios of their own compress texts one by one, and join them with BeaconCache.stack."
        )
    if isinstance(ratio, bool) or not hasattr(ratio, "__index__"):
        raise RatioError(
            f"A compression ratio is an int of at least 2 (raw tokens per beacon); got {ratio!r}. Use {known}."
        )
    ratio = operator.index(ratio)
    if ratio < 2:
        raise RatioError(
            f"A compression ratio is an int of at least 2 (raw tokens per beacon); got {ratio}. Use {known}."
        )
    if ratio > config.chunk_size:
        raise RatioError(f"ratio ({ratio}) must not exceed chunk_size ({config.chunk_size}). Use {known}.")
    if config.chunk_size % ratio:
        raise RatioError(f"ratio ({ratio}) must divide chunk_size ({config.chunk_size}). Use {known}.")
    if ratio not in config.ratios:
        raise RatioError(f"ratio ({ratio}) is not one that this adapter knows. Use {known}.")
    return ratio


def _chunks(count: int) -> str:
    return f"{count} chunk" if count == 1 else f"{count} chunks"


def _check_budget(config: BeaconConfig, budget: int | None, ratio: object) -> int | None:
    if budget is None:
        return None
    if ratio != "auto":
        raise RatioError(f'A budget ({budget}) chooses the ratio by itself and needs ratio="auto"; got {ratio!r}.')
    num_beacons, tail = config.num_beacons(config.ratios[-1]), config.untouched_length
    least = config.num_sinks + tail + num_beacons
    number = _as_int(budget)
    if number is None or number < least:
        raise RatioError(
            f"budget must be at least {least} cache entries ({config.num_sinks} sinks, {tail} raw tokens, {num_beacons} beacons "
            f"of one chunk at ratio {config.ratios[-1]}); got {budget!r}."
        )
    return number


def _check_span(config: BeaconConfig, span: Sequence[int | None]) -> Span:
    if len(span) != 3:
        raise RatioError(f"A span is (start, stop, ratio), with None for ratio to keep it raw; got {tuple(span)!r}.")
    start, stop, ratio = span
    first, end = _as_int(start), _as_int(stop)
    if first is None or end is None or not 0 <= first < end:
        raise RatioError(f"A span needs 0 <= start < stop, counted in tokens of the text; got {start!r}, {stop!r}.")
    return Span(first, end, None if ratio is None else check_ratio(config, ratio))


def _is_raw(start: int, stop: int, spans: Sequence[Span]) -> bool:
    """Whether spans keep all tokens `start..stop-1` raw."""
    for span in sorted(span for span in spans if span.ratio is None):
        if span.start <= start:
            start = max(start, span.stop)
    return start >= stop


def _as_int(value: Any) -> int | None:
    """Any kind of integer as Python's; None for what is none."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None


# --- one chunk -------------------------------------------------------------------------------------------------------


class ClosedChunk(NamedTuple):
    """What a closed chunk left behind."""

    ratio: int
    num_beacons: int
    num_raw: int


@dataclass(frozen=True)
class ChunkLayout:
    """Where a chunk's raw tokens and beacons stand in the pass that reads it, and what is kept of it.

    Slots count from the chunk's first; positions of the held entries count from the memory's end, so that slot and target
    share an origin and a key is moved by `shifts`.
    """

    ratio: int
    num_slots: int
    raw_slots: tuple[int, ...]  # slot of each raw token
    beacon_slots: tuple[int, ...]  # slot of each beacon
    anchor_slots: tuple[int, ...]  # slot of the last token that each beacon stands for
    kept_slots: tuple[int, ...]  # sinks first (chunk 1 only), then beacons and raw runs in the order of the text
    num_sinks: int
    num_beacons: int  # beacons among the kept
    num_raw: int  # tokens of raw runs among the kept
    has_raw_runs: bool  # also where all of them are sinks

    @property
    def closed(self) -> ClosedChunk:
        """What the chunk leaves behind, in numbers."""
        return ClosedChunk(self.ratio, self.num_beacons, self.num_raw)

    @functools.cached_property
    def token_of_slot(self) -> tuple[int, ...]:
        """For each slot the token that stands there; any for a beacon's."""
        tokens = dict(zip(self.raw_slots, itertools.count()))
        return tuple(tokens.get(slot, 0) for slot in range(self.num_slots))

    @functools.cached_property
    def beacon_mask(self) -> tuple[bool, ...]:
        """For each slot, whether a beacon stands there."""
        raw = set(self.raw_slots)
        return tuple(slot not in raw for slot in range(self.num_slots))

    @functools.cached_property
    def shifts(self) -> tuple[int, ...]:
        """For each kept entry, the position it is moved to less the one it was read at."""
        return tuple(target - slot for target, slot in enumerate(self.kept_slots))


def chunks_closed(num_tokens: int, chunk_size: int, local_tokens: int = 0) -> int:
    """Chunks that are closed once so many tokens have been read (lazily: the last full chunk stays raw)."""
    return max(0, (num_tokens - 1 - local_tokens) // chunk_size)


def within(length: int, window: int | None) -> int:
    """Of so many entries, those that the next token sees in a layer with a sliding window of `window`, its own entry included."""
    return length if window is None else min(length, window - 1)


def entries_held(config: BeaconConfig, num_tokens: int, ratio: int, window: int | None = None) -> int:
    """Cache entries that a layer holds after so many tokens, read at one ratio: sinks and beacons in its window, and the tail."""
    closed = chunks_closed(num_tokens, config.chunk_size, config.local_tokens)
    memory = closed * config.num_beacons(ratio) + (config.num_sinks if closed else 0)
    return within(memory, window) + num_tokens - closed * config.chunk_size


@functools.lru_cache(maxsize=1024)
def chunk_layout(
    chunk_size: int, ratio: int, placement: Placement, num_sinks: int = 0, raw_runs: tuple[RawRun, ...] = ()
) -> ChunkLayout:
    """Lay out one chunk (section 3.1: interleaved; "append" is the paper's ablation, and what exact beacons need)."""
    units = chunk_size // ratio
    if placement == "append":
        raw_slots = tuple(range(chunk_size))
        beacon_slots = tuple(range(chunk_size, chunk_size + units))
    else:
        raw_slots = tuple(token + token // ratio for token in range(chunk_size))
        beacon_slots = tuple(unit * (ratio + 1) + ratio for unit in range(units))
    raw_tokens = {token for run in raw_runs for token in range(run.start, run.stop)}
    beacons = [
        slot
        for unit, slot in enumerate(beacon_slots)
        if not raw_tokens.issuperset(range(unit * ratio, (unit + 1) * ratio))
    ]
    kept_raw = [raw_slots[token] for token in sorted(raw_tokens) if token >= num_sinks]
    return ChunkLayout(
        ratio=ratio,
        num_slots=chunk_size + units,
        raw_slots=raw_slots,
        beacon_slots=beacon_slots,
        anchor_slots=raw_slots[ratio - 1 :: ratio],
        kept_slots=(*raw_slots[:num_sinks], *sorted(beacons + kept_raw)),
        num_sinks=num_sinks,
        num_beacons=len(beacons),
        num_raw=len(kept_raw),
        has_raw_runs=bool(raw_runs),
    )


@dataclass(frozen=True)
class GroupLayout:
    """Chunks of a text in one pass, their layouts laid end to end.

    Slots count from the first chunk's first, entries and positions from the end of the memory before it.
    """

    layouts: tuple[ChunkLayout, ...]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each chunk."""
        return tuple(layout.num_slots for layout in self.layouts)

    @functools.cached_property
    def first_slots(self) -> tuple[int, ...]:
        """First slot of each chunk, and at the end the number of all slots."""
        return (0, *itertools.accumulate(self.sizes))

    @functools.cached_property
    def num_kept(self) -> tuple[int, ...]:
        """Entries kept of the chunks before each, and at the end of all."""
        return (0, *itertools.accumulate(len(layout.kept_slots) for layout in self.layouts))

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """Position of each slot."""
        spans = zip(self.num_kept, self.sizes, strict=False)
        return tuple(position for held, size in spans for position in range(held, held + size))

    @functools.cached_property
    def raw_slots(self) -> tuple[int, ...]:
        """Slot of each raw token."""
        return self._slots("raw_slots")

    @functools.cached_property
    def beacon_slots(self) -> tuple[int, ...]:
        """Slot of each beacon."""
        return self._slots("beacon_slots")

    @functools.cached_property
    def kept_slots(self) -> tuple[int, ...]:
        """Slots whose entries are kept, in the order in which they are held."""
        return self._slots("kept_slots")

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Of each chunk whose beacons stand at its end, its tokens and its beacons."""
        return tuple((len(layout.raw_slots), len(layout.beacon_slots)) for layout in self.layouts)

    @functools.cached_property
    def shifts(self) -> tuple[int, ...]:
        """For each kept entry, the position it is moved to less the one it was read at."""
        return tuple(shift for layout in self.layouts for shift in layout.shifts)

    def _slots(self, name: str) -> tuple[int, ...]:
        starts = zip(self.first_slots, self.layouts, strict=False)
        return tuple(first + slot for first, layout in starts for slot in getattr(layout, name))


# --- one text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One text as far as it has been read: what its cache holds, in numbers. Part of a batch's row, hence the name."""

    chunk_size: int
    tokens_seen: int = 0
    num_sinks: int = 0
    chunks: tuple[ClosedChunk, ...] = ()

    @functools.cached_property
    def num_beacons(self) -> int:
        """Beacons held."""
        return sum(chunk.num_beacons for chunk in self.chunks)

    @functools.cached_property
    def memory_length(self) -> int:
        """Entries before the tail: sinks, beacons, and tokens kept raw among them."""
        return self.num_sinks + sum(chunk.num_beacons + chunk.num_raw for chunk in self.chunks)

    @property
    def tail_length(self) -> int:
        """Raw tokens after the last closed chunk."""
        return self.tokens_seen - len(self.chunks) * self.chunk_size

    @property
    def cache_length(self) -> int:
        """Entries held now; also the position of the next token."""
        return self.memory_length + self.tail_length

    def entries_within(self, window: int | None) -> int:
        """Entries that a layer with this window has to hold: of the memory those that a token behind it sees, and all of the tail."""
        return within(self.memory_length, window) + self.tail_length

    def at_token(self, num_tokens: int) -> "Row":
        """The row as it was with its first tokens, up to a chunk's end or to a token of the tail."""
        chunks = self.chunks[: num_tokens // self.chunk_size]
        return Row(self.chunk_size, num_tokens, self.num_sinks if chunks else 0, chunks)

    def after_closing(self, layout: ChunkLayout) -> "Row":
        """The row once its next chunk has been closed and what stood after it is unread."""
        chunks = (*self.chunks, layout.closed)
        return Row(self.chunk_size, len(chunks) * self.chunk_size, self.num_sinks + layout.num_sinks, chunks)

    def after_reading(self, num_tokens: int) -> "Row":
        """The row once `num_tokens` more have been read raw."""
        return Row(self.chunk_size, self.tokens_seen + num_tokens, self.num_sinks, self.chunks)


@dataclass(frozen=True)
class RowReading:
    """How one text is read on: start anew or not, chunks to close in order, and then the tail from `raw_start`."""

    restart: bool
    closings: tuple[ChunkLayout, ...]
    raw_start: int
    stop: int


class TextPlanner:
    """Plans the reading of texts under one configuration and policy.

    Args:
        config: the adapter's settings.
        policy: the ratios asked for.
        max_positions: positions of the base model; None where it has no limit.
    """

    def __init__(self, config: BeaconConfig, policy: RatioPolicy, max_positions: int | None) -> None:
        self.config = config
        self.policy = policy
        self.max_positions = max_positions

    def num_closed(self, num_tokens: int) -> int:
        """Chunks that are closed once `num_tokens` have been read."""
        return chunks_closed(num_tokens, self.config.chunk_size, self.config.local_tokens)

    def plan(self, row: Row, num_new: int) -> RowReading:
        """Plan the reading of `num_new` more tokens.

        Raises:
            RatioError: if the policy names fewer ratios than chunks have to be closed.
            CapacityError: if the cache would need more positions than the base model has.
        """
        stop = row.tokens_seen + num_new
        num_closed = self.num_closed(stop) if num_new else len(row.chunks)
        is_due = num_closed > len(row.chunks)  # fewer than are closed where a tail of local tokens was cropped
        if not is_due and not self._outgrows(row.cache_length + num_new):
            self._check_tail(row, row.cache_length + num_new, stop)
            return RowReading(False, (), row.tokens_seen, stop)
        layouts = self.layouts(stop)
        held = tuple(layout.closed for layout in layouts[: len(row.chunks)])
        restart = self.policy.ratio == "auto" and held != row.chunks
        done = 0 if restart else len(row.chunks)
        self._check_closings(Row(row.chunk_size) if restart else row, layouts[done:], stop)
        return RowReading(restart, tuple(layouts[done:]), num_closed * self.config.chunk_size, stop)

    def _outgrows(self, num_entries: int) -> bool:
        """Whether "auto" has to choose again though no chunk is due: earlier chunks got their ratios otherwise."""
        return self.policy.ratio == "auto" and any(num_entries > limit for limit in self._limits)

    def layouts(self, num_tokens: int) -> list[ChunkLayout]:
        """The layout of every chunk that is closed once `num_tokens` have been read."""
        num_closed = self.num_closed(num_tokens)
        self._check_some_ratio_fits(num_closed, num_tokens)
        ratio = self.policy.ratio
        if ratio == "auto":
            return self._layouts_that_fit(num_closed, num_tokens)
        if isinstance(ratio, tuple):
            if num_closed and not ratio:
                raise RatioError(f"ratio names no chunk, but the text of {num_tokens:,} tokens closes {num_closed}.")
            ratios: list[int] = [ratio[min(index, len(ratio) - 1)] for index in range(num_closed)]
        else:
            ratios = [ratio] * num_closed
        return [self._layout(index, chunk_ratio) for index, chunk_ratio in enumerate(ratios)]

    def check_names_every_chunk(self, num_tokens: int) -> None:
        """Refuse a sequence of ratios that is shorter than the chunks that a text of `num_tokens` closes.

        Raises:
            RatioError: with both numbers.
        """
        needed, ratio = self.num_closed(num_tokens), self.policy.ratio
        if isinstance(ratio, tuple) and len(ratio) < needed:
            raise RatioError(
                f"ratio names {_chunks(len(ratio))}, but the text of {num_tokens:,} tokens closes {needed}. "
                "Give one ratio for each chunk of the whole text, or one int for all."
            )

    def check_are_ahead(self, row: Row, held: Sequence[Span]) -> None:
        """Refuse spans that ask for more of a closed chunk than it holds, unless "auto" reads the text anew.

        Args:
            row: what has been read.
            held: the spans that it was read under.

        Raises:
            RatioError: naming the chunk's tokens.
        """
        size = self.config.chunk_size
        late = [span for span in self.policy.spans if span not in held and self.policy.ratio != "auto"]
        for span in late:
            for index, chunk in enumerate(row.chunks[: (span.stop - 1) // size + 1]):
                start, stop = max(span.start, index * size), min(span.stop, (index + 1) * size)
                is_kept = (span.ratio is not None and chunk.ratio <= span.ratio) or _is_raw(start, stop, held)
                if start < stop and not is_kept:
                    raise RatioError(
                        f"The span {tuple(span)} comes too late: tokens {index * size:,} to {(index + 1) * size - 1:,} have been "
                        f'compressed at ratio {chunk.ratio}. Name it when they are read, or go on with ratio "auto".'
                    )

    def _check_some_ratio_fits(self, num_closed: int, num_tokens: int) -> None:
        """Refuse what no ratio can hold before a layout is made for each of its chunks: a limit on an answer may be any number."""
        config = self.config
        least = num_closed * config.num_beacons(config.ratios[-1])
        if any(least > limit for limit in self._limits):
            tail = config.untouched_length
            raise self._beyond_all_ratios(num_tokens, config.num_sinks + least + tail)

    def _layouts_that_fit(self, num_closed: int, num_tokens: int) -> list[ChunkLayout]:
        for ratio in self.config.ratios:
            layouts = [self._layout(index, ratio) for index in range(num_closed)]
            if self._fits(layouts):
                return layouts
        raise self._beyond_all_ratios(num_tokens, self._entries(layouts))

    def _beyond_all_ratios(self, num_tokens: int, num_entries: int) -> CapacityError:
        ratio = self.config.ratios[-1]
        return CapacityError(
            f"A text of {num_tokens:,} tokens needs {num_entries:,} cache entries at ratio {ratio}, the largest that "
            f"this adapter knows; {self._limit_text()}. Read at most {self._longest_text(ratio):,} tokens."
        )

    @property
    def _limits(self) -> list[int]:
        """What entries are bounded by, if by anything."""
        return [limit for limit in (self.policy.budget, self.max_positions) if limit is not None]

    def _fits(self, layouts: Sequence[ChunkLayout]) -> bool:
        return self._has_room(self._held(layouts[:-1]), layouts[-1] if layouts else None)

    def _has_room(self, held_before: int, last: ChunkLayout | None) -> bool:
        """Whether a text fits of whose chunks all but the last leave so many entries."""
        tail = self.config.untouched_length  # at its longest
        entries = held_before + (len(last.kept_slots) if last else 0) + tail
        positions = max(entries, held_before + (last.num_slots if last else 0))  # the pass that closes the last chunk
        budget_ok = self.policy.budget is None or entries <= self.policy.budget
        return budget_ok and (self.max_positions is None or positions <= self.max_positions)

    def _entries(self, layouts: Sequence[ChunkLayout]) -> int:
        """Entries held at most, with the tail at its longest."""
        return self._held(layouts) + self.config.untouched_length

    def _held(self, layouts: Sequence[ChunkLayout]) -> int:
        return sum(len(layout.kept_slots) for layout in layouts)

    def _layout(self, index: int, ratio: int) -> ChunkLayout:
        start, size = index * self.config.chunk_size, self.config.chunk_size
        runs = []
        for span in self.policy.spans:
            begin, end = max(span.start - start, 0), min(span.stop - start, size)
            if begin < end and span.ratio is None:
                runs.append(RawRun(begin, end))
            elif begin < end and span.ratio is not None:
                ratio = min(ratio, span.ratio)
        num_sinks = self.config.num_sinks if index == 0 else 0
        return chunk_layout(size, ratio, self.config.placement, num_sinks, tuple(runs))

    def _check_closings(self, row: Row, layouts: Sequence[ChunkLayout], stop: int) -> None:
        if self.max_positions is None:
            return
        held, needed = row.memory_length, 0
        for layout in layouts:
            needed = max(needed, held + layout.num_slots)
            held += len(layout.kept_slots)
        num_closed = len(row.chunks) + len(layouts)
        tail = stop - num_closed * self.config.chunk_size
        self._check_tail(row, max(needed, held + tail), stop)

    def _check_tail(self, row: Row, num_positions: int, num_tokens: int) -> None:
        if self.max_positions is not None and num_positions > self.max_positions:
            raise self._too_long(row, num_positions, num_tokens)

    def _too_long(self, row: Row, num_positions: int, num_tokens: int) -> CapacityError:
        text = f"A text of {num_tokens:,} tokens needs {num_positions:,} positions at ratio {self._ratio_text()}"
        num_closed = self.num_closed(num_tokens)
        for ratio in self.config.ratios:
            if self._fits([self._layout(index, ratio) for index in range(num_closed)]):
                way = (
                    f'Compress it anew at ratio {ratio}, or go on with ratio "auto"'
                    if row.chunks
                    else f"Use ratio {ratio}"
                )
                return CapacityError(f"{text}; {self._limit_text()}. {way}.")
        longest = self._longest_text(self.config.ratios[-1])
        return CapacityError(
            f"{text}; {self._limit_text()}. No ratio fits: read at most {longest:,} tokens at the largest."
        )

    def _ratio_text(self) -> str:
        ratio = self.policy.ratio
        return ",".join(map(str, ratio)) if isinstance(ratio, tuple) else str(ratio)

    def _limit_text(self) -> str:
        if self.policy.budget is not None and (self.max_positions is None or self.policy.budget <= self.max_positions):
            return f"the budget is {self.policy.budget:,}"
        return f"the base model has {self.max_positions:,}"

    def _longest_text(self, ratio: int) -> int:
        held = 0
        for index in itertools.count():
            layout = self._layout(index, ratio)
            if not self._has_room(held, layout):
                return index * self.config.chunk_size + self.config.untouched_length
            held += len(layout.kept_slots)
        raise AssertionError("unreachable: a limit exists where this is asked")


# --- a batch ---------------------------------------------------------------------------------------------------------


def closing_rounds(readings: Sequence[RowReading]) -> Iterator[tuple[tuple[int, ...], ChunkLayout]]:
    """Order the chunks of a batch into passes: each row's chunks in turn, rows of one layout together.

    Yields:
        The rows of a pass and the layout that they share.
    """
    for number in range(max((len(reading.closings) for reading in readings), default=0)):
        groups: dict[ChunkLayout, list[int]] = {}
        for row, reading in enumerate(readings):
            if number < len(reading.closings):
                groups.setdefault(reading.closings[number], []).append(row)
        for layout, rows in groups.items():
            yield tuple(rows), layout
