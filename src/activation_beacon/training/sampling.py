"""Which tokens a step trains on: a sample is a pure function of seed and index, whoever asks, in whatever order.

So a run that is resumed, or spread over processes, takes exactly the samples of an unbroken single one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from activation_beacon.errors import ConfigError, InputError
from activation_beacon.training.token_store import TokenStore

LEAST_CHUNKS = 2  # below, there is no beacon to train: the last chunk is read raw
MIX_BLOCK = 1000  # samples in which every share of a mix is met
NEIGHBOURS = 64  # conversations that share a length


@dataclass(frozen=True)
class Sample:
    """One text to train on.

    Attributes:
        ids: (N,), long.
        is_target: (N,), bool; whether predicting this token counts in the loss.
    """

    ids: torch.Tensor
    is_target: torch.Tensor


class Sampler(Protocol):
    """What hands out samples without end."""

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0."""


def check_sizes(length: int, chunk_size: int) -> None:
    """Refuse lengths at which nothing can be trained.

    Raises:
        ConfigError: with both numbers.
    """
    if length < LEAST_CHUNKS * chunk_size or length % chunk_size:
        lower = max(length // chunk_size, LEAST_CHUNKS) * chunk_size
        raise ConfigError(
            f"The length of samples ({length}) must be a multiple of chunk_size ({chunk_size}), and two chunks at least: "
            f"of one chunk there is nothing to compress. Use {lower}, or another chunk_size."
        )


def random_of(seed: int, *numbers: int) -> np.random.Generator:
    """A generator that is the same for the same numbers, and unlike any other's.

    Raises:
        ConfigError: if the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more; got {seed}.")
    return np.random.default_rng([seed, *numbers])


class DocumentSampler:
    """Windows of single documents.

    An epoch takes windows that do not overlap, from a random start in each document, in random order: documents in
    proportion to their lengths, no token twice. A document of fewer than `length` tokens gives one window of its whole
    chunks; one of less than two chunks gives none. The loss begins after the first chunk.

    Args:
        store: the documents' tokens.
        length: of the windows, in whole chunks.
        chunk_size: of the adapter.
        seed: of all choices.
        local_tokens: that contexts will have. What is predicted from the first of each chunk does not count: with so many
            local tokens, the chunk before is still raw when they are read.

    Raises:
        ConfigError: if the length is no multiple of the chunk, or less than two.
        InputError: if no document is long enough.
    """

    def __init__(self, store: TokenStore, *, length: int, chunk_size: int, seed: int, local_tokens: int = 0) -> None:
        check_sizes(length, chunk_size)
        self.store, self.length, self.chunk_size, self.seed = store, length, chunk_size, seed
        self.local_tokens = local_tokens
        whole_chunks = store.lengths // chunk_size
        self._sizes = np.minimum(whole_chunks * chunk_size, length)
        self._counts = np.where(whole_chunks >= LEAST_CHUNKS, store.lengths // np.maximum(self._sizes, 1), 0)
        self._stops = np.cumsum(self._counts)
        self.epoch_size = int(self._stops[-1])
        if not self.epoch_size:
            raise InputError(
                f"No document has the two chunks ({LEAST_CHUNKS * chunk_size} tokens) that training needs; the longest of "
                f"{len(store)} has {store.lengths.max()}. Use longer documents or a smaller chunk_size."
            )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.epoch_size

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0; it goes on beyond an epoch, with other windows."""
        document, start, stop = self.window(index)
        ids = torch.from_numpy(self.store.document(document)[start:stop].astype(np.int64))
        places = torch.arange(len(ids))
        is_local = (places - 1) % self.chunk_size < self.local_tokens  # predicted from the token before
        return Sample(ids, (places >= self.chunk_size) & ~is_local)

    def window(self, index: int) -> tuple[int, int, int]:
        """Document, first token and stop of a sample."""
        epoch, place = divmod(index, self.epoch_size)
        number = int(_epoch_order(self.seed, epoch, self.epoch_size)[place])
        document = int(np.searchsorted(self._stops, number, side="right"))
        size, count = int(self._sizes[document]), int(self._counts[document])
        spare = int(self.store.lengths[document]) - count * size
        first = int(random_of(self.seed, epoch, 1, document).integers(spare + 1))
        start = first + (number - int(self._stops[document]) + count) * size
        return document, start, start + size


class MixedSampler:
    """Samples of several samplers, each with its share: exactly met in every thousand samples, in random order.

    Args:
        parts: samplers and their shares; the shares need not add up to 1.
        seed: of the order.

    Raises:
        ConfigError: if there is no sampler, or a share is too small to be met.
    """

    def __init__(self, parts: Sequence[tuple[Sampler, float]], *, seed: int) -> None:
        shares = [share for _, share in parts]
        if not parts or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            raise ConfigError(f"A mix needs samplers with shares above 0; got shares {shares}.")
        self.samplers = [sampler for sampler, _ in parts]
        self.seed = seed
        self._counts = _portions([share / sum(shares) for share in shares], MIX_BLOCK)
        for share, count in zip(shares, self._counts, strict=True):
            if not count:
                raise ConfigError(
                    f"A share of {share:g} in {sum(shares):g} is less than one sample in {MIX_BLOCK}. "
                    "Give it more, or leave it out."
                )

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0; each sampler gives its own in turn, without a gap."""
        part, number = self.choice(index)
        return self.samplers[part].sample(number)

    def choice(self, index: int) -> tuple[int, int]:
        """Which sampler a number falls to, and the number that it is asked for."""
        block, place = divmod(index, MIX_BLOCK)
        order = _block_order(self.seed, block, self._counts)
        part = int(order[place])
        return part, block * self._counts[part] + int((order[:place] == part).sum())


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return random_of(seed, epoch, 0).permutation(size)


@lru_cache(maxsize=8)
def _block_order(seed: int, block: int, counts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return random_of(seed, block).permutation(np.repeat(np.arange(len(counts)), counts))


def _portions(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers in the proportion of shares, `total` together: those with the largest remainders get one more."""
    exact = [share * total for share in shares]
    portions = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda part: portions[part] - exact[part])
    for part in by_remainder[: total - sum(portions)]:
        portions[part] += 1
    return tuple(portions)


def drawn_length(length: int, chunk_size: int, *, seed: int, index: int) -> int:
    """How long a conversation is to be: the full length for half of them, three chunks or more for the others.

    Neighbours share a length, so that batches stay of one piece.
    """
    generator = random_of(seed, index // NEIGHBOURS, 7)
    if generator.random() < 0.5:
        return length
    return chunk_size * int(generator.integers(min(3, length // chunk_size), length // chunk_size + 1))
