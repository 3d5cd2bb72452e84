"""Which objective teaches most per text: how far the gradients of different texts agree.

A gradient is what all texts have in common plus noise of its own text. With s the part in common, the mean cosine between
the gradients of two texts is s² / (s² + noise²): an objective with four times the cosine needs about a quarter of the
texts for a direction of the same quality, while the noise is the larger part.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from activation_beacon.at_once import chunks_at_once
from activation_beacon.layouts import chunks_closed
from activation_beacon.training.batches import draw_ratios
from activation_beacon.training.frozen import without_dropout
from activation_beacon.training.objective import Objective, losses

OBJECTIVES = {
    "cross-entropy": Objective(),
    "distillation": Objective(0.0, 1.0),
    "both": Objective(1.0, 1.0),
    "context weight": Objective(1.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Agreement:
    """One objective, measured on some texts.

    Attributes:
        objective: its name.
        cosine: mean between the gradients of two texts.
        seconds_per_text: forward and backward pass.
        num_texts: how many.
    """

    objective: str
    cosine: float
    seconds_per_text: float
    num_texts: int


def measure(
    model: Any,
    texts: Sequence[torch.Tensor],
    *,
    chunk_size: int,
    objectives: Mapping[str, Objective] = OBJECTIVES,
    seed: int = 0,
) -> Iterator[Agreement]:
    """Measure objectives in turn on the same texts, with the same ratios.

    Args:
        model: with beacons attached.
        texts: at least two, ids (1, T) each, T more than a chunk.
        chunk_size: chunks to read them in.
        objectives: by name.
        seed: of the ratios.
    """
    with without_dropout(model), chunks_at_once(model):
        for name, objective in objectives.items():
            yield _measured(model, texts, name, objective, chunk_size, seed)


def _measured(
    model: Any, texts: Sequence[torch.Tensor], name: str, objective: Objective, chunk_size: int, seed: int
) -> Agreement:
    directions: torch.Tensor | float = 0.0
    start = time.perf_counter()
    for index, ids in enumerate(texts):
        num_closed = chunks_closed(ids.shape[1], chunk_size)
        ratios = draw_ratios(num_closed, model.beacon_config.ratios, "chunk", seed=seed, index=index)
        directions = directions + _direction(model, ids, ratios, objective, chunk_size)
    assert isinstance(directions, torch.Tensor), "there are texts"
    count = len(texts)
    # The sum of all pairs' cosines, each text's with itself taken off.
    cosine = (float(directions.dot(directions)) - count) / (count * (count - 1))
    seconds = (time.perf_counter() - start) / count  # a GPU is done when the number above is there
    return Agreement(name, cosine, seconds, count)


def _direction(
    model: Any, ids: torch.Tensor, ratios: tuple[int, ...], objective: Objective, chunk_size: int
) -> torch.Tensor:
    """The gradient of one text over all beacon weights, of length 1."""
    is_target = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= chunk_size
    result = losses(model, ids, is_target, ratios, objective=objective, chunk_size=chunk_size)
    parameters = [parameter for _, parameter in model.beacon_parameters()]
    gradients = torch.autograd.grad(result.total / result.num_targets, parameters)
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    return flat / flat.norm()
