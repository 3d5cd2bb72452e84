"""`beacon eval compare`: folders of results beside one another, such as those of an adapter and of the one before."""

from pathlib import Path
from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, print_json
from activation_beacon.cli.texts import check_output

EXAMPLES = (
    "beacon eval compare out-default out-mine",
    "beacon eval compare out-default out-first out-second --tasks needles,qa -o comparison.md",
)
NO_PICTURE = 'No picture: matplotlib is not installed (pip install "activation-beacon[eval]").'


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Folders of results; differences are to the first.")
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Some of their tasks, such as needles,qa; by default all.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "--out", "-o", metavar="FILE", help="Write the tables there as Markdown, and plots/ beside it."
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Compare folders of results: an adapter with the one before, or with the default.

    For each task, length, method and ratio that all folders have: the mean of each, and how far each lies from the first,
    paired over the samples that all have. What is not in all of them is named in one line. Folders that did not measure
    the same thing (another base model, other settings of a task) are refused.
    """
    from activation_beacon.evaluation.blocks import markdown_of
    from activation_beacon.evaluation.comparison import compare
    from activation_beacon.evaluation.comparison_report import as_json, blocks_of, can_draw, write_comparison

    if out is not None:
        check_output(out, force=force, example="comparison.md")
    found = compare(folders, tasks=[name for part in tasks.split(",") if (name := part.strip())])
    pictures = [] if out is None else write_comparison(found, out)
    if out is not None and not can_draw():
        notice(NO_PICTURE)
    if json:
        files = {} if out is None else {"report": str(out), "pictures": [str(path) for path in pictures]}
        print_json({**files, **as_json(found)})
        return
    typer.echo(markdown_of(blocks_of(found)))
    if out is not None:
        typer.echo(f"Report: {', '.join(map(str, (out, *pictures)))}")
