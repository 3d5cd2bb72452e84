"""Texts that come in and files that go out, checked before any model is loaded."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from activation_beacon.errors import FileFormatError, InputError, StorageError, reason

STDIN = "-"
BYTE_ORDER_MARK = "\ufeff"
GAP = "\n\n"
PROBE = 4096


def read_texts(names: Sequence[str]) -> str:
    """One text of several files, in order, with a blank line between them.

    Args:
        names: paths of UTF-8 files; "-" once at most for standard input.

    Raises:
        StorageError: if a file cannot be read.
        InputError: if one is empty, binary, or not UTF-8.
    """
    if names.count(STDIN) > 1:
        raise InputError("Standard input (-) can be read once; it is named twice. Name it once.")
    texts = [read_text(name) for name in names]
    return texts[0] if len(texts) == 1 else GAP.join(text.strip("\n") for text in texts)


def read_text(name: str) -> str:
    """One text; see `read_texts`."""
    shown = "Standard input" if name == STDIN else name
    text = _decoded(_bytes_of_stdin() if name == STDIN else _bytes_of(Path(name)), shown)
    if not text:
        raise InputError(f"{shown} is empty: there is no text to compress.")
    if text.isspace():
        raise InputError(f"{shown} holds nothing but white space: there is no text to compress.")
    return text.removeprefix(BYTE_ORDER_MARK)


def check_stdin_open() -> None:
    """Refuse to read where nothing can come from.

    Raises:
        StorageError: if standard input is closed.
    """
    if sys.stdin is None:
        raise StorageError("Standard input is closed. Leave it open, or send something through a pipe.")


def _bytes_of_stdin() -> bytes:
    check_stdin_open()
    return sys.stdin.buffer.read()


def _bytes_of(path: Path) -> bytes:
    if not path.exists():
        raise StorageError(f"{path} does not exist. Name a UTF-8 text file, or - for standard input.")
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Name a UTF-8 text file, or - for standard input.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}.") from error


def _decoded(content: bytes, shown: str) -> str:
    zero = content.find(b"\0")
    if zero >= 0:
        raise InputError(
            f"{shown} is a binary file (or UTF-16): it has a NUL byte at offset {zero}. Convert it to UTF-8 text first."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{shown} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}. "
            "Convert it first, for example with iconv -f LATIN1 -t UTF-8."
        ) from error


def check_output(path: Path, *, force: bool, example: str = "book.beacon") -> None:
    """Refuse now a file that could not be written after minutes of work.

    Raises:
        StorageError: if its folder is missing or closed, a file of that name exists and `force` is not given, or what
            exists is no regular file.
    """
    folder = path.parent
    if not folder.is_dir():
        raise StorageError(f"{path} cannot be written: there is no folder {folder}. Make it, or choose another place.")
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Name a file, such as {path / example}.")
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is a device, a pipe or the like, not a file. Name a file, such as {example}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: the folder {folder} is closed to you. Choose another place.")
    if path.exists() and not force:
        raise StorageError(f"{path} exists already. Choose another name, or replace it with --force.")


def check_is_no_text(path: Path) -> None:
    """Refuse a text where a compressed context is due.

    Raises:
        FileFormatError: naming the command that makes a context of a text.
    """
    if not path.is_file():
        return  # whoever opens it says why it cannot
    with path.open("rb") as file:
        start = file.read(PROBE)
    if start and b"\0" not in start and _is_text(start):
        raise FileFormatError(
            f"{path} is a text, not a compressed context. Compress it first: "
            f"beacon compress {path} -o {path.with_suffix('.beacon')}"
        )


def _is_text(start: bytes) -> bool:
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(start) == PROBE and error.start > PROBE - 4  # a character cut in two
    return True
