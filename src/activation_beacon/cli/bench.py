"""`beacon bench`: how fast it is, measured on this machine."""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, print_json
from activation_beacon.cli.models import Loaded, load_model, usable_device
from activation_beacon.config import DEFAULT_KIND, PAPER_KIND, Placement
from activation_beacon.errors import InputError
from activation_beacon.sizes import bytes_text

if TYPE_CHECKING:
    import torch

    from activation_beacon.bench.cost import Compression, ModelShape

BenchDtype = Annotated[
    options.Dtype | None,
    typer.Option("--dtype", help="Float type to load the model in; by default bfloat16 on a GPU, its own on a CPU."),
]

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
    dtype: BenchDtype = None,
    cpu_matmul: options.CpuMatmulOption = options.CpuMatmul.AUTO,
    json: options.Json = False,
) -> None:
    """Time training steps: chunk by chunk, all chunks at once, and at once with gradient checkpointing.

    The share is that of the speed of a large matrix product on the same hardware.
    """
    sizes = options.parse_numbers(lengths, "--lengths")
    loaded = load_model(model, base=base, device=device, dtype=usual_dtype(device, dtype))
    loaded.model.cpu_matmul = str(cpu_matmul)
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


def usual_dtype(device: str | None, dtype: options.Dtype | None) -> options.Dtype | None:
    """What a model is measured in: on a GPU bfloat16, unless another is named. The flash kernels know no float32."""
    return options.Dtype.BFLOAT16 if dtype is None and usable_device(device).type == "cuda" else dtype


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
        raise InputError(f"There are not two texts of {length:,} tokens. Name more texts, or lower --length.")
    return [torch.tensor([row], device=loaded.model.device) for row in rows]


PLAN_EPILOG = options.examples(
    "beacon bench plan --shape qwen2-7b",
    "beacon bench plan --shape llama-3-8b --gpu-gib 24 --lengths 32768,131072 --ratios 4,8,32",
    "beacon bench plan --model my/decoder --gpu-gib 80 --batch-size 8",
    "beacon bench plan --shape qwen2-7b --placement interleave   # the paper's beacons",
)


@bench.command("plan", epilog=PLAN_EPILOG)
def plan(
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="Sizes of a known model: smollm2-135m (if no --model is named), llama-2-7b, llama-3-8b, qwen2-7b, "
            "qwen3-30b-a3b, gemma-3-1b or gemma-3-4b.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help='Base model of your own instead: its folder or hub id, or "default". Only its config is read.',
        ),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the texts.")] = "8192,32768,131072",
    ratios: Annotated[str, typer.Option("--ratios", help="Tokens per beacon.")] = "2,4,8,16,32",
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=2, help="Tokens of a chunk.")] = 1024,
    placement: Annotated[
        Placement,
        typer.Option(
            "--placement",
            help="Beacons behind the chunk, anchored, as the default adapter has them; or between its tokens, as in the paper.",
        ),
    ] = "append",
    sinks: Annotated[
        int | None,
        typer.Option(
            "--sinks",
            min=0,
            help="First tokens that are kept raw; by default 4, and none with beacons between the tokens.",
        ),
    ] = None,
    local_tokens: Annotated[
        int | None,
        typer.Option(
            "--local-tokens", min=0, help="Last tokens that stay raw at least; by default 128 and none, likewise."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens written after reading.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts read side by side.")] = 1,
    gpu_gib: Annotated[float | None, typer.Option("--gpu-gib", min=0.0, help="Say what fits this memory.")] = None,
    element_bytes: Annotated[
        int, typer.Option("--element-bytes", min=1, help="Of weights and cache: 2 for bfloat16.")
    ] = 2,
    json: options.Json = False,
) -> None:
    """Compute on paper what beacons save: operations and bytes, break-even, and which ratio fits.

    For each text: operations of reading (prefill) and of writing --new-tokens (decode, with the chunks that they fill),
    bytes read per token written, the cache after reading, the memory at the peak, and what reading and writing is too long
    for: the base's positions, or the GPU's memory. Operations and bytes are those of the whole batch. Only matrix products
    are counted, attention as causal. No weights are loaded, nothing is measured.
    """
    from activation_beacon.bench.cost import Compression

    name, known = _known_shape(shape, model)
    gpu_bytes = _gpu_bytes(gpu_gib)
    kind = dict(DEFAULT_KIND if placement == DEFAULT_KIND["placement"] else PAPER_KIND)
    given = {"num_sinks": sinks, "local_tokens": local_tokens}
    kind.update({name: number for name, number in given.items() if number is not None})
    ways = [Compression(ratio, chunk_size, **kind) for ratio in (None, *options.parse_ratios(ratios))]
    work: dict[str, int] = {"new_tokens": new_tokens, "batch_size": batch_size, "element_bytes": element_bytes}
    rows = [
        _planned(known, length, how, gpu_bytes, **work)
        for length in options.parse_numbers(lengths, "--lengths")
        for how in ways
    ]
    limits = [_limits(known, how, gpu_bytes, **work) for how in ways]
    if json:
        setting = {"model": name, "shape": dataclasses.asdict(known), "chunk_size": chunk_size, **kind, **work}
        print_json({**setting, "gpu_gib": gpu_gib, "rows": rows, "ratios": limits})
        return
    typer.echo("\n".join([_plan_line(PLAN_HEAD), *map(_row_line, rows), "", *map(_limit_line, limits)]))
    for length, fitting in _ways_that_fit(rows).items():
        typer.echo(f"{length:,} tokens: {'fits with ' + ', '.join(fitting) if fitting else 'fits with none of these'}")


PLAN_HEAD = (
    *("tokens", "ratio", "prefill TFLOP", "fewer", "decode TFLOP", "total fewer", "read per token", "fewer"),
    *("cache", "smaller", "peak", "too long for"),
)
PLAN_WIDTHS = (9, 7, 15, 9, 14, 14, 15, 8, 13, 9, 13, 14)


def _known_shape(shape: str | None, model: str | None) -> tuple[str, "ModelShape"]:
    """The shape asked for and what to call it."""
    from activation_beacon.bench.cost import DEFAULT_SHAPE, SHAPES

    if shape is not None and model is not None:
        raise InputError(f"--shape ({shape}) and --model ({model}) name two models. Give one of them.")
    if model is not None:
        from activation_beacon.bench.shapes import read_shape

        return model, read_shape(model)
    name = DEFAULT_SHAPE if shape is None else shape
    if name not in SHAPES:
        raise InputError(
            f"--shape must be one of {', '.join(SHAPES)}; got {name!r}. For other models there is --model."
        )
    return name, SHAPES[name]


def _gpu_bytes(gpu_gib: float | None) -> int | None:
    if gpu_gib is not None and not math.isfinite(gpu_gib):
        raise InputError(f"--gpu-gib must be a number of GiB such as 24; got {gpu_gib}.")
    return None if gpu_gib is None else int(gpu_gib * 2**30)


def _planned(
    shape: "ModelShape",
    length: int,
    how: "Compression",
    gpu_bytes: int | None,
    *,
    new_tokens: int,
    batch_size: int,
    element_bytes: int,
) -> dict[str, Any]:
    """Operations and bytes of a batch of texts, beside full attention's."""
    from activation_beacon.bench import cost

    full = cost.FULL_ATTENTION
    prefill, full_prefill = (cost.prefill_flops(shape, length, way) for way in (how, full))
    decode = cost.decode_flops(shape, length, new_tokens, how)
    step, full_step = (
        cost.decode_bytes(shape, length, way, element_bytes, batch_size=batch_size) for way in (how, full)
    )
    cache, full_cache = (cost.cache_bytes(shape, length, way, element_bytes) for way in (how, full))
    batch: dict[str, int] = {"batch_size": batch_size, "num_new": new_tokens}
    return {
        "tokens": length,
        "ratio": how.ratio,
        "prefill_flops": batch_size * prefill,
        "prefill_speedup": full_prefill / prefill,
        "decode_flops": batch_size * decode,
        "flops": batch_size * (prefill + decode),
        "speedup": cost.end_to_end_speedup(shape, length, new_tokens, how),
        "decode_bytes": step,
        "decode_bytes_factor": full_step / step,
        "cache_bytes": batch_size * cache,
        "cache_factor": full_cache / cache,
        "peak_bytes": cost.memory_bytes(shape, length, how, element_bytes, **batch),
        "too_long_for": cost.obstacle(shape, length, how, element_bytes, gpu_bytes=gpu_bytes, **batch),
    }


def _limits(
    shape: "ModelShape",
    how: "Compression",
    gpu_bytes: int | None,
    *,
    new_tokens: int,
    batch_size: int,
    element_bytes: int,
) -> dict[str, Any]:
    """From which length on beacons take fewer operations, and the longest text that fits."""
    from activation_beacon.bench.cost import break_even, longest_text

    longest, stops = longest_text(
        shape, how, element_bytes, gpu_bytes=gpu_bytes, batch_size=batch_size, num_new=new_tokens
    )
    return {
        "ratio": how.ratio,
        "prefill_break_even": None if how.ratio is None else break_even(shape, how),
        "break_even": None if how.ratio is None else break_even(shape, how, num_new=new_tokens),
        "longest_text": longest,
        "limited_by": stops,
    }


def _ways_that_fit(rows: list[dict[str, Any]]) -> dict[int, list[str]]:
    fitting: dict[int, list[str]] = {row["tokens"]: [] for row in rows}
    for row in rows:
        if row["too_long_for"] is None:
            fitting[row["tokens"]].append(_way_text(row["ratio"]))
    return fitting


def _way_text(ratio: int | None) -> str:
    return "full attention" if ratio is None else f"ratio {ratio}"


def _row_line(row: dict[str, Any]) -> str:
    return _plan_line(
        (
            f"{row['tokens']:,}",
            str(row["ratio"] or "full"),
            f"{row['prefill_flops'] / 1e12:,.2f}",
            f"{row['prefill_speedup']:.2f}x",
            f"{row['decode_flops'] / 1e12:,.2f}",
            f"{row['speedup']:.2f}x",
            bytes_text(row["decode_bytes"]),
            f"{row['decode_bytes_factor']:.2f}x",
            bytes_text(row["cache_bytes"]),
            f"{row['cache_factor']:.1f}x",
            bytes_text(row["peak_bytes"]),
            row["too_long_for"] or "-",
        )
    )


def _plan_line(cells: tuple[str, ...]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, PLAN_WIDTHS, strict=True))


def _limit_line(limits: dict[str, Any]) -> str:
    parts = []
    if limits["ratio"] is not None:
        evens = (("to read", limits["prefill_break_even"]), ("in all", limits["break_even"]))
        gains = [f"{what} from {even:,} tokens on" for what, even in evens if even is not None]
        parts.append(f"fewer operations {', '.join(gains)}" if gains else "never fewer operations")
    most = f"up to {limits['longest_text']:,} tokens"
    parts.append(f"{most} ({limits['limited_by']})" if limits["limited_by"] else f"{most} at least")
    return f"{_way_text(limits['ratio'])}: {', '.join(parts)}"
