"""Quantised bases: which they are, and by what their linear layers multiply.

No packing is known here by name. What a linear layer does to unit vectors is its weight, however it keeps it; so beacons that begin
as copies do to a token what the base itself does to it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from activation_beacon.entries import FLOATS
from activation_beacon.errors import UnsupportedModelError, reason
from activation_beacon.projection import OneDnnLinear

# M input features · N output features

UNITS = 1024  # unit vectors that a layer is given at once
PLAIN = (nn.Linear.forward, OneDnnLinear.forward)  # what multiplies by the weight, and does nothing else


def is_linear(module: object) -> bool:
    """A linear layer by its features, not by its class: quantised ones have classes of their own."""
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether the numbers of a tensor do not stand for themselves: integers, floats of 8 bits, or several tensors in one."""
    return tensor.dtype not in FLOATS or _is_of_parts(tensor)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are packed, all or some, by transformers or by anyone else."""
    return bool(getattr(model, "is_quantized", False)) or any(is_packed(each) for each in model.parameters())


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or its codes, scales and the like."""
    if not _is_of_parts(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from parts(getattr(tensor, name))


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers: some quantised layers keep all that they have in buffers."""
    yield from module.parameters()
    yield from module.buffers()


def packed_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What linear layers keep beside their parameters, with its names: nothing in ordinary models, weights in some quantised ones."""
    for name, module in model.named_modules():
        if is_linear(module):
            for own_name, buffer in module.named_buffers(recurse=False):
                yield f"{name}.{own_name}", buffer


def dense_weight(linear: nn.Module, dtype: torch.dtype, name: str | None = None) -> torch.Tensor:
    """The weight (N, M) of a linear layer in floats: its own, or where it is packed, or not all that the layer does, a new one.

    Args:
        linear: a layer of the base.
        dtype: of what it is given to multiply, where its own is not taken.
        name: what an error calls it; its class where there is none.

    Raises:
        UnsupportedModelError: if it is packed and cannot be tried here, or is no linear layer after all.
    """
    weight = getattr(linear, "weight", None)
    shape = (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
    has_own = isinstance(weight, torch.Tensor) and not is_packed(weight) and tuple(weight.shape) == shape
    if has_own and type(linear).forward in PLAIN:
        return weight  # type: ignore[return-value]
    kind = type(linear).__name__ if name is None else f"{name} ({type(linear).__name__})"
    try:
        found = _multiplier(linear, dtype, may_subtract=has_own)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # kernels that are missing say so in many ways
        raise _unknown(kind, f"multiplying by it failed ({reason(failure)})") from failure
    if found is None or tuple(found.shape) != shape or not found.isfinite().all():
        raise _unknown(kind, "what it gives for unit vectors is not a weight")
    return found


@torch.no_grad()
def _multiplier(linear: nn.Module, dtype: torch.dtype, *, may_subtract: bool) -> torch.Tensor | None:
    """By what a layer multiplies: what it makes of unit vectors, side by side; None where it also makes something of nothing.

    Args:
        linear: the layer.
        dtype: of the vectors.
        may_subtract: whether a bias that it keeps out of sight may be subtracted: where its weight is in floats.
    """
    features = int(linear.in_features)  # type: ignore[arg-type]
    device = next((tensor.device for tensor in tensors_of(linear)), None)
    # A quantised layer stays in its mode: bitsandbytes packs weights anew in evaluation, for good.
    with _without_bias(linear), _in_eval_mode(linear) if may_subtract else contextlib.nullcontext():
        nothing = linear(torch.zeros(1, 1, features, dtype=dtype, device=device))
        if nothing.any() and not may_subtract:
            return None
        columns = []
        for first in range(0, features, UNITS):
            units = torch.zeros(1, min(UNITS, features - first), features, dtype=dtype, device=device)
            units[0].diagonal(first).fill_(1)
            columns.append((linear(units)[0] - nothing[0]).to(dtype))
    return torch.cat(columns).T.contiguous()


@contextlib.contextmanager
def _in_eval_mode(linear: nn.Module) -> Iterator[None]:
    """What is dropped in training belongs to the weight."""
    training = [module for module in linear.modules() if module.training]
    linear.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _without_bias(linear: nn.Module) -> Iterator[None]:
    """A large bias would take small weights their last digits."""
    places: tuple[dict[str, Any], ...] = (linear._parameters, linear._buffers, vars(linear))
    for own in places:
        if own.get("bias") is not None:
            bias, own["bias"] = own["bias"], None
            try:
                yield
            finally:
                own["bias"] = bias
            return
    yield


def _is_of_parts(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor)


def _unknown(kind: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{kind} does not keep its weight in floats, and {what}. "
        "Attach to the model in bf16, fp16 or fp32, or quantised where that form runs."
    )
