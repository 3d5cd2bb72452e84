"""Results on disk: one JSON line for each finished sample, and beside them what they were measured on.

A run that was killed is continued by opening its folder again: what is finished is kept, a line cut short is dropped. Where several
processes run together, each but the first appends to a file of its own, which the first takes in.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from activation_beacon import __version__
from activation_beacon.errors import FileFormatError, MismatchError, StorageError, reason
from activation_beacon.files import make_folder, write_text
from activation_beacon.json_lines import append_lines, lines_from, read_lines

RESULTS, HARNESS, RUN = "results.jsonl", "harness.jsonl", "run.json"
CONTENTS = "sha256"  # the setting that tells files of one name apart
PART = "results-{}.jsonl"  # what a process that is not the first has finished
UNTOLD = {"local_tokens": 0}  # what is so of a model where run.json does not say
FORMAT_VERSION = 1


class Key(NamedTuple):
    """What one line is the result of."""

    task: str
    method: str
    ratio: int | str | None
    length: int
    sample: str


class Results:
    """The results of one folder.

    Args:
        folder: made if it is missing.
        model: what is measured, in plain values; None to read only.
        name: of the model, as it was asked for; noted, and not compared.
        rank: of the process, which must not write where another one does. The first must have opened the folder before the others.

    Raises:
        StorageError: if the folder cannot be read or made.
        MismatchError: if it holds results of another model.
        FileFormatError: if a file in it is damaged.
    """

    def __init__(
        self, folder: str | Path, model: Mapping[str, Any] | None = None, *, name: str | None = None, rank: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.name, self.rank = name, rank
        if model is None and not (self.folder / RUN).is_file():
            raise StorageError(f"{self.folder} holds no results ({RUN} is missing). Name a folder of `beacon eval`.")
        self.records: dict[Key, dict[str, Any]] = {}
        self.run = self._read_run()
        if model is not None:
            make_folder(self.folder)
            self._check_model(dict(model))
        for path in (self.folder / RESULTS, *self._parts()):
            is_own = model is not None and path == self.path
            for record in read_lines(path) if is_own else lines_from(path, 0)[0]:  # others may be writing theirs
                self.records[key_of(record)] = record
        if model is not None and rank == 0:
            self.gather()

    @property
    def path(self) -> Path:
        """The file of lines that this process appends to."""
        return self.folder / (PART.format(self.rank) if self.rank else RESULTS)

    def gather(self) -> None:
        """Take in what other processes have finished; for the first one, when the others do not write.

        Raises:
            StorageError: if a file cannot be read, written or removed.
        """
        parts = self._parts()
        known = {key_of(record) for record in read_lines(self.path)} if parts else set()
        for path in parts:
            others = {key_of(record): record for record in lines_from(path, 0)[0]}
            if others.keys() - known:
                self._note_origin(datetime.fromtimestamp(path.stat().st_mtime, UTC))
            append_lines(self.path, [record for key, record in others.items() if key not in known])
            known |= others.keys()
            self.records |= others
            try:
                path.unlink()
            except OSError as error:
                raise StorageError(
                    f"{path} cannot be removed: {reason(error)}. Remove it: it has been taken in."
                ) from error

    @property
    def model(self) -> dict[str, Any]:
        """What was measured."""
        return self.run["model"]

    @property
    def origin(self) -> dict[str, Any] | None:
        """Who ran the samples, and when; None for a folder from before this was noted.

        `models` and `versions` are those of the model and the package, in the order in which they came; `first` and `last` the
        dates of samples, in UTC; `first` is None where there are samples from before dates were noted.
        """
        return self.run.get("origin")

    def note_run(self) -> None:
        """Take note of who runs a sample now; on disk when this returns. Of several processes the first one does."""
        if self.rank == 0:
            self._note_origin(datetime.now(UTC))

    def open_task(self, name: str, settings: Mapping[str, Any], quality: str) -> None:
        """Begin or continue a task.

        Raises:
            MismatchError: if the folder holds results of the task with other settings.
        """
        wanted = json.loads(json.dumps({"settings": dict(settings), "quality": quality}))
        known = self.run["tasks"].get(name)
        if known is not None and known != wanted:
            raise MismatchError(self._difference(name, known["settings"], wanted["settings"]))
        if known is None:
            self.run["tasks"][name] = wanted
            self._write_run()

    def _difference(self, name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        """What keeps a task from being gone on with, and the way out."""
        first = first_difference(theirs, ours) or "quality"
        if first == CONTENTS and CONTENTS in ours:
            return self._other_contents(name, theirs.get(CONTENTS), ours[CONTENTS])
        return (
            f"{self.folder} holds results of {name} with {first} {theirs.get(first)!r}; this run has {ours.get(first)!r}. "
            "Choose another folder, or the same settings."
        )

    def _other_contents(self, name: str, theirs: Any, ours: Any) -> str:
        if theirs is None:
            return (
                f"{self.folder} holds results of {name} from before the contents of files were noted: whether they are of these "
                f"files cannot be told. Choose another folder; or, if you know that they are, add "
                f"{json.dumps({CONTENTS: ours})[1:-1]} to the settings of {name} in {self.folder / RUN}."
            )
        return (
            f"{self.folder} holds results of {name} on files of these names with other contents (SHA-256 {_listed(theirs)}; "
            f"these have {_listed(ours)}). Choose another folder, or the files that it was begun with."
        )

    def add(self, key: Key, fields: Mapping[str, Any]) -> None:
        """Append a finished sample; it is on disk when this returns.

        Raises:
            StorageError: if it cannot be written.
        """
        self.note_run()
        record = json.loads(json.dumps({**key._asdict(), **fields}))
        append_lines(self.path, [record])
        self.records[key] = record

    def of_task(self, name: str) -> list[dict[str, Any]]:
        """All records of a task, in an order that does not depend on when each was finished."""
        keys = sorted((key for key in self.records if key.task == name), key=lambda key: tuple(map(str, key)))
        return [self.records[key] for key in keys]

    def _note_origin(self, time: datetime) -> None:
        """Once for each model, version and day."""
        day = time.date().isoformat()
        known = self.origin or {"models": [], "versions": [], "first": None if self._has_older() else day, "last": day}
        names = [] if self.name is None else [self.name]
        origin = {
            "models": list(dict.fromkeys([*known["models"], *names])),
            "versions": list(dict.fromkeys([*known["versions"], __version__])),
            "first": known["first"] and min(known["first"], day),
            "last": max(known["last"], day),
        }
        if origin != self.origin:
            self.run["origin"] = origin
            self._write_run()

    def _has_older(self) -> bool:
        """Whether there are results of which nothing is noted."""
        return any(path.is_file() and path.stat().st_size for path in map(self.folder.joinpath, (RESULTS, HARNESS)))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(PART.format("*")))

    def _check_model(self, model: dict[str, Any]) -> None:
        if not self.run["model"]:
            self.run["model"] = model
            self._write_run()
        for name, ours in model.items():
            theirs = self.run["model"].get(name, UNTOLD.get(name))
            if theirs != ours:
                raise MismatchError(
                    f"{self.folder} holds results of another model ({name} {theirs}, this one has {ours}). "
                    "Choose another folder."
                )

    def _read_run(self) -> dict[str, Any]:
        path = self.folder / RUN
        if not path.is_file():
            return {"format_version": FORMAT_VERSION, "model": {}, "tasks": {}}
        try:
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileFormatError(
                f"{path} is damaged ({reason(error)}). Remove the folder and run it again."
            ) from error
        if run.get("format_version") != FORMAT_VERSION:
            raise FileFormatError(
                f"{path} has format version {run.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
                "Use the one that wrote it."
            )
        return run

    def _write_run(self) -> None:
        write_text(self.folder / RUN, json.dumps(self.run, indent=2, ensure_ascii=False) + "\n")


def _listed(digests: Sequence[str | None]) -> str:
    return ", ".join(map(str, digests))


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first setting that differs, contents of files last; None where none does."""
    differing = (key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    return min(differing, key=lambda key: (key == CONTENTS, key), default=None)


def key_of(record: Mapping[str, Any]) -> Key:
    """What a record is the result of."""
    return Key(*(record[name] for name in Key._fields))
