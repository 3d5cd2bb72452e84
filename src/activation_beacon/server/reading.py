"""Reading a text piece by piece, so that others wait for a chunk at most.

A piece closes one chunk, or reads the tail. Pieces end where a chunk is due, so that the cache that comes of them is the one
that reading at once would give; "auto", and how a sequence of ratios goes on, is decided for the whole text before its
first piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.ratios import RatioPolicy

# V vocabulary


@dataclass(frozen=True)
class Pieces:
    """How a reading is cut.

    Attributes:
        restart: whether the text is read anew from its first token: "auto" has chosen another ratio.
        stops: tokens of the text that have been read after each piece.
        policy: under which the pieces are read: the text's own, made a ratio for each chunk unless it is one for all.
    """

    restart: bool
    stops: tuple[int, ...]
    policy: RatioPolicy


def cut(cache: BeaconCache, max_positions: int | None, num_new: int) -> Pieces:
    """Cut the reading of `num_new` more tokens into a cache of one row.

    Raises:
        RatioError, CapacityError: as the plan of reading them at once.
    """
    config, policy = cache.config, cache.policy
    reading = cache.planner(max_positions).plan(cache.rows[0], num_new)
    held = () if reading.restart else cache.rows[0].chunks
    ratios = (*(chunk.ratio for chunk in held), *(layout.ratio for layout in reading.closings))
    numbers = range(len(held) + 1, len(ratios) + 1)
    stops = [number * config.chunk_size + config.local_tokens + 1 for number in numbers]
    if not stops or stops[-1] < reading.stop:
        stops.append(reading.stop)
    is_settled = isinstance(policy.ratio, int) or not reading.closings
    return Pieces(reading.restart, tuple(stops), policy if is_settled else RatioPolicy(ratios, spans=policy.spans))


def closes_a_chunk(cache: BeaconCache, max_positions: int | None) -> bool:
    """Whether the next token cannot just be appended to a cache of one row.

    Raises:
        CapacityError: if it does not fit.
    """
    reading = cache.planner(max_positions).plan(cache.rows[0], 1)
    return bool(reading.closings) or reading.restart


class Reading:
    """One text on its way into a cache.

    Args:
        model: with beacons.
        cache: of one row; the reading's own from now on. See `dense`.
        ids: to be read on.
        needs_logits: whether the last token's logits are wanted.

    Raises:
        RatioError, CapacityError: before anything is read.
    """

    def __init__(self, model: Any, cache: BeaconCache, ids: Sequence[int], *, needs_logits: bool) -> None:
        self.model = model
        self.needs_logits = needs_logits
        self.policy = cache.policy
        self.ids = [*cache.token_ids[0].tolist(), *ids]
        pieces = cut(cache, model.max_positions, len(ids))
        self.cache = cache.emptied() if pieces.restart else cache
        self.cache.policy = pieces.policy
        self.stops = pieces.stops
        self.num_done = 0

    @property
    def num_pieces(self) -> int:
        """Pieces in all."""
        return len(self.stops)

    @property
    def num_left(self) -> int:
        """Pieces that are still to be read."""
        return len(self.stops) - self.num_done

    @torch.no_grad()
    def step(self) -> torch.Tensor | None:
        """Read the next piece; logits (V,) after the last one, if they are wanted."""
        stop = self.stops[self.num_done]
        piece = torch.tensor([self.ids[self.cache.tokens_seen : stop]], device=self.model.device)
        is_last = self.num_left == 1
        logits = None
        if is_last and self.needs_logits:
            output = self.model(input_ids=piece, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[0, -1]
        else:
            self.model.compress(piece, cache=self.cache)
        self.num_done += 1
        if is_last:
            self.cache.policy = self.policy
        return logits


def dense(context: BeaconCache) -> BeaconCache:
    """A cache of its own that begins with the same contents, nothing of it quantised: batches are dense."""
    cache = context.fork()
    cache.layers = [layer.dense() for layer in cache.layers]
    return cache
