"""What the engine is asked to do, and what it tells while doing it. Knows nothing of HTTP."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import BeaconError
from activation_beacon.server.sampling import Chosen, Sampler, Sampling
from activation_beacon.server.writing import Writer

Reason = Literal["stop", "length"]


class BusyError(BeaconError, RuntimeError):
    """The queue is full: try again later."""


class LateError(BeaconError, TimeoutError):
    """A request that took longer than it may."""


class ClosedError(BeaconError, RuntimeError):
    """The engine is shutting down."""


@dataclass(frozen=True)
class Progress:
    """Pieces of the text that have been read, and all of them."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """A token of an answer: the text that it made certain, which may be empty, and the characters before its own."""

    number: int
    text: str
    chosen: Chosen
    offset: int


@dataclass(frozen=True)
class Ended:
    """An answer's end, with the text that was held back until then."""

    number: int
    text: str
    reason: Reason
    num_tokens: int


@dataclass(frozen=True)
class Done:
    """The job's end.

    Attributes:
        cache: of the text read, grown by the first answer where answers were asked for.
        before: the same before the answers, where the cache cannot be cut back to it.
    """

    cache: BeaconCache
    before: BeaconCache | None = None


@dataclass(frozen=True)
class Failed:
    """The job's end if something went wrong."""

    error: Exception


Event = Progress | Piece | Ended | Done | Failed


class Answer:
    """One answer that is being written.

    Attributes:
        pending: the token chosen last, which the cache has not seen.
        reason: why it ended; None while it goes on.
    """

    def __init__(self, job: "Job", number: int, sampling: Sampling, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job = job
        self.number = number
        self.sampling = sampling
        self.sampler = Sampler(sampling, number)
        self.writer = Writer(tokenizer, sampling.stop)
        self.ends = ends
        self.num_tokens = 0
        self.pending = -1
        self.reason: Reason | None = None

    def take(self, logits: Any) -> None:
        """Choose the next token and tell of it."""
        chosen = self.sampler.choose(logits)
        self.pending = chosen.token
        self.num_tokens += 1
        if chosen.token in self.ends:
            self.end("stop")
            return
        offset = self.writer.num_chars
        self.job.emit(Piece(self.number, self.writer.add(chosen.token), chosen, offset))
        if self.writer.is_stopped or self.sampler.is_finished:
            self.end("stop")
        elif self.num_tokens >= self.sampling.max_tokens:
            self.end("length")

    def end(self, reason: Reason) -> None:
        """End here."""
        self.reason = reason
        self.job.emit(Ended(self.number, self.writer.finish(), reason, self.num_tokens))


@dataclass(eq=False)
class Job:
    """A text to be read on a cache, and answers to be written on it.

    Attributes:
        cache: where it begins; stays as it was.
        ids: to be read.
        emit: told of every event, in the engine's thread.
        samplings: one for each answer; none to read only.
        seconds: that it may take at most, waiting included; None for any number.
        is_cancelled: set by `cancel`: nobody waits for it any more.
    """

    cache: BeaconCache
    ids: Sequence[int]
    emit: Callable[[Event], None]
    samplings: Sequence[Sampling] = ()
    seconds: float | None = None
    is_cancelled: bool = False
    started: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Let the engine drop it at the next token or chunk."""
        self.is_cancelled = True

    @property
    def is_late(self) -> bool:
        """Whether it has taken longer than it may."""
        return self.seconds is not None and time.monotonic() - self.started > self.seconds

    @property
    def num_rows(self) -> int:
        """Rows that it takes in the batch at most."""
        return max(1, len(self.samplings))
