"""How chunks get their ratios, and which tokens deserve better: what a call asks for, checked. Integers, no torch."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import RatioError

Ratio = int | Sequence[int] | Literal["auto"]


class Span(NamedTuple):
    """Tokens `start..stop-1` of a text that deserve better: their chunks get at most `ratio`; None keeps them raw."""

    start: int
    stop: int
    ratio: int | None


@dataclass(frozen=True)
class RatioPolicy:
    """How a text's chunks get their compression ratios.

    Args:
        ratio: one ratio for all chunks; one for each chunk of the text (the last goes on for what is decoded later); or
            "auto", the smallest ratio of the adapter with which the text fits.
        budget: cache entries that the text may hold at most; needs "auto".
        spans: parts of the text that are kept raw or at a lower ratio.
    """

    ratio: int | tuple[int, ...] | Literal["auto"] = "auto"
    budget: int | None = None
    spans: tuple[Span, ...] = ()


def as_policy(
    config: BeaconConfig,
    ratio: Ratio = "auto",
    *,
    budget: int | None = None,
    spans: Sequence[Sequence[int | None]] = (),
) -> RatioPolicy:
    """Check what a caller asked for against the adapter.

    Raises:
        RatioError: if a ratio is not among the adapter's, the budget is too small to hold a chunk, or a span is empty.
    """
    if isinstance(ratio, str):
        if ratio != "auto":
            raise RatioError(f'ratio must be an int, a sequence of ints, or "auto"; got {ratio!r}.')
        checked: int | tuple[int, ...] | Literal["auto"] = "auto"
    elif hasattr(ratio, "__iter__"):
        values = ratio.tolist() if hasattr(ratio, "tolist") else list(ratio)
        is_scalar = not isinstance(values, list)  # a tensor of no dimension
        checked = check_ratio(config, values) if is_scalar else tuple(check_ratio(config, value) for value in values)
    else:
        checked = check_ratio(config, ratio)
    return RatioPolicy(checked, _check_budget(config, budget, checked), tuple(_check_span(config, s) for s in spans))


def revised(
    config: BeaconConfig,
    policy: RatioPolicy,
    *,
    ratio: Ratio | None = None,
    budget: int | None = None,
    spans: Sequence[Sequence[int | None]] = (),
) -> RatioPolicy:
    """A policy with what a caller names in place of what it says; spans are added to those that it has.

    A budget asks for "auto", and a ratio of its own ends it.

    Raises:
        RatioError: as `as_policy`.
    """
    if ratio is None:
        ratio = policy.ratio if budget is None else "auto"
    if budget is None and isinstance(ratio, str):
        budget = policy.budget
    new = [span for span in map(tuple, spans) if span not in policy.spans]
    return as_policy(config, ratio, budget=budget, spans=(*policy.spans, *new))


def check_ratio(config: BeaconConfig, ratio: Any) -> int:
    """One of the adapter's ratios, as an int.

    Raises:
        RatioError: if it is something else; the message lists the adapter's ratios.
    """
    known = ", ".join(map(str, config.ratios))
    if isinstance(ratio, list | tuple):
        raise RatioError(
            f"ratio names one for each chunk of a text, and the same ones for each text of a batch; got {ratio!r} among them. "
            "For ratios of their own compress texts one by one, and join them with BeaconCache.stack."
        )
    if isinstance(ratio, bool) or not hasattr(ratio, "__index__"):
        raise RatioError(
            f"A compression ratio is an int of at least 2 (raw tokens per beacon); got {ratio!r}. Use {known}."
        )
    ratio = operator.index(ratio)
    if ratio < 2:
        raise RatioError(
            f"A compression ratio is an int of at least 2 (raw tokens per beacon); got {ratio}. Use {known}."
        )
    if ratio > config.chunk_size:
        raise RatioError(f"ratio ({ratio}) must not exceed chunk_size ({config.chunk_size}). Use {known}.")
    if config.chunk_size % ratio:
        raise RatioError(f"ratio ({ratio}) must divide chunk_size ({config.chunk_size}). Use {known}.")
    if ratio not in config.ratios:
        raise RatioError(f"ratio ({ratio}) is not one that this adapter knows. Use {known}.")
    return ratio


def parse_ratio(text: str, name: str = "ratio") -> int | tuple[int, ...] | Literal["auto"]:
    """What a text asks for: "auto", one ratio, or one for each chunk with commas between them.

    Args:
        text: as it was written.
        name: of the option, for the error.

    Raises:
        RatioError: if it is none of these.
    """
    if text == "auto":
        return "auto"
    try:
        ratios = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RatioError(
            f'{name} must be "auto", an int such as 8, or a list such as 2,4,8 with one for each chunk; got {text[:50]!r}.'
        ) from None
    return ratios if "," in text else ratios[0]


def _check_budget(config: BeaconConfig, budget: int | None, ratio: object) -> int | None:
    if budget is None:
        return None
    if ratio != "auto":
        raise RatioError(f'A budget ({budget}) chooses the ratio by itself and needs ratio="auto"; got {ratio!r}.')
    num_beacons, tail = config.num_beacons(config.ratios[-1]), config.untouched_length
    least = config.num_sinks + tail + num_beacons
    number = _as_int(budget)
    if number is None or number < least:
        raise RatioError(
            f"budget must be at least {least} cache entries ({config.num_sinks} sinks, {tail} raw tokens, {num_beacons} beacons "
            f"of one chunk at ratio {config.ratios[-1]}); got {budget!r}."
        )
    return number


def _check_span(config: BeaconConfig, span: Sequence[int | None]) -> Span:
    if len(span) != 3:
        raise RatioError(f"A span is (start, stop, ratio), with None for ratio to keep it raw; got {tuple(span)!r}.")
    start, stop, ratio = span
    first, end = _as_int(start), _as_int(stop)
    if first is None or end is None or not 0 <= first < end:
        raise RatioError(f"A span needs 0 <= start < stop, counted in tokens of the text; got {start!r}, {stop!r}.")
    return Span(first, end, None if ratio is None else check_ratio(config, ratio))


def is_raw(start: int, stop: int, spans: Sequence[Span]) -> bool:
    """Whether spans keep all tokens `start..stop-1` raw."""
    for span in sorted(span for span in spans if span.ratio is None):
        if span.start <= start:
            start = max(start, span.stop)
    return start >= stop


def _as_int(value: Any) -> int | None:
    """Any kind of integer as Python's; None for what is none."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None
