"""One thread that owns the model: reads texts chunk by chunk and, between two chunks, decodes all answers as one batch.

In the batch each answer stays on a cache of its own (`read_next`): joining and leaving copy nothing. A step is one piece of
one text, or one token of every answer. While texts are being read, half of the time goes to answers: these wait for one chunk
at most, and then get as much time as the chunk took.
"""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import BeaconError, CapacityError
from activation_beacon.row_ends import end_ids
from activation_beacon.server.jobs import Answer, BusyError, ClosedError, Done, Failed, Job, LateError, Progress
from activation_beacon.server.prefixes import can_be_cut_to, is_cut_anywhere
from activation_beacon.server.reading import Reading, closes_a_chunk, dense

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "The server is shutting down. Ask another one, or again after its restart."
OLDEST_EVERY = (
    4  # one piece of so many goes to the text that has waited longest, the others to that with fewest pieces left
)


class Observer(Protocol):
    """Told of what the engine does; see `metrics`."""

    def piece_read(self, seconds: float, num_tokens: int) -> None:
        """A piece of a text has been read."""

    def step_decoded(self, seconds: float) -> None:
        """A token of all answers that are decoded together has been decoded."""

    def token_written(self) -> None:
        """An answer has got a token, whichever way."""


@dataclass
class Limits:
    """How much the engine takes on.

    Attributes:
        max_rows: answers written, and texts read, at a time.
        max_waiting: jobs that may wait for their turn when a request comes; with more, it is refused.
        max_batch_bytes: keys and values of all answers that are decoded together; what would exceed it waits.
    """

    max_rows: int = 16
    max_waiting: int = 64
    max_batch_bytes: int = 8 * 2**30


@dataclass(eq=False)
class _Task:
    """A text that is being read: a job's own, or the next token of an answer that closes a chunk."""

    job: Job
    reading: Reading
    answer: Answer | None = None


@dataclass
class _Running:
    """What is left of a job that has begun."""

    answers: list[Answer] = field(default_factory=list)
    num_open: int = 0
    first_cache: BeaconCache | None = None
    before: BeaconCache | None = None  # of the text read, where what grows from it may not be cut back to it


class Engine:
    """Runs jobs; see the module.

    Args:
        model: with beacons; nobody else may call it while the engine runs.
        tokenizer: to decode with; the engine's own.
        limits: how much it takes on.
        observer: told of each step.
    """

    def __init__(
        self, model: Any, tokenizer: Any, limits: Limits | None = None, *, observer: Observer | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.observer = observer
        self.ends = end_ids(model.generation_config.eos_token_id)
        self._batch: dict[Answer, BeaconCache] = {}  # decoded together
        self._joining: list[tuple[Answer, BeaconCache]] = []
        self._tasks: list[_Task] = []
        self._running: dict[Job, _Running] = {}
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._ends_at: float | None = None  # set once no more jobs are taken: when those that are left fail
        self._debt = 0.0  # seconds that answers have waited for pieces and have not got back yet
        self._num_picked = 0
        self._thread = threading.Thread(target=self._run, name="beacon-engine", daemon=True)

    # --- any thread ---

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue the jobs of one request, all or none; they are told of in events.

        Raises:
            BusyError: if too many wait already.
            ClosedError: if the engine is shutting down.
        """
        with self._changed:
            if self._ends_at is not None:
                raise ClosedError(SHUTTING_DOWN)
            if len(self._waiting) >= self.limits.max_waiting:
                raise BusyError(
                    f"As many requests are waiting as may (--max-waiting {self.limits.max_waiting}). Try again later."
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self, *, seconds: float = 0.0) -> None:
        """Take no more jobs; those that are there get `seconds` to finish, and then fail. Returns at once.

        Called again, the sooner end counts.
        """
        ends_at = time.monotonic() + seconds
        with self._changed:
            self._ends_at = ends_at if self._ends_at is None else min(self._ends_at, ends_at)
            self._changed.notify()

    def stop(self, *, seconds: float = 0.0) -> None:
        """Close, and wait for the thread's end."""
        self.close(seconds=seconds)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that have begun and not ended."""
        return len(self._running)

    @property
    def num_rows(self) -> int:
        """Answers that are being decoded together."""
        return len(self._batch) + len(self._joining)

    # --- its own thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._ends_at is not None):
                    self._changed.wait()
                if self._ends_at is not None and not (self._waiting or self._running):
                    return
            try:
                self.step()
            except Exception as error:  # one bad step must not end the server
                logger.exception("a step of the engine failed")
                self._fail_all(error)

    def step(self) -> None:
        """Do one piece or one token of all answers."""
        self._drop_unwanted()
        self._admit()
        is_turn_of_answers = self._debt > 0 or not self._tasks
        if self.num_rows and is_turn_of_answers:
            self._decode()
        elif self._tasks:
            self._read_piece(self._pick())

    def _drop_unwanted(self) -> None:
        for job in [*self._waiting, *self._running]:
            error = self._reason_to_drop(job)
            if error is not None:
                self._end(job, error)

    def _reason_to_drop(self, job: Job) -> Exception | None:
        if job.is_cancelled:
            return ClosedError("The request was cancelled.")
        if job.is_late:
            return LateError(f"The request took longer than {job.seconds:g} s. Ask for less.")
        if self._ends_at is not None and time.monotonic() > self._ends_at:
            return ClosedError(SHUTTING_DOWN)
        return None

    def _admit(self) -> None:
        """Begin waiting jobs while there is room."""
        while self._waiting:
            rows = sum(running.num_open for running in self._running.values())
            if rows and rows + self._waiting[0].num_rows > self.limits.max_rows:
                return
            with self._changed:
                job = self._waiting.popleft()
            self._begin(job)

    def _begin(self, job: Job) -> None:
        self._running[job] = running = _Running(num_open=job.num_rows)
        with self._blaming(job):
            running.answers += [
                Answer(job, number, sampling, self.tokenizer, self.ends)
                for number, sampling in enumerate(job.samplings)
            ]
            reading = Reading(self.model, dense(job.cache), job.ids, needs_logits=bool(running.answers))
            job.emit(Progress(0, reading.num_pieces))
            self._tasks.append(_Task(job, reading))

    def _pick(self) -> _Task:
        """The text that is done soonest, so that a question need not wait for a book; now and then the oldest."""
        self._num_picked += 1
        if self._num_picked % OLDEST_EVERY == 0:
            return min(self._tasks, key=lambda task: task.job.started)
        return min(self._tasks, key=lambda task: task.reading.num_left)

    def _read_piece(self, task: _Task) -> None:
        start = time.perf_counter()
        with self._blaming(task.job):
            before = task.reading.cache.tokens_seen
            logits = task.reading.step()
            _wait(self.model)
            seconds = time.perf_counter() - start
            self._debt = seconds if self.num_rows else 0.0
            if self.observer is not None:
                self.observer.piece_read(seconds, task.reading.cache.tokens_seen - before)
            if task.answer is None:
                task.job.emit(Progress(task.reading.num_done, task.reading.num_pieces))
            if task.reading.num_left == 0:
                self._tasks.remove(task)
                self._after_reading(task, logits)

    def _after_reading(self, task: _Task, logits: torch.Tensor | None) -> None:
        cache = task.reading.cache
        if logits is None:
            self._finish(task.job, cache)
            return
        logits = logits.float().cpu()
        running = self._running[task.job]
        if task.answer is None and not is_cut_anywhere(cache):
            running.before = cache
        for answer in running.answers if task.answer is None else [task.answer]:
            self._take(answer, logits)
            self._go_on(answer, cache.fork())

    def _take(self, answer: Answer, logits: torch.Tensor) -> None:
        answer.take(logits)
        if self.observer is not None:
            self.observer.token_written()

    def _decode(self) -> None:
        """One token for every answer; those that would close a chunk are read on apart."""
        self._join()
        if not self._batch:
            return
        start = time.perf_counter()
        answers = list(self._batch)
        with self._blaming(*{answer.job for answer in answers}):
            logits = self.model.read_next([*self._batch.values()], [answer.pending for answer in answers])
            self._hand_out(answers, logits.float().cpu())  # one wait for all of them
        seconds = time.perf_counter() - start
        self._debt -= seconds
        if self.observer is not None:
            self.observer.step_decoded(seconds)

    def _hand_out(self, answers: list[Answer], logits: torch.Tensor) -> None:
        """Give each answer its logits (B, V); those that end, fail, or have a chunk to close leave."""
        for answer, row in zip(answers, logits, strict=True):
            if answer not in self._batch:
                continue  # another answer of its job has failed
            try:
                self._take(answer, row)
                if answer.reason is None and not self._must_read(answer, self._batch[answer]):
                    continue
                self._go_on(answer, self._batch.pop(answer))
            except Exception as error:
                if not isinstance(error, BeaconError):  # what an answer was, no log is told
                    logger.error("an answer failed", exc_info=error)
                self._end(answer.job, error)

    def _go_on(self, answer: Answer, cache: BeaconCache) -> None:
        """Let an answer end, read on, or join the batch, as its state wants it."""
        must_read = answer.reason is None and self._must_read(answer, cache)
        if answer.reason is not None:
            self._ended(answer, cache)
        elif must_read:
            reading = Reading(self.model, cache, [answer.pending], needs_logits=True)
            self._tasks.append(_Task(answer.job, reading, answer))
        else:
            self._joining.append((answer, cache))

    def _must_read(self, answer: Answer, cache: BeaconCache) -> bool:
        """Whether an answer's next token closes a chunk; one for which no place is left ends."""
        try:
            return closes_a_chunk(cache, self.model.max_positions)
        except CapacityError:
            answer.end("length")
            return True

    def _join(self) -> None:
        """Take into the batch whoever fits; one always does."""
        num_bytes = sum(cache.cache_bytes for cache in self._batch.values())
        while self._joining:
            num_bytes += self._joining[0][1].cache_bytes
            if self._batch and num_bytes > self.limits.max_batch_bytes:
                return
            answer, cache = self._joining.pop(0)
            self._batch[answer] = cache

    # --- ends ---

    def _ended(self, answer: Answer, cache: BeaconCache) -> None:
        running = self._running[answer.job]
        if answer.number == 0:
            running.first_cache = cache.compacted()  # it may be kept, without the room that writing has made
        running.num_open -= 1
        if running.num_open == 0 and running.first_cache is not None:
            cache, before = running.first_cache, running.before
            if before is not None:
                is_in_reach = can_be_cut_to(cache, len(before.rows[0].chunks))
                before = None if is_in_reach else before.compacted()
            self._finish(answer.job, cache, before)

    def _finish(self, job: Job, cache: BeaconCache, before: BeaconCache | None = None) -> None:
        self._running.pop(job, None)
        job.emit(Done(cache, before))

    def _end(self, job: Job, error: Exception) -> None:
        """Drop a job wherever it stands."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        self._running.pop(job, None)
        self._tasks = [task for task in self._tasks if task.job is not job]
        self._joining = [(answer, cache) for answer, cache in self._joining if answer.job is not job]
        self._batch = {answer: cache for answer, cache in self._batch.items() if answer.job is not job}
        job.emit(Failed(error))

    @contextlib.contextmanager
    def _blaming(self, *jobs: Job) -> Iterator[None]:
        """Within the block an error ends these jobs, and nothing else."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, BeaconError):
                logger.error("a job failed", exc_info=error)
            for job in jobs:
                self._end(job, error)

    def _fail_all(self, error: Exception) -> None:
        for job in list(self._running):
            self._end(job, error)
        self._batch = {}


def _wait(model: Any) -> None:
    """Until a GPU has done what it was given, so that seconds are those of the work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
