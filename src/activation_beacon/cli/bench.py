"""`beacon bench`: how fast it is, measured on this machine."""

import dataclasses
from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import bytes_text, notice, print_json
from activation_beacon.cli.models import load_model
from activation_beacon.errors import InputError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and memory on this machine.")

EPILOG = options.examples(
    "beacon bench training --lengths 2048,4096", "beacon bench training --model my-adapter --dtype bfloat16 --json"
)


@bench.command("training", epilog=EPILOG)
def training(
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the texts.")] = "2048,4096,8192",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts of a step.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Steps that count, after one that does not.")] = 3,
    model: options.Model = "default",
    base: options.Base = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Time training steps: chunk by chunk, all chunks at once, and at once with gradient checkpointing.

    The share is that of the speed of a large matrix product on the same hardware.
    """
    sizes = _lengths(lengths)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    shortest = loaded.config.chunk_size
    if sizes[0] <= shortest:
        raise InputError(
            f"--lengths ({sizes[0]}) must exceed the chunk ({shortest}): there is nothing to train on before."
        )
    from activation_beacon.training.benchmark import measure

    found = []
    for speed in measure(loaded.model, sizes, batch_size=batch_size, repeats=repeats):
        found.append(speed)
        notice(f"{speed.way}, {speed.length:,} tokens: {speed.tokens_per_second:,.0f} tokens/s")
    if json:
        print_json({"model": model, "batch_size": batch_size, "measured": [dataclasses.asdict(each) for each in found]})
        return
    typer.echo(f"{'tokens':>8}  {'way':<13}{'tokens/s':>9}{'of the loop':>13}{'share of peak':>15}{'memory':>12}")
    loops = {each.length: each.tokens_per_second for each in found if each.way == "loop"}
    for each in found:
        factor = each.tokens_per_second / loops[each.length]
        typer.echo(
            f"{each.length:>8,}  {each.way:<13}{each.tokens_per_second:>9,.0f}{factor:>12.2f}x{each.share_of_peak:>14.0%}"
            f"{bytes_text(each.memory_bytes):>13}"
        )


def _lengths(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--lengths must be ints such as 2048,4096; got {text!r}.") from None
