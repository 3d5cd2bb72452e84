"""Caches kept in memory within a number of bytes; the least recently used goes first. What is lost can be read again."""

import collections
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    """What is kept: caches, as far as the quota is concerned."""

    @property
    def cache_bytes(self) -> int:
        """Bytes held."""


Kept = TypeVar("Kept", bound=HasBytes)


class Memory(Generic[Kept]):
    """Keeps caches by key.

    Args:
        max_bytes: of all caches together; one that is larger is not kept at all.

    Attributes:
        num_bytes: held now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: collections.OrderedDict[Hashable, tuple[Kept, int]] = collections.OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self._kept))

    def get(self, key: Hashable) -> Kept | None:
        """What is kept under a key, which counts as a use."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def peek(self, key: Hashable) -> Kept:
        """What is kept under a key, without using it."""
        return self._kept[key][0]

    def put(self, key: Hashable, cache: Kept) -> None:
        """Keep a cache, at the cost of those that were not used for longest."""
        self.drop(key)
        size = cache.cache_bytes
        if size > self.max_bytes:
            return
        self._kept[key] = (cache, size)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Hashable) -> None:
        """Forget what is kept under a key, if anything is."""
        if key in self._kept:
            self.num_bytes -= self._kept.pop(key)[1]
