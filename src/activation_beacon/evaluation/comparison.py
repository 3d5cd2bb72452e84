"""Folders of results beside one another: the mean of each, and paired differences over the samples that all of them have.

Knows nothing of models: what a folder was measured on stands in its run.json.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activation_beacon.config import is_same_fingerprint, short_fingerprint
from activation_beacon.errors import InputError, MismatchError
from activation_beacon.evaluation.metrics import Estimate, mean, mean_difference
from activation_beacon.evaluation.results import CONTENTS, UNTOLD, Results, first_difference
from activation_beacon.evaluation.summary import Record, Way, lengths_of, paired, select, ways_of

CONFOUNDERS = ("dtype", "chunk_size", "local_tokens")  # that a difference may come of, besides the adapter

Owners = tuple[int, ...]  # places of folders in the order given


@dataclass(frozen=True)
class Line:
    """One way of one task at one length, over the samples that all folders have.

    Attributes:
        task, length, way: what was measured.
        quality: "nats" (less is better) or "score" (more is).
        means: of each folder.
        differences: of each folder after the first: how much it lies above the first.
    """

    task: str
    length: int
    way: Way
    quality: str
    means: Sequence[Estimate]
    differences: Sequence[Estimate]


@dataclass
class Comparison:
    """What folders have in common, and what only some of them have.

    Attributes:
        folders: in the order given.
        labels: of the folders: name and adapter.
        lines: of what all have.
        unshared: what is in some of them only, by the places of these.
    """

    folders: Sequence[Results]
    labels: Sequence[str]
    lines: list[Line] = field(default_factory=list)
    unshared: dict[Owners, list[str]] = field(default_factory=dict)

    @property
    def confounders(self) -> list[str]:
        """Facts besides the adapter in which the folders differ."""
        return [
            name
            for name in CONFOUNDERS
            if len({str(each.model.get(name, UNTOLD.get(name))) for each in self.folders}) > 1
        ]

    def unshared_text(self) -> str:
        """One line that names what is left out; nothing where nothing is."""
        parts = sorted(self.unshared.items())
        return " ".join(f"Only in {self.named(owners)}: {'; '.join(texts)}." for owners, texts in parts)

    def named(self, owners: Owners) -> str:
        """The names of these folders."""
        return " and ".join(names_of(self.folders)[place] for place in owners)


def compare(paths: Sequence[str | Path], *, tasks: Sequence[str] = ()) -> Comparison:
    """Compare folders of results.

    Args:
        paths: two at least.
        tasks: to compare; all by default.

    Raises:
        InputError: for one folder alone, one that is given twice, a task that none has, or folders that share no sample.
        MismatchError: if they did not measure the same: another base model, or a task with other settings.
        StorageError, FileFormatError: for a folder without results, or with damaged ones.
    """
    folders = _open(paths)
    names = names_of(folders)
    wanted = _tasks(folders, tasks)
    for number, other in enumerate(folders[1:], 1):
        _check_base(folders[0], other, names[0], names[number])
    for task in wanted:
        _check_task(task, folders, names)
    found = Comparison(folders, labels_of(folders))
    for task in wanted:
        _compare_task(found, task)
    if not found.lines:
        raise InputError(
            f"{' and '.join(names)} share no finished sample. {found.unshared_text()}".rstrip()
            + " Run the same tasks, lengths, methods and ratios into each."
        )
    return found


# --- folders ---------------------------------------------------------------------------------------------------------


def names_of(folders: Sequence[Results]) -> list[str]:
    """A name for each folder: its own, or the path as given where two have one name."""
    short = [each.folder.resolve().name for each in folders]
    return short if len(set(short)) == len(short) else [str(each.folder) for each in folders]


def labels_of(folders: Sequence[Results]) -> list[str]:
    """A column's head for each folder: its name, and the adapter as it was asked for; the fingerprint where that is not known."""
    return [f"{name} ({adapter_of(each)})" for name, each in zip(names_of(folders), folders, strict=True)]


def adapter_of(results: Results) -> str:
    """The adapter as it was asked for, or else its fingerprint; and whether it is untrained."""
    names = (results.origin or {}).get("models", [])
    found = ", ".join(names) or short_fingerprint(str(results.model.get("adapter_fingerprint", "unknown adapter")))
    return found if results.model.get("is_trained", True) else f"{found}, untrained"


def _open(paths: Sequence[str | Path]) -> list[Results]:
    if len(paths) < 2:
        raise InputError(f"A comparison takes two folders of results or more; got {len(paths)}. Name another one.")
    known = [Path(path).resolve() for path in paths]
    twice = next((path for path, place in zip(paths, known, strict=True) if known.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice. Name each folder once.")
    return [Results(path) for path in paths]


def _tasks(folders: Sequence[Results], wanted: Sequence[str]) -> list[str]:
    known = list(dict.fromkeys(task for results in folders for task in results.run["tasks"]))
    for task in wanted:
        if task not in known:
            raise InputError(f"No folder has a task {task!r}. Use some of {', '.join(known) or 'none'}.")
    return [task for task in known if not wanted or task in wanted]


# --- what may be compared --------------------------------------------------------------------------------------------


def _check_base(first: Results, other: Results, name: str, other_name: str) -> None:
    ours, theirs = (str(each.model.get("base_fingerprint")) for each in (first, other))
    if not is_same_fingerprint(ours, theirs):
        raise MismatchError(
            f"{name} and {other_name} are of different base models ({_base_text(first)}, {_base_text(other)}), and what they "
            "score says nothing of their adapters. Compare folders of one base model."
        )


def _base_text(results: Results) -> str:
    return f"{results.model.get('base_model')}, fingerprint {short_fingerprint(str(results.model.get('base_fingerprint')))}"


def _check_task(task: str, folders: Sequence[Results], names: Sequence[str]) -> None:
    """Refuse a task that two folders have with other settings, or on other tokens."""
    those = [(name, each) for name, each in zip(names, folders, strict=True) if task in each.run["tasks"]]
    first_name, first = those[0]
    for name, other in those[1:]:
        ours, theirs = (_measured(each, task) for each in (first, other))
        differing = first_difference(ours, theirs)
        if differing is None:
            continue
        raise MismatchError(
            f"{first_name} and {name} did not measure the same {task}: {differing} is {_value(ours, differing)} in {first_name}, "
            f"{_value(theirs, differing)} in {name}. {_way_out(differing, ours, theirs)}, or name other tasks with --tasks."
        )


def _measured(results: Results, task: str) -> dict[str, Any]:
    """All that a task's samples and their scores depend on, besides the model."""
    facts = results.run["tasks"][task]
    tokens = {"chunk_size": results.model.get("chunk_size")} if facts["quality"] == "nats" else {}
    return {**facts["settings"], **tokens}


def _value(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not noted"


def _way_out(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if name == "chunk_size":
        return "Its loss is taken after the first chunk, so on other tokens: compare adapters of one chunk size"
    if name == CONTENTS and CONTENTS in ours and CONTENTS in theirs:
        return "Files of one name have other contents: run it on the same ones"
    if name == CONTENTS:
        known = json.dumps({CONTENTS: {**ours, **theirs}[CONTENTS]})[1:-1]
        return f"If you know that the files are the same, add {known} to its settings in the run.json that lacks them"
    return "Run it anew with the same settings"


# --- sample by sample ------------------------------------------------------------------------------------------------


def _compare_task(found: Comparison, task: str) -> None:
    """Add the lines of a task, and what is in some folders only: the whole of it, a length, a way, or some samples."""
    quality = next(each.run["tasks"][task]["quality"] for each in found.folders if task in each.run["tasks"])
    records = [[record for record in each.of_task(task) if quality in record] for each in found.folders]
    if not _all_have(found, records, task):
        return
    for length in lengths_of(_joined(records)):
        those = [select(each, length=length) for each in records]
        if _all_have(found, those, f"{task} {length:,}"):
            _compare_ways(found, task, length, quality, those)


def _compare_ways(found: Comparison, task: str, length: int, quality: str, records: Sequence[Sequence[Record]]) -> None:
    ways = ways_of(_joined(records))
    lacking: dict[Owners, list[Way]] = {}
    more: dict[tuple[Owners, int], list[Way]] = {}
    for way in ways:
        own = [select(each, method=way.method, ratio=way.ratio) for each in records]
        owners = _owners(own)
        if len(owners) < len(own):
            lacking.setdefault(owners, []).append(way)
            continue
        values = [{str(record["sample"]): float(record[quality]) for record in each} for each in own]
        for owners, count in _unshared_samples(values):
            more.setdefault((owners, count), []).append(way)
        columns = paired(*values)
        if columns[0]:
            means = [mean(column) for column in columns]
            found.lines.append(Line(task, length, way, quality, means, _differences(columns)))
    for owners, those in lacking.items():
        _note(found, owners, f"{task} {length:,} {_ways_text(those)}")
    for (owners, count), those in more.items():
        of = "" if len(those) == len(ways) else f" {_ways_text(those)}"
        _note(found, owners, f"{count} {'sample' if count == 1 else 'samples'} of {task} {length:,}{of}")


def _ways_text(ways: Sequence[Way]) -> str:
    """Such as "full, beacons x4 x8"."""
    ratios: dict[str, list[str]] = {}
    for way in ways:
        ratios.setdefault(way.method, []).extend([] if way.ratio is None else [f"x{way.ratio}"])
    return ", ".join(" ".join([method, *those]) for method, those in ratios.items())


def _differences(columns: Sequence[Sequence[float]]) -> list[Estimate]:
    return [mean_difference(column, columns[0]) for column in columns[1:]]


def _all_have(found: Comparison, records: Sequence[Sequence[Record]], text: str) -> bool:
    """Whether no folder is without such records; what only some have is noted."""
    owners = _owners(records)
    if owners and len(owners) < len(records):
        _note(found, owners, text)
    return len(owners) == len(records)


def _owners(records: Sequence[Sequence[Record]]) -> Owners:
    return tuple(place for place, each in enumerate(records) if each)


def _unshared_samples(values: Sequence[Mapping[str, float]]) -> Iterator[tuple[Owners, int]]:
    """How many samples are in some folders only, and in which."""
    counts: dict[Owners, int] = {}
    for sample in {sample: None for each in values for sample in each}:
        owners = tuple(place for place, each in enumerate(values) if sample in each)
        counts[owners] = counts.get(owners, 0) + 1
    yield from ((owners, count) for owners, count in counts.items() if len(owners) < len(values))


def _note(found: Comparison, owners: Owners, text: str) -> None:
    found.unshared.setdefault(owners, []).append(text)


def _joined(records: Iterable[Sequence[Record]]) -> list[Record]:
    return [record for each in records for record in each]
