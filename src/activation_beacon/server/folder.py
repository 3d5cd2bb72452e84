"""The folder of contexts: `ID.beacon` and, beside it, `ID.json` with its name and numbers. Any place that fsspec knows.

A context is there when its `.beacon` file is; the numbers can be made anew from it, but not the name: a new context's are
written before it, so that whoever finds it finds its name. Several servers may share the folder. Looking changes no context: a
file that does not read well may be one that is still being copied, and is set aside only when it is opened and has been still for
a while.
Whatever the place does not allow is a StorageError, and errors say nothing of where the folder is: clients are told them.
Nothing here runs the model. Ids are checked against one pattern before they become part of a path.
"""

import contextlib
import dataclasses
import json
import logging
import re
import secrets
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from pydantic import TypeAdapter

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import BeaconError, FileFormatError, InputError, StorageError, reason
from activation_beacon.files import whole_file, write_text

logger = logging.getLogger(__name__)

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
CONTEXT, NUMBERS, DAMAGED = ".beacon", ".json", ".beacon.damaged"
PART = re.compile(r"\.([A-Za-z0-9_-]+\.(?:beacon|json))\.[0-9a-f]+\.part")
STILL_S = 60.0  # a damaged file that nobody has written to for so long is no copy in progress
PART_AGE_S = 3600.0  # a half-written file of this age belongs to no writer any more


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a context without opening it.

    Attributes:
        id: its handle and the stem of its file.
        name: what its maker called it.
        created: seconds since 1970.
        error: why it cannot be used; None for a good one.
    """

    id: str
    name: str
    created: int
    tokens: int = 0
    chunks: int = 0
    ratios: tuple[int, ...] = ()
    sinks: int = 0
    beacons: int = 0
    tail: int = 0
    cache_length: int = 0
    cache_bytes: int = 0
    uncompressed_bytes: int = 0
    quantized_bits: int | None = None
    base_fingerprint: str = ""
    adapter_fingerprint: str = ""
    file_bytes: int = 0
    error: str | None = None


RECORDS = TypeAdapter(Record)


def new_id() -> str:
    """A handle that nobody has."""
    return f"ctx_{secrets.token_hex(12)}"


def described(record: Record, cache: BeaconCache) -> Record:
    """The record with a cache's numbers."""
    return dataclasses.replace(
        record,
        tokens=cache.tokens_seen,
        chunks=len(cache.ratios),
        ratios=tuple(sorted(set(cache.ratios))),
        sinks=cache.num_sinks,
        beacons=cache.num_beacons,
        tail=cache.tail_length,
        cache_length=cache.cache_length,
        cache_bytes=cache.cache_bytes,
        uncompressed_bytes=cache.uncompressed_bytes,
        quantized_bits=cache.quantized_bits,
        base_fingerprint=cache.base_fingerprint,
        adapter_fingerprint=cache.adapter_fingerprint,
    )


def _without(text: str, place: str) -> str:
    """A message without a folder's path, and with files' own names in place of those that they have while they are written."""
    text = text.replace(f"{place}/", "").replace(place, "the folder") if place else text
    return PART.sub(r"\1", text)


def _version(info: Mapping[str, Any]) -> str:
    """What of fsspec's knowledge of a file changes whenever the file does."""
    return " ".join(str(info.get(key, "")) for key in ("size", "mtime", "ino", "ETag", "etag", "created", "updated"))


class Folder:
    """Contexts on disk, or wherever fsspec reaches.

    Args:
        url: a folder, made if missing, such as `contexts` or `s3://bucket/contexts`.

    Raises:
        StorageError: if it cannot be made.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
            self.fs.makedirs(root, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise StorageError(f"The folder of contexts {url} cannot be opened: {reason(error)}.") from error
        self.root = str(root).rstrip("/")
        protocols = self.fs.protocol if isinstance(self.fs.protocol, tuple | list) else (self.fs.protocol,)
        self.is_local = "file" in protocols
        self._records: dict[str, tuple[str, Record]] = {}  # by id, with the version that they describe
        self._locks: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self._finding_a_lock = threading.Lock()
        if self.is_local:
            self._remove_old_parts()

    # --- looking ---

    def list(self) -> list[Record]:
        """All contexts, newest first, damaged ones with the reason."""
        with self._reaching():
            files = {entry["name"].rsplit("/", 1)[-1]: entry for entry in self._entries() if entry["type"] == "file"}
        ids = {name.removesuffix(end) for name in files for end in (CONTEXT, DAMAGED) if name.endswith(end)}
        records = [self._found(each, files.get(f"{each}{CONTEXT}")) for each in ids if ID.fullmatch(each)]
        return sorted((each for each in records if each is not None), key=lambda each: (-each.created, each.id))

    def _entries(self) -> Any:
        self.fs.invalidate_cache(self.root)
        return self.fs.ls(self.root, detail=True)

    def _found(self, context_id: str, info: Mapping[str, Any] | None) -> Record | None:
        """What is known of a context; one that cannot be read does not hide the others."""
        try:
            with self._reaching():
                return self._looked_at(context_id, info)
        except StorageError as error:
            return Record(context_id, context_id, 0, error=str(error))

    def find(self, context_id: str) -> Record | None:
        """What is known of a context; None if there is none of that id.

        Raises:
            StorageError: if it cannot be read.
        """
        if not ID.fullmatch(context_id):
            return None
        with self._reaching():
            return self._looked_at(context_id, self._info(context_id))

    def _looked_at(self, context_id: str, info: Mapping[str, Any] | None) -> Record | None:
        if info is None:
            return self._damaged_record(context_id)
        known = self._records.get(context_id)
        if known is not None and known[0] == _version(info):
            return known[1]
        record = self._noted(context_id)
        if record is None or record.error is not None or record.file_bytes != info["size"]:
            record = self._examined(context_id, info)
        if record is not None:
            self._records[context_id] = (_version(info), record)
        return record

    def version(self, context_id: str) -> str | None:
        """Changes whenever the file does; None if there is none."""
        with self._reaching():
            info = self._info(context_id)
        return None if info is None else _version(info)

    def has(self, context_id: str) -> bool:
        """Whether there is a context of that id, damaged or not; whatever else may be wrong with it."""
        if not ID.fullmatch(context_id):
            return False
        with self._reaching():
            return self._info(context_id) is not None or self._is_set_aside(context_id)

    def _info(self, context_id: str) -> dict[str, Any] | None:
        try:
            self.fs.invalidate_cache(self.root)
            info = dict(self.fs.info(self._path(context_id, CONTEXT)))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def num_bytes(self) -> int:
        """Bytes of all files."""
        with self._reaching():
            return sum(entry.get("size") or 0 for entry in self._entries())

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what goes wrong with the place into errors for clients; the log has all of it."""
        try:
            yield
        except (StorageError, FileFormatError) as error:
            text = _without(str(error), self.root)
            if text == str(error):
                raise
            logger.warning("%s", error)
            raise type(error)(text) from error
        except OSError as error:
            logger.warning("the folder of contexts %s: %s", self.root, error)
            raise StorageError(f"The folder of contexts cannot be used: {reason(error)}. Ask its operator.") from error

    def _noted(self, context_id: str) -> Record | None:
        """What the file of numbers says, whatever has become of the context."""
        try:
            record = RECORDS.validate_json(self.fs.cat_file(self._path(context_id, NUMBERS)), strict=True)
        except (OSError, ValueError):  # missing, or of wrong types
            return None
        return record if record.id == context_id else None

    def _examined(self, context_id: str, info: Mapping[str, Any]) -> Record | None:
        """The record of a context that has none, such as a file of `beacon compress`, or another file's; written beside it."""
        known = self._noted(context_id) or Record(context_id, context_id, int(time.time()))
        try:
            cache = self._read(context_id)
        except FileFormatError:
            return dataclasses.replace(known, error="The file is damaged, or is still being written.")
        except InputError as error:
            return dataclasses.replace(known, error=str(error))
        except StorageError:
            if self.version(context_id) == _version(info):
                raise
            return self.find(context_id)
        if self.version(context_id) != _version(info):  # replaced meanwhile: these may be either file's numbers
            return self.find(context_id)
        record = dataclasses.replace(described(known, cache), file_bytes=info["size"], error=None)
        try:
            self._write_numbers(record)
        except OSError as error:  # full, or closed to us: the next start looks again
            logger.warning("the numbers of context %s could not be written: %s", context_id, reason(error))
        return record

    def _is_set_aside(self, context_id: str) -> bool:
        is_there: bool = self.fs.exists(self._path(context_id, DAMAGED))
        return is_there

    def _damaged_record(self, context_id: str) -> Record | None:
        if not self._is_set_aside(context_id):
            return None
        return self._noted(context_id) or Record(context_id, context_id, 0, error="The file is damaged.")

    # --- contents ---

    def load(self, context_id: str) -> BeaconCache:
        """Read a context; a damaged one is set aside, unless somebody has written to it just now.

        Raises:
            StorageError: if it cannot be read.
            FileFormatError: if it is damaged.
            InputError: if it holds a batch.
        """
        with self._reaching():
            try:
                return self._read(context_id)
            except FileFormatError as error:
                if self._is_still(context_id):
                    self._set_aside(context_id, str(error))
                raise

    def _is_still(self, context_id: str) -> bool:
        try:
            written = self.fs.modified(self._path(context_id, CONTEXT))
        except (OSError, NotImplementedError):
            return False
        return time.time() - written.timestamp() > STILL_S

    def _read(self, context_id: str) -> BeaconCache:
        cache = self._loaded(context_id)
        if cache.batch_size != 1:
            raise InputError(
                f"{context_id}{CONTEXT} holds a batch of {cache.batch_size} contexts; one is served. Save context.row(0)."
            )
        return cache

    def _loaded(self, context_id: str) -> BeaconCache:
        path = self._path(context_id, CONTEXT)
        if self.is_local:
            return BeaconCache.load(path)
        with tempfile.TemporaryDirectory() as here:
            local = Path(here) / f"{context_id}{CONTEXT}"
            try:
                self.fs.get_file(path, str(local))
                return BeaconCache.load(local)
            except (StorageError, FileFormatError) as error:
                raise type(error)(_without(str(error), here)) from error
            except OSError as error:
                raise StorageError(f"{path} cannot be read: {reason(error)}.") from error

    def save(self, record: Record, cache: BeaconCache) -> Record:
        """Write a new context.

        Returns:
            The record with the numbers of what was written.

        Raises:
            StorageError: if it cannot be written; what was there is as it was.
        """
        with self._lock(record.id), self._reaching():
            return self._written(record, cache)

    def replace(self, record: Record, cache: BeaconCache) -> Record | None:
        """Write a context in place of the one of its id; as `save`, but None if it has been deleted meanwhile."""
        with self._lock(record.id), self._reaching():
            return self._written(record, cache) if self.version(record.id) is not None else None

    def _lock(self, context_id: str) -> threading.Lock:
        with self._finding_a_lock:
            return self._locks.setdefault(context_id, threading.Lock())

    def _written(self, record: Record, cache: BeaconCache) -> Record:
        is_new = self._noted(record.id) is None
        with self._written_aside(record.id) as local:
            record = dataclasses.replace(described(record, cache), file_bytes=cache.save(local))
            if is_new:
                self._write_numbers(record)
        if not is_new:  # older numbers have the name, and a size that says whose they are
            self._write_numbers(record)
        self._records[record.id] = (self.version(record.id) or "", record)
        return record

    @contextlib.contextmanager
    def _written_aside(self, context_id: str) -> Iterator[Path]:
        """A file of this machine that becomes the context when the block ends well."""
        path = self._path(context_id, CONTEXT)
        if self.is_local:
            with whole_file(path) as local:
                yield local
        else:
            with tempfile.TemporaryDirectory() as here:
                local = Path(here) / f"{context_id}{CONTEXT}"
                yield local
                self._upload(local, path)

    def delete(self, context_id: str) -> None:
        """Remove a context, damaged or not; one that is being written is removed afterwards."""
        with self._lock(context_id), self._reaching():
            self._records.pop(context_id, None)
            for ending in (CONTEXT, DAMAGED, NUMBERS):
                path = self._path(context_id, ending)
                if self.fs.exists(path):
                    with contextlib.suppress(FileNotFoundError):  # another server was faster
                        self.fs.rm_file(path)

    def _write_numbers(self, record: Record) -> None:
        text, path = json.dumps(dataclasses.asdict(record), indent=2) + "\n", self._path(record.id, NUMBERS)
        if self.is_local:
            write_text(path, text)
        else:
            self.fs.pipe_file(path, text.encode())

    def _upload(self, local: Path, path: str) -> None:
        try:
            self.fs.put_file(str(local), path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {reason(error)}. Free space or choose another place."
            ) from error

    def _set_aside(self, context_id: str, why: str) -> None:
        """Rename a file that must not be used, and note why."""
        logger.warning("context %s is damaged and was set aside: %s", context_id, why)
        known = self._noted(context_id) or Record(context_id, context_id, int(time.time()))
        record = dataclasses.replace(known, error=f"The file is damaged and was set aside as {context_id}{DAMAGED}.")
        self._records.pop(context_id, None)
        try:
            self._write_numbers(record)
            self.fs.mv(self._path(context_id, CONTEXT), self._path(context_id, DAMAGED))
        except (OSError, BeaconError):
            logger.exception("context %s could not be set aside", context_id)

    def _path(self, context_id: str, ending: str) -> str:
        if not ID.fullmatch(context_id):
            raise InputError("A context's id has letters, digits, - and _ only, 64 at most.")
        return f"{self.root}/{context_id}{ending}"

    def _remove_old_parts(self) -> None:
        """Files that a killed process left half-written; younger ones may be another server's work."""
        for part in Path(self.root).glob(".*.part"):
            with contextlib.suppress(OSError):  # it has been moved into place, or cannot be removed
                if time.time() - part.stat().st_mtime > PART_AGE_S:
                    part.unlink(missing_ok=True)
