"""Training a difference of low rank instead of whole projections (LoRA): fewer weights in training, the same adapter out."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from activation_beacon.projection import BeaconProjection

# N output features · M input features · R rank


class Difference(nn.Module):
    """W + B A, with W (N, M) frozen, A (R, M) random and B (N, R) zero at the start."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        noise = torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
        self.down = nn.Parameter(noise.to(weight))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that is used."""
        return weight + self.up @ self.down


class LowRank:
    """Puts differences on all beacon projections of a model.

    Args:
        model: with beacons attached.
        rank: of the differences.
        seed: of A.
    """

    def __init__(self, model: Any, rank: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = {parameter: name for name, parameter in model.beacon_parameters()}
        self.projections: dict[str, BeaconProjection] = {}
        self.others: dict[str, nn.Parameter] = dict(model.beacon_parameters())
        for module in [module for module in model.modules() if isinstance(module, BeaconProjection)]:
            name = names[module.weight]
            del self.others[name]
            self.projections[name] = module
            difference = Difference(module.weight.detach(), rank, generator)
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", difference)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        yield from self.others.items()
        for name, module in self.projections.items():
            difference: Any = module.parametrizations["weight"][0]  # type: ignore[index]
            yield f"{name}.down", difference.down
            yield f"{name}.up", difference.up

    @torch.no_grad()
    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The weights as they are used, by their names in an adapter's file."""
        return {**self.others, **{name: module.weight for name, module in self.projections.items()}}
