"""A text read and continued, timed, whatever model and cache it is; random tokens; memory held at most.

It needs torch alone: the process that runs kvpress loads this file too, so that all are timed by the same code.
"""

import ctypes
import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MOST_MAPPED, TRIMMED_FROM = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        first_token_s: seconds until the logits of the first token to be written.
        step_s: median seconds of writing one token more.
        slowest_step_s: of those, the slowest: the one that closes a chunk, if one does.
        total_s: reading and writing.
        cache_bytes: keys and values held at the end, and states.
        peak_bytes: held at most; by torch on a GPU, by the whole process on a CPU; None where it cannot be told.
        by: what ran it, if not this package.
    """

    first_token_s: float
    step_s: float
    slowest_step_s: float
    total_s: float
    cache_bytes: int
    peak_bytes: int | None
    by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def random_ids(vocabulary: int, batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """Tokens (B, T) drawn evenly; for each length the same ones."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (batch_size, length), generator=generator).to(device)


def timed(model: Any, cache: Any, ids: torch.Tensor, num_new: int) -> Run:
    """Read ids (B, T) into an empty cache in one call, then write `num_new` tokens greedily.

    Args:
        model: called as a causal language model of transformers is.
        cache: with `layers` that hold `keys` and `values`, or states.
        ids: (B, T).
        num_new: tokens to be written after the first.
    """
    _reset_peak(ids.device)
    start = now(ids.device)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    times = [now(ids.device)]
    for _ in range(num_new):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        times.append(now(ids.device))
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Run(
        first_token_s=times[0] - start,
        step_s=statistics.median(steps),
        slowest_step_s=max(steps),
        total_s=times[-1] - start,
        cache_bytes=sum(map(_layer_bytes, cache.layers)),
        peak_bytes=_peak(ids.device),
    )


def _layer_bytes(layer: Any) -> int:
    """Bytes of a layer's keys and values, or of its states."""
    if hasattr(layer, "num_bytes"):  # one of ours, which may hold two states
        return layer.num_bytes
    states = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
    tensors = [
        getattr(layer, "keys", None),
        getattr(layer, "values", None),
        *(each for kind in states for each in kind.values()),
    ]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def now(device: torch.device) -> float:
    """Seconds, when the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def keep_pages() -> None:
    """From now on have the C library keep what is freed, where it is glibc, rather than hand it back and fault it in again.

    Whether it does so depends on the order of what was allocated before, and costs more than most of what is to be compared.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    set_option(MOST_MAPPED, 0)
    set_option(TRIMMED_FROM, 2**31 - 1)


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
