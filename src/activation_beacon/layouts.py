"""Where the tokens and beacons of a chunk stand in the pass that reads it, and what is kept of it. Integers, no torch.

Section 3 of the paper: a full chunk is read with one beacon after each unit of `ratio` raw tokens (here also with all of them behind
the chunk), and afterwards only the beacons are held.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from activation_beacon.config import BeaconConfig, Placement

# Slots of all texts that several chunks may have in one pass. On two cores more are no faster for each slot; a GPU waits for
# Python where they are few.
ROWS_TOGETHER = 1024
ROWS_TOGETHER_ON_CUDA = 8192  # not measured


class RawRun(NamedTuple):
    """Tokens `start..stop-1` of a chunk, counted from the chunk's first, that are kept raw beside its beacons."""

    start: int
    stop: int


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
