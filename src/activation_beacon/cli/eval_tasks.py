"""The tasks of `beacon eval`: each checks its inputs at once, and is made when the model is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli.eval_run import Make
from activation_beacon.cli.models import Loaded
from activation_beacon.errors import InputError

if TYPE_CHECKING:
    from activation_beacon.evaluation.tasks import Origin, Task

BACKGROUND_TOKENS = 300_000  # of a background at most; it is taken up again where a text needs more
SAMPLES = 10  # of a task that could go on making them

OnError = Annotated[str, typer.Option("--on-error", help="skip or stop at a broken record.")]
Field = Annotated[str, typer.Option("--field", help="Where a record's text stands.")]
KindField = Annotated[
    str | None, typer.Option("--kind-field", help="Where a record's kind stands: the report tells kinds apart.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of what is drawn.")]
Background = Annotated[
    list[Path] | None,
    typer.Option(
        "--background", metavar="FILE", help="Text to hide needles in: .txt or .jsonl; by default the demo's book."
    ),
]


def lm(documents: Sequence[str], *, field: str, on_error: str, kind_field: str | None = None) -> Make:
    """Language modelling on documents.

    Raises:
        BeaconError: if they cannot be read.
    """
    handling = _on_error(on_error)
    _check_files(documents, field, handling, kind_field)

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import LanguageModelling

        return LanguageModelling(loaded.tokenizer, documents, field=field, kind_field=kind_field, on_error=handling)

    return make


def needles(
    background: list[Path] | None, *, kinds: str, depths: int | Sequence[float], repeats: int, seed: int
) -> Make:
    """Needles in a background.

    Raises:
        BeaconError: if it cannot be read.
    """
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import needles

        ids, source = _background(loaded, background)
        chosen = tuple(kinds.split(","))
        return needles(loaded.prompt, ids, kinds=chosen, depths=depths, repeats=repeats, seed=seed, source=source)

    return make


def multi_turn(background: list[Path] | None, *, limit: int | None, seed: int) -> Make:
    """Conversations on needles in a background.

    Raises:
        BeaconError: if it cannot be read.
    """
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import multi_turn

        ids, source = _background(loaded, background)
        return multi_turn(loaded.prompt, ids, count=limit or SAMPLES, seed=seed, source=source)

    return make


def qa(files: Sequence[str], *, seed: int, on_error: str) -> Make:
    """Questions of records, their contexts packed long.

    Raises:
        BeaconError: if they cannot be read.
    """
    from activation_beacon.data.sources import ReadReport
    from activation_beacon.evaluation.packed_qa import read_passages

    handling = _on_error(on_error)
    read_passages(
        files, on_error=handling, report=ReadReport()
    )  # says now what is wrong; what is skipped is told later

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import packed_qa

        return packed_qa(loaded.prompt, files, seed=seed, on_error=handling)

    return make


def reconstruction(background: list[Path] | None, *, limit: int | None, seed: int) -> Make:
    """Reading a background back.

    Raises:
        BeaconError: if it cannot be read.
    """
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import reconstruction

        ids, source = _background(loaded, background)
        count = limit or SAMPLES
        return reconstruction(loaded.prompt, ids, count=count, seed=seed, source=source, config=loaded.config)

    return make


def ruler(names: Sequence[str], *, count: int, seed: int) -> Make:
    """RULER, `count` samples of each of its tasks."""

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import ruler

        return ruler(loaded.prompt, names=names, count=count, seed=seed)

    return make


def _on_error(text: str) -> Any:
    if text not in ("skip", "stop"):
        raise InputError(f"--on-error must be skip or stop; got {text!r}.")
    return text


def _check_files(
    paths: Sequence[str | Path], field: str = "text", on_error: Any = "stop", kind_field: str | None = None
) -> None:
    """Refuse now a file that could not be read once the model is there."""
    from activation_beacon.data.sources import ReadReport
    from activation_beacon.evaluation.documents import read_documents

    for path in paths:
        found = read_documents([path], field=field, kind_field=kind_field, on_error=on_error, report=ReadReport())
        next(found, None)


def _background(loaded: Loaded, files: list[Path] | None) -> tuple[list[int], "Origin"]:
    """Ids of the background text, and where it came from."""
    from activation_beacon import books
    from activation_beacon.evaluation.documents import first_documents
    from activation_beacon.evaluation.tasks import Origin

    if not files:
        text, source = books.read_demo_book(), Origin(books.DEMO_BOOK_TITLE)
    else:
        text = first_documents(files, num_tokens=BACKGROUND_TOKENS)
        source = Origin(", ".join(path.name for path in files), tuple(files))
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:BACKGROUND_TOKENS], source
