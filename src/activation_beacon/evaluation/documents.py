"""Documents that a user gives: read from files, and cut to texts of a given length in tokens."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_beacon.data.data_files import file_entry, source_entries
from activation_beacon.data.sources import OnError, ReadReport, documents, documents_of_kinds

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 8  # more than texts have; a text that has more is tokenised whole
MARGIN = 64  # last tokens of a cut text, which the cut may have changed
DIGITS = 16  # of a digest


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: its own, or file and line.
        text: all of it.
        kind: of which it is; "" where nobody asked.
    """

    id: str
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Text:
    """The beginning of a document, as tokens; its kind, "" where nobody asked."""

    id: str
    ids: list[int]
    kind: str = ""


def read_documents(
    sources: Sequence[str | Path],
    *,
    field: str = "text",
    kind_field: str | None = None,
    on_error: OnError = "stop",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents in the order given: files, folders, globs or hub data sets, as `data.sources.documents` reads them.

    Args:
        sources: where they stand.
        field: where a record's text stands.
        kind_field: where its kind stands; None for documents of no kind.
        on_error: what becomes of a record without one.
        report: counts are added to it, and the caller tells them; without one, what was left out is logged when the
            reading ends, be it that no more documents are asked for.

    Raises:
        StorageError: if a file cannot be read.
        FileFormatError: for an unknown kind of file.
        InputError: for a record that has no text, or no kind, unless such are skipped.
    """
    counts = ReadReport() if report is None else report
    try:
        if kind_field is None:
            for name, text in documents(sources, text_field=field, on_error=on_error, report=counts):
                yield Document(name, text)
            return
        for found in documents_of_kinds(
            sources, kind_field=kind_field, text_field=field, on_error=on_error, report=counts
        ):
            yield Document(*found)
    finally:
        if report is None and counts.skipped:
            logger.warning("Documents: %s", counts.summary())


def digests(sources: Iterable[str | Path]) -> list[str | None]:
    """The first digits of each source's SHA-256; None for a hub data set.

    That of a file is its own, that of a folder or glob is one over those of its files.

    Raises:
        StorageError: if a file cannot be read.
        FileFormatError: for an unknown kind of file.
    """
    return [_digest(source_entries(source)) for source in sources]


def folder_digest(folder: Path) -> str:
    """The first digits of one SHA-256 over all that lies in a folder, but for what is hidden and what Python makes there.

    Raises:
        StorageError: if a file cannot be read.
    """
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(name for name in files if not any(part == "__pycache__" or part[0] == "." for part in name.parts))
    entries = [file_entry(files[name], name.as_posix()) for name in names]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:DIGITS]


def _digest(entries: Sequence[Mapping[str, Any]]) -> str | None:
    found = [entry.get("sha256") for entry in entries]
    whole = hashlib.sha256(json.dumps(entries).encode()).hexdigest() if len(found) > 1 else found[0]
    return whole and whole[:DIGITS]


def texts(
    found: Iterator[Document], tokenizer: Any, *, length: int, limit: int | None = None, prefix: Sequence[int] = ()
) -> Iterator[Text]:
    """The first `length` tokens of each document that has so many; shorter ones are passed over.

    Args:
        found: documents to be cut.
        tokenizer: of the base model.
        length: tokens of a text, the prefix among them.
        limit: texts at most.
        prefix: ids that open every text, such as a beginning-of-text token.
    """
    count = 0
    for document in found:
        if limit is not None and count >= limit:
            return
        ids = first_ids(tokenizer, document.text, length - len(prefix))
        if ids is not None:
            count += 1
            yield Text(document.id, [*prefix, *ids], document.kind)


def told_apart(names: Iterable[str]) -> Iterator[str]:
    """The names, with "#2" and so on at those that came before."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


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
