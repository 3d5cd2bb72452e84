"""The report of a folder of results: Markdown and HTML of the same blocks, and the plots beside them."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activation_beacon.errors import InputError
from activation_beacon.evaluation import plots, summary
from activation_beacon.evaluation.blocks import (
    PICTURES,
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    markdown_of,
    page_of,
)
from activation_beacon.evaluation.harness_tasks import HarnessResults
from activation_beacon.evaluation.metrics import FEW, MIN_SAMPLES, Estimate
from activation_beacon.evaluation.overview import overview
from activation_beacon.evaluation.results import Results
from activation_beacon.evaluation.summary import Record, Row
from activation_beacon.files import make_folder, write_text

MARKDOWN, HTML = "report.md", "report.html"
QUALITIES = {"nats": "nats per token", "score": "score"}
INTERVALS = (
    "n counts samples. Intervals are 95% over these: Wilson's where each sample is 0 or 1, elsewhere bootstrap percentiles; "
    "comparisons are paired: they take samples that all have, and show their own n where these are fewer."
)
UNTRAINED = "**Untrained**: the beacons of this adapter have not been trained. Sizes hold; quality is what untrained beacons give."


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Draw the plots of a folder of results and write report.md and report.html there.

    Returns:
        Both files.

    Raises:
        StorageError, FileFormatError: if there are no results, or they are damaged.
        InputError: if no sample is finished, or matplotlib is not installed.
    """
    results = Results(folder)
    if not results.records and not HarnessResults(folder).lines:
        raise InputError(f"{folder} has no finished sample yet. Run `beacon eval` on, then ask for the report.")
    pictures = results.folder / PICTURES
    make_folder(pictures)
    blocks = _blocks(results, pictures)
    markdown, page = results.folder / MARKDOWN, results.folder / HTML
    write_text(markdown, markdown_of(blocks))
    write_text(page, page_of(blocks, pictures))
    return markdown, page


def tables(results: Results, task: str | None = None) -> list[Block]:
    """The tables of one task, or of all, without words and pictures."""
    blocks: list[Block] = []
    for name, facts in results.run["tasks"].items():
        records = results.of_task(name) if task in (None, name) else []
        for length in summary.lengths_of(records):
            blocks += [Heading(3, f"{name}, {length:,} tokens"), *_tables_of(records, length, facts["quality"])]
    if task in (None, "harness"):
        blocks += _harness_blocks(results.folder)
    return blocks


def rows_as_json(results: Results, task: str | None = None) -> list[dict[str, Any]]:
    """The rows of the tables of one task, or of all, as plain values."""
    rows = []
    for name, facts in results.run["tasks"].items():
        records = results.of_task(name) if task in (None, name) else []
        for length in summary.lengths_of(records):
            found = summary.rows_of(summary.select(records, length=length), facts["quality"])
            rows += [{"task": name, "length": length, **_row_as_json(row, facts["quality"])} for row in found]
    return rows


def _row_as_json(row: Row, quality: str) -> dict[str, Any]:
    against = "gap_closed" if quality == "nats" else "less_full_context"
    return {
        "method": row.way.method,
        "ratio": row.way.ratio,
        quality: None if row.quality is None else row.quality.to_dict(),
        against: None if row.against is None else row.against.to_dict(),
        "share_of_full": None if row.share is None else row.share.to_dict(),
        "cache_length": row.cache_length,
        "cache_bytes": row.cache_bytes,
        "seconds": row.seconds,
        "refused": row.num_refused,
        "only_masks": row.only_masks,
        "kinds": {kind: found.to_dict() for kind, found in row.kinds.items()},
        "turns": [{"score": score.to_dict(), "seconds": seconds} for score, seconds in row.turns],
    }


# --- contents --------------------------------------------------------------------------------------------------------


def _blocks(results: Results, pictures: Path) -> list[Block]:
    model = results.model
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in model.items() if name != "is_trained"]
    blocks: list[Block] = [Heading(1, "Evaluation"), Paragraph(", ".join(facts) + ".")]
    if results.origin is not None:
        blocks.append(Paragraph(_origin_text(results.origin)))
    if not model.get("is_trained", True):
        blocks.append(Paragraph(UNTRAINED))
    blocks += [Paragraph(INTERVALS), *overview(results)]
    for name, task in results.run["tasks"].items():
        records = results.of_task(name)
        if records:
            blocks += _task_blocks(name, task, records, pictures)
    return blocks + _harness_blocks(results.folder)


def _origin_text(origin: Mapping[str, Any]) -> str:
    """Such as "Model my-adapter, activation-beacon 0.1.0; samples of 2026-05-01 to 2026-05-02."."""
    model = f"Model {', '.join(origin['models'])}, " if origin["models"] else ""
    return f"{model}activation-beacon {', '.join(origin['versions'])}; samples {summary.dates_text(origin)}."


def _harness_blocks(folder: Path) -> list[Block]:
    found = HarnessResults(folder)
    if not found.lines:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in found.lines[0]["facts"].items() if value is not None)
    return [
        Heading(2, "Tasks of lm-eval"),
        Paragraph(f"As lm-eval scores them, ± standard error; {settings}."),
        found.table(),
    ]


def _task_blocks(name: str, task: dict[str, Any], records: Sequence[Record], pictures: Path) -> list[Block]:
    quality = task["quality"]
    settings = ", ".join(f"{key} {_value_text(value)}" for key, value in task["settings"].items())
    blocks: list[Block] = [Heading(2, name), Paragraph(f"Settings: {settings}." if settings else "No settings.")]
    if quality == "nats":
        blocks.append(Paragraph(LM_TEXT))
    for length in summary.lengths_of(records):
        blocks += [Heading(3, f"{length:,} tokens"), *_tables_of(records, length, quality)]
    blocks += _refusals(records)
    return blocks + _pictures(name, quality, records, pictures)


def _tables_of(records: Sequence[Record], length: int, quality: str) -> list[Block]:
    those = summary.select(records, length=length)
    rows = summary.rows_of(those, quality)
    found: list[Block] = [_table(rows, quality), *_peer_notes(rows, those)]
    if any(row.kinds for row in rows):
        found.append(_kinds_table(rows, "gap closed" if quality == "nats" else "score"))
    if any(row.turns for row in rows):
        found.append(_turns_table(rows))
    if any(estimate.count < MIN_SAMPLES for row in rows for estimate in _estimates(row)):
        found.append(Paragraph(FEW))
    return found


def _estimates(row: Row) -> Iterator[Estimate]:
    """All that stand in a row's tables."""
    yield from (each for each in (row.quality, row.against, row.share) if each is not None)
    yield from row.kinds.values()
    yield from (score for score, _ in row.turns)


LM_TEXT = (
    "Loss of the tokens after the first chunk, but for the first of each chunk. **full**: the base model with the whole text "
    "before each token; **alone**: with nothing before the chunk; **recent**: with as many of the "
    "tokens before it as beacons have entries; "
    "**shuffled**: on beacons of another text. Gap closed: (alone - method) / (alone - full); none where the full context is no "
    "better than nothing, as beyond the base's window."
)


MASKS = " (masks only)"
MASKS_TEXT = (
    "**Masks only**: it hides entries from attention and frees none. Its entries are those that attention sees; its bytes are "
    "those of the whole text."
)


def _table(rows: Sequence[Row], quality: str) -> Table:
    against = ["gap closed"] if quality == "nats" else ["less full context", "share of full context"]
    refused = any(row.num_refused for row in rows)
    header = ["method", QUALITIES[quality], "n", *against, "cache entries", "cache MiB", "seconds to read"]
    return Table(
        [*header, *(["do not fit"] if refused else [])],
        [
            [
                row.way.label + (MASKS if row.only_masks else ""),
                _text(row.quality, _count(row)),
                str(_count(row)),
                _text(row.against, _count(row)),
                *([] if quality == "nats" else [_text(row.share, _count(row))]),
                _number(row.cache_length, ",.0f"),
                _number(None if row.cache_bytes is None else row.cache_bytes / 2**20, ",.2f"),
                _number(row.seconds, ",.2f"),
                *([str(row.num_refused)] if refused else []),
            ]
            for row in rows
        ],
    )


def _peer_notes(rows: Sequence[Row], records: Sequence[Record]) -> list[Block]:
    """What is to be known of methods that another project ran."""
    by = dict.fromkeys(str(record["by"]) for record in records if "by" in record)
    names = dict.fromkeys(str(record["method"]) for record in records if "by" in record)
    notes = [f"Run by {'; '.join(by)}: {', '.join(names)}."] if by else []
    if any(row.only_masks for row in rows):
        notes.append(MASKS_TEXT)
    return [Paragraph(" ".join(notes))] if notes else []


def _kinds_table(rows: Sequence[Row], measure: str) -> Table:
    """Counts stand in the head; in a cell, where it has another one than most of its column."""
    counts = {
        kind: statistics.mode(row.kinds[kind].count for row in rows if kind in row.kinds)
        for kind in sorted({kind for row in rows for kind in row.kinds})
    }
    return Table(
        [f"{measure} by kind", *(f"{kind}, n={count}" for kind, count in counts.items())],
        [
            [row.way.label, *(_text(row.kinds.get(kind), count) for kind, count in counts.items())]
            for row in rows
            if row.kinds
        ],
    )


def _turns_table(rows: Sequence[Row]) -> Table:
    num_turns = max(len(row.turns) for row in rows)
    found = []
    for row in rows:
        cells = [f"{_text(score, _count(row))} / {seconds:.2f} s" for score, seconds in row.turns]
        found.append([row.way.label, str(_count(row)), *cells, *["-"] * (num_turns - len(cells))])
    header = [f"turn {turn + 1}" for turn in range(num_turns)]
    return Table(["score and seconds, reading included in the first", "n", *header], found)


def _refusals(records: Sequence[Record]) -> list[Block]:
    texts = dict.fromkeys(str(record["refused"]) for record in records if "refused" in record)
    if not texts:
        return []
    return [Paragraph("Do not fit: " + " ".join(list(texts)[:3]) + (" ..." if len(texts) > 3 else ""))]


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(name: str, quality: str, records: Sequence[Record], folder: Path) -> list[Block]:
    made: list[Block] = []
    rows = {
        length: summary.rows_of(summary.select(records, length=length), quality)
        for length in summary.lengths_of(records)
    }
    label = QUALITIES[quality]
    has_bars = quality != "nats"  # documents differ far more than methods do; the table has the intervals
    if any(isinstance(row.way.ratio, int) for those in rows.values() for row in those):
        panels = [_over_ratio(f"{length:,} tokens", those) for length, those in rows.items()]
        plots.draw_lines(
            folder / f"{name}-ratio.png", panels, x_label="compression ratio", y_label=label, has_bars=has_bars
        )
        made.append(Picture(f"{name}-ratio.png", f"{name}: {label} over the compression ratio"))
    panels = [_over_bytes(f"{length:,} tokens", those) for length, those in rows.items()]
    path = folder / f"{name}-bytes.png"
    plots.draw_lines(path, panels, x_label="cache in MiB", y_label=label, has_bars=has_bars, ticks="powers")
    made.append(Picture(path.name, f"{name}: {label} over the size of the cache"))
    if quality == "nats":
        made += [*_gap_picture(name, rows, folder), _positions(name, records, folder)]
    if any("depth" in record for record in records):
        made.append(_heat_maps(name, records, folder))
    return made


def _over_ratio(title: str, rows: Sequence[Row]) -> plots.Panel:
    lines: dict[str, list[plots.Point]] = {}
    levels = {}
    for row in rows:
        if row.quality is None:
            continue
        if isinstance(row.way.ratio, int):
            lines.setdefault(row.way.method, []).append(plots.Point(row.way.ratio, row.quality))
        elif row.way.ratio is None:
            levels[row.way.method] = row.quality
    return plots.Panel(title, lines, levels)


def _over_bytes(title: str, rows: Sequence[Row]) -> plots.Panel:
    lines: dict[str, list[plots.Point]] = {}
    levels = {}
    for row in rows:
        if row.quality is None or row.cache_bytes is None:
            continue
        if row.way.method in ("alone", "shuffled"):
            levels[row.way.method] = row.quality
            continue
        note = f"x{row.way.ratio}" if row.way.method == "beacons" else ""  # the others stand at the same bytes
        lines.setdefault(row.way.method, []).append(plots.Point(row.cache_bytes / 2**20, row.quality, note))
    return plots.Panel(title, lines, levels)


def _gap_picture(name: str, rows: Mapping[int, Sequence[Row]], folder: Path) -> list[Block]:
    panels = []
    for length, those in rows.items():
        lines: dict[str, list[plots.Point]] = {}
        for row in those:
            if isinstance(row.way.ratio, int) and row.against is not None:
                lines.setdefault(row.way.method, []).append(plots.Point(row.way.ratio, row.against))
        if lines:
            panels.append(plots.Panel(f"{length:,} tokens", lines, {}))
    if not panels:
        return []
    path = folder / f"{name}-gap.png"
    plots.draw_lines(path, panels, x_label="compression ratio", y_label="gap closed")
    return [Picture(path.name, f"{name}: share of the gap between nothing and all before the chunk that is closed")]


def _positions(name: str, records: Sequence[Record], folder: Path) -> Picture:
    panels = {}
    for length in summary.lengths_of(records):
        those = summary.select(records, length=length)
        lines = {
            way.label: summary.by_position(summary.select(those, method=way.method, ratio=way.ratio))
            for way in summary.ways_of(those)
        }
        panels[f"{length:,} tokens"] = {label: ranges for label, ranges in lines.items() if ranges}
    plots.draw_positions(folder / f"{name}-positions.png", panels, y_label=QUALITIES["nats"])
    return Picture(
        f"{name}-positions.png",
        f"{name}: nats per token by position within the chunk (chunks alone, or on another text, may lie above)",
    )


def _heat_maps(name: str, records: Sequence[Record], folder: Path) -> Picture:
    lengths = summary.lengths_of(records)
    depths = sorted({record["depth"] for record in records if "depth" in record})
    grids = {
        way.label: summary.grid(
            summary.select(records, method=way.method, ratio=way.ratio), depths, lengths, "depth", "length"
        )
        for way in summary.ways_of(records)
    }
    plots.draw_heat_maps(folder / f"{name}-heat.png", grids, columns=lengths, rows=depths)
    return Picture(f"{name}-heat.png", f"{name}: score over length and depth")


# --- numbers ---------------------------------------------------------------------------------------------------------


def _text(estimate: Estimate | None, count: int) -> str:
    """A number and its interval; and its count, if that is not the one that stands beside it."""
    if estimate is None or estimate.value != estimate.value:
        return "-"
    return estimate.beside(count)


def _count(row: Row) -> int:
    return row.quality.count if row.quality else 0


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _value_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
