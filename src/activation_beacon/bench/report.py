"""What the runs say: medians, ratios to full attention pair by pair, and the computed bounds beside them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from activation_beacon.bench import cost
from activation_beacon.bench.cost import Compression, ModelShape
from activation_beacon.bench.measure import Cell
from activation_beacon.bench.timing import Run
from activation_beacon.config import BeaconConfig

HEAD = (
    *("tokens", "texts", "way", "first token", "", "per token", "", "slowest token"),
    *("total", "", "of tuned", "bound", "cache", "", "peak"),
)
WIDTHS = (9, 6, 24, 13, 8, 11, 8, 15, 11, 8, 11, 8, 12, 8, 12)


@dataclass(frozen=True)
class Row:
    """One way of reading one text: medians over its repeats, in seconds and bytes.

    Ratios, above 1 where full attention is worse, are medians over repeats of full attention's value to this one's in the
    same repeat; None where full attention was not run. `total_speedup_of_tuned` compares with tuned full attention
    (`measure`). Bounds are what operations (reading, total) and bytes (writing) give; None for kvpress, and
    where operations are not counted.
    """

    length: int
    batch_size: int
    ratio: int | None
    press: str | None
    is_tuned: bool
    repeats: int
    first_token_s: float
    step_s: float
    slowest_step_s: float
    total_s: float
    cache_bytes: int
    peak_bytes: int | None
    first_token_speedup: float | None
    step_speedup: float | None
    total_speedup: float | None
    total_speedup_of_tuned: float | None
    cache_factor: float | None
    first_token_bound: float | None
    step_bound: float | None
    total_bound: float | None
    by: str | None

    @property
    def way(self) -> str:
        """What to call it."""
        if self.ratio is None:
            return "full, tuned" if self.is_tuned else "full"
        return f"x{self.ratio}" if self.press is None else f"{self.press} x{self.ratio}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summary(
    runs: Mapping[Cell, Run], shape: ModelShape | None, *, num_new: int, config: BeaconConfig, element_bytes: int
) -> list[Row]:
    """One row for each text and way, in the order of the runs; without bounds where no shape is given."""
    groups: dict[Cell, dict[int, Run]] = {}
    for cell, run in runs.items():
        groups.setdefault(cell._replace(repeat=0), {})[cell.repeat] = run
    rows = []
    for cell in sorted(groups, key=lambda cell: (*cell[:2], cell.ratio or 0, cell.press or "", cell.is_tuned)):
        full, tuned = (
            groups.get(cell._replace(ratio=None, press=None, is_tuned=is_tuned), {}) for is_tuned in (False, True)
        )
        bounds: Mapping[str, float] = {}
        if cell.press is None and shape is not None:
            how = Compression.of(config, cell.ratio)
            bounds = _bounds(shape, cell.length, how, num_new, cell.batch_size, element_bytes)
        rows.append(_row(cell, groups[cell], full, tuned, bounds))
    return rows


def _row(
    cell: Cell,
    repeats: Mapping[int, Run],
    full: Mapping[int, Run],
    tuned: Mapping[int, Run],
    bounds: Mapping[str, float],
) -> Row:
    names = ("first_token_s", "step_s", "slowest_step_s", "total_s")
    medians = {name: statistics.median(getattr(run, name) for run in repeats.values()) for name in names}

    def speedup(name: str, other: Mapping[int, Run] = full) -> float | None:
        pairs = [(other[number], run) for number, run in repeats.items() if number in other]
        return statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs) if pairs else None

    peaks = [run.peak_bytes for run in repeats.values() if run.peak_bytes is not None]
    return Row(
        cell.length,
        cell.batch_size,
        cell.ratio,
        cell.press,
        cell.is_tuned,
        len(repeats),
        cache_bytes=next(iter(repeats.values())).cache_bytes,
        peak_bytes=max(peaks) if peaks else None,
        first_token_speedup=speedup("first_token_s"),
        step_speedup=speedup("step_s"),
        total_speedup=speedup("total_s"),
        total_speedup_of_tuned=speedup("total_s", tuned),
        cache_factor=speedup("cache_bytes"),
        **medians,
        first_token_bound=bounds.get("first_token_bound"),
        step_bound=bounds.get("step_bound"),
        total_bound=bounds.get("total_bound"),
        by=next(iter(repeats.values())).by,
    )


def _bounds(
    shape: ModelShape, length: int, how: Compression, num_new: int, batch_size: int, element_bytes: int
) -> dict[str, float]:
    full = cost.FULL_ATTENTION

    def step_bytes(way: Compression) -> int:
        return cost.decode_bytes(shape, length, way, element_bytes, batch_size=batch_size)

    return {
        "first_token_bound": cost.prefill_flops(shape, length, full) / cost.prefill_flops(shape, length, how),
        "step_bound": step_bytes(full) / step_bytes(how),
        "total_bound": cost.end_to_end_speedup(shape, length, num_new, how),
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text; behind each time but the slowest token's stands how many times faster than full attention it is."""
    lines = [_line(HEAD)]
    for row in rows:
        cells = [f"{row.length:,}", str(row.batch_size), row.way]
        cells += [_seconds(row.first_token_s), _factor(row.first_token_speedup)]
        cells += [_seconds(row.step_s), _factor(row.step_speedup), _seconds(row.slowest_step_s)]
        cells += [_seconds(row.total_s), _factor(row.total_speedup), _factor(row.total_speedup_of_tuned)]
        cells += [_factor(row.total_bound)]
        cells += [_mebibytes(row.cache_bytes), _factor(row.cache_factor)]
        lines.append(_line([*cells, "-" if row.peak_bytes is None else _mebibytes(row.peak_bytes)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A picture: how many times as fast as full attention over the length; dashed the bounds, dotted beside tuned full attention.

    Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from activation_beacon.files import whole_file

    panels = {
        "first token": ("first_token_speedup", "first_token_bound", "operations"),
        "per token": ("step_speedup", "step_bound", "bytes read"),
        "total": ("total_speedup", "total_bound", "operations"),
    }
    figure = Figure(figsize=(4.2 * len(panels), 4.2), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    batch = min(row.batch_size for row in rows)
    for axis, (title, (measured, bound, counted)) in zip(axes, panels.items(), strict=True):
        for number, way in enumerate(dict.fromkeys(row.way for row in rows if row.ratio)):
            line = [row for row in rows if row.way == way and row.batch_size == batch]
            found = [row for row in line if getattr(row, measured) is not None]
            colour = f"C{number}"
            axis.plot(
                [row.length for row in found],
                [getattr(row, measured) for row in found],
                "o-",
                color=colour,
                label=way,
            )
            paper = [(row.length, getattr(row, bound)) for row in line if getattr(row, bound) is not None]
            if paper:
                axis.plot(*zip(*paper, strict=True), "--", color=colour, label=f"{way}, by {counted}")
            beside = [row for row in line if row.total_speedup_of_tuned is not None] if title == "total" else []
            if beside:
                factors = [row.total_speedup_of_tuned for row in beside]
                label = f"{way}, beside tuned full attention"
                axis.plot([row.length for row in beside], factors, ".:", color=colour, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        lengths = sorted({row.length for row in rows})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set(title=title, xlabel="tokens", ylabel="times as fast as full attention")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)  # below: it would cover lines
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
