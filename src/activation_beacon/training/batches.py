"""From samples to batches: texts of as many chunks together, each batch with ratios of its own.

Everything is a function of the seed and the step, so that a resumed run, and one on more processes, sees the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from activation_beacon.plan import chunks_closed
from activation_beacon.training.sampling import Sample, Sampler
from activation_beacon.training.settings import RatioDraw, Stage

# B texts · T tokens


@dataclass(frozen=True)
class Batch:
    """Texts that are read together.

    Attributes:
        ids: (B, T), padded with zeros on the right.
        is_target: (B, T), whether the prediction of a token counts; False in padding.
        ratios: one for each closed chunk.
        chunk_size: tokens of a chunk.
    """

    ids: torch.Tensor
    is_target: torch.Tensor
    ratios: tuple[int, ...]
    chunk_size: int

    @property
    def num_targets(self) -> int:
        """Tokens whose prediction counts; a text's first has none."""
        return int(self.is_target[:, 1:].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens read, padding included."""
        return self.ids.numel()

    def empty(self) -> "Batch":
        """The same texts with nothing to predict: for a process that waits for others."""
        return Batch(self.ids, torch.zeros_like(self.is_target), self.ratios, self.chunk_size)


def step_batches(
    stage: Stage,
    sampler: Sampler,
    step: int,
    *,
    chunk_size: int,
    ratios: Sequence[int],
    seed: int,
    local_tokens: int = 0,
    rank: int = 0,
    num_processes: int = 1,
) -> list[Batch]:
    """What one process reads for one update.

    Args:
        stage: batch sizes and how ratios are drawn.
        sampler: gives the sample of an index.
        step: within the stage.
        chunk_size: tokens of a chunk.
        ratios: to draw from.
        seed: of the ratios.
        local_tokens: of the adapter.
        rank: of this process, among `num_processes` that share the update's texts.
        num_processes: see there.
    """
    first = step * stage.batch_size
    groups: dict[int, list[tuple[int, Sample]]] = {}
    for index in range(first + rank, first + stage.batch_size, num_processes):
        sample = sampler.sample(index)
        groups.setdefault(chunks_closed(len(sample.ids), chunk_size, local_tokens), []).append((index, sample))
    batches = []
    for num_chunks, members in sorted(groups.items()):
        for start in range(0, len(members), stage.micro_batch_size):
            part = members[start : start + stage.micro_batch_size]
            drawn = draw_ratios(num_chunks, ratios, stage.ratio_draw, seed=seed, index=part[0][0])
            batches.append(stack([sample for _, sample in part], drawn, chunk_size))
    return batches


def draw_ratios(num_chunks: int, ratios: Sequence[int], draw: RatioDraw, *, seed: int, index: int) -> tuple[int, ...]:
    """A ratio for each chunk (section 3.2), or one for all."""
    generator = random.Random(f"ratios {seed} {index}")
    if draw == "text":
        return (generator.choice(ratios),) * num_chunks
    return tuple(generator.choice(ratios) for _ in range(num_chunks))


def stack(samples: Sequence[Sample], ratios: Sequence[int], chunk_size: int) -> Batch:
    """Samples as one batch, padded on the right."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros((len(samples), width), dtype=torch.long)
    is_target = torch.zeros((len(samples), width), dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        is_target[row, : len(sample.ids)] = sample.is_target
    return Batch(ids, is_target, tuple(ratios), chunk_size)
