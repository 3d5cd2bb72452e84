"""What of a text need not be read again: a cache that was kept, cut back to what a new text has in common with it."""

from collections.abc import Sequence

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.layouts import ClosedChunk, chunks_closed


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Ids (N,) that two texts have in common at their beginning."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0, 0]) if len(differs) else length


def is_cut_anywhere(cache: BeaconCache) -> bool:
    """Whether a cache can be cut back to the end of any chunk: states, and layers with a window, do not hold what was before."""
    return not cache.is_recurrent and not cache.windows


def can_be_cut_to(cache: BeaconCache, num_chunks: int) -> bool:
    """Whether a cache of one row can be cut back to where so many chunks were closed."""
    row = cache.rows[0]
    if num_chunks == len(row.chunks):
        return True
    return not cache.is_recurrent and cache.still_holds(row.at_token(num_chunks * row.chunk_size))


def reusable_length(cache: BeaconCache, ids: torch.Tensor) -> int:
    """Tokens of a text (N,) that a cache of one row can stand for; at least one is always left to be read.

    The tail can be cut anywhere. Behind a closed chunk the cut is at a chunk's end: beacons cannot be taken apart. States stand
    after the last token, and after the last closed chunk; layers with a window hold what is seen there, and may not have what was
    seen before.
    """
    row = cache.rows[0]
    common = common_length(cache.token_ids[0], ids[:-1])
    num_closed = chunks_closed(len(ids), row.chunk_size, cache.config.local_tokens)
    num_chunks = min(len(row.chunks), common // row.chunk_size, num_closed)
    at_chunk_end = num_chunks * row.chunk_size
    if num_chunks < len(row.chunks):
        return at_chunk_end if can_be_cut_to(cache, num_chunks) else 0
    return at_chunk_end if cache.is_recurrent and common < row.tokens_seen else common


def opening(cache: BeaconCache, num_tokens: int) -> BeaconCache:
    """A cache of the first `num_tokens` tokens, a number that `reusable_length` gave."""
    row = cache.rows[0]
    kept = row.at_token(num_tokens)
    short = cache.fork()
    is_at_chunk_end = cache.is_recurrent and num_tokens < row.tokens_seen
    short.layers = [
        layer.at_chunk_end(kept.cache_length) if is_at_chunk_end else layer.cut(kept.cache_length)
        for layer in cache.layers
    ]
    short.rows = (kept,)
    short.token_ids = cache.token_ids[:, :num_tokens]
    return short


def longest(
    caches: Sequence[BeaconCache], ids: torch.Tensor, start: BeaconCache, max_positions: int | None
) -> tuple[int, int] | None:
    """Which of some caches spares most of a text, more than the cache that it stands on: its index and the tokens spared.

    A cache is of use where its chunks are those that reading the text on `start` would leave. With "auto" they may not be:
    a longer text was read at a larger ratio.

    Args:
        caches: of texts that were read on `start` too, under its policy.
        ids: of the text (N,), those that `start` has seen included.
        start: of one row; what the text stands on.
        max_positions: of the base model.
    """
    if not caches:
        return None
    chunks = _chunks_after_reading(start, len(ids), max_positions)
    best: tuple[int, int] | None = None
    for index, cache in enumerate(caches):
        length = reusable_length(cache, ids)
        held = cache.rows[0].chunks[: length // cache.config.chunk_size]
        if length > (best[1] if best else start.tokens_seen) and held == chunks[: len(held)]:
            best = index, length
    return best


def _chunks_after_reading(start: BeaconCache, total: int, max_positions: int | None) -> tuple[ClosedChunk, ...]:
    """The chunks of a text of `total` tokens once it has been read on a cache of its first ones."""
    row = start.rows[0]
    reading = start.planner(max_positions).plan(row, total - row.tokens_seen)
    held = () if reading.restart else row.chunks
    return (*held, *(layout.closed for layout in reading.closings))
