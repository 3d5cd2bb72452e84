"""A job of the engine, awaited: its events come to the event loop; who stops listening cancels it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TypeVar

from starlette.requests import Request

from activation_beacon.cache import BeaconCache
from activation_beacon.server.jobs import Done, Event, Failed, Job
from activation_beacon.server.sampling import Sampling

Result = TypeVar("Result")


class GoneError(Exception):
    """The client has closed the connection."""


class Work:
    """A job for the engine's `submit`, and what it tells.

    Args:
        cache, ids, samplings, seconds: see `Job`.
    """

    def __init__(
        self,
        cache: BeaconCache,
        ids: Sequence[int],
        samplings: Sequence[Sampling] = (),
        *,
        seconds: float | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job = Job(cache, ids, emit, samplings, seconds)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Its events, `Done` last.

        Raises:
            Exception: what the job has failed with.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.job.cancel()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work for a client; it is cancelled when the client goes away.

    Raises:
        GoneError: if it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
