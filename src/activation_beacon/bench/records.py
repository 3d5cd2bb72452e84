"""Finished runs on disk, one JSON line each, so that a measurement that was broken off goes on where it stood."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from activation_beacon.bench.measure import Cell
from activation_beacon.bench.timing import Run
from activation_beacon.errors import MismatchError
from activation_beacon.files import make_folder
from activation_beacon.json_lines import append_lines, read_lines

FILE = "speed.jsonl"


class Records:
    """Runs by their cells, in memory and, where a folder is named, on disk.

    Args:
        folder: made if missing; None to keep nothing.
        setting: what all runs have in common: model, device, threads and the like, in plain values.

    Raises:
        MismatchError: if the folder holds runs of another setting.
        StorageError: if it cannot be read or written.
        FileFormatError: if a line is damaged.
    """

    def __init__(self, folder: str | Path | None, setting: Mapping[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.setting = json.loads(json.dumps(setting))
        self.runs: dict[Cell, Run] = {}
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        make_folder(path.parent, "Choose another --output.")
        values = read_lines(path)
        if not values:
            append_lines(path, [self.setting])
        elif values[0] != self.setting:
            theirs = values[0]
            name = sorted(key for key in {*theirs, *self.setting} if theirs.get(key) != self.setting.get(key))[0]
            raise MismatchError(
                f"{path} holds runs with {name} {theirs.get(name)!r}; this one has {self.setting.get(name)!r}. "
                "Choose another --output, or the same settings."
            )
        self.runs |= {Cell(**value["cell"]): Run(**value["run"]) for value in values[1:]}

    def add(self, cell: Cell, run: Run) -> None:
        """Keep a finished run, at once.

        Raises:
            StorageError: if it cannot be written.
        """
        self.runs[cell] = run
        if self.path is not None:
            append_lines(self.path, [{"cell": cell._asdict(), "run": run.to_dict()}])
