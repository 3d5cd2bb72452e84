"""Answers on different contexts, decoded as one ragged batch. Rows join and leave between two tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.plan import RatioPolicy
from activation_beacon.server.reading import closes_a_chunk

# B batch · V vocabulary


class DecodeBatch:
    """The caches of answers that are being written, one row each.

    Args:
        model: with beacons.

    Attributes:
        keys: for each row, who joined with it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys: list[Any] = []
        self._cache: BeaconCache | None = None
        self._policies: list[RatioPolicy] = []

    def __len__(self) -> int:
        return len(self.keys)

    def num_bytes_with(self, caches: Sequence[BeaconCache]) -> int:
        """Bytes that the batch would take with these rows too: all rows are as long as the longest."""
        lengths = [row.cache_length for row in (self._cache.rows if self._cache else ())]
        lengths += [cache.cache_length for cache in caches]
        sample = caches[0] if caches else self._cache
        if sample is None:
            return 0
        slots = max(1, sample.layers[0].get_seq_length())
        return len(lengths) * max(lengths) * (sample.cache_bytes // slots // sample.batch_size)

    def join(self, keys: Sequence[Any], caches: Sequence[BeaconCache]) -> None:
        """Take in rows, each a cache of one text that is the batch's own from now on."""
        if not caches:
            return
        self._policies += [cache.policy for cache in caches]
        self._cache = BeaconCache.stack([*([self._cache] if self._cache else []), *caches])
        # Rows that close chunks leave first: what stays needs no policy, least of all another row's.
        self._cache.policy = RatioPolicy(self._cache.config.ratios[0])
        self.keys += keys

    def closes_a_chunk(self, index: int) -> bool:
        """Whether a row's next token has to be read apart.

        Raises:
            CapacityError: if it does not fit.
        """
        assert self._cache is not None, "an empty batch has no rows"
        row, policy = self._cache.rows[index], self._policies[index]
        return closes_a_chunk(self._cache.config, policy, self.model.max_positions, row)

    def row(self, index: int) -> BeaconCache:
        """One row's cache, under its own policy, as a copy that holds nothing of the batch."""
        assert self._cache is not None, "an empty batch has no rows"
        single = self._cache.row(index)
        single.policy = self._policies[index]
        return compact(single)

    def leave(self, indices: Sequence[int]) -> None:
        """Drop rows."""
        if not indices:
            return
        assert self._cache is not None, "an empty batch has no rows"
        kept = [index for index in range(len(self.keys)) if index not in set(indices)]
        self.keys = [self.keys[index] for index in kept]
        self._policies = [self._policies[index] for index in kept]
        if kept:
            self._cache.batch_select_indices(torch.tensor(kept))
            self._cache = compact(self._cache)
        else:
            self._cache = None

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one more token in each row; logits (B, V)."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]


def compact(cache: BeaconCache) -> BeaconCache:
    """The same cache without memory that a view keeps from being freed, such as a batch of which it was one row."""
    cache.layers = [layer.map(_own) for layer in cache.layers]
    cache.token_ids = _own(cache.token_ids)
    return cache


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
