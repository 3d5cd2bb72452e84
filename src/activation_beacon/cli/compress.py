"""`beacon compress`: texts in, one context file out."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import (
    Progress,
    factor_text,
    notice,
    print_json,
    seconds_text,
    trained_fields,
    trained_mark,
    warn_untrained,
)
from activation_beacon.cli.models import Loaded, check_ratio, load_model
from activation_beacon.cli.texts import check_output, read_texts
from activation_beacon.ratios import parse_ratio
from activation_beacon.sizes import bytes_text

if TYPE_CHECKING:
    from activation_beacon.cache import BeaconCache

USUAL_RATIO = 8


def compress(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="UTF-8 text files, or - for standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    model: options.Model = "default",
    base: options.Base = None,
    ratio: Annotated[
        str, typer.Option("--ratio", help='Tokens per beacon: "auto", an int, or a list with one for each chunk.')
    ] = "auto",
    budget: Annotated[
        int | None, typer.Option("--budget", help='With ratio "auto": cache entries to hold at most.')
    ] = None,
    quantize: Annotated[
        options.Bits | None, typer.Option("--quantize", help="Keep the beacons in so many bits.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Take the text as it is, not as the opening of a user's message.")
    ] = False,
    force: options.Force = False,
    local_tokens: options.LocalTokens = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Compress texts into one context file.

    Several texts make one context: they are read in the order given, with a blank line between them. The text becomes
    the opening of a user's message in the model's chat template, which a question then closes (see `beacon ask`).

    The ratio says how many tokens one beacon stands for. "auto" takes the smallest that makes the text fit the base
    model's positions.
    """
    wanted = parse_ratio(ratio, "--ratio")
    text = read_texts(texts)
    check_output(output, force=force)
    check_ratio(model, wanted, budget=budget)
    loaded = load_model(model, base=base, device=device, dtype=dtype, local_tokens=local_tokens)
    warn_untrained(loaded.config)
    ids = loaded.tokenizer(text, verbose=False)["input_ids"] if plain else loaded.prompt.opening(text)
    if wanted == "auto" and budget is None:
        _suggest_usual_ratio(loaded, len(ids))
    context, seconds = compress_ids(loaded, ids, ratio=wanted, budget=budget)
    if quantize is not None:
        context = context.quantize(int(quantize))
    file_bytes = context.save(output)
    if not context.ratios:
        longest = context.config.untouched_length
        notice(f"The text has at most {longest:,} tokens: it is kept raw, without beacons.")
    if json:
        print_json(
            {"file": str(output), **numbers(context), **_result(file_bytes, seconds), **trained_fields(loaded.config)}
        )
    else:
        typer.echo(_summary(output, context, file_bytes, seconds))


def _suggest_usual_ratio(loaded: Loaded, num_tokens: int) -> None:
    """Say what the ratio that most texts are compressed at would hold, where "auto" has room for a smaller one."""
    chosen = _ratio_taken(loaded, num_tokens, "auto", None)
    if not isinstance(chosen, int) or chosen >= USUAL_RATIO or USUAL_RATIO not in loaded.config.ratios:
        return
    from activation_beacon.layouts import entries_held

    site = loaded.model.decoder_site
    held = functools.partial(entries_held, loaded.config, num_tokens, USUAL_RATIO)
    features = None if site.is_recurrent else site.features_held(held)  # states come besides
    size = f"{held():,} entries" if features is None else bytes_text(features * loaded.model.dtype.itemsize)
    notice(
        f'"auto" chose ratio {chosen}, the smallest that fits the model\'s positions. --ratio {USUAL_RATIO} would hold '
        f"{size} and read faster."
    )


def _ratio_taken(
    loaded: Loaded, num_tokens: int, ratio: options.RatioOption, budget: int | None
) -> options.RatioOption:
    """The ratio that a text is read at: what "auto" chooses, if it closes a chunk.

    Raises:
        CapacityError: if not even the largest fits.
    """
    if ratio != "auto":
        return ratio
    from activation_beacon.plan import TextPlanner

    policy = loaded.model.ratio_policy("auto", budget=budget)
    layouts = TextPlanner(loaded.config, policy, loaded.model.max_positions).layouts(num_tokens)
    return layouts[0].ratio if layouts else ratio


def compress_ids(
    loaded: Loaded, ids: list[int], *, ratio: options.RatioOption, budget: int | None = None
) -> tuple["BeaconCache", float]:
    """Compress with a progress bar; the context and the seconds that it took."""
    taken = _ratio_taken(loaded, len(ids), ratio, budget)
    name = ",".join(map(str, taken)) if isinstance(taken, tuple) else taken
    with Progress(f"compressing at ratio {name}", len(ids), loaded.config.chunk_size) as progress:
        start = time.perf_counter()
        context = loaded.model.compress(ids, ratio=ratio, budget=budget, progress=progress)
        return context, time.perf_counter() - start


def numbers(context: "BeaconCache") -> dict[str, Any]:
    """What a context of one text holds, for `--json`."""
    return {
        "tokens": context.tokens_seen,
        "chunks": len(context.ratios),
        "ratios": list(context.ratios),
        "sinks": context.num_sinks,
        "beacons": context.num_beacons,
        "kept_raw": context.memory_length - context.num_sinks - context.num_beacons,
        "tail": context.tail_length,
        "cache_length": context.cache_length,
        "cache_bytes": context.cache_bytes,
        "uncompressed_bytes": context.uncompressed_bytes,
        "quantized_bits": context.quantized_bits,
    }


def ratios_text(ratios: tuple[int, ...]) -> str:
    """Such as "ratio 8", or "ratios 2 (x3), 8 (x11)" with the number of chunks of each."""
    kinds = sorted(set(ratios))
    if not kinds:
        return "no ratio: nothing is compressed yet"
    if len(kinds) == 1:
        return f"ratio {kinds[0]}"
    return "ratios " + ", ".join(f"{kind} (x{ratios.count(kind)})" for kind in kinds)


def holding_text(context: "BeaconCache") -> str:
    """What a context holds, in words."""
    num_raw = context.memory_length - context.num_sinks - context.num_beacons
    parts = [f"{context.num_beacons:,} beacons", f"{context.tail_length:,} raw tokens in the tail"]
    parts += [f"{num_raw:,} kept raw"] if num_raw else []
    return " + ".join([f"{context.num_sinks} sinks", *parts] if context.num_sinks else parts)


def cache_text(context: "BeaconCache") -> str:
    """Bytes held against bytes uncompressed."""
    held, full = context.cache_bytes, context.uncompressed_bytes
    bits = "" if context.quantized_bits is None else f", beacons in {context.quantized_bits} bits"
    return f"{bytes_text(held)}{bits}; uncompressed {bytes_text(full)} ({factor_text(full, held)})"


def _result(file_bytes: int, seconds: float) -> dict[str, Any]:
    return {"file_bytes": file_bytes, "seconds": round(seconds, 3)}


def _summary(output: Path, context: "BeaconCache", file_bytes: int, seconds: float) -> str:
    chunks = f"{len(context.ratios)} chunks, {ratios_text(context.ratios)}"
    return "\n".join(
        [
            f"{output}{trained_mark(context.config)}",
            f"  tokens  {context.tokens_seen:,} ({chunks})",
            f"  held    {holding_text(context)}",
            f"  cache   {cache_text(context)}",
            f"  file    {bytes_text(file_bytes)}",
            f"  time    {seconds_text(seconds)} ({context.tokens_seen / seconds:,.0f} tokens/s)",
        ]
    )
