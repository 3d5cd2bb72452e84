"""The mean of the weights that a run passes through: better than the last ones where steps are few and noisy."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from activation_beacon.training.sharding import fill, whole


class Average:
    """An exponential moving average of trained weights: the plain mean of all steps until it has forgotten the first.

    Args:
        parameters: what is trained, by name; all processes hold them alike.
        decay: share of the average that a step leaves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self._means = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        share = max(1 - self.decay, 1 / step)
        for name, parameter in self.parameters.items():
            self._means[name].lerp_(parameter.detach(), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters are the average."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self._means)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average, each tensor in one piece. All processes must ask for it."""
        return {name: whole(mean) for name, mean in self._means.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, mean in self._means.items():
            fill(mean, tensors[name])
