"""Metrics in a tracker that people watch while a run goes on, besides `metrics.jsonl`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from activation_beacon.errors import ConfigError

Track = Callable[[dict[str, Any]], None]


def open_tracker(name: str, folder: Path, settings: dict[str, Any]) -> tuple[Track, Callable[[], None]]:
    """What takes a line of metrics, and what closes the tracker.

    Args:
        name: "tensorboard" (files under `folder`/tensorboard) or "trackio" (its own dashboard).
        folder: of the run.
        settings: of the run, shown beside its curves.

    Raises:
        ConfigError: if the tracker is not installed.
    """
    try:
        return _tensorboard(folder) if name == "tensorboard" else _trackio(folder, settings)
    except ImportError as error:
        raise ConfigError(f"report_to {name} needs a package that is not here: pip install {name}.") from error


def flat(line: dict[str, Any]) -> dict[str, float]:
    """Numbers of a line of metrics by names such as "loss_by_ratio/x8"."""
    found = {name: float(value) for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    for group in ("loss_by_ratio", "dev", "dev_answers"):
        found |= {f"{group}/x{ratio}": value for ratio, value in line.get(group, {}).items()}
    return found


def _tensorboard(folder: Path) -> tuple[Track, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(line: dict[str, Any]) -> None:
        for name, value in flat(line).items():
            writer.add_scalar(name, value, line["step"])

    return track, writer.close


def _trackio(folder: Path, settings: dict[str, Any]) -> tuple[Track, Callable[[], None]]:
    import trackio

    trackio.init(project="activation-beacon", name=folder.name, config=settings)

    def track(line: dict[str, Any]) -> None:
        trackio.log(flat(line), step=line["step"])

    return track, trackio.finish
