"""Which tokens a chunk's beacons begin as: evenly spread ones, and numbers and codes token by token.

Knows nothing of torch. Numbers, dates, codes and identifiers are useless when blurred, and cannot be guessed from the rest of
the text. So their tokens, and the ones beside them, get a beacon each, up to half of a chunk's beacons.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import ConfigError

REACH = 2  # tokens beside an exact one that are held too: "9f" between digits, and "is" before a number
SHARE = 2  # of a chunk's beacons at most one in so many is for exact tokens


def digit_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a tokenizer's tokens that hold a decimal digit, in order; special tokens and single bytes ("<0x0A>") are none.

    Digits that a tokenizer spells in bytes, as many do those that are not ASCII, are not found.

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


def with_digits(config: BeaconConfig, tokenizer: Any) -> BeaconConfig:
    """The configuration, with ids in the place of `exact_ids="digits"`.

    Raises:
        ConfigError: if the tokenizer has no digits.
    """
    if config.exact_ids != "digits":
        return config
    ids = digit_ids(tokenizer)
    if not ids:
        raise ConfigError(
            'exact_ids ("digits") finds none: no token of the tokenizer holds a digit. Name the ids, or none.'
        )
    return dataclasses.replace(config, exact_ids=ids)


def anchor_tokens(ids: Sequence[int], num_beacons: int, exact: Collection[int]) -> tuple[int, ...]:
    """For each beacon of a chunk, in order, the token that it begins as, counted from the chunk's first.

    Without exact tokens these are the last ones of even units. Runs of exact tokens and their neighbours are held whole or
    not at all; where all of them are more than half of the beacons, as many as fit are taken, spread over the chunk. A run that
    is longer than that by itself is read like any text.

    Args:
        ids: of the chunk's tokens.
        num_beacons: as many are chosen.
        exact: ids of the tokens to be exact about.
    """
    runs = _spread(list(_runs(ids, exact)), num_beacons // SHARE)
    held = [token for start, stop in runs for token in range(start, stop)]
    is_held = set(held)
    others = [token for token in range(len(ids)) if token not in is_held]
    rest = num_beacons - len(held)
    return tuple(sorted(held + [others[(number + 1) * len(others) // rest - 1] for number in range(rest)]))


def _runs(ids: Sequence[int], exact: Collection[int]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of tokens that are exact or within reach of one."""
    start = stop = -1
    for place, token in enumerate(ids):
        if token not in exact:
            continue
        if stop < 0 or place - REACH > stop:
            if stop > 0:
                yield start, stop
            start = max(0, place - REACH)
        stop = place + REACH + 1
    if stop > 0:
        yield start, min(stop, len(ids))


def _spread(runs: Sequence[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """As many of the runs as have `room` together: where that is not all, evenly spread ones, then whichever still fit."""
    runs = [(start, stop) for start, stop in runs if stop - start <= room]
    total = sum(stop - start for start, stop in runs)
    if total <= room:
        return list(runs)
    chosen, credit, left = [], 0, room
    for start, stop in runs:
        credit += room * (stop - start)
        if credit >= total * (stop - start) and stop - start <= left:
            chosen.append((start, stop))
            credit -= total * (stop - start)
            left -= stop - start
    for start, stop in runs:
        if (start, stop) not in chosen and stop - start <= left:
            chosen.append((start, stop))
            left -= stop - start
    return chosen
