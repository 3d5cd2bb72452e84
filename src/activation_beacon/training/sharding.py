"""One model that several processes train: the wrapper that averages gradients, and weights that are spread over them."""

from typing import Any

import torch
from torch import nn

from activation_beacon.processes import Processes
from activation_beacon.training.settings import Wrapper


def wrap(module: nn.Module, kind: Wrapper, group: Processes, layers: list[nn.Module]) -> nn.Module:
    """A module whose gradients are averaged over the processes.

    Args:
        module: whose forward makes the loss.
        kind: "ddp" keeps the whole model in each process; "fsdp" shards the decoder's layers over them.
        group: the processes.
        layers: of the decoder.
    """
    if group.count == 1:
        return module
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(module.parameters()).device.type, (group.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def whole(tensor: Any) -> torch.Tensor:
    """A tensor that is in one piece, gathered from its shards where it is not. All processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def regather(module: nn.Module) -> None:
    """Let go of whole weights that fsdp has gathered: their shards have been changed, and the next pass gathers them anew."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@torch.no_grad()
def fill(parameter: Any, tensor: torch.Tensor) -> None:
    """Copy a tensor in one piece into a parameter, of which this process may hold a shard."""
    parameter.copy_(like(parameter, tensor))


def like(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece, on the parameter's device and sharded as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
