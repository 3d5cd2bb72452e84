"""Contexts by handle: on disk for good, in memory while they are used; and conversations that may be gone on with."""

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from activation_beacon.cache import BeaconCache
from activation_beacon.config import is_same_fingerprint
from activation_beacon.errors import CapacityError, FileFormatError, StorageError
from activation_beacon.ratios import Ratio
from activation_beacon.server.engine import Engine
from activation_beacon.server.failures import NotFoundError, QuotaError
from activation_beacon.server.folder import Folder, Record, new_id
from activation_beacon.server.jobs import Done, Progress
from activation_beacon.server.memory import Memory
from activation_beacon.server.prefixes import common_length, longest, opening
from activation_beacon.server.reading import cut
from activation_beacon.server.settings import Settings
from activation_beacon.server.work import Work

Result = TypeVar("Result")
Save = Callable[[Record, BeaconCache], Record | None]
LEAST_SPARED = 16  # tokens; to look up fewer is not worth a copy


class Library:
    """See the module. Its methods are called in the event loop; files are read and written in threads of its own.

    Args:
        model: with beacons; only asked for its settings here.
        engine: reads texts.
        settings: folder and quotas.
    """

    def __init__(self, model: Any, engine: Engine, settings: Settings) -> None:
        self.model = model
        self.engine = engine
        self.settings = settings
        self.folder = Folder(settings.folder)
        self.memory: Memory[BeaconCache] = Memory(settings.memory_bytes)
        self._blank: BeaconCache = model.new_cache()  # its fingerprints take milliseconds
        self._fingerprints = {kind: getattr(model, f"{kind}_fingerprint") for kind in ("base", "adapter")}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="beacon-files")
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._num_kept = 0

    def close(self) -> None:
        """Let files that are being written be finished."""
        self._threads.shutdown(wait=True)

    async def _in_thread(self, act: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, act, *args)

    async def _unbroken(self, act: Callable[..., Result], *args: Any) -> Result:
        """Do something that goes on to its end even if nobody waits for it any more."""
        return await asyncio.shield(self._in_thread(act, *args))

    def _lock(self, context_id: str) -> asyncio.Lock:
        return self._locks.setdefault(context_id, asyncio.Lock())

    # --- looking ---

    async def records(self) -> list[Record]:
        """All contexts, newest first."""
        return [self._checked(record) for record in await self._in_thread(self.folder.list)]

    async def record(self, context_id: str) -> Record:
        """One context.

        Raises:
            NotFoundError: if there is none of that id.
        """
        record = await self._in_thread(self.folder.find, context_id)
        if record is None:
            raise _not_found(context_id)
        return self._checked(record)

    def _checked(self, record: Record) -> Record:
        """The record, saying so if the context is another model's."""
        for kind in ("base", "adapter"):
            made_by = getattr(record, f"{kind}_fingerprint")
            if record.error is None and made_by and not is_same_fingerprint(made_by, self._fingerprints[kind]):
                return dataclasses.replace(record, error="The context was made with another model or adapter.")
        return record

    def is_in_memory(self, record: Record) -> bool:
        """Whether a context can be asked without being read from disk."""
        return any(key[:2] == ("context", record.id) for key in self._keys())

    def _keys(self) -> list[tuple[Any, ...]]:
        return [key for key in self.memory if isinstance(key, tuple)]

    async def opened(self, context_id: str) -> tuple[Record, BeaconCache, Hashable]:
        """A context to be asked: its record, its cache, and a name for this state of it.

        Raises:
            NotFoundError: if there is none of that id.
            FileFormatError: if it is damaged.
            MismatchError: if another model made it.
        """
        async with self._lock(context_id):
            record = await self.record(context_id)
            version = await self._in_thread(self.folder.version, context_id)
            if version is None and record.error is not None:
                raise FileFormatError(f"{record.error} Compress the text again.")
            scope = ("context", context_id, version)
            cache = self.memory.get(scope)
            if cache is None:
                cache = await self._read_from_disk(context_id)
                self._forget(context_id)
                self.memory.put(scope, cache)
            return record, cache, scope

    async def _read_from_disk(self, context_id: str) -> BeaconCache:
        try:
            return await self._in_thread(self._loaded, context_id)
        except StorageError:
            if await self._in_thread(self.folder.has, context_id):
                raise
            raise _not_found(context_id) from None  # another server has deleted it just now

    def _loaded(self, context_id: str) -> BeaconCache:
        cache: BeaconCache = self.model.placed(self.folder.load(context_id))
        return cache

    # --- making ---

    def check_can_fit(self, cache: BeaconCache, num_tokens: int) -> None:
        """Refuse a text by what is known before it is tokenized.

        Args:
            cache: that it is to follow.
            num_tokens: which it has at least.

        Raises:
            CapacityError: if so many can never be read there.
        """
        try:
            cache.planner(self.model.max_positions).plan(cache.rows[0], num_tokens)
        except CapacityError as error:
            raise CapacityError(f"The text has {num_tokens:,} tokens or more, which do not fit. {error}") from None

    def empty(self, ratio: Ratio | None = None) -> BeaconCache:
        """What a new context begins as."""
        cache = self._blank.emptied()
        cache.policy = self.model.ratio_policy(self.settings.ratio if ratio is None else ratio)
        return cache

    async def create(
        self, name: str, ids: Sequence[int], *, ratio: Ratio | None = None, bits: int | None = None
    ) -> AsyncGenerator[Progress | Record, None]:
        """Compress a text; its progress, and the record of the context last.

        Raises:
            QuotaError: if the folder is full.
            RatioError: if a sequence of ratios names fewer than the text has chunks.
            BeaconError: as the engine.
        """
        await self._check_quota(0)
        start = self.empty(ratio)
        record = Record(new_id(), name, int(time.time()))
        async with contextlib.aclosing(self._read(start, ids)) as reading:
            async for event in reading:
                if isinstance(event, Progress):
                    yield event
                else:
                    cache = event if bits is None else await self._in_thread(event.quantize, bits)
                    yield await self._saved(record, cache)

    async def append(
        self, context_id: str, ids: Sequence[int], *, ratio: Ratio | None = None
    ) -> AsyncGenerator[Progress | Record, None]:
        """Read on in a context; requests that are being answered on it go on with what it was.

        Raises:
            as `create` and `opened`.
        """
        async with self._lock(f"append {context_id}"):
            record, cache, _ = await self.opened(context_id)
            await self._check_quota(cache.cache_bytes, replaced=record.file_bytes)  # before hours of reading
            start = cache.fork()
            if ratio is not None:
                start.policies = self.model.revised_policies(start, ratio)
            async with contextlib.aclosing(self._read(start, ids)) as reading:
                async for event in reading:
                    if isinstance(event, Progress):
                        yield event
                    else:
                        bits = cache.quantized_bits
                        grown = event if bits is None else await self._in_thread(event.quantize, bits)
                        yield await self._saved(record, grown, save=self.folder.replace, replaced=record.file_bytes)

    async def _read(self, start: BeaconCache, ids: Sequence[int]) -> AsyncGenerator[Progress | BeaconCache, None]:
        start.planner(None).check_names_every_chunk(start.tokens_seen + len(ids))
        pieces = cut(start, self.model.max_positions, len(ids))
        work = Work(start, ids, seconds=self.settings.compress_s)
        self.engine.submit(work.job)
        async with contextlib.aclosing(work.events()) as events:
            yield Progress(0, len(pieces.stops))  # queued
            async for event in events:
                if isinstance(event, Progress):
                    yield event
                elif isinstance(event, Done):
                    yield event.cache

    async def fork(self, context_id: str, name: str) -> Record:
        """A context of its own with the same contents."""
        record, cache, _ = await self.opened(context_id)
        return await self._saved(dataclasses.replace(record, id=new_id(), name=name, created=int(time.time())), cache)

    async def delete(self, context_id: str) -> None:
        """Remove a context from memory and disk, whatever is wrong with it; answers that are being written on it go on.

        Raises:
            NotFoundError: if there is none of that id.
        """
        async with self._lock(context_id):  # a request that opens it has it, or does not find it
            if not await self._in_thread(self.folder.has, context_id):
                raise _not_found(context_id)
            await self._unbroken(self.folder.delete, context_id)
            self._forget(context_id)

    async def _saved(
        self, record: Record, cache: BeaconCache, save: Save | None = None, *, replaced: int = 0
    ) -> Record:
        await self._check_quota(cache.cache_bytes, replaced=replaced)
        saved = await self._unbroken(save or self.folder.save, record, cache)
        if saved is None:
            raise NotFoundError(f"The context {record.id!r} was deleted while text was appended to it.")
        record = saved
        self._forget(record.id)
        version = await self._in_thread(self.folder.version, record.id)
        self.memory.put(("context", record.id, version), cache)
        return record

    async def _check_quota(self, num_bytes: int, *, replaced: int = 0) -> None:
        """Refuse so many bytes more than the folder may hold, in the place of those that are replaced."""
        most = self.settings.disk_bytes
        if most is None:
            return
        held = await self._in_thread(self.folder.num_bytes) - replaced
        if held + num_bytes > most or held >= most:
            raise QuotaError(
                f"The folder of contexts holds {held:,} bytes and may hold {most:,}"
                f"{f'; {num_bytes:,} more were needed' if num_bytes else ''}. "
                "Delete contexts (DELETE /v1/contexts/ID), or raise --disk."
            )

    def _forget(self, context_id: str) -> None:
        """Drop what memory holds of a context and of conversations on it."""
        for key in self._keys():
            if key[:2] == ("context", context_id) or (key[0] == "talk" and key[1][:2] == ("context", context_id)):
                self.memory.drop(key)

    # --- conversations ---

    async def start(self, scope: Hashable, cache: BeaconCache, ids: Sequence[int]) -> tuple[BeaconCache, list[int]]:
        """Where to begin to read `ids` on a cache: there, or where an earlier text has gone the same way farther.

        Args:
            scope: what the text stands on; texts of one scope were read under one policy.

        Returns:
            A cache, and the ids that it has not seen.
        """
        keys, kept = self._talks(scope)

        def compared() -> tuple[tuple[int, int] | None, list[int]]:
            """In a thread: ids on a GPU are waited for."""
            text = torch.tensor([*cache.token_ids[0].tolist(), *ids], device=cache.token_ids.device)
            return longest(kept, text, cache, self.model.max_positions), text.tolist()

        found, text = await asyncio.to_thread(compared)
        if found is None or found[1] < cache.tokens_seen + LEAST_SPARED:
            return cache, list(ids)
        index, length = found
        self.memory.get(keys[index])
        return opening(kept[index], length), text[length:]

    async def keep(self, scope: Hashable, cache: BeaconCache, before: BeaconCache | None = None) -> None:
        """Keep what has been read and written, in place of what it has grown from.

        Args:
            scope: what it stands on.
            cache: of one row.
            before: the same before the last answer, where the cache cannot be cut back to it: kept as well, so that it can be
                answered once more, or a text like it.
        """
        keys, kept = self._talks(scope)

        def outgrown() -> list[bool]:
            ids = cache.token_ids[0]
            return [common_length(older.token_ids[0], ids) == older.tokens_seen for older in kept]

        for key, is_outgrown in zip(keys, await asyncio.to_thread(outgrown), strict=True):
            if is_outgrown:
                self.memory.drop(key)
        for each in (before, cache):
            if each is not None:
                self._num_kept += 1
                self.memory.put(("talk", scope, self._num_kept), each)

    def _talks(self, scope: Hashable) -> tuple[list[tuple[Any, ...]], list[BeaconCache]]:
        """Conversations on a scope that memory holds: their keys, and their caches."""
        keys = [key for key in self._keys() if key[0] == "talk" and key[1] == scope]
        return keys, [self.memory.peek(key) for key in keys]


def _not_found(context_id: str) -> NotFoundError:
    return NotFoundError(f"There is no context {context_id[:64]!r}. GET /v1/contexts lists them.")
