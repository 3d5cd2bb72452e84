"""`beacon demo`: a whole book, compressed at several ratios, beside the same book without compression."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.compress import compress_ids
from activation_beacon.cli.console import (
    factor_text,
    notice,
    one_line,
    print_json,
    seconds_text,
    trained_fields,
    trained_mark,
    warn_untrained,
    working,
)
from activation_beacon.cli.models import Loaded, check_ratio, load_model
from activation_beacon.cli.texts import check_output
from activation_beacon.sizes import bytes_text

if TYPE_CHECKING:
    from activation_beacon.cache import BeaconCache
    from activation_beacon.conversation import Answer

DEFAULT_RATIOS = "4,8,32"
QUICK_RATIO = 8
NUM_TARGETS = 1024  # last tokens of the book, of which losses are taken
ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Run:
    """The book at one ratio."""

    ratio: int
    context: "BeaconCache"
    seconds: float
    file_bytes: int
    is_same_after_loading: bool


@dataclass(frozen=True)
class Reading:
    """What the model makes of the book's last tokens, having read what stands before them in one way or another."""

    name: str
    num_entries: int  # cache entries that it attends to in the end
    num_bytes: int  # of these
    nll: float  # nats for each token


@dataclass(frozen=True)
class Report:
    """All that the demo found."""

    loaded: Loaded
    title: str
    ids: list[int]
    runs: list[Run]
    asked_ratio: int
    answers: list[tuple[str, str, "Answer"]]
    readings: list[Reading] = field(default_factory=list)


def demo(
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Annotated[str, typer.Option("--ratios", help="Compression ratios to show.")] = DEFAULT_RATIOS,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Ratio {QUICK_RATIO} alone, and no comparison with the base model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "--out", "-o", metavar="DIR", help="Keep the context files here; else they are removed."
        ),
    ] = None,
    force: options.Force = False,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Compress a whole book and ask about it.

    The book comes with the package, is in the public domain, and is longer than the default model's 8,192
    positions. For each ratio there is one row with the size of the cache, the time, and the file. A second table
    measures what the model makes of the book's last tokens: on its own with the whole book before them, with as
    much as it has positions for, with as many tokens as there are entries of beacons, and with nothing; and on the beacons.
    """
    wanted = (QUICK_RATIO,) if quick else options.parse_ratios(ratios)
    for ratio in wanted:
        check_ratio(model, ratio)
    with _folder(out) as folder:
        for ratio in wanted:
            check_output(_file(folder, ratio), force=force)
        loaded = load_model(model, base=base, device=device, dtype=dtype)
        warn_untrained(loaded.config)
        report = _report(loaded, wanted, folder, compare=not quick)
        if json:
            print_json(_as_json(report, kept=out))
        else:
            _print(report, kept=out)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="beacon-demo-") as name:
            yield Path(name)
        return
    from activation_beacon.files import make_folder

    make_folder(out)
    yield out


def _file(folder: Path, ratio: int) -> Path:
    return folder / f"book-ratio-{ratio}.beacon"


# --- measuring -------------------------------------------------------------------------------------------------------


def _report(loaded: Loaded, ratios: Sequence[int], folder: Path, *, compare: bool) -> Report:
    from activation_beacon import books

    title = f"{books.DEMO_BOOK_TITLE}, by {books.DEMO_BOOK_AUTHOR}"
    ids = loaded.prompt.opening(books.read_demo_book())
    notice(f"{title}: {len(ids):,} tokens")
    runs, readings = [], []
    for ratio in ratios:
        run, nll = _run(loaded, ids, ratio, _file(folder, ratio), measure=compare)
        runs.append(run)
        if nll is not None:
            name = f"beacons, ratio {ratio}{trained_mark(loaded.config)}"
            readings.append(Reading(name, run.context.cache_length, run.context.cache_bytes, nll))
    asked = runs[len(runs) // 2]
    with working(f"asking at ratio {asked.ratio}"):
        answers = _answers(loaded, asked.context, list(zip(books.DEMO_QUESTIONS, books.DEMO_ANSWERS, strict=True)))
    if compare:
        per_token = asked.context.uncompressed_bytes // asked.context.tokens_seen
        readings = [*_base_readings(loaded, ids, asked, per_token), *readings]
    return Report(loaded, title, ids, runs, asked.ratio, answers, readings)


def _run(loaded: Loaded, ids: list[int], ratio: int, path: Path, *, measure: bool) -> tuple[Run, float | None]:
    """Compress, save and load; on the way take the loss of the last tokens on the beacons of all before them.

    The book is cut before its last tokens; a text may be cut anywhere without changing its cache.
    """
    from activation_beacon.evaluation.language_modelling import losses_as_decoded

    cut = len(ids) - NUM_TARGETS - 1 if measure else len(ids)
    context, seconds = compress_ids(loaded, ids[:cut], ratio=ratio)
    nll = None
    if measure:
        start = time.perf_counter()
        nll = float(losses_as_decoded(loaded.model, context, ids[cut:]).mean())  # reads them into the context
        seconds += time.perf_counter() - start
    file_bytes = context.save(path)
    again = type(context).load(path, loaded.model)
    return Run(ratio, context, seconds, file_bytes, _are_same(context, again)), nll


def _answers(
    loaded: Loaded, context: "BeaconCache", questions: Sequence[tuple[str, str]]
) -> list[tuple[str, str, "Answer"]]:
    from activation_beacon.conversation import Conversation

    found = []
    for question, expected in questions:
        conversation = Conversation(loaded.model, loaded.tokenizer, context, prompt=loaded.prompt)
        found.append((question, expected, conversation.ask(question, max_new_tokens=ANSWER_TOKENS)))
    return found


def _base_readings(loaded: Loaded, ids: list[int], run: Run, bytes_per_token: int) -> list[Reading]:
    """The base alone: with the whole book, as much as it has positions for, as many tokens as a run has entries, and none.

    Each is what stands before the book's last tokens, and these.
    """
    windows = [("the whole book, full attention", ids)]
    if loaded.max_positions is not None and loaded.max_positions < len(ids):
        windows.append((f"the last {loaded.max_positions:,} tokens", ids[-loaded.max_positions :]))
    if NUM_TARGETS < run.context.cache_length < len(ids):
        windows.append((f"the last {run.context.cache_length:,} tokens", ids[-run.context.cache_length :]))
    windows.append(("nothing before them", ids[-NUM_TARGETS - 1 :]))
    readings = []
    for name, window in windows:
        start = time.perf_counter()
        with working(f"the base model alone reads {name}"), loaded.model.beacon_disabled():
            nll = _loss(loaded, window)
        notice(f"the base model alone, {name}: {seconds_text(time.perf_counter() - start)}")
        readings.append(Reading(f"base alone, {name}", len(window), len(window) * bytes_per_token, nll))
    return readings


def _loss(loaded: Loaded, ids: list[int]) -> float:
    """Nats of the base alone for each of the last tokens of `ids`, in one forward."""
    import torch

    tokens = torch.tensor([ids], device=loaded.model.device)
    with torch.no_grad():
        logits = loaded.model(tokens, logits_to_keep=NUM_TARGETS + 1, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), tokens[0, -NUM_TARGETS:]))


def _are_same(context: "BeaconCache", other: "BeaconCache") -> bool:
    """Whether two contexts hold the same numbers, bit for bit."""
    import torch

    if context.rows != other.rows or not torch.equal(context.token_ids, other.token_ids):
        return False
    for mine, theirs in zip(context.layers, other.layers, strict=True):
        tensors, others = dict(mine.named_tensors()), dict(theirs.named_tensors())
        if tensors.keys() != others.keys() or not all(torch.equal(tensors[name], others[name]) for name in tensors):
            return False
    return True


# --- showing ---------------------------------------------------------------------------------------------------------


def _print(report: Report, *, kept: Path | None) -> None:
    config, mark = report.loaded.config, trained_mark(report.loaded.config)
    full = report.runs[0].context.uncompressed_bytes
    typer.echo(f"{report.title}: {len(report.ids):,} tokens\n")
    typer.echo(f"Compressed{mark}, in chunks of {config.chunk_size:,} tokens:\n")
    _print_table(
        ("ratio", "tokens", "beacons", "tail", "cache", "smaller", "seconds", "file", "loads"),
        [
            (
                str(run.ratio),
                f"{run.context.tokens_seen:,}",
                f"{run.context.num_beacons:,}",
                f"{run.context.tail_length:,}",
                bytes_text(run.context.cache_bytes),
                factor_text(full, run.context.cache_bytes),
                f"{run.seconds:.1f}",
                bytes_text(run.file_bytes),
                "the same" if run.is_same_after_loading else "CHANGED",
            )
            for run in report.runs
        ],
    )
    typer.echo(f"\nAsked at ratio {report.asked_ratio}{mark}:")
    for question, expected, reply in report.answers:
        typer.echo(f"\n  question  {question}\n  book      {expected}\n  model     {one_line(reply.text)}{mark}")
    typer.echo(f"\n{_without_compression(report, full)}")
    if report.readings:
        typer.echo(f"\nLoss of the book's last {NUM_TARGETS:,} tokens, in nats for each (less is better).")
        typer.echo(f"The base's shorter window is as large as the cache at ratio {report.asked_ratio}:\n")
        _print_table(
            ("what the model has read", "entries", "cache", "nats"),
            [(r.name, f"{r.num_entries:,}", bytes_text(r.num_bytes), f"{r.nll:.2f}") for r in report.readings],
        )
    if kept is not None:
        typer.echo(f"\nKept in {kept}: {', '.join(_file(kept, run.ratio).name for run in report.runs)}")


def _without_compression(report: Report, full: int) -> str:
    num_tokens, positions = len(report.ids), report.loaded.max_positions
    text = f"Without compression the cache of these {num_tokens:,} tokens takes {bytes_text(full)}"
    if positions is None or positions >= num_tokens:
        return f"{text}."
    return (
        f"{text},\nand the base model has {positions:,} positions: {num_tokens - positions:,} tokens are beyond them."
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text, the first to the left and all others to the right if they hold numbers."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  " + "  ".join(cells).rstrip())


def _as_json(report: Report, *, kept: Path | None) -> dict[str, Any]:
    return {
        "title": report.title,
        "model": report.loaded.name,
        "tokens": len(report.ids),
        "max_positions": report.loaded.max_positions,
        "uncompressed_bytes": report.runs[0].context.uncompressed_bytes,
        "ratios": [
            {
                "ratio": run.ratio,
                "tokens": run.context.tokens_seen,
                "beacons": run.context.num_beacons,
                "tail": run.context.tail_length,
                "cache_bytes": run.context.cache_bytes,
                "seconds": round(run.seconds, 3),
                "file_bytes": run.file_bytes,
                "is_same_after_loading": run.is_same_after_loading,
                "file": None if kept is None else str(_file(kept, run.ratio)),
            }
            for run in report.runs
        ],
        "asked_ratio": report.asked_ratio,
        "answers": [
            {"question": question, "expected": expected, "answer": reply.text}
            for question, expected, reply in report.answers
        ],
        "last_tokens": NUM_TARGETS,
        "nats_per_token": [
            {"read": r.name, "cache_length": r.num_entries, "cache_bytes": r.num_bytes, "nats": round(r.nll, 4)}
            for r in report.readings
        ],
        **trained_fields(report.loaded.config),
    }
