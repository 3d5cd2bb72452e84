"""Integers of plans as tensors, each made once: copying them to a GPU waits for all work that it was given before."""

import functools

import torch


@functools.lru_cache(maxsize=256)
def constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor (n,) of these values, which nobody may write to.

    Args:
        values: n integers.
        device: where.
        dtype: of the tensor.
    """
    with torch.inference_mode(False):  # it outlives the block that asked first
        return torch.tensor(values, dtype=dtype, device=device)
