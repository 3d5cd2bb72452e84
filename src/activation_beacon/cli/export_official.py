"""`beacon export-official`: an adapter and its base model, as the paper's authors lay out a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import print_json, working


def export_official(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or its name as for --model.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Its base model's folder: config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder for the checkpoint.")],
    json: options.Json = False,
) -> None:
    """Export to the paper authors' layout.

    An adapter and its base model become one checkpoint, which the authors' code reads.
    """
    with working(f"writing {target}"):
        from activation_beacon.hub import adapter_folder
        from activation_beacon.official import export_official as convert

        convert(adapter_folder(adapter) or adapter, base, target)
    num_bytes = sum(file.stat().st_size for file in target.iterdir())
    if json:
        print_json({"checkpoint": str(target), "adapter": str(adapter), "base": str(base), "bytes": num_bytes})
    else:
        typer.echo(f"{target}: {num_bytes:,} bytes")
