"""What to read and what to keep of a text, decided in integers before anything is read.

Knows nothing of torch. The semantics are those of section 3 of the paper: a text falls into chunks, each of which is closed when
the first token behind it is read, and afterwards only its beacons are held.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import CapacityError, RatioError
from activation_beacon.layouts import ChunkLayout, ClosedChunk, RawRun, chunk_layout, chunks_closed, within
from activation_beacon.ratios import RatioPolicy, Span, is_raw


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

    def check_grows(self, row: Row, num_prompt: int, num_more: int) -> None:
        """Refuse a text that would have to break off as it is read on, token by token after the first `num_prompt`.

        It holds most at its end, or right before a chunk is closed: with local tokens a tail is longer there than a chunk and its
        beacons, which is as much as is held while one is closed.

        Raises:
            RatioError, CapacityError: as `plan`.
        """
        stop = row.tokens_seen + num_prompt + num_more
        last = stop - (stop - self.config.local_tokens) % self.config.chunk_size - row.tokens_seen
        self.plan(row, num_prompt + num_more)
        if num_prompt < last:
            self.plan(row, last)

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
                is_kept = (span.ratio is not None and chunk.ratio <= span.ratio) or is_raw(start, stop, held)
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
            f"this adapter knows; {self._limit_text()}. Read at most {self.longest_text(ratio):,} tokens."
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
        longest = self.longest_text(self.config.ratios[-1])
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

    def longest_text(self, ratio: int) -> int:
        """Tokens of the longest text that fits at a ratio of the adapter; call it where there is a limit."""
        held = 0
        for index in itertools.count():
            layout = self._layout(index, ratio)
            if not self._has_room(held, layout):
                return index * self.config.chunk_size + self.config.untouched_length
            held += len(layout.kept_slots)
        raise AssertionError("unreachable: a limit exists where this is asked")


def _chunks(count: int) -> str:
    return f"{count} chunk" if count == 1 else f"{count} chunks"


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
