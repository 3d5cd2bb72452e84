"""Rows of a batch, cut and joined along their slots."""

from collections.abc import Sequence

import torch

from activation_beacon.constants import constant


def take(tensor: torch.Tensor, rows: Sequence[int], ends: Sequence[int], length: int, *, dim: int) -> torch.Tensor:
    """Cut from each of `rows` the `length` slots before its own of `ends`; what lies before slot 0 is padding.

    Args:
        tensor: batch first, slots along `dim`.

    Returns:
        One row for each of `rows`, `length` slots along `dim`; a view where all rows are cut alike.
    """
    if len(set(ends)) == 1 and ends[0] >= length:
        return _rows_of(tensor, rows).narrow(dim, ends[0] - length, length)
    if tensor.shape[dim] == 0:  # nothing but padding to take
        empty = list(tensor.shape)
        empty[0], empty[dim] = len(rows), length
        return tensor.new_zeros(empty)
    index = constant(tuple(ends), tensor.device)[:, None] + torch.arange(-length, 0, device=tensor.device)
    index = index.clamp(min=0)
    chosen = _rows_of(tensor, rows)
    if dim == 1:
        return chosen.gather(1, index)
    return chosen.gather(2, index[:, None, :, None].expand(len(rows), tensor.shape[1], length, tensor.shape[3]))


def _rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows of a batch, a copy unless they are all in their order; the indices are on the device already."""
    rows = tuple(rows)
    return tensor if rows == tuple(range(tensor.shape[0])) else tensor.index_select(0, constant(rows, tensor.device))


def merge(parts: Sequence[tuple[Sequence[int], torch.Tensor]], *, dim: int) -> torch.Tensor:
    """Put rows that were handled apart into one batch again, right-aligned along `dim`.

    Args:
        parts: for each part, the rows that it holds and their tensor.
    """
    if len(parts) == 1:
        return parts[0][1]
    length = max(tensor.shape[dim] for _, tensor in parts)
    padded = []
    for _, tensor in parts:
        pad = [0, 0] * (tensor.dim() - 1 - dim) + [length - tensor.shape[dim], 0]
        padded.append(torch.nn.functional.pad(tensor, pad))
    order = [row for rows, _ in parts for row in rows]
    return _rows_of(torch.cat(padded), [order.index(row) for row in range(len(order))])
