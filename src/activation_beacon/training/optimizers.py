"""Optimizers of beacon weights: AdamW, or Muon for the matrices and AdamW for the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from activation_beacon.training.settings import Optimizer

BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.9
# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., Muon, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def make_optimizers(kind: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Optimizers that together hold all `parameters`, without weight decay; learning rates are set at each step."""
    if kind == "adamw":
        return [_adamw(parameters.values())]
    matrices = [parameter for parameter in parameters.values() if parameter.dim() == 2]
    others = [parameter for parameter in parameters.values() if parameter.dim() != 2]
    return [Muon(matrices), _adamw(others)]


def _adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=0.0, betas=BETAS, weight_decay=0.0)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, scaled to the root mean square of AdamW's updates.

    In the parameters' own dtype: torch's Muon works in bfloat16, which is slow where the hardware has none.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices."""
        assert closure is None, "the loss is not computed anew"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MUON_MOMENTUM)
                update = orthogonal(parameter.grad.lerp(momentum, MUON_MOMENTUM))
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values all lie near 1."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if is_tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
