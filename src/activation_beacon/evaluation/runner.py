"""A run: tasks x methods x ratios x lengths, sample by sample, so that what is finished can be compared at any time."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from activation_beacon.errors import CapacityError, ConfigError, InputError
from activation_beacon.evaluation.language_modelling import evaluating
from activation_beacon.evaluation.peers import PEERS, Peers, peer_records
from activation_beacon.evaluation.results import Key, Results
from activation_beacon.evaluation.samples import TooShort
from activation_beacon.evaluation.tasks import Task
from activation_beacon.processes import Processes
from activation_beacon.ratios import Ratio

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """How much of a task to run.

    Attributes:
        methods: names of methods.
        ratios: for the methods that have one.
        lengths: tokens of a sample.
        limit: samples of each length at most; None for all that the task has.
    """

    methods: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    lengths: tuple[int, ...]
    limit: int | None = None


def run_task(
    model: Any,
    task: Task,
    plan: Plan,
    results: Results,
    *,
    samples: Mapping[int, Sequence[Any]] | None = None,
    peers: Peers | None = None,
    progress: Progress | None = None,
    group: Processes | None = None,
) -> None:
    """Run what is not finished yet, and append it to the results; last what another program runs.

    Args:
        model: with beacons attached.
        task: what to run.
        plan: how much of it.
        results: where it goes.
        samples: of each length, where `draw_samples` has drawn them already.
        peers: where kvpress is, for its methods.
        progress: called with the units done, those there are for this process, and what is being done.
        group: the processes that run the task together: samples are dealt out, each with all of its methods.

    Raises:
        InputError: for a method that the task does not know, or a length of which it has no sample.
        MismatchError: if the results are of the same task with other settings.
        PeerError: if kvpress is asked for and cannot be run.
    """
    ways = list(planned_ways(task, plan))
    samples = draw_samples(model, task, plan) if samples is None else samples
    results.open_task(task.name, task.settings, task.quality)
    group = group or Processes()
    units = list(_units(samples, ways, group))
    total, done = len(units), 0
    others = []
    with evaluating(model):
        for length, index, (method, ratio) in units:
            key = Key(task.name, method, ratio, length, samples[length][index].id)
            if method in PEERS and key not in results.records:
                others.append((key, samples[length][index]))
                continue
            if progress is not None:
                progress(done, total, _unit_text(task, method, ratio, length))
            if key not in results.records:
                results.add(key, _run(model, task, samples[length], index, method, ratio))
            done += 1
        if others:
            _run_others(peers or Peers(), model, task, others, results, _counting(progress, task, done, total))
    if progress is not None:
        progress(total, total, task.name)


def _run_others(
    peers: Peers,
    model: Any,
    task: Any,
    wanted: Sequence[tuple[Key, Any]],
    results: Results,
    say: Callable[[int, str], None],
) -> None:
    """What kvpress makes of samples of a task with questions; no other task has its methods."""
    count = 0
    records = peer_records(
        peers, model, task.prompt, wanted, results.folder, rank=results.rank,
        say=lambda text: say(count, f"kvpress: {text}"),
    )  # fmt: skip
    for key, record in records:
        results.add(key, record)
        count += 1


def _counting(progress: Progress | None, task: Task, done: int, total: int) -> Callable[[int, str], None]:
    """Progress of what comes after `done` units."""

    def say(count: int, text: str) -> None:
        if progress is not None:
            progress(done + count, total, f"{task.name}, {text}")

    return say


def _run(
    model: Any, task: Task, samples: Sequence[Any], index: int, method: str, ratio: Ratio | None
) -> dict[str, Any]:
    try:
        return task.run(model, samples, index, method, ratio)
    except (CapacityError, ConfigError) as error:  # the latter where not even a method's local tokens fit
        return {"refused": str(error)}


def planned_ways(task: Task, plan: Plan) -> Iterator[tuple[str, Any]]:
    """Methods with their ratios.

    Raises:
        InputError: for a method that the task does not know.
    """
    for method in plan.methods:
        if method not in task.methods:
            known = ", ".join(task.methods)
            raise InputError(f"The task {task.name} has no method {method!r}. Use some of {known}.")
        for ratio in plan.ratios if task.methods[method] else (None,):
            yield method, ratio


def draw_samples(model: Any, task: Task, plan: Plan) -> dict[int, list[Any]]:
    """The samples of each length.

    Raises:
        InputError: for a length of which there is none, that has no room for one of them, or whose samples the methods
            cannot be run on.
    """
    samples = {}
    for length in plan.lengths:
        try:
            samples[length] = list(itertools.islice(task.samples(length), plan.limit))
        except TooShort as error:
            raise InputError(
                f"The task {task.name} has samples that {length} tokens have no room for: template, questions, answers and some "
                f"text need more. Use a length of at least {_least_length(task, plan.limit, error.least)}."
            ) from error
        if not samples[length]:
            raise InputError(
                f"The task {task.name} has no sample of {length:,} tokens. Use a shorter length, or longer texts."
            )
        task.check(model, samples[length], plan.methods)
    return samples


def _least_length(task: Task, limit: int | None, length: int) -> int:
    """The first length from here on that has room for each sample; samples are others at another length."""
    while True:
        try:
            list(itertools.islice(task.samples(length), limit))
        except TooShort as error:
            length = error.least
        else:
            return length


def _units(
    samples: Mapping[int, Sequence[Any]], ways: Sequence[tuple[str, Any]], group: Processes
) -> Iterator[tuple[int, int, tuple[str, Any]]]:
    """Length, sample and way of all that this process does."""
    each = [(length, index) for length, those in samples.items() for index in range(len(those))]
    for number, (length, index) in enumerate(each):
        if group.takes(number):
            for way in ways:
                yield length, index, way


def _unit_text(task: Task, method: str, ratio: Ratio | None, length: int) -> str:
    return f"{task.name} {length} {method}" + ("" if ratio is None else f" x{ratio}")
