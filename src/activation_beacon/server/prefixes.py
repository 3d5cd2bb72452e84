"""What of a text need not be read again: a cache that was kept, cut back to what a new text has in common with it."""

from collections.abc import Sequence

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.plan import Row, TextPlanner


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Ids (N,) that two texts have in common at their beginning."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0, 0]) if len(differs) else length


def reusable_length(cache: BeaconCache, ids: torch.Tensor) -> int:
    """Tokens of a text (N,) that a cache of one row can stand for; at least one is always left to be read.

    The tail can be cut anywhere. Behind a closed chunk the cut is at a chunk's end: beacons cannot be taken apart.
    """
    row = cache.rows[0]
    common = common_length(cache.token_ids[0], ids[:-1])
    num_closed = TextPlanner(cache.config, cache.policy, None).num_closed(len(ids))
    num_chunks = min(len(row.chunks), common // row.chunk_size, num_closed)
    return common if num_chunks == len(row.chunks) else num_chunks * row.chunk_size


def opening(cache: BeaconCache, num_tokens: int) -> BeaconCache:
    """A cache of the first `num_tokens` tokens, a number that `reusable_length` gave."""
    row = cache.rows[0]
    chunks = row.chunks[: num_tokens // row.chunk_size]
    num_sinks = row.num_sinks if chunks else 0
    kept = Row(row.chunk_size, num_tokens, num_sinks, chunks)
    short = cache.fork()
    short.layers = [layer.dense().map(lambda tensor: tensor[:, :, : kept.cache_length]) for layer in cache.layers]
    short.rows = (kept,)
    short.token_ids = cache.token_ids[:, :num_tokens]
    return short


def longest(caches: Sequence[BeaconCache], ids: torch.Tensor, max_positions: int | None) -> tuple[int, int] | None:
    """Which of some caches, of texts read under one policy, spares most of a text (N,): its index and the tokens spared."""
    best: tuple[int, int] | None = None
    for index, cache in enumerate(caches):
        length = reusable_length(cache, ids)
        if length > (best[1] if best else 0) and not _is_read_anew(cache, length, len(ids), max_positions):
            best = index, length
    return best


def _is_read_anew(cache: BeaconCache, length: int, total: int, max_positions: int | None) -> bool:
    """Whether "auto" would choose other ratios for the longer text, so that nothing is spared."""
    row = opening(cache, length).rows[0]
    planner = TextPlanner(cache.config, cache.policy, max_positions)
    return planner.plan(row, total - length).restart
