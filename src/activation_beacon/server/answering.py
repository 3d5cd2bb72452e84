"""Requests for answers carried out: prompts put on their contexts, and what the engine tells of each answer."""

import asyncio
import contextlib
import dataclasses
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import CapacityError, InputError
from activation_beacon.server.failures import NotFoundError
from activation_beacon.server.jobs import Done, Ended, Piece, Progress
from activation_beacon.server.listing import Listed, Listing
from activation_beacon.server.sampling import Sampling
from activation_beacon.server.schema import AnswerRequest, CompletionRequest
from activation_beacon.server.state import Server
from activation_beacon.server.work import Work

MOST_ANSWERS = 128


@dataclass
class Asked:
    """One prompt, where it begins to be read, and what came of it.

    Attributes:
        scope: see `Library.start`.
        num_prompt: tokens of context and prompt.
        cache, ids: where reading begins, and what is read.
        work: the job.
        grown: the cache at the end.
        num_written: tokens of all its answers.
    """

    scope: Hashable
    num_prompt: int
    cache: BeaconCache
    ids: list[int]
    work: Work | None = None
    grown: BeaconCache | None = None
    num_written: int = 0


@dataclass
class Choice:
    """One answer as it is gathered for a reply in one piece."""

    text: str = ""
    listed: list[Listed] = field(default_factory=list)
    reason: str = "length"

    def add(self, event: Piece | Ended, listed: Sequence[Listed]) -> None:
        """Go on with a piece, or the end."""
        self.text += event.text
        self.listed += listed
        if isinstance(event, Ended):
            self.reason = event.reason


class Answering:
    """One request for answers, however they are told.

    Args:
        server: with the engine and the library.
        request: checked already.

    Attributes:
        context, ratio: what the request names; see `AnswerRequest`.
        sampling: how answers are written, once it has begun.
    """

    sampling: Sampling

    def __init__(self, server: Server, request: AnswerRequest) -> None:
        self.server = server
        self.request = request
        self.context, self.ratio = request.context, request.ratio
        self.created = int(time.time())
        self.started = time.monotonic()
        self.asked: list[Asked] = []

    def prompts(self) -> list[Any]:
        """Texts, ids or conversations that are to be answered; called once.

        Raises:
            BeaconError: if they cannot be had.
        """
        raise NotImplementedError

    # --- before anything is sent ---

    async def begin(self) -> None:
        """Check the request and queue its jobs.

        Raises:
            BeaconError: if it cannot be served, now or at all.
        """
        request, server = self.request, self.server
        request.check_can_be_served()
        if request.model != server.settings.model_name:
            raise NotFoundError(
                f"There is no model {request.model[:100]!r} here. It is called {server.settings.model_name!r}."
            )
        prompts, num_each = self.prompts(), request.num_answers
        if len(prompts) * num_each > MOST_ANSWERS:
            raise InputError(
                f"The request asks for {len(prompts) * num_each} answers; {MOST_ANSWERS} are allowed. Send several."
            )
        self.asked = [await self._placed(prompt) for prompt in prompts]
        self.sampling = await self._sampling()
        samplings, seconds = [self.sampling] * num_each, server.settings.answer_s
        works = [Work(asked.cache, asked.ids, samplings, seconds=seconds) for asked in self.asked]
        server.engine.submit(*(work.job for work in works))
        for asked, work in zip(self.asked, works, strict=True):
            asked.work = work

    async def _sampling(self) -> Sampling:
        sampling, schema = (
            self.request.sampling(self.server.model, self.server.settings.max_tokens),
            self.request.answer_schema,
        )
        if schema is None:
            return sampling
        grammar = await asyncio.to_thread(self.server.grammars.of_schema, schema)
        return dataclasses.replace(sampling, grammar=grammar)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for asked in self.asked:
            if asked.work is not None:
                asked.work.job.cancel()

    async def _placed(self, prompt: Any) -> Asked:
        """Put a prompt on its context, and find where reading can begin."""
        library = self.server.library
        scope: Hashable
        if self.context is None:
            cache = library.empty(self.ratio)
            scope = ("text", cache.policy)
        elif self.ratio is not None:
            raise InputError("A context has its own ratio: leave ratio out, or make the context anew with another one.")
        else:
            _, cache, scope = await library.opened(self.context)
        ids = await asyncio.to_thread(self._checked_ids, cache, prompt)
        start, unread = await library.start(scope, cache, ids)
        return Asked(scope, cache.tokens_seen + len(ids), start, unread)

    def _checked_ids(self, cache: BeaconCache, prompt: Any) -> list[int]:
        self.server.library.check_can_fit(cache, self.server.prompting.least_tokens(prompt))
        ids = self._ids(cache, prompt)
        if not ids:
            raise InputError("The prompt is empty: there is nothing to answer. Send at least one word.")
        self._check_fits(cache, ids)
        return ids

    def _ids(self, cache: BeaconCache, prompt: Any) -> list[int]:
        prompting = self.server.prompting
        if isinstance(self.request, CompletionRequest):
            ids = prompting.completion(prompt, is_first=cache.tokens_seen == 0)
            size = self.server.model.get_input_embeddings().weight.shape[0]
            if ids and max(ids) >= size:
                raise InputError(
                    f"Token ids must be within 0..{size - 1}; got {max(ids)}. Use the model's own tokenizer."
                )
            return ids
        if self.context is None:
            return prompting.conversation(prompt)
        return prompting.on_context(cache.token_ids[0].tolist(), prompt)

    def _check_fits(self, cache: BeaconCache, ids: list[int]) -> None:
        """Refuse now what could not be read, or would break off before the answer is as long as was asked for.

        Raises:
            CapacityError: saying what would fit.
        """
        planner = cache.planner(self.server.model.max_positions)
        planner.plan(cache.rows[0], len(ids))
        limit = self.request.limit
        if limit is None:
            return

        def exceeds(num_new: int) -> bool:
            try:
                planner.check_grows(cache.rows[0], len(ids), num_new - 1)
            except CapacityError:
                return True
            return False

        if exceeds(limit):
            most = bisect_left(range(1, limit + 1), True, key=exceeds)
            raise CapacityError(
                f"{self.request.limit_name} ({limit:,}) is more than fits behind the {cache.tokens_seen + len(ids):,} tokens of "
                f"context and prompt. Ask for {most:,} at most."
            )

    # --- while they are written ---

    def listings(self) -> list[Listing]:
        """One for each answer."""
        return [Listing() for _ in range(len(self.asked) * self.request.num_answers)]

    async def heard(self) -> AsyncGenerator[tuple[Progress | Piece | Ended, int], None]:
        """Events of all jobs with the index of the choice that they are about."""
        is_first = True
        try:
            for number, asked in enumerate(self.asked):
                assert asked.work is not None, "begin() comes first"
                async with contextlib.aclosing(asked.work.events()) as events:
                    async for event in events:
                        if isinstance(event, Done):
                            await self._finished(asked, event)
                            continue
                        if isinstance(event, Piece) and is_first:
                            is_first = False
                            self.server.metrics.first_token(time.monotonic() - self.started)
                        if isinstance(event, Ended):
                            asked.num_written += event.num_tokens
                        local = event.number if isinstance(event, Piece | Ended) else 0
                        yield event, number * self.request.num_answers + local  # type: ignore[misc]
        finally:
            self.cancel()

    async def _finished(self, asked: Asked, done: Done) -> None:
        asked.grown = done.cache
        await self.server.library.keep(asked.scope, done.cache, done.before)
        self.server.metrics.answered(len(asked.ids), asked.num_prompt - len(asked.ids))

    async def gathered(self) -> list[Choice]:
        """All answers, when they have been written."""
        listings = self.listings()
        choices = [Choice() for _ in listings]
        async with contextlib.aclosing(self.heard()) as heard:
            async for event, index in heard:
                if isinstance(event, Piece | Ended):
                    choices[index].add(event, listed_with(event, listings[index]))
        return choices

    def counts(self) -> dict[str, Any]:
        """Tokens as OpenAI counts them, and what the caches hold for them."""
        prompt, written = sum(a.num_prompt for a in self.asked), sum(a.num_written for a in self.asked)
        read = sum(len(asked.ids) for asked in self.asked)
        grown = [asked.grown for asked in self.asked if asked.grown is not None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": prompt - read},
            "beacon": {
                "tokens_read": read,
                "beacons": sum(cache.num_beacons for cache in grown),
                "cache_entries": sum(cache.cache_length for cache in grown),
                "cache_bytes": sum(cache.cache_bytes for cache in grown),
                "uncompressed_bytes": sum(cache.uncompressed_bytes for cache in grown),
            },
        }


def listed_with(event: Piece | Ended, listing: Listing) -> list[Listed]:
    """Tokens that are listed with a piece of an answer, or with its end."""
    if isinstance(event, Piece):
        return listing.add(event.text, event.chosen, event.offset)
    return listing.end(event.text, is_cut=event.reason == "stop")
