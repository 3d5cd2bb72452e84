"""One text read and continued, by full attention or on beacons, with its times and its memory; and such runs in turn.

Both ways do the same work with the same code: one call of the model reads the text and returns the last token's logits,
then tokens are written greedily, one by one. Full attention is the base model itself, beacons disabled.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from activation_beacon import attach, detach

WARM_UP_TOKENS = 4


class Cell(NamedTuple):
    """What one run is of.

    Attributes:
        length: tokens of a text.
        batch_size: texts read side by side.
        ratio: tokens per beacon; None for full attention.
        repeat: counts from 0.
    """

    length: int
    batch_size: int
    ratio: int | None
    repeat: int


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        first_token_s: seconds until the logits of the first token to be written.
        step_s: median seconds of writing one token more.
        slowest_step_s: of those, the slowest: the one that closes a chunk, if one does.
        total_s: reading and writing.
        cache_bytes: keys and values held at the end.
        peak_bytes: held at most; by torch on a GPU, by the whole process on a CPU; None where it cannot be told.
    """

    first_token_s: float
    step_s: float
    slowest_step_s: float
    total_s: float
    cache_bytes: int
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cells(lengths: Sequence[int], batch_sizes: Sequence[int], ratios: Sequence[int], repeat: int) -> Iterator[Cell]:
    """One repeat of everything: for each text, full attention and then each ratio, back to back."""
    for length in lengths:
        for batch_size in batch_sizes:
            for ratio in (None, *ratios):
                yield Cell(length, batch_size, ratio, repeat)


@torch.no_grad()
def run(model: Any, cell: Cell, num_new: int) -> Run:
    """Read and continue a batch of random tokens.

    Args:
        model: with beacons attached.
        cell: of what; its repeat does not matter.
        num_new: tokens to be written after the first.

    Raises:
        CapacityError: if the text does not fit the base's positions at this ratio.
    """
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(cell.length)
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (cell.batch_size, cell.length), generator=generator).to(device)
    _reset_peak(device)
    if cell.ratio is None:
        with model.beacon_disabled():
            return timed(model, DynamicCache(), ids, num_new)
    return timed(model, model.new_cache(cell.batch_size, ratio=cell.ratio), ids, num_new)


def warm_up(model: Any, ratios: Sequence[int]) -> None:
    """Runs that do not count, of each way, on texts of two chunks and a token."""
    length = 2 * model.beacon_config.chunk_size + 1
    for cell in cells([length], [1], ratios, 0):
        run(model, cell, WARM_UP_TOKENS)


def timed(model: Any, cache: Any, ids: torch.Tensor, num_new: int) -> Run:
    """Read ids (B, T) into an empty cache in one call, then write `num_new` tokens greedily."""
    start = _now(ids.device)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    times = [_now(ids.device)]
    for _ in range(num_new):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        times.append(_now(ids.device))
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Run(
        first_token_s=times[0] - start,
        step_s=statistics.median(steps),
        slowest_step_s=max(steps),
        total_s=times[-1] - start,
        cache_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        peak_bytes=_peak(ids.device),
    )


def chunk_seconds(model: Any, num_chunks: int, ratio: int) -> list[float]:
    """Seconds that each of so many chunks takes to be closed, in order."""
    device = model.get_input_embeddings().weight.device
    size, width = model.get_input_embeddings().weight.shape[0], num_chunks * model.beacon_config.chunk_size + 1
    times = [_now(device)]

    def note(*_: int) -> None:
        times.append(_now(device))

    model.compress(torch.randint(0, size, (1, width), device=device), ratio=ratio, progress=note)
    return [after - before for before, after in itertools.pairwise(times)]


@torch.no_grad()
def idle_pairs(model: Any, length: int, num_new: int, repeats: int) -> list[tuple[Run, Run]]:
    """Runs on a short text in pairs: on the bare base model, and with beacons attached. The beacons are new ones after it.

    Attaching and detaching move much memory: a run that does not count comes after each.
    """
    config, pairs = model.beacon_config, []
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (1, length), device=device)
    for number in range(repeats + 1):
        bare = detach(model)
        timed(bare, DynamicCache(), ids, 1)
        alone = timed(bare, DynamicCache(), ids, num_new)
        model = attach(bare, config)
        timed(model, model.new_cache(), ids, 1)
        with_beacons = timed(model, model.new_cache(), ids, num_new)
        if number:
            pairs.append((alone, with_beacons))
    return pairs


def median_factor(pairs: Sequence[tuple[Run, Run]], what: str) -> float:
    """Median over pairs of the second's seconds to the first's."""
    return statistics.median(getattr(second, what) / getattr(first, what) for first, second in pairs)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- memory ------------------------------------------------------------------------------------------------------------

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 begins the peak of resident memory anew
STATUS = Path("/proc/self/status")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PEAK_RESET.exists():
        PEAK_RESET.write_text("5")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024
