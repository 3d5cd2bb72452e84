"""Which tokens a chunk's beacons begin as: evenly spread ones, and numbers and codes token by token.

Knows nothing of torch. Numbers, dates, codes and identifiers are what a blurred memory is of no use for, and what a text
does not foretell. So the tokens of them, and their neighbours, get a beacon each, up to half of a chunk's beacons.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

REACH = 2  # tokens beside an exact one that are held too: "9f" between digits, and "is" before a number
SHARE = 2  # of a chunk's beacons at most one in so many is for exact tokens


def digit_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a tokenizer's tokens that hold a digit, in order; special tokens and single bytes ("<0x0A>") are none.

    Args:
        tokenizer: as in transformers.
    """
    special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    return tuple(
        sorted(
            index
            for token, index in tokenizer.get_vocab().items()
            if index not in special and not token.startswith("<0x") and any(char.isdecimal() for char in token)
        )
    )


def anchor_tokens(ids: Sequence[int], num_beacons: int, exact: Collection[int]) -> tuple[int, ...]:
    """For each beacon of a chunk, in order, the token that it begins as, counted from the chunk's first.

    Without exact tokens these are the last ones of even units. Runs of exact tokens and their neighbours are held whole or
    not at all; where all of them are more than half of the beacons, as many as fit are taken, spread over the chunk.

    Args:
        ids: of the chunk's tokens.
        num_beacons: at most as many.
        exact: ids of the tokens to be exact about.
    """
    held = [
        token for start, stop in _spread(list(_runs(ids, exact)), num_beacons // SHARE) for token in range(start, stop)
    ]
    is_held = set(held)
    others = [token for token in range(len(ids)) if token not in is_held]
    rest = num_beacons - len(held)
    return tuple(sorted(held + [others[(number + 1) * len(others) // rest - 1] for number in range(rest)]))


def _runs(ids: Sequence[int], exact: Collection[int]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of tokens that are exact or within reach of one."""
    start = stop = None
    for place, token in enumerate(ids):
        if token not in exact:
            continue
        if stop is not None and place - REACH <= stop:
            stop = place + REACH + 1
            continue
        if start is not None and stop is not None:
            yield start, stop
        start, stop = max(0, place - REACH), place + REACH + 1
    if start is not None and stop is not None:
        yield start, min(stop, len(ids))


def _spread(runs: Sequence[tuple[int, int]], room: int) -> Iterator[tuple[int, int]]:
    """As many of the runs as have `room` together, spread evenly where that is not all."""
    total = sum(stop - start for start, stop in runs)
    credit, left = 0, room
    for start, stop in runs:
        credit += min(room, total) * (stop - start)
        if stop - start <= left and credit >= (stop - start) * total:
            yield start, stop
            left -= stop - start
            credit -= (stop - start) * total
