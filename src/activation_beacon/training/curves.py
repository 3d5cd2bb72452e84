"""A picture of a training run: loss by ratio, losses on dev texts, learning rate and gradient norm."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from activation_beacon.files import whole_file

WINDOW = 30  # updates that a point of a smoothed curve looks back on; fewer are drawn as points


def draw_curves(metrics: Sequence[dict[str, Any]], target: Path) -> None:
    """Write the curves of a run's metrics as a PNG file.

    Raises:
        StorageError: if it cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=(2, 1))
    made = [line for line in metrics if line["step"]]  # in step 0, dev texts are measured and nothing is updated
    _draw_losses(losses, made, metrics)
    _draw_rates(rates, made)
    for axes in (losses, rates):
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k tokens
    with whole_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_losses(axes: Axes, made: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> None:
    ratios = sorted(
        {int(ratio) for line in metrics for name in ("loss_by_ratio", "dev") for ratio in line.get(name, {})}
    )
    for place, ratio in enumerate(ratios):
        color = mpl.colormaps["viridis"](place / max(len(ratios) - 1, 1) * 0.9)
        _draw(axes, *_points(made, "loss_by_ratio", ratio), num_updates=len(made), color=color, label=f"x{ratio}")
        axes.plot(*_points(metrics, "dev", ratio), "o--", color=color, markersize=4, linewidth=0.8)
    for line, following in itertools.pairwise(made):
        if line["stage"] != following["stage"]:
            axes.axvline(line["tokens"], color="0.7", linewidth=0.8)
    if ratios:
        dots = ";\ndots: dev texts" if any("dev" in line for line in metrics) else ""
        axes.legend(title=f"ratio of the preceding chunk{dots}", fontsize=8, title_fontsize=8)
    what = f"mean of the last {WINDOW} updates" if is_smoothed(len(made)) else "each update"
    axes.set(xlabel="tokens read", ylabel="nats per token after the first chunk", title=f"Loss ({what})")
    axes.grid(alpha=0.3)


def _points(metrics: Sequence[dict[str, Any]], name: str, ratio: int) -> tuple[list[int], list[float]]:
    """Tokens read, and the loss at a ratio, of the lines that have one."""
    found = [line for line in metrics if str(ratio) in line.get(name, {})]
    return [line["tokens"] for line in found], [line[name][str(ratio)] for line in found]


def _draw_rates(axes: Axes, made: Sequence[dict[str, Any]]) -> None:
    tokens = [line["tokens"] for line in made]
    axes.plot(
        tokens,
        [line["learning_rate"] for line in made],
        color="tab:blue",
        marker=None if is_smoothed(len(made)) else ".",
    )
    axes.set(xlabel="tokens read", title="Learning rate and gradient norm")
    axes.set_ylabel("learning rate", color="tab:blue")
    norms = axes.twinx()
    norms.set_yscale("log")
    _draw(norms, tokens, [line["gradient_norm"] for line in made], num_updates=len(made), color="tab:red")
    norms.set_ylabel("gradient norm", color="tab:red")


def _draw(axes: Axes, xs: list[int], ys: list[float], *, num_updates: int, **looks: Any) -> None:
    """A smoothed line; points of a run that is too short for one."""
    if is_smoothed(num_updates):
        axes.plot(xs, smoothed(ys), linewidth=1.2, **looks)
    else:
        axes.plot(xs, ys, "x", markersize=5, **looks)


def is_smoothed(num_updates: int) -> bool:
    """Whether a run is long enough for smoothed curves."""
    return num_updates >= WINDOW


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over the last `WINDOW` values."""
    return [sum(part) / len(part) for part in (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))]
