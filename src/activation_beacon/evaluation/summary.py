"""What the records say: one row for each method and ratio, with counts and paired intervals. Knows nothing of plots."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from activation_beacon.evaluation.metrics import Estimate, gap_closed, mean, mean_difference, share
from activation_beacon.evaluation.names import ALONE, FULL, ORDER, RATIO_ORDER

Record = Mapping[str, Any]


class Way(NamedTuple):
    """A method, with its ratio where it has one."""

    method: str
    ratio: int | str | None

    @property
    def label(self) -> str:
        """Such as "beacons x8"."""
        return self.method if self.ratio is None else f"{self.method} x{self.ratio}"


@dataclass(frozen=True)
class Row:
    """One way at one length.

    Attributes:
        way: method and ratio.
        quality: over the samples that it has; None where all were refused.
        against: of the samples that the other ways have too: in language modelling the gap closed, elsewhere the
            difference to the full context; None where there is nothing to compare with.
        share: of scores, what it keeps of the full context's; None in language modelling.
        cache_length, cache_bytes: in the mean.
        seconds: for reading, in the mean.
        num_refused: samples that do not fit.
        kinds: of each kind of sample, where samples are of kinds: in language modelling the gap closed, elsewhere the quality.
        turns: of conversations: the score of each turn, and its seconds in the mean.
        only_masks: whether what is dropped stays in memory; `cache_length` is then what attention sees, and `cache_bytes`
            what is held.
    """

    way: Way
    quality: Estimate | None
    against: Estimate | None
    share: Estimate | None
    cache_length: float | None
    cache_bytes: float | None
    seconds: float | None
    num_refused: int
    kinds: Mapping[str, Estimate]
    turns: Sequence[tuple[Estimate, float]]
    only_masks: bool


def dates_text(origin: Mapping[str, Any]) -> str:
    """When the samples of a folder were run, such as "of 2026-05-01 to 2026-05-02"."""
    first, last = origin["first"], origin["last"]
    if first is None:
        return f"of up to {last}, the first from before dates were noted"
    return f"of {first}" if first == last else f"of {first} to {last}"


def ways_of(records: Iterable[Record]) -> list[Way]:
    """The ways that records are of: those without a ratio first, then method by method, small ratios first."""
    found = {Way(record["method"], record["ratio"]) for record in records}
    return sorted(found, key=lambda way: (way.ratio is not None, _place(way), way.method, *_sortable(way.ratio)))


def _place(way: Way) -> int:
    order = ORDER if way.ratio is None else RATIO_ORDER
    return order.index(way.method) if way.method in order else len(order)


def _sortable(ratio: int | str | None) -> tuple[int, str]:
    return (ratio, "") if isinstance(ratio, int) else (0, str(ratio))


def lengths_of(records: Iterable[Record]) -> list[int]:
    """The lengths that records are of."""
    return sorted({record["length"] for record in records})


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records with these fields."""
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


def rows_of(records: Sequence[Record], quality: str) -> list[Row]:
    """One row for each way, from records of one task and length."""
    values = {way: _by_sample(select(records, method=way.method, ratio=way.ratio), quality) for way in ways_of(records)}
    return [_row(way, values, records, quality) for way in values]


def _by_sample(records: Iterable[Record], field: str) -> dict[str, float]:
    return {record["sample"]: record[field] for record in records if field in record}


def _row(way: Way, values: Mapping[Way, Mapping[str, float]], records: Sequence[Record], quality: str) -> Row:
    own = select(records, method=way.method, ratio=way.ratio)
    measured = [record for record in own if quality in record]
    return Row(
        way=way,
        quality=mean(list(values[way].values())) if measured else None,
        against=_against(way, values, quality),
        share=None if quality == "nats" else _share(way, values),
        cache_length=_average(measured, "cache_length"),
        cache_bytes=_average(measured, "cache_bytes"),
        seconds=_average(measured, "seconds" if quality == "nats" else "read_seconds"),
        num_refused=len(own) - len(measured),
        kinds=_by_kind(way, measured, values, quality),
        turns=turns_of(record for record in measured if record.get("is_conversation")),
        only_masks=any(record.get("only_masks") for record in measured),
    )


def _by_kind(
    way: Way, records: Sequence[Record], values: Mapping[Way, Mapping[str, float]], quality: str
) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for kind in sorted({record["kind"] for record in records if "kind" in record}):
        own = _by_sample(select(records, kind=kind), quality)
        estimate = _against(way, {**values, way: own}, quality) if quality == "nats" else mean(list(own.values()))
        if estimate is not None:
            found[kind] = estimate
    return found


def _average(records: Sequence[Record], field: str) -> float | None:
    return sum(record[field] for record in records) / len(records) if records else None


def _against(way: Way, values: Mapping[Way, Mapping[str, float]], quality: str) -> Estimate | None:
    full, alone = Way(FULL, None), Way(ALONE, None)
    if quality == "nats":
        if way in (full, alone):
            return None
        columns = paired(values.get(alone, {}), values[way], values.get(full, {}))
        has_gap = sum(columns[0]) > sum(columns[2])  # beyond the base's window all that stands before may do harm
        return gap_closed(*columns) if has_gap else None
    if way == full:
        return None
    columns = paired(values[way], values.get(full, {}))
    return mean_difference(*columns) if columns[0] else None


def _share(way: Way, values: Mapping[Way, Mapping[str, float]]) -> Estimate | None:
    full = Way(FULL, None)
    columns = paired(values[way], values.get(full, {}))
    return share(*columns) if way != full and sum(columns[1]) > 0 else None


def paired(*columns: Mapping[str, float]) -> list[list[float]]:
    """The values of the samples that all columns have, in one order."""
    common = sorted(set.intersection(*(set(column) for column in columns)))
    return [[column[sample] for sample in common] for column in columns]


def by_position(records: Iterable[Record]) -> list[tuple[int, int, float]]:
    """Ranges of positions within the chunk and the mean loss of all tokens there, from records of one way."""
    sums: dict[tuple[int, int], list[float]] = {}
    for record in records:
        for low, high, value, count in record.get("by_position", ()):
            if count:
                total = sums.setdefault((low, high), [0.0, 0.0])
                total[0] += value * count
                total[1] += count
    return [(low, high, total / count) for (low, high), (total, count) in sorted(sums.items())]


def grid(
    records: Sequence[Record], rows: Sequence[Any], columns: Sequence[Any], row: str, column: str
) -> list[list[Estimate | None]]:
    """Mean scores by two fields; None where there is no sample."""
    found = [
        [[r["score"] for r in select(records, **{row: one, column: other}) if "score" in r] for other in columns]
        for one in rows
    ]
    return [[mean(scores) if scores else None for scores in line] for line in found]


def turns_of(records: Iterable[Record]) -> list[tuple[Estimate, float]]:
    """For each turn the score and the seconds in the mean, from records of one way; reading counts into the first."""
    measured = [record for record in records if "scores" in record]
    turns = []
    for turn in range(min((len(record["scores"]) for record in measured), default=0)):
        seconds = [r["answer_seconds"][turn] + (r["read_seconds"] if turn == 0 else 0.0) for r in measured]
        turns.append((mean([r["scores"][turn] for r in measured]), sum(seconds) / len(seconds)))
    return turns
