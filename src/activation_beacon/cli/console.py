"""What goes to the terminal besides results: notices, progress; and how numbers are written.

Results are printed by the commands, to stdout. Everything here but `print_json` writes to stderr.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import typer

if TYPE_CHECKING:
    from activation_beacon.config import BeaconConfig

SECONDS_BETWEEN_LINES = 10.0
INTERRUPTED = 130  # exit status: 128 + SIGINT, as shells count


def notice(text: str) -> None:
    """Print a line to stderr."""
    typer.echo(text, err=True)


def print_json(values: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command to stdout."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False))


def one_line(text: str) -> str:
    """The text with every run of white space made one blank."""
    return " ".join(text.split())


# --- untrained adapters ----------------------------------------------------------------------------------------------


def trained_mark(config: "BeaconConfig") -> str:
    """What stands next to every output of a model: " (untrained)" until it is trained."""
    return "" if config.is_trained else " (untrained)"


def untrained_notice(config: "BeaconConfig") -> str | None:
    """What is to be known of an untrained adapter; None for a trained one."""
    if config.is_trained:
        return None
    if config.exact_ids:
        return "untrained: this adapter's beacons hold numbers, one token in so many of the rest of a text, and nothing else."
    if config.anchored:
        return "untrained: this adapter's beacons hold one token of each unit of a compressed text, and nothing of the others."
    return "untrained: this adapter's beacons have not been trained; do not trust what is said of a compressed text."


def trained_fields(config: "BeaconConfig") -> dict[str, Any]:
    """The same for `--json`."""
    return {"is_trained": config.is_trained, "notice": untrained_notice(config)}


def warn_untrained(config: "BeaconConfig") -> None:
    """Print the notice, if there is one."""
    text = untrained_notice(config)
    if text is not None:
        notice(text)


# --- numbers ---------------------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """Such as "8.3 s" or "2 min 5 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def factor_text(full: float, held: float) -> str:
    """Such as "7.1x"."""
    return f"{full / held:.1f}x" if held else "-"


# --- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Show on a terminal that something is going on; elsewhere say nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


class Progress:
    """Counts chunks: a bar on a terminal, and elsewhere a line every ten seconds.

    Args:
        text: what is going on.
        num_tokens: tokens in all.
        chunk_size: tokens of a step.
    """

    def __init__(self, text: str, num_tokens: int, chunk_size: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._text, self._num_tokens, self._chunk_size = text, num_tokens, chunk_size
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[numbers]}"))
        self._bar = Bar(*columns, console=console, transient=True, expand=True) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task(text, total=None, numbers="")

    def __enter__(self) -> Self:
        self._start = self._last_line = time.perf_counter()
        if self._bar is None:
            notice(f"{self._text}: {self._num_tokens:,} tokens")
        else:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Take note of `done` of `total` chunks."""
        now = time.perf_counter()
        speed = done * self._chunk_size / max(now - self._start, 1e-9)
        left = max(0.0, self._num_tokens - done * self._chunk_size) / speed
        if self._bar is not None and self._task is not None:
            numbers = f"{done}/{total} chunks · {speed:,.0f} tokens/s · {seconds_text(left)} left"
            self._bar.update(self._task, completed=done, total=total, numbers=numbers)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            notice(f"{self._text}: {done} of {total} chunks, {speed:,.0f} tokens/s, about {seconds_text(left)} left")
