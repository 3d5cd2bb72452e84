"""Documents that a user gives: read from files, and cut to texts of a given length in tokens."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from activation_beacon.errors import FileFormatError, InputError, StorageError

WINDOW = 2**27  # bytes that a .zst file may ask for
CHARACTERS_PER_TOKEN = 8  # more than texts have; a text that has more is tokenised whole
MARGIN = 64  # last tokens of a cut text, which the cut may have changed
KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: its own, or file and line.
        text: all of it.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Text:
    """The beginning of a document, as tokens."""

    id: str
    ids: list[int]


def read_documents(paths: Sequence[str | Path], *, field: str = "text") -> Iterator[Document]:
    """Documents of files in the order given: one of each .txt or .md, one of each line of .jsonl, .jsonl.gz, .jsonl.zst.

    Args:
        paths: the files.
        field: where a line's text stands.

    Raises:
        StorageError: if a file cannot be read.
        FileFormatError: for an unknown kind of file, or a line that is no record with a text.
    """
    for name in paths:
        path = Path(name)
        if path.suffix in (".txt", ".md"):
            yield Document(path.name, _whole_text(path))
        else:
            for number, record in read_records(path):
                yield Document(str(record.get("id", f"{path.name}:{number}")), _text_of(record, field, path, number))


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a .jsonl file, compressed or not; empty lines are passed over.

    Raises:
        StorageError: if the file cannot be read.
        FileFormatError: for another kind of file, or a line that is no JSON object.
    """
    path = Path(path)
    with open_text(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if line.strip():
                yield number, _record(line, path, number)


def open_text(path: Path) -> IO[str]:
    """A .jsonl, .jsonl.gz or .jsonl.zst file, to be read as UTF-8.

    Raises:
        StorageError: if it cannot be opened.
        FileFormatError: for another kind of file.
    """
    if not path.name.endswith(KINDS):
        raise FileFormatError(f"{path} is of no known kind. Give one of {', '.join(KINDS)}.")
    if not path.is_file():
        raise StorageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Name a file of documents.")
    try:
        if path.suffix == ".zst":
            return _open_zst(path)
        if path.suffix == ".gz":
            import gzip

            return gzip.open(path, "rt", encoding="utf-8")
        return path.open(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error


def texts(
    documents: Iterator[Document], tokenizer: Any, *, length: int, limit: int | None = None, prefix: Sequence[int] = ()
) -> Iterator[Text]:
    """The first `length` tokens of each document that has so many; shorter ones are passed over.

    Args:
        documents: to be cut.
        tokenizer: of the base model.
        length: tokens of a text, the prefix among them.
        limit: texts at most.
        prefix: ids that open every text, such as a beginning-of-text token.
    """
    found = 0
    for document in documents:
        if limit is not None and found >= limit:
            return
        ids = first_ids(tokenizer, document.text, length - len(prefix))
        if ids is not None:
            found += 1
            yield Text(document.id, [*prefix, *ids])


def first_documents(paths: Sequence[str | Path], *, num_tokens: int) -> str:
    """As many documents as surely hold `num_tokens`, one after the other, with a blank line between them."""
    found, size = [], 0
    for document in read_documents(paths):
        found.append(document.text)
        size += len(document.text)
        if size > CHARACTERS_PER_TOKEN * num_tokens:
            break
    return "\n\n".join(found)


def first_ids(tokenizer: Any, text: str, count: int) -> list[int] | None:
    """The first `count` tokens of a text, without special ones; None if it has fewer."""
    size = CHARACTERS_PER_TOKEN * (count + MARGIN)
    for part in dict.fromkeys((text[:size], text)):
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count + (MARGIN if len(part) < len(text) else 0):
            return ids[:count]
    return None


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: a beginning-of-text token, or nothing."""
    with_special = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []


def _whole_text(path: Path) -> str:
    if not path.is_file():
        raise StorageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Name a file of documents.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 at offset {error.start}. Convert it first.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error


def _open_zst(path: Path) -> IO[str]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f'{path} needs zstandard: pip install "activation-beacon[eval]".') from error
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(path.open("rb"), closefd=True)
    return io.TextIOWrapper(reader, encoding="utf-8")


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    """Lines of a file; what is wrong with its bytes is named."""
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is damaged or cut short after line {number} ({error}). Get it again.") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise FileFormatError(f"{path} is damaged or cut short after line {number} ({error}). Get it again.") from error


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise FileFormatError(f"{path}, line {number} is not JSON ({error}). Mend or remove it.") from error
    if not isinstance(record, Mapping):
        raise FileFormatError(f"{path}, line {number} is a {type(record).__name__}, not an object with fields.")
    return dict(record)


def _text_of(record: Mapping[str, Any], field: str, path: Path, number: int) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        fields = ", ".join(sorted(record)) or "none"
        raise FileFormatError(f'{path}, line {number} has no text in "{field}". Its fields: {fields}.')
    return text
