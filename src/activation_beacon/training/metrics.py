"""What is written down of a run: one line of JSON for each update."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from activation_beacon.files import make_folder, write_text
from activation_beacon.json_lines import append_lines
from activation_beacon.processes import Processes
from activation_beacon.training.batches import Batch
from activation_beacon.training.objective import Losses


class StepTotals:
    """Sums over the batches of one update.

    Args:
        ratios: that are drawn from; the same in all processes.
    """

    def __init__(self, ratios: Sequence[int]) -> None:
        self.num_targets = 0
        self.has_divergence = False
        self.ratios = sorted(ratios)
        self.batches: list[tuple[tuple[int, ...], torch.Tensor]] = []  # ratios, sums of a batch where it was computed

    def add(self, result: Losses, batch: Batch) -> None:
        """Add a batch, without waiting for it. A chunk's tokens count for the ratio of the chunk before."""
        nll = result.nll.detach()
        self.num_targets += batch.num_targets
        self.has_divergence |= result.divergence is not None
        divergence = torch.zeros_like(result.cross_entropy) if result.divergence is None else result.divergence
        sums = [result.cross_entropy.detach(), divergence.detach()]
        for number in range(1, len(batch.ratios) + 1):
            last = nll.shape[1] if number == len(batch.ratios) else (number + 1) * batch.chunk_size - 1
            piece = nll[:, number * batch.chunk_size - 1 : last].double()
            sums += [piece.nansum(), piece.isfinite().sum()]
        self.batches.append((tuple(batch.ratios), torch.stack([each.double() for each in sums])))

    def line(self, group: Processes, device: torch.device) -> dict[str, Any]:
        """Means over all processes: loss in nats per token, by ratio too."""
        total, divergence = 0.0, 0.0
        by_ratio = {ratio: [0.0, 0.0] for ratio in self.ratios}  # sum of nats, tokens
        for ratios, sums in self.batches:
            nats, diverging, *rest = sums.tolist()
            total, divergence = total + nats, divergence + diverging
            for ratio, nats, tokens in zip(ratios, rest[::2], rest[1::2], strict=True):
                by_ratio[ratio] = [by_ratio[ratio][0] + nats, by_ratio[ratio][1] + tokens]
        nll, count, divergence, *rest = group.sum(
            total, self.num_targets, divergence, *itertools.chain(*by_ratio.values()), device=device
        )
        found = zip(self.ratios, rest[::2], rest[1::2], strict=True)
        by_name = {str(ratio): nats / tokens for ratio, nats, tokens in found if tokens}
        line: dict[str, Any] = {"loss": nll / count if count else 0.0, "loss_by_ratio": by_name}
        if self.has_divergence:
            line["divergence"] = divergence / max(count, 1)
        return line


class MetricsLog:
    """`metrics.jsonl`: lines of steps that are read anew after a resumption are dropped first.

    The line of step 0 holds what is measured before any update, and no loss.

    Args:
        path: of the file.
        step: the run goes on after this one; from 0 it is measured anew.

    Raises:
        StorageError: if it cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        make_folder(path.parent, "Choose another --output.")
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, line: dict[str, Any]) -> None:
        """Write one line at once.

        Raises:
            StorageError: if it cannot be written.
        """
        append_lines(self.path, [line], way_out="free space, then --resume")


def updates(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of updates: all but that of step 0."""
    return [line for line in metrics if line["step"]]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file; one that was cut short by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def peak_memory(device: torch.device) -> int:
    """Bytes that were held at most so far: by torch on a GPU, by the whole process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
