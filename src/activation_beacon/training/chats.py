"""Conversations as they were held: long ones are read on what beacons hold of their beginnings."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from activation_beacon.data.sources import Chat
from activation_beacon.errors import InputError
from activation_beacon.training.conversations import Conversations, Turn
from activation_beacon.training.sampling import NEIGHBOURS, Sample, check_sizes, random_of


class Chats:
    """Whole conversations, each once an epoch, in random order, with the loss on the answers.

    Neighbours are of similar lengths, so that they can be read together.

    Args:
        chats: with one answer each at least.
        tokenizer: of the base model.
        length: tokens that a conversation may have.
        chunk_size: of the adapter.
        seed: of the order.

    Attributes:
        num_longer: conversations that exceed the length and are left out.
        num_shorter: those that end within the first chunk, of which there is nothing to compress.

    Raises:
        ConfigError: if the length is no multiple of the chunk or less than two.
        InputError: if none is left.
    """

    def __init__(self, chats: Sequence[Chat], tokenizer: Any, *, length: int, chunk_size: int, seed: int) -> None:
        check_sizes(length, chunk_size)
        self.seed = seed
        self._conversations = Conversations(tokenizer)
        self._chats = chats
        lengths = np.array([len(self._written(number).ids) for number in range(len(chats))])
        self.num_longer, self.num_shorter = int((lengths > length).sum()), int((lengths <= chunk_size + 1).sum())
        self._chosen = np.flatnonzero((lengths <= length) & (lengths > chunk_size + 1))
        self._lengths = lengths
        self.epoch_size = len(self._chosen)
        if not self.epoch_size:
            raise InputError(
                f"Conversations need more than one chunk ({chunk_size} tokens), and no more than {length} tokens, to be trained "
                f"on; of {len(chats)}, {self.num_shorter} are shorter and {self.num_longer} longer. Name others, or change "
                "the length or the chunk size."
            )
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.epoch_size

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0; it goes on beyond an epoch, in another order."""
        epoch, place = divmod(index, self.epoch_size)
        if self._order[0] != epoch:
            self._order = (epoch, self._drawn(epoch))
        return self._written(self._order[1][place])

    def _drawn(self, epoch: int) -> list[int]:
        """Numbers of the conversations in an epoch's order: at random, and by length among neighbours."""
        order = random_of(self.seed, epoch, 0).permutation(self._chosen).tolist()
        runs = [order[start : start + NEIGHBOURS] for start in range(0, len(order), NEIGHBOURS)]
        return [number for run in runs for number in sorted(run, key=lambda each: (self._lengths[each], each))]

    def _written(self, number: int) -> Sample:
        chat = self._chats[number]
        return self._conversations.chat(chat.system, [Turn(*turn) for turn in chat.turns])


def digest_of(chats: Sequence[Chat]) -> str:
    """Sixteen hexadecimal digits for all that is said, and its order."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(json.dumps([chat.system, *chat.turns]).encode())
    return digest.hexdigest()[:16]
