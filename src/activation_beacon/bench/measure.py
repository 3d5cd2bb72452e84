"""What is timed, in which order: full attention, beacons and kvpress on one text, in turn; chunks; idle beacons.

All ways do the same work with the same code (`timing.timed`): one call of the model reads the text and returns the last
token's logits, then tokens are written greedily, one by one. Full attention is the base model itself, beacons disabled; it can
be run "tuned" as well, with all that beacons have and that is not beacons, to tell what is whose gain.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache

from activation_beacon import attach, detach
from activation_beacon.bench.timing import Run, keep_pages, now, random_ids, timed
from activation_beacon.causal import without_cudnn
from activation_beacon.grouped import rows_together
from activation_beacon.matmul import training_products

WARM_UP_TOKENS = 4
TIMES_EACH = 3


class Cell(NamedTuple):
    """What one run is of.

    Attributes:
        length: tokens of a text.
        batch_size: texts read side by side.
        ratio: tokens per beacon; None for full attention.
        repeat: counts from 0.
        press: the method of kvpress that is to hold as many entries as beacons do at this ratio; None for beacons.
        is_tuned: of full attention: its cache is appended to in place and its kernels are chosen as those of beacons are.
    """

    length: int
    batch_size: int
    ratio: int | None
    repeat: int
    press: str | None = None
    is_tuned: bool = False


def cells(
    lengths: Sequence[int],
    batch_sizes: Sequence[int],
    ratios: Sequence[int],
    repeat: int,
    presses: Sequence[str] = (),
    *,
    with_tuned: bool = False,
) -> Iterator[Cell]:
    """One repeat of everything, back to back: for each text full attention, then beacons and presses at each ratio."""
    for length in lengths:
        for batch_size in batch_sizes:
            yield Cell(length, batch_size, None, repeat)
            if with_tuned:
                yield Cell(length, batch_size, None, repeat, is_tuned=True)
            for ratio in ratios:
                for press in (None, *presses):
                    yield Cell(length, batch_size, ratio, repeat, press)


@torch.no_grad()
def run(model: Any, cell: Cell, num_new: int) -> Run:
    """Read and continue a batch of random tokens.

    Args:
        model: with beacons attached.
        cell: of what, without a press; its repeat does not matter.
        num_new: tokens to be written after the first.

    Raises:
        CapacityError: if the text does not fit the base's positions at this ratio.
    """
    device = model.get_input_embeddings().weight.device
    ids = random_ids(model.get_input_embeddings().weight.shape[0], cell.batch_size, cell.length, device)
    if cell.ratio is None:
        with model.beacon_disabled():
            if not cell.is_tuned:
                return timed(model, _base_cache(model.config), ids, num_new)
            return timed(_tuned(model), _tuned_cache(model), ids, num_new)
    return timed(model, model.new_cache(cell.batch_size, ratio=cell.ratio), ids, num_new)


def _base_cache(config: Any) -> DynamicCache:
    """An empty cache of transformers, which has to know of layers that carry states, or have a sliding window."""
    return DynamicCache(config=config)


def _tuned_cache(model: Any) -> Cache:
    """The same with room behind entries, as in caches of beacons, but for layers whose window keeps them short."""
    ours, base = model.new_cache().layers, _base_cache(model.config).layers
    return Cache(layers=[base[index] if own.window else own for index, own in enumerate(ours)])


def _tuned(model: Any) -> Callable[..., Any]:
    """The base with kernels as beacons have them: on a GPU none of cuDNN's for attention in writing.

    On a CPU, where oneDNN is faster, products through it: all of them in reading, attention's too; of linear layers in writing.
    """
    weight = model.get_input_embeddings().weight
    everything = functools.partial(training_products, model.cpu_matmul, device=weight.device, dtype=weight.dtype)

    def call(ids: torch.Tensor, **options: Any) -> Any:
        with model.fast_products(ids.numel()), everything() if ids.shape[1] > 1 else without_cudnn(ids.device):
            return model(ids, **options)

    return call


def warm_up(model: Any, ratios: Sequence[int]) -> None:
    """Runs that do not count, of each way, on texts of two chunks and a token."""
    for cell in cells([warm_up_length(model)], [1], ratios, 0, with_tuned=True):
        run(model, cell, WARM_UP_TOKENS)


def warm_up_length(model: Any) -> int:
    """Tokens of a text that does not count: those that close two chunks."""
    return 2 * model.beacon_config.chunk_size + model.local_tokens + 1


def chunk_seconds(model: Any, num_chunks: int, ratio: int) -> list[float]:
    """Seconds that each of so many chunks takes to be closed in a pass of its own, in order.

    Without local tokens, so that each call reads one chunk whole, as one call for the text does.
    """
    device, size = model.get_input_embeddings().weight.device, model.beacon_config.chunk_size
    pieces = [size + 1, *[size] * (num_chunks - 1)]  # each closes one
    cache, seconds, began = model.new_cache(ratio=ratio, local_tokens=0), [], 0.0

    def note(*_: int) -> None:
        seconds.append(now(device) - began)

    for piece in _chunks(model, num_chunks).split(pieces, dim=1):
        began = now(device)
        model.compress(piece, cache=cache, progress=note)
    return seconds


def seconds_in_one_call(model: Any, num_chunks: int, ratio: int) -> float | None:
    """Seconds to close as many chunks in one call, several in one pass; None where each would have its own."""
    device, chunk = model.get_input_embeddings().weight.device, model.beacon_config.chunk_size
    if 2 * (chunk + chunk // ratio) > rows_together(device):
        return None
    cache, times = model.new_cache(ratio=ratio, local_tokens=0), [now(device)]
    model.compress(_chunks(model, num_chunks), cache=cache, progress=lambda *_: times.append(now(device)))
    return times[-1] - times[0]


def _chunks(model: Any, num_chunks: int) -> torch.Tensor:
    """Random tokens (1, T) that close so many chunks, where there are no local tokens."""
    weight = model.get_input_embeddings().weight
    return random_ids(weight.shape[0], 1, num_chunks * model.beacon_config.chunk_size + 1, weight.device)


@torch.no_grad()
def idle_pairs(model: Any, length: int, num_new: int, repeats: int) -> list[tuple[Run, Run]]:
    """Runs on a short text in pairs: on the bare base model, and with beacons attached. The beacons are new ones after it.

    Attaching and detaching move much memory: it is kept from then on, and a run that does not count comes after each. What
    else the machine does comes and goes: each way is first in turn, and runs `TIMES_EACH` times.
    """
    keep_pages()
    config = model.beacon_config
    pairs: list[tuple[Run, Run]] = []
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (1, length), device=device)

    def runs_of(model: Any, make_cache: Callable[[], Any]) -> list[Run]:
        timed(model, make_cache(), ids, 1)
        return [timed(model, make_cache(), ids, num_new) for _ in range(TIMES_EACH)]

    for number in range(repeats + 1):
        with_beacons = runs_of(model, model.new_cache) if number % 2 else []
        bare = detach(model)
        alone = runs_of(bare, functools.partial(_base_cache, bare.config))
        model = attach(bare, config)
        if number:  # the first repeat does not count
            pairs += zip(alone, with_beacons or runs_of(model, model.new_cache), strict=True)
    return pairs


def median_factor(pairs: Sequence[tuple[Run, Run]], what: str) -> float:
    """Median over pairs of the second's seconds to the first's."""
    return statistics.median(getattr(second, what) / getattr(first, what) for first, second in pairs)
