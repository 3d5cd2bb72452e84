"""`beacon import-official`: a checkpoint of the paper's authors in, an adapter out."""

from pathlib import Path
from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import print_json, trained_fields, trained_mark, working


def import_official(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Their folder: config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder for the adapter.")],
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Also write the base model, to DST/base, where the adapter finds it.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Import a checkpoint of the paper's authors.

    It becomes an adapter folder. Only tensors are read; none of their code is run. Without --with-base the adapter
    needs its base model by name: load(..., base=...).
    """
    with working(f"reading {source}"):
        from activation_beacon.official import import_official as convert

        config = convert(source, target, with_base=with_base)
    if json:
        fields = {"chunk_size": config.chunk_size, "ratios": list(config.ratios), "num_sinks": config.num_sinks}
        print_json({"adapter": str(target), "with_base": with_base, **fields, **trained_fields(config)})
        return
    ratios = ", ".join(map(str, config.ratios))
    typer.echo(
        f"{target}{trained_mark(config)}: chunks of {config.chunk_size:,} tokens, ratios {ratios}, "
        f"{config.num_sinks} sinks" + (", base model included" if with_base else "")
    )
