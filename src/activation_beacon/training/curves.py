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

WINDOW = 30  # updates that a point of a smoothed curve looks back on


def draw_curves(metrics: Sequence[dict[str, Any]], target: Path) -> None:
    """Write the curves of a run's metrics as a PNG file.

    Raises:
        StorageError: if it cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_losses(losses, metrics)
    _draw_rates(rates, metrics)
    for axes in (losses, rates):
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k tokens
    with whole_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_losses(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    ratios = sorted({int(ratio) for line in metrics for ratio in line["loss_by_ratio"]})
    for place, ratio in enumerate(ratios):
        points = [
            (line["tokens"], line["loss_by_ratio"][str(ratio)])
            for line in metrics
            if str(ratio) in line["loss_by_ratio"]
        ]
        color = mpl.colormaps["viridis"](place / max(len(ratios) - 1, 1) * 0.9)
        axes.plot(
            [x for x, _ in points], smoothed([y for _, y in points]), color=color, label=f"x{ratio}", linewidth=1.2
        )
        dev = [(line["tokens"], line["dev"][str(ratio)]) for line in metrics if str(ratio) in line.get("dev", {})]
        axes.plot([x for x, _ in dev], [y for _, y in dev], "o--", color=color, markersize=4, linewidth=0.8)
    for line, following in itertools.pairwise(metrics):
        if line["stage"] != following["stage"]:
            axes.axvline(line["tokens"], color="0.7", linewidth=0.8)
    if ratios:
        axes.legend(title="ratio before\n(dots: dev texts)", fontsize=8, title_fontsize=8)
    axes.set(
        xlabel="tokens read", ylabel="nats per token after the first chunk", title=f"Loss (mean of {WINDOW} updates)"
    )
    axes.grid(alpha=0.3)


def _draw_rates(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    tokens = [line["tokens"] for line in metrics]
    axes.plot(tokens, [line["learning_rate"] for line in metrics], color="tab:blue")
    axes.set(xlabel="tokens read", title="Learning rate and gradient norm")
    axes.set_ylabel("learning rate", color="tab:blue")
    norms = axes.twinx()
    norms.semilogy(tokens, smoothed([line["gradient_norm"] for line in metrics]), color="tab:red", linewidth=0.9)
    norms.set_ylabel("gradient norm", color="tab:red")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over the last `WINDOW` values."""
    return [sum(part) / len(part) for part in (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))]
