"""Language modelling on long documents: nats per token after the first chunk, by what the model could see before each.

Every method is measured on the same tokens. When a chunk stands alone its first token has no prediction, so that token is
left out everywhere; so is the whole first chunk, before which nothing stands to be compressed.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import InputError
from activation_beacon.evaluation.contexts import base_cache_bytes, positions_on
from activation_beacon.evaluation.metrics import Estimate, gap_closed, mean
from activation_beacon.evaluation.names import LOCAL_TOKENS
from activation_beacon.layouts import entries_held
from activation_beacon.ratios import Ratio

# T tokens of a text · w chunk size · V vocabulary

PIECE = 512  # tokens read at a time where all logits are needed: (PIECE, V) of them are alive, never (T, V)
HOLE = torch.tensor([torch.nan])  # a token without a prediction


@dataclass(frozen=True)
class Losses:
    """What one way of reading made of one text.

    Attributes:
        nll: (T - 1,) nats of the second token on, NaN where there is no prediction.
        cache_length: entries that the text's last token attended to.
        cache_bytes: bytes of these.
        seconds: for reading it.
    """

    nll: torch.Tensor
    cache_length: int
    cache_bytes: int
    seconds: float


# --- ways of reading -------------------------------------------------------------------------------------------------


def full_losses(model: Any, ids: Sequence[int]) -> Losses:
    """The base model with the whole text before each token, beyond its window too (where it breaks down)."""
    return _base_losses(model, ids)


def alone_losses(model: Any, ids: Sequence[int], *, prefix: Sequence[int] = ()) -> Losses:
    """The base model on each chunk of the text with nothing before it.

    Args:
        model: with beacons attached, which are not used.
        ids: the text.
        prefix: ids that every text opens with (a beginning-of-text token): they stand before each chunk too.
    """
    size = model.beacon_config.chunk_size
    parts = [_base_losses(model, ids[:size])]
    nll = [parts[0].nll]
    for start in range(size, len(ids), size):
        parts.append(_base_losses(model, [*prefix, *ids[start : start + size]]))
        nll += [HOLE, parts[-1].nll[len(prefix) :]]
    return _joined(nll, parts)


def recent_losses(model: Any, ids: Sequence[int], ratio: int, *, prefix: Sequence[int] = ()) -> Losses:
    """The base model on each chunk with as many of the tokens before it as there are beacons and sinks of them.

    They are read anew for each chunk, so that none knows what stood before the window, nor pays for it in positions.
    The beacons' local tokens do not count: they stand in a chunk's raw tail, not for what is before it.

    Args:
        model: with beacons attached, which are not used.
        ids: the text.
        ratio: of the beacons that it is compared with.
        prefix: see `alone_losses`; a part of the window.
    """
    config = dataclasses.replace(model.beacon_config, local_tokens=0)
    size = config.chunk_size
    parts, nll = [], []
    for start in range(0, len(ids), size):
        held = entries_held(config, start + 1, ratio) - 1  # when the chunk's first token is read
        window = _window(ids[:start], held, prefix)
        parts.append(_base_losses(model, [*window, *ids[start : start + size]]))
        nll.append(parts[-1].nll[max(len(window) - 1, 0) :])
    return _joined(nll, parts)


def _window(before: Sequence[int], num_entries: int, prefix: Sequence[int]) -> list[int]:
    """The last of the ids that stand before a chunk, opened by the prefix, `num_entries` together."""
    if num_entries >= len(before):
        return list(before)
    return [*prefix, *before[len(before) - num_entries + len(prefix) :]]


@torch.no_grad()
def beacon_losses(model: Any, ids: Sequence[int], ratio: Ratio, *, local_tokens: int | None = None) -> Losses:
    """The text read on the beacons of the chunks before: chunk by chunk, as in training, or as it is read in decoding.

    Args:
        model: with beacons attached.
        ids: the text.
        ratio: of the beacons.
        local_tokens: by default the model's. Where there are any, tokens are predicted from the tail, the first ones of a chunk
            before the chunk in front of them is closed.

    Raises:
        RatioError: if a list of ratios names fewer than the text has chunks.
        CapacityError: if the beacons do not fit the base model's positions.
    """
    start = time.perf_counter()
    cache = _new_cache(model, ids, ratio, local_tokens)
    nll = losses_as_decoded(model, cache, ids)
    return Losses(nll, cache.cache_length, cache.cache_bytes, time.perf_counter() - start)


def _new_cache(model: Any, ids: Sequence[int], ratio: Ratio, local_tokens: int | None = None) -> BeaconCache:
    """An empty one for a text that is read in several calls: a list of ratios has to be long enough for all of it."""
    cache: BeaconCache = model.new_cache(ratio=ratio, local_tokens=local_tokens)
    cache.planner(model.max_positions).check_names_every_chunk(len(ids))
    return cache


@torch.no_grad()
def losses_as_decoded(model: Any, cache: BeaconCache, ids: Sequence[int]) -> torch.Tensor:
    """Losses of a text that goes on from a cache of one row, each as decoding predicts it; the cache grows in place.

    Args:
        model: with beacons attached.
        cache: what stands before the text, of one row.
        ids: the text, N tokens.

    Returns:
        (N - 1,) nats of the second token on.
    """
    size, local = cache.config.chunk_size, cache.config.local_tokens
    first = (local - cache.rows[0].tokens_seen) % size or size
    # Where a chunk is due: each piece closes one before its first token is read, and none within. Without local tokens a
    # chunk's first token is predicted from the tail in one pass, too.
    cuts = range(first, len(ids), size) if local else ()
    nll, before, last = [], 0, None
    for stop in (*cuts, len(ids)):
        piece = torch.tensor([list(ids[before:stop])], device=model.device)
        output = model(piece, labels=piece, past_key_values=cache, logits_to_keep=1)
        if last is not None:
            nll.append(nn.functional.cross_entropy(last, piece[0, :1], reduction="none"))
        nll.append(output.nll[0].float())
        before, last = stop, output.logits[0].float()
    return torch.cat(nll).cpu()


@torch.no_grad()
def shuffled_losses(model: Any, ids: Sequence[int], other: Sequence[int], ratio: Ratio) -> Losses:
    """Each chunk of the text read on the beacons of as many chunks of another one, which remember nothing of it.

    Args:
        model: with beacons attached.
        ids: the text.
        other: ids of at least as many chunks, but for the last one.
        ratio: of the beacons.

    Raises:
        CapacityError: if the beacons do not fit the base model's positions.
    """
    start_time = time.perf_counter()
    before = _new_cache(model, ids, ratio)
    size, others = before.config.chunk_size, torch.tensor([list(other)], device=model.device)
    nll = []
    for start in range(0, len(ids), size):
        cache = before.fork()
        more = 0 if before.config.local_tokens else 1  # the token after it closes the chunk
        nll += [HOLE, losses_as_decoded(model, cache, ids[start : start + size + more])[: size - 1]]
        if start + size < len(ids):
            model(others[:, start : start + size], past_key_values=before, logits_to_keep=1)
    return Losses(torch.cat(nll[1:]), cache.cache_length, cache.cache_bytes, time.perf_counter() - start_time)


@torch.no_grad()
def _base_losses(model: Any, ids: Sequence[int]) -> Losses:
    """The base model on one text, read in pieces on its own cache."""
    start_time = time.perf_counter()
    row = torch.tensor([list(ids)], device=model.device)
    parts, cache = [], None
    with model.beacon_disabled():
        for start in range(0, len(ids), PIECE):
            piece = row[:, start : start + PIECE]
            output = model(piece, past_key_values=cache, use_cache=True, **positions_on(cache, piece))
            cache = output.past_key_values
            targets = row[0, start + 1 : start + PIECE + 1]
            losses = nn.functional.cross_entropy(output.logits[0, : len(targets)].float(), targets, reduction="none")
            parts.append(losses.cpu())
    return Losses(torch.cat(parts), len(ids), base_cache_bytes(cache), time.perf_counter() - start_time)


def _joined(nll: Sequence[torch.Tensor], parts: Sequence[Losses]) -> Losses:
    """Chunk by chunk: the last chunk's cache, everyone's time."""
    return Losses(torch.cat(list(nll)), parts[-1].cache_length, parts[-1].cache_bytes, sum(p.seconds for p in parts))


# --- what counts -----------------------------------------------------------------------------------------------------


def counted(num_tokens: int, chunk_size: int) -> torch.Tensor:
    """Mask (T - 1,) of the losses that count: of tokens after the first chunk, but for the first of each chunk."""
    tokens = torch.arange(1, num_tokens)
    return (tokens >= chunk_size) & (tokens % chunk_size != 0)


def position_edges(chunk_size: int) -> list[int]:
    """Bounds of the ranges of positions within a chunk: 1, 2, 4, 8, ... up to its size."""
    edges = [1]
    while edges[-1] < chunk_size:
        edges.append(min(2 * edges[-1], chunk_size))
    return edges


def check_length(num_tokens: int, chunk_size: int) -> None:
    """Refuse texts of which no token counts.

    Raises:
        InputError: with the two lengths.
    """
    if not bool(counted(num_tokens, chunk_size).any()):
        raise InputError(
            f"A text of {num_tokens:,} tokens has none after its first chunk ({chunk_size:,}) to measure. Use a longer length."
        )


def loss_record(losses: Losses, chunk_size: int) -> dict[str, Any]:
    """One text's losses as plain values: the mean over the tokens that count, and over each range of positions."""
    num_tokens = len(losses.nll) + 1
    check_length(num_tokens, chunk_size)
    mask = counted(num_tokens, chunk_size)
    positions = torch.arange(1, num_tokens) % chunk_size
    edges = position_edges(chunk_size)
    by_position = []
    for low, high in itertools.pairwise(edges):
        chosen = losses.nll[mask & (positions >= low) & (positions < high)]
        by_position.append([low, high, float(chosen.double().mean()) if len(chosen) else None, len(chosen)])
    return {
        "nats": float(losses.nll[mask].double().mean()),
        "tokens": int(mask.sum()),
        "by_position": by_position,
        "cache_length": losses.cache_length,
        "cache_bytes": losses.cache_bytes,
        "seconds": round(losses.seconds, 3),
    }


# --- a table in one call ---------------------------------------------------------------------------------------------


def measure(
    model: Any,
    ids: Sequence[int],
    method: str,
    *,
    ratio: Ratio | None = None,
    prefix: Sequence[int] = (),
    other: Sequence[int] = (),
) -> dict[str, Any]:
    """One text read in one way; see `loss_record` for what comes back.

    Args:
        model: with beacons attached.
        ids: the text.
        method: "full", "alone", "recent", "beacons", "shuffled" (beacons of `other`), or a key of `LOCAL_TOKENS`.
        ratio: of the beacons, and of those that "recent" is as large as.
        prefix: see `alone_losses`.
        other: see `shuffled_losses`.

    Raises:
        InputError: for another method.
    """
    size = model.beacon_config.chunk_size
    if method == "full":
        losses = full_losses(model, ids)
    elif method == "alone":
        losses = alone_losses(model, ids, prefix=prefix)
    elif method == "recent" and isinstance(ratio, int):
        losses = recent_losses(model, ids, ratio, prefix=prefix)
    elif (method == "beacons" or method in LOCAL_TOKENS) and ratio is not None:
        losses = beacon_losses(model, ids, ratio, local_tokens=LOCAL_TOKENS.get(method))
    elif method == "shuffled" and ratio is not None:
        losses = shuffled_losses(model, ids, other, ratio)
    else:
        raise InputError(
            f'method must be "full", "alone", or with a ratio "recent", "beacons", "shuffled" or some of '
            f"{', '.join(LOCAL_TOKENS)}; got {method!r}."
        )
    return loss_record(losses, size)


def evaluate(
    model: Any, texts: Iterable[Sequence[int]], ratios: Sequence[Ratio], *, prefix: Sequence[int] = ()
) -> dict[str, Any]:
    """Measure texts in one call, without files: nats of each method, and the share of the gap that beacons close.

    Args:
        model: with beacons attached; put into evaluation mode for the call.
        texts: ids of each text.
        ratios: of the beacons.
        prefix: see `alone_losses`.

    Returns:
        `{"full": Estimate, "alone": Estimate, "beacons": {ratio: Estimate}, "gap_closed": {ratio: Estimate}}`.
    """
    nats: dict[Any, list[float]] = {"full": [], "alone": [], **{ratio: [] for ratio in ratios}}
    with evaluating(model):
        for ids in texts:
            for name in ("full", "alone"):
                nats[name].append(measure(model, ids, name, prefix=prefix)["nats"])
            for ratio in ratios:
                nats[ratio].append(measure(model, ids, "beacons", ratio=ratio)["nats"])
    closed: dict[Any, Estimate] = {ratio: gap_closed(nats["alone"], nats[ratio], nats["full"]) for ratio in ratios}
    beacons = {ratio: mean(nats[ratio]) for ratio in ratios}
    return {"full": mean(nats["full"]), "alone": mean(nats["alone"]), "beacons": beacons, "gap_closed": closed}


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
