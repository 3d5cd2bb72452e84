"""`beacon bench speed`, `chunks` and `idle`: beacons beside full attention, on this machine."""

import json as json_format
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.bench import BenchDtype, usual_dtype
from activation_beacon.cli.console import notice, seconds_text
from activation_beacon.cli.models import load_model, usable_device
from activation_beacon.errors import CapacityError, InputError, UnsupportedError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from activation_beacon.bench.cost import ModelShape
    from activation_beacon.bench.peers import TimedPeers
    from activation_beacon.bench.records import Records

Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Random weights of a known shape, instead of a model; see `beacon bench plan`.",
    ),
]
ChunkSize = Annotated[int, typer.Option("--chunk-size", min=2, help="Tokens of a chunk, with --shape.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; by default all.")]

SPEED_EPILOG = options.examples(
    "beacon bench speed --lengths 4096,8192 --ratios 8",
    "beacon bench speed --lengths 4096,8192,16384,32768 --ratios 8 --enough 150 -o speed-cpu",
    "beacon bench speed --lengths 8192 --ratios 8 --peers snapkv,expected-attention   # after `make peers`",
    "beacon bench speed --shape qwen2-7b --device cuda --cuda-graphs --lengths 32768,131072 -o speed-gpu",
)


def speed(
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the texts.")] = "4096,8192,16384",
    ratios: Annotated[str, typer.Option("--ratios", help="Tokens per beacon.")] = "8",
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="Texts read side by side.")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens written after the first.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each, after some that do not count.")] = 3,
    enough: Annotated[
        float | None,
        typer.Option("--enough", min=0.0, help="No further repeat of a text after runs of so many seconds."),
    ] = None,
    full_up_to: Annotated[
        int | None,
        typer.Option("--full-up-to", min=0, help="Run full attention, and kvpress, up to so many tokens only."),
    ] = None,
    full_tuned: Annotated[
        bool,
        typer.Option(
            help="Run full attention also with what else beacons have: appending in place, oneDNN or flash kernels."
        ),
    ] = True,
    peers: Annotated[
        str | None,
        typer.Option("--peers", help="Methods of kvpress to time beside, at as many entries, such as snapkv,knorm."),
    ] = None,
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to keep runs in, and to go on from; gets a picture too."),
    ] = None,
    model: options.Model = "default",
    base: options.Base = None,
    shape: Shape = None,
    chunk_size: ChunkSize = 1024,
    local_tokens: options.LocalTokens = None,
    device: options.Device = None,
    dtype: BenchDtype = None,
    threads: Threads = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Record steps with beacons as CUDA graphs; full attention's are not."),
    ] = False,
    cpu_matmul: options.CpuMatmulOption = options.CpuMatmul.AUTO,
    json: options.Json = False,
) -> None:
    """Time reading and writing with beacons and with full attention, in turn, on random tokens.

    For each text: seconds to the first token, for each token more, for the slowest of these, and in total; the cache, and the
    memory held at most. Factors compare with full attention in the same repeat; the bound is what counting operations gives
    for the total, where they are known (not of latent attention and recurrent layers).
    Full attention is run as transformers runs it, and again "tuned", with all that helps beacons and is not beacons: a cache that is
    appended to in place; on a CPU float32 products through oneDNN where they are faster; on a GPU no kernels of cuDNN in
    writing, where it makes a plan for each token. "of tuned" compares with the latter.
    With --peers, methods of kvpress are run in its own environment, in turn with these, at as many cache entries.
    The last line is one JSON object.
    """
    from activation_beacon.bench import measure, report
    from activation_beacon.bench.records import Records

    sizes, batches, ways = (
        options.parse_numbers(lengths, "--lengths"),
        options.parse_numbers(batch_sizes, "--batch-sizes"),
        options.parse_ratios(ratios),
    )
    presses = _presses(peers)
    name, attached = _model(model, base, shape, chunk_size, device, dtype, threads)
    counted = _counted(attached)
    if local_tokens is not None:
        attached.local_tokens = local_tokens
    _set_graphs(attached, cuda_graphs)
    attached.cpu_matmul = str(cpu_matmul)
    records = Records(output, {**_setting(name, attached), "new_tokens": new_tokens})
    notice("warming up")
    measure.warm_up(attached, ways)
    texts = _texts(sizes, batches, ways, presses, full_up_to, with_tuned=full_tuned)
    presses = tuple(press for press in presses if any(cell.press == press for cells in texts for cell in cells))
    with _peers(attached, presses, ways, peers_python) as timed:
        for number, cells in enumerate(texts):
            spent = 0.0  # by runs on record, too: what was interrupted ends where it would have ended
            for repeat in range(repeats):
                if repeat and enough is not None and spent > enough:
                    break
                again = [cell._replace(repeat=repeat) for cell in cells]
                for cell in again:
                    _run(attached, timed, cell, new_tokens, records)
                spent += sum(records.runs[cell].total_s for cell in again if cell in records.runs)
            notice(f"{number + 1} of {len(texts)} texts done")
    rows = report.summary(
        records.runs,
        counted,
        num_new=new_tokens,
        config=attached.beacon_config,
        element_bytes=attached.dtype.itemsize,
    )
    if not json:
        typer.echo("\n".join(report.table(rows)))
    if output is not None and rows:
        _draw(output / "speed.png", rows)
    _print_line({**records.setting, "rows": [row.to_dict() for row in rows]})


def _counted(model: Any) -> "ModelShape | None":
    """The shape that bounds are computed of; None, with a note, where its operations are not counted."""
    from activation_beacon.bench.shapes import shape_of

    try:
        return shape_of(model, model.decoder_site)
    except UnsupportedError as error:
        notice(f"no bounds: {str(error).partition(', so')[0]}.")
        return None


def _set_graphs(model: Any, is_on: bool) -> None:
    if is_on and model.device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a GPU; the model is on {model.device.type}. Add --device cuda.")
    model.cuda_graphs = is_on


def _presses(peers: str | None) -> tuple[str, ...]:
    from activation_beacon.bench.peers import PRESSES

    names = tuple(name.strip() for name in peers.split(",")) if peers is not None else ()
    if unknown := [name for name in names if name not in PRESSES]:
        raise InputError(f"--peers must be some of {', '.join(PRESSES)}; got {unknown[0]!r}.")
    return tuple(dict.fromkeys(names))


def _peers(
    model: Any, presses: tuple[str, ...], ways: tuple[int, ...], python: Path
) -> "AbstractContextManager[TimedPeers | None]":
    from activation_beacon.bench.peers import timed_peers

    if not presses:
        return nullcontext()
    notice("starting kvpress")
    return timed_peers(model, presses, ways, python)


def _texts(
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    ways: tuple[int, ...],
    presses: tuple[str, ...],
    full_up_to: int | None,
    *,
    with_tuned: bool,
) -> list[list[Any]]:
    """The cells of each text, full attention first; kvpress reads as it does, so that it is left out with it."""
    from activation_beacon.bench.measure import cells

    def is_wanted(cell: Any) -> bool:
        return full_up_to is None or cell.length <= full_up_to or (cell.ratio is not None and cell.press is None)

    return [
        [cell for cell in cells([size], [batch], ways, 0, presses, with_tuned=with_tuned) if is_wanted(cell)]
        for size in sizes
        for batch in batches
    ]


def _run(model: Any, peers: "TimedPeers | None", cell: Any, new_tokens: int, records: "Records") -> None:
    import torch

    from activation_beacon.bench import measure

    if cell in records.runs:
        return
    way = f"{cell.press or 'beacons'} at ratio {cell.ratio}"
    if cell.ratio is None:
        way = "tuned full attention" if cell.is_tuned else "full attention"
    try:
        if cell.press is None:
            found = measure.run(model, cell, new_tokens)
        else:
            assert peers is not None, "started where there are presses"
            found = peers.run(cell, new_tokens)
    except CapacityError as error:
        notice(f"{cell.length:,} tokens, {way}: {error}")
        return
    except torch.OutOfMemoryError:
        found = None
    if torch.cuda.is_available() and (found is None or peers is not None):
        torch.cuda.empty_cache()  # kvpress needs the same memory; what a traceback held is free here
    if found is None:
        notice(f"{cell.length:,} tokens, {way}: does not fit the GPU's memory")
        return
    records.add(cell, found)
    notice(f"{cell.length:,} tokens, {cell.batch_size} texts, {way}: {seconds_text(found.total_s)}")


def _draw(path: Path, rows: Any) -> None:
    from importlib.util import find_spec

    from activation_beacon.bench import report

    if find_spec("matplotlib") is None:
        notice("no picture: it needs matplotlib (pip install 'activation-beacon[eval]')")
        return
    report.draw(path, rows)


CHUNKS_EPILOG = options.examples(
    "beacon bench chunks --chunks 64 --ratio 16",
    "beacon bench chunks --shape smollm2-135m --chunk-size 64 --chunks 64 --ratio 8",
)


def chunks(
    num_chunks: Annotated[int, typer.Option("--chunks", min=2, help="Chunks of the text.")] = 64,
    ratio: Annotated[int, typer.Option("--ratio", min=2, help="Tokens per beacon.")] = 16,
    model: options.Model = "default",
    base: options.Base = None,
    shape: Shape = None,
    chunk_size: ChunkSize = 1024,
    device: options.Device = None,
    dtype: BenchDtype = None,
    threads: Threads = None,
    json: options.Json = False,
) -> None:
    """Time each chunk of one long text: linear, but for attention to the beacons held, which the bound counts.

    Where chunks are small enough for several to share a pass, all of them in one call are timed too.
    """
    from activation_beacon.bench import measure
    from activation_beacon.bench.cost import Compression, pass_flops
    from activation_beacon.bench.shapes import shape_of

    name, attached = _model(model, base, shape, chunk_size, device, dtype, threads)
    sizes = shape_of(attached, attached.decoder_site)
    how = Compression.of(attached.beacon_config, ratio)
    measure.warm_up(attached, [ratio])
    seconds = measure.chunk_seconds(attached, num_chunks, ratio)
    in_one_call = measure.seconds_in_one_call(attached, num_chunks, ratio)
    passes = list(how.closings(0, how.longest_raw(num_chunks - 1) + 1))
    flops = [pass_flops(sizes, each) for each in passes]
    if not json:
        typer.echo(f"{'chunk':>6}{'held':>9}{'seconds':>10}{'of the first':>14}{'on paper':>10}")
        for number in sorted({0, *range(7, num_chunks, 8), num_chunks - 1}):
            typer.echo(
                f"{number + 1:>6}{passes[number].held:>9,}{seconds[number]:>10.3f}"
                f"{seconds[number] / seconds[0]:>13.2f}x{flops[number] / flops[0]:>9.2f}x"
            )
        if in_one_call is not None:
            typer.echo(
                f"in one call, several chunks a pass: {in_one_call:.2f} s in place of {sum(seconds):.2f} s, "
                f"{sum(seconds) / in_one_call:.2f}x as fast"
            )
    measured = {"seconds": seconds, "seconds_in_one_call": in_one_call, "flops": flops}
    _print_line({**_setting(name, attached), "ratio": ratio, **measured})


IDLE_EPILOG = options.examples("beacon bench idle", "beacon bench idle --length 1024 --repeats 20")


def idle(
    length: Annotated[
        int, typer.Option("--length", min=1, help="Tokens of the text, so few that none is compressed.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens written after the first.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Pairs that count, after one that does not.")] = 10,
    model: options.Model = "default",
    base: options.Base = None,
    shape: Shape = None,
    chunk_size: ChunkSize = 1024,
    device: options.Device = None,
    dtype: BenchDtype = None,
    threads: Threads = None,
    json: options.Json = False,
) -> None:
    """Time a short text on the bare base model and with beacons attached, in turn: what they cost when idle."""
    from activation_beacon.bench import measure

    name, attached = _model(model, base, shape, chunk_size, device, dtype, threads)
    if length + new_tokens > attached.untouched_length:
        raise InputError(
            f"--length and --new-tokens ({length + new_tokens}) must not exceed {attached.untouched_length}: "
            "longer texts are compressed."
        )
    found = measure.idle_pairs(attached, length, new_tokens, repeats)
    factors = {what: measure.median_factor(found, what) for what in ("first_token_s", "step_s")}
    if not json:
        for what, factor in factors.items():
            typer.echo(f"{what:<15}{factor:>8.3f} of the base's")
    _print_line({**_setting(name, attached), "length": length, "repeats": repeats, "of_base": factors})


def add_to(bench: typer.Typer) -> None:
    """Put the commands of this file under `beacon bench`."""
    for command, epilog in ((speed, SPEED_EPILOG), (chunks, CHUNKS_EPILOG), (idle, IDLE_EPILOG)):
        bench.command(command.__name__, epilog=epilog)(command)


def _model(
    name: str,
    base: str | None,
    shape: str | None,
    chunk_size: int,
    device: str | None,
    dtype: options.Dtype | None,
    threads: int | None,
) -> tuple[str, Any]:
    """The model to be measured and what to call it."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        loaded = load_model(name, base=base, device=device, dtype=usual_dtype(device, dtype))
        return name, loaded.model.eval()
    from activation_beacon.bench.cost import SHAPES
    from activation_beacon.bench.shapes import random_model

    if shape not in SHAPES:
        raise InputError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}.")
    kind = getattr(torch, str(usual_dtype(device, dtype) or "float32"))
    return shape, random_model(shape, chunk_size=chunk_size, device=usable_device(device), dtype=kind)


def _setting(name: str, model: Any) -> dict[str, Any]:
    """What a measurement depends on, in plain values."""
    import torch
    import transformers

    device = model.get_input_embeddings().weight.device
    return {
        "model": name,
        "chunk_size": model.beacon_config.chunk_size,
        "local_tokens": model.beacon_config.local_tokens,
        "placement": model.beacon_config.placement,
        "anchored": model.beacon_config.anchored,
        "cuda_graphs": model.cuda_graphs,
        "cpu_matmul": model.cpu_matmul,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "transformers": transformers.__version__,
    }


def _print_line(values: dict[str, Any]) -> None:
    typer.echo(json_format.dumps(values))
