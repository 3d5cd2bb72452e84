"""Integers of plans as tensors, which nobody waits for.

Copying them to a GPU makes the host wait for all work that it was given before, unless they are copied once or from pinned memory.
"""

import functools
from collections.abc import Sequence

import torch


@functools.lru_cache(maxsize=256)
def constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor (n,) of these values, which nobody may write to.

    It is waited for, once: it serves every stream from then on, also one that records a graph.

    Args:
        values: n integers.
        device: where.
        dtype: of the tensor.
    """
    with torch.inference_mode(False):  # it outlives the block that asked first
        return torch.tensor(values, dtype=dtype, device=device)


def sent(values: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor (n,) of values that differ from pass to pass; nobody waits until it has reached a GPU.

    Args:
        values: n integers, or a tensor of integers on the host, whose shape it keeps.
        device: where.
    """
    made = torch.as_tensor(values, dtype=torch.long, device="cpu")
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
