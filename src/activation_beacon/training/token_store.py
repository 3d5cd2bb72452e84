"""Tokenised documents on disk, opened by mmap: made once from the sources, by several processes, and found again.

A store's folder is named after what it was made from, moved into place when it is complete, and never changed. Knows
nothing of chunks or samples.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from activation_beacon.data.data_files import Source, list_sources, source_entries
from activation_beacon.data.sources import OnError, ReadReport, documents
from activation_beacon.errors import ConfigError, FileFormatError, InputError, StorageError, reason
from activation_beacon.files import build_folder

STORE_FORMAT = "activation-beacon tokens"
STORE_VERSION = 1
HEADER_FILE, TOKENS_FILE, OFFSETS_FILE, IDS_FILE = "header.json", "tokens.npy", "offsets.npy", "ids.json"
NAME_DIGITS = 16
BATCH_CHARACTERS = 1 << 20  # a worker's job: many short documents or one long one

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class BuildProgress:
    """How far the building of a store is.

    Attributes:
        documents: tokenised and kept.
        tokens: of those documents.
        bytes_done: of the sources, as they stand on disk.
        bytes_total: the same when all is done; 0 where a hub data set is among the sources, or not all is wanted.
    """

    documents: int
    tokens: int
    bytes_done: int
    bytes_total: int


class TokenStore:
    """Tokens of many documents, in the order of their sources.

    Args:
        folder: that `build_token_store` made.
        left_out: numbers of documents that are passed over, as if they were not there.

    Attributes:
        header: what the store was made from, and its sizes.
        ids: of the documents.
        lengths: tokens of each document.

    Raises:
        StorageError: if there is no store.
        FileFormatError: if it is damaged, incomplete, or not one of ours.
    """

    def __init__(self, folder: str | Path, left_out: Sequence[int] = ()) -> None:
        self.folder, self.left_out = Path(folder), tuple(left_out)
        self.header = _read_header(self.folder)
        try:
            self._tokens: Tokens = np.load(self.folder / TOKENS_FILE, mmap_mode="r", allow_pickle=False)
            self._offsets: npt.NDArray[np.int64] = np.load(self.folder / OFFSETS_FILE, allow_pickle=False)
            self.ids: list[str] = json.loads((self.folder / IDS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(self.folder, reason(error)) from error
        sizes = (len(self.ids), len(self._offsets) - 1, len(self._tokens), int(self._offsets[-1]))
        if sizes != (self.header.get("documents"),) * 2 + (self.header.get("tokens"),) * 2:
            raise _damaged(self.folder, "its files have other lengths than its header says")
        self._kept = np.delete(np.arange(len(self.ids)), self.left_out)
        self.ids = [self.ids[number] for number in self._kept] if left_out else self.ids
        self.lengths = np.diff(self._offsets)[self._kept]

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, tuple[int, ...]]]:
        return TokenStore, (self.folder, self.left_out)  # a memory map would be pickled with all that it maps

    @property
    def num_tokens(self) -> int:
        """Of all documents together."""
        return int(self.lengths.sum())

    @property
    def summary(self) -> str:
        """One line on what was read and what was left out when the store was made."""
        return self.header["summary"]

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits for all tokens and the bounds of documents, whatever they were made from."""
        digest = hashlib.sha256(self._offsets.data)
        digest.update(self._tokens.data)
        if self.left_out:
            digest.update(json.dumps(self.left_out).encode())
        return digest.hexdigest()[:NAME_DIGITS]

    def document(self, index: int) -> Tokens:
        """Tokens of one document, as they lie on disk.

        Raises:
            IndexError: if there is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no document {index}: the store holds {len(self)}, counted from 0.")
        number = self._kept[index]
        return self._tokens[self._offsets[number] : self._offsets[number + 1]]

    def without(self, other: "TokenStore") -> "TokenStore":
        """The same documents but for those that another store holds too, token by token; this store where there are none."""
        known = {_digest_of(other.document(number)) for number in range(len(other))}
        lengths = set(other.lengths.tolist())
        shared = [
            int(self._kept[number])
            for number, length in enumerate(self.lengths.tolist())
            if length in lengths and _digest_of(self.document(number)) in known
        ]
        return TokenStore(self.folder, sorted({*self.left_out, *shared})) if shared else self


def _digest_of(tokens: Tokens) -> bytes:
    return hashlib.sha256(tokens.tobytes()).digest()


def build_token_store(
    sources: Source | Sequence[Source],
    tokenizer: Any,
    folder: str | Path,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    workers: int = 0,
    on_error: OnError = "skip",
    exclude: Collection[str] = (),
    text_field: str = "text",
    progress: Callable[[BuildProgress], None] | None = None,
    report: ReadReport | None = None,
    purpose: str = "to train on",
    way_out: str = "Name other sources.",
) -> TokenStore:
    """Tokenise documents into a store, or open the one that was made of the same sources in the same way.

    Documents are tokenised whole and without special tokens. Files are known again by name and contents, wherever they
    lie; a hub data set by its name alone.

    Args:
        sources: as `documents` reads them.
        tokenizer: of the base model.
        folder: under which stores are kept, each in a folder of its own.
        min_tokens: shorter documents are left out, and counted.
        max_tokens: the document that reaches so many together is the last, as data sets may be without end; None for all.
            What `report` counts may then include documents that were read ahead.
        workers: processes that tokenise; 0 tokenises in this one. The store is the same whatever their number.
        on_error: what to do with a bad record.
        exclude: ids to leave out, with their parts.
        text_field: the field that holds the text.
        progress: is called after each batch of documents.
        report: counts are added to it; left alone where a store is only opened (see `TokenStore.summary`).
        purpose, way_out: what the documents are for, and what to do where none is left, for the message.

    Raises:
        InputError: if no document is left, or at a bad record with `on_error` "stop".
        StorageError: if a source cannot be read, or the store not be written.
        FileFormatError: if a source's format is not known, or the store that is there is damaged.
    """
    for name, value, least in (("min_tokens", min_tokens, 1), ("max_tokens", max_tokens, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}; got {value}.")
    settings = {
        "min_tokens": min_tokens,
        "on_error": on_error,
        "exclude": sorted({exclude} if isinstance(exclude, str) else exclude),
        "text_field": text_field,
        **({} if max_tokens is None else {"max_tokens": max_tokens}),
    }
    entries = [entry for source in list_sources(sources) for entry in source_entries(source)]
    origin = {"sources": entries, "tokenizer": tokenizer_fingerprint(tokenizer), "settings": settings}
    target = Path(folder) / _digest(origin)[:NAME_DIGITS]
    if (target / HEADER_FILE).exists():
        return TokenStore(target)
    report = ReadReport() if report is None else report
    texts = documents(sources, text_field=text_field, exclude=exclude, on_error=on_error, report=report)
    total = 0 if max_tokens is not None else _bytes_total(entries)
    job = _Job(tokenizer, _dtype(tokenizer), min_tokens, max_tokens, workers, report, progress, total, purpose, way_out)
    try:
        build_folder("the training texts", target, lambda aside: _write_store(aside, texts, job, origin))
    except StorageError:
        if not (target / HEADER_FILE).exists():  # another process may have built the same
            raise
    return TokenStore(target)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits for all that decides how a tokenizer splits texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])[:NAME_DIGITS]
    parts = json.loads(backend.to_str())
    kept = {key: part for key, part in parts.items() if key not in ("truncation", "padding", "post_processor")}
    return _digest(kept)[:NAME_DIGITS]


# --- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What the making of one store needs."""

    tokenizer: Any
    dtype: type[np.unsignedinteger[Any]]
    min_tokens: int
    max_tokens: int | None
    workers: int
    report: ReadReport
    progress: Callable[[BuildProgress], None] | None
    bytes_total: int
    purpose: str
    way_out: str

    def is_full(self, num_tokens: int) -> bool:
        return self.max_tokens is not None and num_tokens >= self.max_tokens

    def tell(self, num_documents: int, num_tokens: int) -> None:
        if self.progress is not None:
            self.progress(BuildProgress(num_documents, num_tokens, self.report.bytes_read, self.bytes_total))


class _Batch(NamedTuple):
    ids: list[str]
    texts: list[str]


def _write_store(folder: Path, texts: Iterable[tuple[str, str]], job: _Job, origin: Mapping[str, Any]) -> None:
    ids, offsets = [], [0]
    with (folder / TOKENS_FILE).open("w+b") as file, closing(_tokenised(_batches(texts), job)) as batches:
        _write_array_header(file, job.dtype, 0)
        for names, tokenised in batches:
            for name, tokens in zip(names, tokenised, strict=True):
                if job.is_full(offsets[-1]):
                    break
                if len(tokens) < job.min_tokens:
                    job.report.skip(f"shorter than {job.min_tokens} tokens", name)
                    continue
                file.write(tokens.data)
                ids.append(name)
                offsets.append(offsets[-1] + len(tokens))
            job.tell(len(ids), offsets[-1])
            if job.is_full(offsets[-1]):
                break
        file.seek(0)
        _write_array_header(file, job.dtype, offsets[-1])
    if not ids:
        raise InputError(f"No document is left {job.purpose}: {job.report.summary()} {job.way_out}")
    np.save(folder / OFFSETS_FILE, np.asarray(offsets, dtype=np.int64), allow_pickle=False)
    (folder / IDS_FILE).write_text(json.dumps(ids), encoding="utf-8")
    sizes = {"documents": len(ids), "tokens": offsets[-1], "summary": job.report.summary()}
    header = {"format": STORE_FORMAT, "version": STORE_VERSION, **sizes, **origin, "report": asdict(job.report)}
    (folder / HEADER_FILE).write_text(json.dumps(header, indent=1), encoding="utf-8")


def _write_array_header(file: BinaryIO, dtype: type[np.unsignedinteger[Any]], length: int) -> None:
    """A .npy header; it is as long whatever the length, so that it can be written again when the length is known."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[_Batch]:
    batch, size = _Batch([], []), 0
    for name, text in texts:
        batch.ids.append(name)
        batch.texts.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = _Batch([], []), 0
    if batch.ids:
        yield batch


def _tokenised(batches: Iterable[_Batch], job: _Job) -> Generator[tuple[list[str], list[Tokens]]]:
    """Batches in their order, tokenised; a few are under way at a time."""
    if not job.workers:
        for batch in batches:
            yield batch.ids, _tokenise(job.tokenizer, job.dtype, batch.texts)
        return
    pool = ProcessPoolExecutor(
        job.workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(job.tokenizer, job.dtype)
    )
    waiting: deque[tuple[list[str], Future[list[Tokens]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch.ids, pool.submit(_work, batch.texts)))
            if len(waiting) > 2 * job.workers:
                ids, future = waiting.popleft()
                yield ids, future.result()
        for ids, future in waiting:
            yield ids, future.result()
    except BrokenProcessPool as error:
        raise StorageError(
            "The texts cannot be tokenised: one of the processes ended abruptly. Use fewer workers (memory), or none "
            '(a script needs `if __name__ == "__main__":` around what it runs when it has workers).'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_of_worker: dict[str, Any] = {}  # a process that only tokenises has nowhere else to keep its tokenizer


def _begin_worker(tokenizer: Any, dtype: type[np.unsignedinteger[Any]]) -> None:
    _of_worker.update(tokenizer=tokenizer, dtype=dtype)


def _work(texts: list[str]) -> list[Tokens]:
    return _tokenise(_of_worker["tokenizer"], _of_worker["dtype"], texts)


def _tokenise(tokenizer: Any, dtype: type[np.unsignedinteger[Any]], texts: list[str]) -> list[Tokens]:
    settings = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    return [np.asarray(tokenizer(text, **settings)["input_ids"], dtype=dtype) for text in texts]


# --- what a store was made from ---------------------------------------------------------------------------------------


def _bytes_total(entries: Sequence[Mapping[str, Any]]) -> int:
    return 0 if any("hub" in entry for entry in entries) else sum(entry["bytes"] for entry in entries)


def _dtype(tokenizer: Any) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if len(tokenizer) < 1 << 16 else np.uint32


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise StorageError(f"{folder} holds no tokens: there is no {HEADER_FILE}. Name a folder of a token store.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{HEADER_FILE}: {reason(error)}") from error
    if not isinstance(header, dict) or header.get("format") != STORE_FORMAT:
        raise FileFormatError(f"{path} is no header of a token store. Name a folder of a token store.")
    if header.get("version") != STORE_VERSION:
        raise FileFormatError(
            f"{folder} has format version {header.get('version')!r}; this release reads {STORE_VERSION}. "
            "Delete the folder; it is made anew."
        )
    return header


def _damaged(folder: Path, what: str) -> FileFormatError:
    return FileFormatError(f"The token store {folder} is damaged ({what}). Delete the folder; it is made anew.")
