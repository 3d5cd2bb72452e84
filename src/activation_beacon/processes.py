"""Several processes that work together: who I am, sums over all, and my share of what there is to do.

`torchrun` and `accelerate launch` both start processes and say so in the environment; without them there is one.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first process tokenises, or the last one evaluates


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether this process does the piece of work of that number, of those that are dealt out one by one."""
        return number % self.count == self.rank

    def device(self) -> torch.device:
        """Where this process computes: its own GPU where there is one."""
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
    def first_before_others(self) -> Iterator[None]:
        """The first process does the block, then the others do: they find the files that it has made or mended."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()


def num_launched() -> int:
    """Processes that a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that a launcher has started; alone where none has.

    Args:
        device: where they compute, such as "cpu"; by default each on a GPU of its own, if there are any.
    """
    if num_launched() == 1:
        yield Processes()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpus = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
    if has_gpus:
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if has_gpus else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local_rank)
    finally:
        gc.collect()  # what still held on to the group: threads of gloo that outlive the interpreter abort it
        distributed.destroy_process_group()
