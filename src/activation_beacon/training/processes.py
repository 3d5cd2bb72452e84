"""Several processes that train one model: who I am, sums over all, and the wrapper that averages gradients.

`torchrun` and `accelerate launch` both start processes and say so in the environment; without them there is one.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from activation_beacon.training.settings import Wrapper

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first process tokenises


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def device(self) -> torch.device:
        """Where this process trains: its own GPU where there is one."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum(self, *values: float, device: torch.device) -> list[float]:
        """Sums over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def any(self, value: bool, *, device: torch.device) -> bool:
        """Whether it is so in any process: they stop together or not at all."""
        return self.sum(float(value), device=device)[0] > 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            distributed.barrier()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that a launcher has started; alone where none has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local_rank)
    finally:
        distributed.destroy_process_group()


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
        from torch.distributed.fsdp import fully_shard

        for layer in layers:
            fully_shard(layer)
        fully_shard(module)
        return module
    device_ids: Any = [group.local_rank] if torch.cuda.is_available() else None
    return nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


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
