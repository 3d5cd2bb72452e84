"""From samples to batches: texts of as many chunks together, each batch with ratios of its own.

Everything is a function of the seed and the step, so that a resumed run, and one on more processes, sees the same: an
update is cut into micro-batches as if there were one process, and whole ones are dealt out.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from activation_beacon.layouts import chunks_closed
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
        is_idle: read only because other processes read, and counted nowhere.
    """

    ids: torch.Tensor
    is_target: torch.Tensor
    ratios: tuple[int, ...]
    chunk_size: int
    is_idle: bool = False

    @property
    def num_targets(self) -> int:
        """Tokens whose prediction counts; a text's first has none."""
        return int(self.is_target[:, 1:].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens read, padding included."""
        return 0 if self.is_idle else self.ids.numel()

    def idle(self) -> "Batch":
        """The first text with nothing to predict: for a process that waits for others."""
        return dataclasses.replace(self, ids=self.ids[:1], is_target=torch.zeros_like(self.is_target[:1]), is_idle=True)


def step_batches(
    stage: Stage,
    sampler: Sampler,
    step: int,
    *,
    chunk_size: int,
    ratios: Sequence[int],
    seed: int,
    rank: int = 0,
    num_processes: int = 1,
    is_even: bool = False,
) -> list[Batch]:
    """What one process reads for one update: an idle batch at least.

    Args:
        stage: batch sizes and how ratios are drawn.
        sampler: gives the sample of an index.
        step: within the stage.
        chunk_size: tokens of a chunk.
        ratios: to draw from.
        seed: of the ratios.
        rank: of this process, among `num_processes` that share the update's micro-batches.
        num_processes: see there.
        is_even: all processes get as many batches; idle ones make up for what one has less.
    """
    sample = functools.cache(sampler.sample)

    def num_chunks(index: int) -> int:
        return chunks_closed(len(sample(index).ids), chunk_size)

    def batch(part: tuple[int, ...]) -> Batch:
        drawn = draw_ratios(num_chunks(part[0]), ratios, stage.ratio_draw, seed=seed, index=part[0])
        return stack([sample(index) for index in part], drawn, chunk_size)

    first = step * stage.batch_size
    parts = micro_batches(range(first, first + stage.batch_size), num_chunks, stage.micro_batch_size)
    own = sorted(parts[rank::num_processes], key=lambda part: num_chunks(part[0]))
    batches = [batch(part) for part in own]
    wanted = -(-len(parts) // num_processes) if is_even else 1
    if len(batches) < wanted:
        spare = batches[0] if batches else batch(parts[0])
        batches += [spare.idle()] * (wanted - len(batches))
    return batches


def micro_batches(indices: Sequence[int], num_chunks: Callable[[int], int], size: int) -> list[tuple[int, ...]]:
    """Which texts of an update are read together, in the order of their first.

    Args:
        indices: of the update's texts.
        num_chunks: closed chunks of a text; not asked for where texts are read one by one.
        size: texts of a micro-batch at most, all of as many chunks.
    """
    if size == 1:
        return [(index,) for index in indices]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(num_chunks(index), []).append(index)
    return sorted(tuple(g[start : start + size]) for g in groups.values() for start in range(0, len(g), size))


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
