"""`beacon make-questions`: questions that the base model has answered in its own words, for `beacon train --questions`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, print_json, working
from activation_beacon.cli.eval_run import progress_shown
from activation_beacon.cli.models import best_device, quiet_libraries
from activation_beacon.cli.texts import check_output
from activation_beacon.errors import BaseModelError, InputError

if TYPE_CHECKING:
    from activation_beacon.data.sources import ReadReport
    from activation_beacon.training.own_words import Asked, Counts


def make_questions(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to hide needles in: files, folders, or data sets on the hub."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Questions, as JSON Lines.")] = Path(
        "own-words.jsonl"
    ),
    questions: Annotated[
        list[str] | None,
        typer.Option("--questions", metavar="SOURCE", help="Questions with short contexts to be answered too."),
    ] = None,
    needles: Annotated[int, typer.Option("--needles", min=0, help="Needles to hide in passages of the texts.")] = 800,
    kinds: Annotated[
        str | None,
        typer.Option(
            "--kinds",
            metavar="LIST",
            help="Kinds of needles, of word,number,uuid,sentence,multi,fact; one named twice comes twice as often.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each source at most, drawn at random.")
    ] = None,
    max_words: Annotated[int, typer.Option("--max-words", min=1, help="Words of a question's context at most.")] = 250,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="ID", help="Id of a document to leave out.")
    ] = None,
    base: Annotated[
        str, typer.Option("--base", metavar="NAME", help="Base model: default, a folder, or a hub id.")
    ] = "default",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 48,
    seed: Annotated[int, typer.Option("--seed", help="Seed of passages, needles and drawn questions.")] = 0,
    force: options.Force = False,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Write questions with the base model's own answers.

    Trained on them, a model does not learn another manner of answering.

    The base reads short passages, of texts with something hidden in them and of given questions, and answers as it does in a
    chat. What it answers wrongly, or does not end, is left out; the rest are records for `beacon train --questions`, which
    packs many passages into a long text.

    What is answered is kept beside the file until all is: the same command goes on after Ctrl-C. Under torchrun several
    processes share the work.
    """
    check_output(output, force=force, example="own-words.jsonl")
    from activation_beacon.base_models import load_pretrained_base
    from activation_beacon.processes import processes
    from activation_beacon.training.own_words import BaseAnswers, write_own_words

    with processes(device) as group:
        asked, report = _asked(
            sources or [], questions or [], needles=needles, kinds=kinds, limit=limit, max_words=max_words,
            exclude=exclude or [], seed=seed,
        )  # fmt: skip
        if group.is_first:
            _tell_skipped(sources or [], report)
        place = device or (str(group.device()) if group.count > 1 else best_device())
        with working(f"loading {base}"), quiet_libraries():
            model, tokenizer = load_pretrained_base(base, dtype=None if dtype is None else str(dtype), device=place)
        if tokenizer is None:
            raise BaseModelError(f"The base model {base} has no tokenizer. Put its tokenizer.json beside config.json.")
        answers = BaseAnswers(model, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
        with progress_shown(is_shown=group.is_first) as progress:
            counts = write_own_words(answers, asked, output, group=group, progress=progress)
        if not group.is_first:
            return
    if json:
        print_json({"file": str(output), **counts.to_dict()})
    else:
        typer.echo(_summary(output, counts))


def _tell_skipped(sources: list[str], report: "ReadReport") -> None:
    """Say what of the sources is not read: files of other kinds, and records."""
    from activation_beacon.data.data_files import left_out

    for line in filter(None, map(left_out, sources)):
        notice(line)
    if report.skipped:
        notice(report.summary())


def _asked(
    sources: list[str],
    question_sources: list[str],
    *,
    needles: int,
    kinds: str | None,
    limit: int | None,
    max_words: int,
    exclude: list[str],
    seed: int,
) -> "tuple[list[Asked], ReadReport]":
    """All questions, in random order, and what was read for them."""
    import random

    from activation_beacon.data.sources import ReadReport, documents, questions
    from activation_beacon.training.needle_words import KINDS
    from activation_beacon.training.own_words import needle_questions, short_questions

    if not sources and not question_sources:
        raise InputError("There is nothing to ask about. Name texts, or questions with --questions.")
    names = KINDS if kinds is None else tuple(name.strip() for name in kinds.split(","))
    report = ReadReport()
    asked = []
    for source in question_sources:
        found = questions(source, exclude=exclude, report=report)
        asked += short_questions(found, max_words=max_words, limit=limit, seed=seed)
    if sources:
        texts = (text for _, text in documents(sources, exclude=exclude, report=report))
        asked += needle_questions(texts, needles, kinds=names, seed=seed)
    random.Random(seed).shuffle(asked)
    return asked, report


def _summary(output: Path, counts: "Counts") -> str:
    def line(name: str, asked: int, kept: int) -> str:
        return f"  {name:<18} {kept:>6,} of {asked:>6,} kept"

    lines = [f"{output}", line("all", counts.asked, counts.kept)]
    lines += [line(kind, *pair) for kind, pair in sorted(counts.kinds.items())]
    lines.append(
        f"  left out: {counts.wrong:,} wrong, {counts.unended:,} without an end, {counts.too_long:,} too long for the base"
    )
    lines.append(f"  train with: beacon train TEXT... --questions {output} -o my-run")
    return "\n".join(lines)
