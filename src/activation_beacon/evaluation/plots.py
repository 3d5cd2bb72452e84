"""Pictures of results, with matplotlib: lines over ratios and bytes, losses by position, heat maps of needles."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_beacon.errors import InputError
from activation_beacon.evaluation.metrics import Estimate
from activation_beacon.files import whole_file

# Of Okabe and Ito: told apart by everyone. Black and greys are for what has no ratio.
COLOURS = {
    "beacons": "#0072B2",
    "beacons-int8": "#56B4E9",
    "beacons-int4": "#88CCEE",
    "beacons-local0": "#99BBDD",
    "beacons-local64": "#6699CC",
    "beacons-local128": "#225588",
    "beacons-local256": "#002255",
    "recent": "#E69F00",
    "head-tail": "#D55E00",
    "streaming-llm": "#CC79A7",
    "int8": "#009E73",
    "int4": "#44AA99",
    "full": "#000000",
    "alone": "#777777",
    "shuffled": "#AAAAAA",
}
MARKERS = "osD^vPX"
DODGE = {"points": 0.03, "powers": 0.005}  # by which methods at one x stand apart, as a share of it
MORE_COLOURS = ("#882255", "#117733", "#999933", "#332288", "#AA4499", "#661100")
DASHES: dict[str, Any] = {
    "full": "-",
    "alone": "--",
    "shuffled": ":",
    "recent": "-.",
    "beacons-local0": (0, (9, 1)),
    "beacons-local64": (0, (6, 1)),
    "beacons-local128": (0, (3, 1)),
    "beacons-local256": (0, (1, 1)),
}
WITHOUT_CONTEXT = ("alone", "shuffled")  # they may leave a picture of positions: a chunk's beginning is hard for them
WIDTH, HEIGHT, DPI = 4.2, 3.4, 130
COLUMNS = 3  # panels beside one another


@dataclass(frozen=True)
class Point:
    """One method at one place.

    Attributes:
        x: ratio, bytes or the like.
        quality: how good it is there.
        note: written beside it.
    """

    x: float
    quality: Estimate
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: above it.
        lines: points of each method.
        levels: what does not depend on x, as horizontal lines.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    levels: Mapping[str, Estimate]


def draw_lines(
    path: Path, panels: Sequence[Panel], *, x_label: str, y_label: str, has_bars: bool = True, ticks: str = "points"
) -> None:
    """Quality over something, on a logarithmic scale, a panel for each length.

    Args:
        path: the picture.
        panels: what to draw.
        x_label, y_label: of the axes.
        has_bars: whether 95% intervals are drawn; without them where samples differ far more than methods do.
        ticks: "points" where the points are few and even, "powers" for powers of two.
    """
    figure, axes = _figure(len(panels))
    names = list(dict.fromkeys(name for panel in panels for name in (*panel.levels, *panel.lines)))
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, names, has_bars=has_bars, dodge=DODGE[ticks])
        found = sorted({point.x for points in panel.lines.values() for point in points})
        _log_x(axis, found if ticks == "points" else _powers(found))
        if len(found) == 1 and found[0] > 0:
            axis.set_xlim(found[0] / 2, found[0] * 2)  # or what stands apart by a little would fill the width
        _label(axis, panel.title, x_label, y_label)
    _save(figure, path, axes)


def draw_positions(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[int, int, float]]]], *, y_label: str
) -> None:
    """Losses over the position within the chunk: for each title, the ranges and means of each way.

    The picture is as high as it takes for all but those that read without the text's own context.
    """
    figure, axes = _figure(len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, ranges in lines.items():
            method = name.split(" x")[0]
            shade = _shade(name, names)
            x = [low for low, _, _ in ranges]
            style = DASHES.get(method, "-")
            y = [mean for _, _, mean in ranges]
            axis.plot(x, y, linestyle=style, color=shade, label=name, marker="o", markersize=3)
        seen = [
            mean
            for name, ranges in lines.items()
            if name.split(" x")[0] not in WITHOUT_CONTEXT
            for _, _, mean in ranges
        ]
        if seen:
            margin = 0.1 * max(max(seen) - min(seen), 0.1)
            axis.set_ylim(min(seen) - margin, max(seen) + margin)
        _log_x(axis, sorted({low for ranges in lines.values() for low, _, _ in ranges}))
        _label(axis, title, "position within the chunk (from)", y_label)
    _save(figure, path, axes)


def draw_heat_maps(
    path: Path,
    grids: Mapping[str, Sequence[Sequence[Estimate | None]]],
    *,
    columns: Sequence[int],
    rows: Sequence[float],
) -> None:
    """Scores over length (columns) and depth (rows), a map for each way, all on one scale.

    How many samples a cell has stands above the map; in brackets in the cells, where they differ.
    """
    figure, axes = _figure(len(grids), height=HEIGHT * 0.95)
    image = None
    for axis, (title, values) in zip(axes, grids.items(), strict=True):
        cells = [[float("nan") if cell is None else cell.value for cell in line] for line in values]
        counts = {cell.count for line in values for cell in line if cell is not None}
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        axis.set_xticks(range(len(columns)), [_tokens_text(column) for column in columns])
        axis.set_yticks(range(len(rows)), [f"{100 * row:.0f}%" for row in rows])
        for y, line in enumerate(values):
            for x, cell in enumerate(line):
                if cell is not None:
                    text = _cell_text(cell, has_count=len(counts) > 1)
                    colour = "white" if cell.value > 0.55 else "black"
                    axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        _label(axis, title + _count_text(counts), "length in tokens", "depth", grid=False)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, anchor=(0, 1))
    bar.set_label("score")
    _write(figure, path)


def _cell_text(cell: Estimate, *, has_count: bool) -> str:
    text = f"{cell.value:.2f}".removeprefix("0").replace("1.00", "1")
    return f"{text} ({cell.count})" if has_count else text


def _count_text(counts: Collection[int]) -> str:
    """What a heat map's title says of the counts of its cells."""
    if not counts:
        return ""
    return f" (n={min(counts)} in each cell)" if len(counts) == 1 else " (n in brackets)"


# --- parts -----------------------------------------------------------------------------------------------------------


def _figure(num_panels: int, *, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    """A figure with so many axes; the rest of its last line is empty."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('Plots need matplotlib: pip install "activation-beacon[eval]".') from error
    columns = min(COLUMNS, num_panels)
    lines = -(-num_panels // columns)
    width = WIDTH * columns + 1.6  # room for a legend or a scale at the right
    figure = Figure(figsize=(width, height * lines), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[num_panels:]:
        axis.set_axis_off()
    return figure, axes[:num_panels]


def _draw_panel(axis: Any, panel: Panel, names: Sequence[str], *, has_bars: bool, dodge: float) -> None:
    for name, level in panel.levels.items():
        colour = _colour(name, names)
        axis.axhline(level.value, color=colour, linestyle=DASHES.get(name, "-."), linewidth=1.2, label=name)
        if has_bars and level.low is not None and level.high is not None:
            axis.axhspan(level.low, level.high, color=colour, alpha=0.06, linewidth=0)
    for number, (name, points) in enumerate(panel.lines.items()):
        shift = 1 + dodge * (number - (len(panel.lines) - 1) / 2)
        style = {"color": _colour(name, names), "marker": MARKERS[names.index(name) % len(MARKERS)], "markersize": 4}
        x, y = [point.x * shift for point in points], [point.quality.value for point in points]
        axis.errorbar(x, y, yerr=_bars(points) if has_bars else None, label=name, capsize=2, linewidth=1.2, **style)
        for place, point in zip(x, points, strict=True):
            axis.annotate(
                point.note, (place, point.quality.value), xytext=(3, 4), textcoords="offset points", fontsize=6
            )


def _bars(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of the bars below and above; NaN, which is not drawn, where there is no interval: a bar of no length would be one."""
    estimates = [point.quality for point in points]
    below = [math.nan if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    above = [math.nan if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    return [below, above]


def _colour(name: str, names: Sequence[str]) -> str:
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in names if other not in COLOURS]
    return MORE_COLOURS[others.index(name) % len(MORE_COLOURS)]


def _shade(name: str, names: Sequence[str]) -> Any:
    """The colour of a way: that of its method, or for several ratios of one the ratio's place on a scale from dark to light.

    A ratio has the same place in all methods.
    """
    from matplotlib import colormaps

    method, _, ratio = name.partition(" x")
    if sum(other.partition(" x")[0] == method for other in names) == 1:
        return _colour(method, [n.split(" x")[0] for n in names])
    ratios = sorted({other.partition(" x")[2] for other in names if " x" in other}, key=lambda text: (len(text), text))
    return colormaps["viridis"](ratios.index(ratio) / max(1, len(ratios) - 1) * 0.9)


def _log_x(axis: Any, ticks: Sequence[float]) -> None:
    """A logarithmic scale with these ticks, written as plain numbers."""
    if not ticks or min(ticks) <= 0:
        return
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8, rotation=45 if len(ticks) > 8 else 0)
    axis.minorticks_off()


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of two around the values."""
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = math.floor(math.log2(min(positive))), math.ceil(math.log2(max(positive)))
    return [2.0**power for power in range(low, high + 1, max(1, (high - low) // 8))]


def _label(axis: Any, title: str, x_label: str, y_label: str, *, grid: bool = True) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    if grid:
        axis.grid(visible=True, alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path, axes: Iterable[Any]) -> None:
    """Write the picture with one legend for all of its panels."""
    known: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize=8, frameon=False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _tokens_text(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"
