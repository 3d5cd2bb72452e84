"""A comparison as Markdown, as plain values, and as pictures beside it."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activation_beacon.config import short_fingerprint
from activation_beacon.evaluation import plots
from activation_beacon.evaluation.blocks import (
    PICTURES,
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    markdown_of,
)
from activation_beacon.evaluation.comparison import Comparison, Line, names_of
from activation_beacon.evaluation.harness_tasks import HarnessResults
from activation_beacon.evaluation.metrics import FEW, MIN_SAMPLES, Estimate
from activation_beacon.evaluation.names import FULL
from activation_beacon.evaluation.report import QUALITIES
from activation_beacon.evaluation.results import Results
from activation_beacon.evaluation.summary import dates_text
from activation_beacon.files import make_folder, write_text

TEXT = (
    "Means and differences are over the samples that all of these folders have (n). Differences are paired, sample by sample; "
    "intervals are 95%. More is better in a score, less in nats per token."
)
HARNESS_TEXT = (
    "Tasks of lm-eval are not compared, as no scores of single samples are kept of them; `beacon eval report` shows those of "
    "each folder."
)
BEACONS = "beacons"


def blocks_of(found: Comparison) -> list[Block]:
    """The tables of a comparison and what is to be known of them, without pictures."""
    return [Heading(1, "Comparison"), *_head(found), *_tables(found)]


def write_comparison(found: Comparison, path: Path) -> list[Path]:
    """Write a comparison as Markdown, and its pictures into a folder beside it where matplotlib is installed.

    Returns:
        The pictures.

    Raises:
        StorageError: if a file cannot be written.
    """
    pictures = _draw(found, path) if can_draw() else []
    write_text(path, markdown_of([*blocks_of(found), *pictures]))
    return [path.parent / PICTURES / picture.name for picture in pictures]


def can_draw() -> bool:
    """Whether there will be pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def as_json(found: Comparison) -> dict[str, Any]:
    """The same as plain values."""
    names = names_of(found.folders)
    return {
        "folders": [_facts(name, each) for name, each in zip(names, found.folders, strict=True)],
        "rows": [_line_as_json(line, names) for line in found.lines],
        "unshared": [
            {"folders": [names[place] for place in owners], "what": texts}
            for owners, texts in sorted(found.unshared.items())
        ],
    }


def _facts(name: str, results: Results) -> dict[str, Any]:
    return {"name": name, "folder": str(results.folder), **results.model, "origin": results.origin}


def _line_as_json(line: Line, names: Sequence[str]) -> dict[str, Any]:
    means = zip(names, line.means, strict=True)
    differences = zip(names[1:], line.differences, strict=True)
    return {
        "task": line.task,
        "length": line.length,
        "method": line.way.method,
        "ratio": line.way.ratio,
        "samples": line.means[0].count,
        line.quality: [{"folder": name, **found.to_dict()} for name, found in means],
        "differences": [{"folder": name, "less": names[0], **found.to_dict()} for name, found in differences],
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _head(found: Comparison) -> Iterator[Block]:
    yield _folders_table(found)
    if found.confounders:
        yield Paragraph(
            f"**Not the adapter alone**: the folders differ in {' and '.join(found.confounders).replace('_', ' ')} too."
        )
    if len({each.model.get("adapter_fingerprint") for each in found.folders}) == 1:
        yield Paragraph("**One adapter**: all folders are of the same one.")
    yield Paragraph(TEXT)
    if found.unshared:
        yield Paragraph(found.unshared_text())
    if any(HarnessResults(each.folder).lines for each in found.folders):
        yield Paragraph(HARNESS_TEXT)


def _folders_table(found: Comparison) -> Table:
    rows = []
    for name, each in zip(names_of(found.folders), found.folders, strict=True):
        model, origin = each.model, each.origin
        adapter = short_fingerprint(str(model.get("adapter_fingerprint", "-")))
        rows.append(
            [
                name,
                ", ".join(origin["models"]) or "-" if origin else "-",
                adapter + ("" if model.get("is_trained", True) else " (untrained)"),
                *(str(model.get(key, "-")) for key in ("base_model", "dtype", "chunk_size")),
                ", ".join(origin["versions"]) if origin else "-",
                dates_text(origin).removeprefix("of ") if origin else "-",
            ]
        )
    return Table(["folder", "model", "adapter", "base", "dtype", "chunk size", "version", "samples of"], rows)


def _tables(found: Comparison) -> Iterator[Block]:
    names = names_of(found.folders)
    differences = [f"{name} less {names[0]}" for name in names[1:]]
    for task, length in _places(found):
        lines = [line for line in found.lines if (line.task, line.length) == (task, length)]
        yield Heading(2, f"{task}, {length:,} tokens")
        yield Table(
            [f"method, {QUALITIES[lines[0].quality]}", *found.labels, "n", *differences],
            [_cells(line) for line in lines],
        )
    if any(line.means[0].count < MIN_SAMPLES for line in found.lines):
        yield Paragraph(FEW)


def _places(found: Comparison) -> list[tuple[str, int]]:
    return list(dict.fromkeys((line.task, line.length) for line in found.lines))


def _cells(line: Line) -> list[str]:
    count = line.means[0].count
    means, differences = ([each.beside(count) for each in those] for those in (line.means, line.differences))
    return [line.way.label, *means, str(count), *differences]


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw(found: Comparison, path: Path) -> list[Picture]:
    """A picture for each task with beacons at two ratios or more, a line for each folder."""
    folder = path.parent / PICTURES
    drawn = []
    for task in dict.fromkeys(line.task for line in found.lines):
        panels = list(_panels(found, task))
        if not panels:
            continue
        make_folder(folder, f"Choose another place for {path}.")
        quality = next(line.quality for line in found.lines if line.task == task)
        label, name = QUALITIES[quality], f"{path.stem}-{task}.png"
        has_bars = quality != "nats"  # documents differ far more than adapters do; the table has the differences
        plots.draw_lines(folder / name, panels, x_label="compression ratio", y_label=label, has_bars=has_bars)
        drawn.append(Picture(name, f"{task}: {label} of beacons over the compression ratio"))
    return drawn


def _panels(found: Comparison, task: str) -> Iterator[plots.Panel]:
    for length in [length for each, length in _places(found) if each == task]:
        those = [line for line in found.lines if (line.task, line.length) == (task, length)]
        points: dict[str, list[plots.Point]] = {label: [] for label in found.labels}
        for line in those:
            if line.way.method == BEACONS and isinstance(line.way.ratio, int):
                for label, estimate in zip(found.labels, line.means, strict=True):
                    points[label].append(plots.Point(line.way.ratio, estimate))
        if len(points[found.labels[0]]) > 1:
            yield plots.Panel(f"{length:,} tokens", points, _level(those))


def _level(lines: Sequence[Line]) -> Mapping[str, Estimate]:
    """The base model's own, which no adapter changes."""
    return {line.way.method: line.means[0] for line in lines if line.way.method == FULL}
