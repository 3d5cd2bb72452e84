"""Where the rows of a generated batch end: those that have ended before others are given padding to read until the last one has."""

import logging
from typing import Any

import torch
from transformers import StoppingCriteriaList

from activation_beacon.cache import BeaconCache
from activation_beacon.layouts import chunks_closed

logger = logging.getLogger(__name__)


def end_ids(named: Any) -> frozenset[int]:
    """Ids that end an answer, of what transformers lets `eos_token_id` be: one, several, a tensor, or None."""
    return frozenset(torch.atleast_1d(torch.as_tensor([] if named is None else named, device="cpu")).tolist())


class RowEnds(StoppingCriteriaList):
    """Stopping criteria that note where each row has ended: until the last one has, the others are given padding to read."""

    lengths: torch.Tensor | None = None  # (B,) tokens of a row when it ended, 0 before
    longest = 0  # tokens of the rows now

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended, (B,)."""
        has_ended = super().__call__(input_ids, scores, **kwargs)
        self.longest = input_ids.shape[1]
        before = torch.zeros_like(has_ended, dtype=torch.long) if self.lengths is None else self.lengths
        self.lengths = torch.where(has_ended & (before == 0), self.longest, before)
        return has_ended

    def padding(self, cache: BeaconCache) -> list[int]:
        """Tokens to take back of each row, to leave it with the text that was read before it ended, all but its last token.

        A row whose padding has closed a chunk keeps it: no chunk can be opened again. Without an end token there is no padding:
        transformers has all rows go on.
        """
        if self.lengths is None or not any(hasattr(criterion, "eos_token_id") for criterion in self):
            return [0] * cache.batch_size
        counts = [self.longest - length if length else 0 for length in self.lengths.tolist()]
        for number, (row, count) in enumerate(zip(cache.rows, counts, strict=True)):
            if count > row.tail_length:
                logger.warning(
                    "Row %d ended %d tokens before others, and these have closed a chunk: its context holds padding.",
                    number,
                    count,
                )
                counts[number] = 0
            elif chunks_closed(row.tokens_seen - count, row.chunk_size, cache.config.local_tokens) < len(row.chunks):
                logger.warning(
                    "Row %d ended %d tokens before others, and these have closed a chunk: its tail is shorter than where it is alone.",
                    number,
                    count,
                )
        return counts
