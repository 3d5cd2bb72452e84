"""All tasks of a folder in one table: what is lost at which ratio on which kind of task, and against what else.

Gaps, differences, sizes and seconds stand in the tables of each task.
"""

import statistics
from collections.abc import Sequence

from activation_beacon.evaluation.blocks import Block, Heading, Paragraph, Table
from activation_beacon.evaluation.metrics import FEW, MIN_SAMPLES, Estimate, mean
from activation_beacon.evaluation.results import Results
from activation_beacon.evaluation.summary import Record, Way, lengths_of, select, ways_of

TEXT = (
    "Quality of each method on each task and length: in lm nats per token (less is better), elsewhere the score. n counts "
    "samples; a cell that has others says so."
)

Column = dict[Way, Estimate]


def overview(results: Results) -> list[Block]:
    """A row for each method and ratio, a column for each task and length; nothing for a folder of one column."""
    columns: dict[str, Column] = {}
    for name, facts in results.run["tasks"].items():
        records = [record for record in results.of_task(name) if facts["quality"] in record]
        for length in lengths_of(records):
            columns[f"{name} {length:,}"] = _column(select(records, length=length), facts["quality"])
    if len(columns) < 2:
        return []
    table = _table(columns, ways_of(results.records.values()))
    is_few = any(found.count < MIN_SAMPLES for column in columns.values() for found in column.values())
    return [Heading(2, "Overview"), Paragraph(TEXT), table, *([Paragraph(FEW)] if is_few else [])]


def _column(records: Sequence[Record], quality: str) -> Column:
    return {
        way: mean([record[quality] for record in select(records, method=way.method, ratio=way.ratio)])
        for way in ways_of(records)
    }


def _table(columns: dict[str, Column], ways: Sequence[Way]) -> Table:
    counts = {title: statistics.mode(found.count for found in column.values()) for title, column in columns.items()}
    return Table(
        ["method", *(f"{title}, n={count}" for title, count in counts.items())],
        [[way.label, *(_cell(columns[title].get(way), counts[title]) for title in columns)] for way in ways],
    )


def _cell(estimate: Estimate | None, count: int) -> str:
    return "-" if estimate is None else estimate.beside(count)
