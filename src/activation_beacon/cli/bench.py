"""`beacon bench`: how fast it is, measured on this machine."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import bytes_text, notice, print_json
from activation_beacon.cli.models import Loaded, load_model
from activation_beacon.errors import InputError

if TYPE_CHECKING:
    import torch

    from activation_beacon.bench.cost import Compression, ModelShape

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
    sizes = parse_lengths(lengths)
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


OBJECTIVES_EPILOG = options.examples(
    "beacon bench objectives", "beacon bench objectives texts.jsonl.zst --texts 20 --length 2048 --chunk-size 256"
)


@bench.command("objectives", epilog=OBJECTIVES_EPILOG)
def objectives(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE]...", help="Texts, as for `beacon eval lm`; the demo's book.")
    ] = None,
    length: Annotated[int, typer.Option("--length", min=4, help="Tokens of a text.")] = 1024,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=2, help="Chunks to read them in.")] = 128,
    texts: Annotated[int, typer.Option("--texts", min=2, help="How many.")] = 10,
    model: options.Model = "default",
    base: options.Base = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Measure how far the gradients of different texts agree, objective by objective.

    The more they agree, the fewer texts a training run needs. What costs more seconds a text has to agree more.
    """
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    rows = _rows_of(loaded, sources or [], length, texts)
    if length <= chunk_size or any(chunk_size % ratio for ratio in loaded.config.ratios):
        raise InputError(
            f"--chunk-size ({chunk_size}) must be less than --length ({length}), and every ratio must divide it."
        )
    from activation_beacon.training.agreement import measure

    found = []
    for each in measure(loaded.model, rows, chunk_size=chunk_size):
        found.append(each)
        notice(f"{each.objective}: {each.cosine:.3f}, {each.seconds_per_text:.1f} s a text")
    if json:
        print_json({"model": model, "length": length, "measured": [dataclasses.asdict(each) for each in found]})
        return
    typer.echo(f"{'objective':<16}{'cosine of two texts':>20}{'seconds a text':>16}")
    for each in found:
        typer.echo(f"{each.objective:<16}{each.cosine:>20.3f}{each.seconds_per_text:>16.1f}")


def _rows_of(loaded: Loaded, sources: list[str], length: int, count: int) -> list["torch.Tensor"]:
    """The first tokens of so many documents, or as many windows of the demo's book: (1, length) each."""
    import torch

    from activation_beacon import books
    from activation_beacon.evaluation.documents import read_documents
    from activation_beacon.evaluation.documents import texts as cut

    if sources:
        rows = [text.ids for text in cut(read_documents(sources), loaded.tokenizer, length=length, limit=count)]
    else:
        ids = loaded.tokenizer(books.read_demo_book(), add_special_tokens=False, verbose=False)["input_ids"]
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count]
    if len(rows) < 2:
        raise InputError(f"There are not two texts of {length} tokens. Name more texts, or lower --length.")
    return [torch.tensor([row], device=loaded.model.device) for row in rows]


PLAN_EPILOG = options.examples(
    "beacon bench plan --shape qwen2-7b",
    "beacon bench plan --shape llama-3-8b --gpu-gib 24 --lengths 32768,131072 --ratios 4,8,32",
)


@bench.command("plan", epilog=PLAN_EPILOG)
def plan(
    shape: Annotated[str, typer.Option("--shape", help="Sizes of a known model.")] = "smollm2-135m",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the texts.")] = "8192,32768,131072",
    ratios: Annotated[str, typer.Option("--ratios", help="Tokens per beacon.")] = "2,4,8,16,32",
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=2, help="Tokens of a chunk.")] = 1024,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens written after reading.")] = 64,
    gpu_gib: Annotated[float | None, typer.Option("--gpu-gib", min=0.0, help="Say what fits this memory.")] = None,
    element_bytes: Annotated[
        int, typer.Option("--element-bytes", min=1, help="Of weights and cache: 2 for bfloat16.")
    ] = 2,
    json: options.Json = False,
) -> None:
    """Compute on paper what beacons save: operations, cache, break-even, and the longest text that fits a GPU.

    Only matrix products are counted, attention as causal. Nothing is loaded or measured.
    """
    from activation_beacon.bench.cost import SHAPES, break_even, longest_text

    if shape not in SHAPES:
        raise InputError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}.")
    known, sizes = SHAPES[shape], parse_lengths(lengths)
    ways = [None, *options.parse_ratios(ratios)]
    rows = [
        _planned(known, length, ratio, chunk_size=chunk_size, new_tokens=new_tokens, element_bytes=element_bytes)
        for length in sizes
        for ratio in ways
    ]
    limits = {}
    for ratio in ways:
        how = _compression(ratio, chunk_size)
        fits = None if gpu_gib is None else longest_text(known, how, int(gpu_gib * 2**30), element_bytes)
        limits[ratio] = (None if ratio is None else break_even(known, how, num_new=new_tokens), fits)
    if json:
        named = [{"ratio": ratio, "break_even": even, "longest_text": fits} for ratio, (even, fits) in limits.items()]
        print_json({"shape": shape, "chunk_size": chunk_size, "new_tokens": new_tokens, "rows": rows, "ratios": named})
        return
    typer.echo(f"{'tokens':>9}  {'ratio':<6}{'TFLOP':>10}{'fewer':>8}{'cache':>13}{'smaller':>9}")
    for row in rows:
        typer.echo(
            f"{row['tokens']:>9,}  {row['ratio'] or 'full':<6}{row['flops'] / 1e12:>10,.2f}{row['speedup']:>7.2f}x"
            f"{bytes_text(row['cache_bytes']):>13}{row['cache_factor']:>8.1f}x"
        )
    typer.echo("")
    for ratio, (even, fits) in limits.items():
        name = "full attention" if ratio is None else f"ratio {ratio}"
        parts = (
            [] if ratio is None else [f"fewer operations from {even:,} tokens on" if even else "never fewer operations"]
        )
        parts += [] if fits is None else [f"up to {fits:,} tokens in {gpu_gib:g} GiB"]
        if parts:
            typer.echo(f"{name}: {', '.join(parts)}")


def _compression(ratio: int | None, chunk_size: int) -> "Compression":
    from activation_beacon.bench.cost import Compression

    return Compression(ratio, chunk_size)


def _planned(
    shape: "ModelShape", length: int, ratio: int | None, *, chunk_size: int, new_tokens: int, element_bytes: int
) -> dict[str, Any]:
    """Operations and cache of one text."""
    from activation_beacon.bench import cost

    how = _compression(ratio, chunk_size)
    flops = cost.prefill_flops(shape, length, how) + cost.decode_flops(shape, length, new_tokens, how)
    held, full = (shape.cache_bytes(each.entries(length), element_bytes) for each in (how, cost.FULL_ATTENTION))
    return {
        "tokens": length,
        "ratio": ratio,
        "flops": flops,
        "speedup": cost.end_to_end_speedup(shape, length, new_tokens, how),
        "cache_bytes": held,
        "cache_factor": full / held,
    }


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """What an option with a list of numbers asks for: each once, smallest first.

    Raises:
        InputError: if it is not a list of ints of at least 1.
    """
    if all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        return sorted({int(part) for part in text.split(",")})
    raise InputError(f"{option} must be ints such as 2048,4096; got {text!r}.")
