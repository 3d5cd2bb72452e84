"""lm-eval's tasks by name, at several ratios, into a folder that can be continued: short contexts, LongBench and the rest.

What lm-eval measures is kept as it says it, metric by metric; nothing is scored here.
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from activation_beacon.errors import InputError, MismatchError, StorageError, reason
from activation_beacon.evaluation.blocks import Table
from activation_beacon.evaluation.documents import folder_digest
from activation_beacon.evaluation.results import CONTENTS, HARNESS, first_difference
from activation_beacon.files import make_folder
from activation_beacon.json_lines import append_lines, lines_from, read_lines

BASE = "none"  # the ratio that stands for the base model alone

Progress = Callable[[int, int, str], None]
Line = dict[str, Any]


class HarnessResults:
    """The lines of a folder's `harness.jsonl`: one for each metric of a task at a ratio.

    Args:
        folder: made when the first line is written.
        facts: the settings; lines made with others are not mixed with these. None to read only.
        note: called before a line is written.

    Raises:
        FileFormatError: if a line is damaged.
        MismatchError: if the folder holds lines made with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: Mapping[str, Any] | None = None,
        *,
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self.note = note
        self.path = Path(folder) / HARNESS
        self.facts = None if facts is None else json.loads(json.dumps(facts))
        self.lines = lines_from(self.path, 0)[0] if facts is None else read_lines(self.path)
        for line in self.lines:
            theirs = line["facts"]
            if self.facts is not None and theirs != self.facts:
                raise MismatchError(f"{self.path} holds results {_difference(theirs, self.facts)}")

    def has(self, name: str, ratio: str) -> bool:
        """Whether a task is finished at a ratio."""
        return any((line["asked"], line["ratio"]) == (name, ratio) for line in self.lines)

    def add(self, lines: Sequence[Line]) -> None:
        """Append the lines of one task at one ratio; they are on disk when this returns.

        Raises:
            StorageError: if they cannot be written.
        """
        found = [{**line, "facts": self.facts} for line in lines]
        make_folder(self.path.parent)
        self.note()
        append_lines(self.path, found)
        self.lines += found

    def table(self) -> Table:
        """A row for each metric, with its samples, and a column for each ratio.

        A cell is a value, and its standard error where lm-eval gives one.
        """
        ratios = sorted({line["ratio"] for line in self.lines}, key=lambda text: int(text) if text.isdecimal() else 0)
        rows: dict[tuple[str, str, int | None], dict[str, str]] = {}
        for line in self.lines:
            error = "" if line["stderr"] is None else f" ± {line['stderr']:.3f}"
            key = line["task"], line["metric"], line["samples"]
            rows.setdefault(key, {})[line["ratio"]] = f"{line['value']:.3f}{error}"
        header = ["task", "n", *("base" if ratio == BASE else f"x{ratio}" for ratio in ratios)]
        return Table(
            header,
            [
                [f"{task}, {metric}", "-" if count is None else str(count), *(row.get(ratio, "-") for ratio in ratios)]
                for (task, metric, count), row in rows.items()
            ],
        )


def include_facts(folder: Path | None) -> dict[str, str]:
    """What a folder of further tasks is known by: its name and contents; nothing without one.

    Raises:
        StorageError: if a file in it cannot be read.
    """
    return {} if folder is None else {"include": folder.resolve().name, CONTENTS: folder_digest(folder)}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What keeps lines from being gone on with, and the way out."""
    name = first_difference(theirs, ours) or ""
    if name == CONTENTS:
        return (
            f"of an --include folder of this name with other contents (SHA-256 {theirs[name]}; this one has {ours[name]}). "
            "Choose another folder of results, or the tasks that it was begun with."
        )
    if name == "include" and name not in theirs:
        return (
            "without --include, or from before the contents of its folder were noted. Choose another folder; or, if you know "
            f"that they are of these tasks, add {json.dumps({each: ours[each] for each in ('include', CONTENTS)})[1:-1]} to "
            'the "facts" of each of its lines.'
        )
    return f"with {name} {theirs.get(name)!r}; this run has {ours.get(name)!r}. Choose another folder, or the same settings."


def find_tasks(names: Sequence[str], include: Path | None = None) -> Any:
    """lm-eval's manager of tasks, which knows those of these names.

    Args:
        names: of tasks or groups.
        include: folder of further tasks (YAML).

    Raises:
        InputError: for a task that lm-eval does not know.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Is it {', '.join(close)}?" if close else " `lm-eval ls tasks` lists them."
            raise InputError(f"lm-eval has no task {name!r}.{hint}")
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    ratios: Sequence[str],
    results: HarnessResults,
    *,
    manager: Any,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run what is not finished yet.

    Args:
        model: with beacons attached.
        tokenizer: of its base.
        names: of tasks or groups of lm-eval.
        ratios: as text; "none" for the base model alone, "auto" for what fits.
        results: of the folder.
        manager: from `find_tasks`.
        limit: samples of each task at most.
        num_fewshot: examples before each question; None for the task's own number.
        progress: called with the runs finished, all runs, and the next one's name.

    Raises:
        StorageError: if a task's data cannot be had.
    """
    runs = [(name, ratio) for ratio in ratios for name in names]
    for number, (name, ratio) in enumerate(runs):
        if progress is not None:
            progress(number, len(runs), f"{name} {_label(ratio)}")
        if not results.has(name, ratio):
            results.add(_run(model, tokenizer, name, ratio, manager, limit, num_fewshot))


def _label(ratio: str) -> str:
    return "base" if ratio == BASE else f"x{ratio}" if ratio.isdecimal() else ratio


def _run(
    model: Any, tokenizer: Any, name: str, ratio: str, manager: Any, limit: int | None, num_fewshot: int | None
) -> list[Line]:
    """One task at one ratio: a line for each metric of it, and of the tasks of a group."""
    import lm_eval

    from activation_beacon.evaluation.harness import BeaconLM

    lm = BeaconLM(model, beacon_ratio=ratio, tokenizer=tokenizer)
    try:
        with redirect_stdout(sys.stderr):  # tasks print
            found = lm_eval.simple_evaluate(
                lm, tasks=[name], task_manager=manager, limit=limit, num_fewshot=num_fewshot, log_samples=False
            )
    except (OSError, RuntimeError, ValueError) as error:
        if not _is_about_data(error):
            raise
        raise StorageError(
            f"The data of {name} cannot be had: {reason(error)}. lm-eval takes them from the hub: check the network, or "
            "fetch them before and set HF_DATASETS_OFFLINE=1."
        ) from error
    return [
        {"asked": name, "ratio": ratio, "task": task, **line, "samples": _count(found, task)}
        for task, values in found["results"].items()
        for line in _metrics(values)
    ]


def _is_about_data(error: Exception) -> bool:
    """Whether it came from fetching: lm-eval's data sets raise errors of many kinds there."""
    modules = set()
    trace = error.__traceback__
    while trace is not None:
        modules.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return bool(modules & {"datasets", "huggingface_hub"})


def _metrics(values: Mapping[str, Any]) -> Iterator[Line]:
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, int | float) else None
        yield {"metric": metric if kind == "none" else f"{metric} ({kind})", "value": float(value), "stderr": stderr}


def _count(found: Mapping[str, Any], task: str) -> int | None:
    counts = found.get("n-samples", {}).get(task)
    return None if counts is None else int(counts["effective"])
