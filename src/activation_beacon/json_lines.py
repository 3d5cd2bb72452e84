"""JSON lines that grow: each is on disk before it counts, and one that a crash cut short does not count."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from activation_beacon.errors import FileFormatError, StorageError, reason


def append_lines(path: Path, values: Iterable[Any], *, way_out: str = "free space and run it again") -> None:
    """Append a line for each value; they are on disk when this returns.

    Args:
        path: of the file.
        values: plain ones.
        way_out: what to do where they cannot be written.

    Raises:
        StorageError: if they cannot be written.
    """
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    try:
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {reason(error)}. What is finished is kept; {way_out}."
        ) from error


def read_lines(path: Path) -> list[Any]:
    """The values of a file that is gone on with, none where there is no file; a line that was cut short is dropped from it.

    Raises:
        StorageError: if it cannot be read.
        FileFormatError: if a line is damaged.
    """
    values, stop = lines_from(path, 0)
    try:
        if path.is_file() and path.stat().st_size > stop:
            os.truncate(path, stop)
    except OSError as error:
        raise StorageError(f"{path} cannot be mended: {reason(error)}. Copy the folder to one of your own.") from error
    return values


def lines_from(path: Path, start: int) -> tuple[list[Any], int]:
    """The values of whole lines from a byte on, and the byte after them: what another process has added meanwhile.

    Raises:
        StorageError: if it cannot be read.
        FileFormatError: if a line is damaged.
    """
    if not path.is_file():
        return [], start
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}.") from error
    whole = content[: content.rfind(b"\n") + 1]
    values = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            after = f" after byte {start:,}" if start else ""
            raise FileFormatError(f"{path}, line {number}{after} is not JSON. Remove that line.") from error
    return values, start + len(whole)
