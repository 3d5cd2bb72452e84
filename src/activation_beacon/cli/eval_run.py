"""A run of `beacon eval`, whichever the tasks: what is wanted, checked; then the model, the samples, the progress, the report.

Knows nothing of single tasks: each comes as a function that makes it once the model is there.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import SECONDS_BETWEEN_LINES, notice, print_json, trained_fields, warn_untrained
from activation_beacon.cli.models import Loaded, check_ratio, load_model
from activation_beacon.errors import InputError

if TYPE_CHECKING:
    from activation_beacon.evaluation.peers import Peers
    from activation_beacon.evaluation.results import Results
    from activation_beacon.evaluation.tasks import Task

Make = Callable[[Loaded], "Task"]
Progress = Callable[[int, int, str], None]

Out = Annotated[
    Path,
    typer.Option(
        "--output", "--out", "-o", metavar="DIR", help="Folder of the results; an unfinished run there is continued."
    ),
]
Ratios = Annotated[str, typer.Option("--ratios", help="Compression ratios, such as 4,8.")]
Methods = Annotated[
    str, typer.Option("--methods", help="What to compare, such as full,beacons; see docs/evaluation.md.")
]


@dataclass(frozen=True)
class Wanted:
    """What the options ask for, checked."""

    out: Path
    methods: tuple[str, ...]
    ratios: tuple[int, ...]
    lengths: tuple[int, ...]
    limit: int | None
    json: bool
    peers: "Peers | None" = None


@dataclass(frozen=True)
class Job:
    """A task that waits for its model.

    Attributes:
        make: the task.
        methods: to run it with.
    """

    make: Make
    methods: tuple[str, ...]


def want(
    out: Path,
    methods: str,
    ratios: str,
    length: str,
    limit: int | None,
    *,
    json: bool,
    peers_python: Path | None = None,
) -> Wanted:
    """Check what all tasks have.

    Raises:
        BeaconError: for a list that is none, a python without kvpress where it is needed, or if matplotlib is missing.
    """
    check_plots()
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    numbers = options.parse_ratios(ratios), options.parse_numbers(length, "--length")
    return Wanted(out, names, *numbers, limit, json, _peers(names, peers_python))


def run_jobs(
    jobs: Sequence[Job],
    wanted: Wanted,
    *,
    model: str,
    base: str | None,
    device: str | None,
    dtype: options.Dtype | None,
    note: str | None = None,
) -> None:
    """Load the model, run the jobs one after another into one folder, write the report and print its tables.

    Whatever can be refused is refused before the first job begins.

    Args:
        jobs: at least one.
        wanted: what all of them share.
        model, base, device, dtype: as the options have them.
        note: said at the start, by one process.
    """
    for ratio in wanted.ratios:
        check_ratio(model, ratio)
    from activation_beacon.evaluation.methods import check_can_hold
    from activation_beacon.evaluation.results import Results
    from activation_beacon.evaluation.runner import Plan, draw_samples, planned_ways, run_task
    from activation_beacon.processes import processes

    with processes(device) as group:
        if note is not None and group.is_first:
            notice(note)
        device = device or (str(group.device()) if group.count > 1 else None)
        loaded = load_model(model, base=base, device=device, dtype=dtype)
        planned = [(job.make(loaded), Plan(job.methods, wanted.ratios, wanted.lengths, wanted.limit)) for job in jobs]
        for task, plan in planned:
            list(planned_ways(task, plan))  # what is not known is refused before a folder is made
            for method in plan.methods:
                check_can_hold(loaded.model, method)
        drawn = [draw_samples(loaded.model, task, plan) for task, plan in planned]
        if group.is_first:
            warn_untrained(loaded.config)
        with group.first_before_others():
            results = Results(wanted.out, model_facts(loaded), name=loaded.name, rank=group.rank)
            for task, _ in planned:
                results.open_task(task.name, task.settings, task.quality)
        with progress_shown(is_shown=group.is_first) as progress:
            for number, (task, plan) in enumerate(planned):
                run_task(
                    loaded.model, task, plan, results, samples=drawn[number], peers=wanted.peers,
                    progress=_numbered(progress, number, len(planned)), group=group,
                )  # fmt: skip
        group.barrier()
        if group.is_first:
            results.gather()
            only = planned[0][0].name if len(planned) == 1 else None
            finish(results, as_json=wanted.json, task=only, facts=trained_fields(loaded.config))


def model_facts(loaded: Loaded) -> dict[str, Any]:
    """What results may not be mixed with those of another."""
    model, config = loaded.model, loaded.config
    return {
        "base_model": config.base_model,
        "base_fingerprint": model.base_fingerprint,
        "adapter_fingerprint": model.adapter_fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chunk_size": config.chunk_size,
        "local_tokens": config.local_tokens,
        "is_trained": config.is_trained,
    }


def finish(results: "Results", *, as_json: bool, task: str | None = None, facts: dict[str, Any] | None = None) -> None:
    """Write the report; print the tables of a task, or of all with an overview."""
    from activation_beacon.evaluation.blocks import markdown_of
    from activation_beacon.evaluation.overview import overview
    from activation_beacon.evaluation.report import rows_as_json, tables, write_report

    markdown, page = write_report(results.folder)
    if as_json:
        files = {"results": str(results.path), "report": str(markdown), "page": str(page)}
        print_json({**files, "origin": results.origin, "rows": rows_as_json(results, task), **(facts or {})})
        return
    typer.echo(markdown_of([*(overview(results) if task is None else []), *tables(results, task)]))
    typer.echo(f"Report: {markdown}, {page}")


# --- what is asked for -----------------------------------------------------------------------------------------------


def check_plots() -> None:
    """Refuse to begin where the report could not be drawn.

    Raises:
        InputError: saying what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('`beacon eval` draws plots with matplotlib: pip install "activation-beacon[eval]".')


def _peers(methods: Sequence[str], python: Path | None) -> "Peers | None":
    """Where kvpress is, if one of its methods is asked for; None too for a task that has none of them."""
    if python is None:
        return None
    from activation_beacon.evaluation.peers import PEERS, Peers

    return Peers(python) if PEERS.keys() & set(methods) else None


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress_shown(*, is_shown: bool = True) -> Iterator[Progress]:
    """A bar on a terminal, and elsewhere a line every ten seconds; of several processes the first one shows its own."""
    if not is_shown:
        yield lambda *_: None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(unit="sample") as bar:
            yield lambda done, total, text: _move(bar, done, total, text)
        return
    last = time.perf_counter()

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            last = time.perf_counter()
            notice(f"{done} of {total}: {text}")

    yield report


def _move(bar: Any, done: int, total: int, text: str) -> None:
    bar.total = total
    bar.set_description(text, refresh=False)
    bar.update(done - bar.n)


def _numbered(progress: Progress, number: int, count: int) -> Progress:
    """Of several tasks each says which one it is."""
    if count == 1:
        return progress
    return lambda done, total, text: progress(done, total, f"task {number + 1} of {count}, {text}")
