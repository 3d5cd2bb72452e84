"""How fast training is: tokens per second, share of the hardware's speed, and memory, against the length of texts."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from activation_beacon.at_once import chunks_at_once
from activation_beacon.layouts import chunks_closed
from activation_beacon.matmul import training_products
from activation_beacon.training.batches import draw_ratios
from activation_beacon.training.metrics import peak_memory
from activation_beacon.training.objective import Objective, losses

WAYS = ("loop", "at once", "checkpointed")
PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}  # of square matrices whose product says what the hardware does at best


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        way: "loop" reads chunk by chunk with all logits, as `model(ids, labels=ids)` does; "at once" all chunks in one
            pass with the loss in slices; "checkpointed" the same with gradient checkpointing.
        length: tokens of a text.
        tokens_per_second: of forward and backward pass, median.
        seconds: of each repeat.
        share_of_peak: of the speed of a large matrix product on the same hardware, counting 4 operations for each frozen
            weight and token (forward, and backward to the inputs).
        memory_bytes: held at most; on a CPU by the process so far.
    """

    way: str
    length: int
    tokens_per_second: float
    seconds: tuple[float, ...]
    share_of_peak: float
    memory_bytes: int


def measure(
    model: Any, lengths: Sequence[int], *, batch_size: int = 1, repeats: int = 3, ways: Sequence[str] = WAYS
) -> Iterator[Speed]:
    """Measure steps on random tokens, the ways in turn for each length. The model is in train mode meanwhile, without local tokens.

    Args:
        model: with beacons attached.
        lengths: of the texts, each more than a chunk.
        batch_size: texts of a step.
        repeats: of each measurement, after one that does not count.
        ways: out of `WAYS`.
    """
    weight = model.get_input_embeddings().weight
    device = weight.device
    fast = functools.partial(training_products, model.cpu_matmul, device=device, dtype=weight.dtype)
    was_training, local_tokens = model.training, model.local_tokens
    model.train()
    model.local_tokens = 0  # training does not depend on them
    try:
        with fast():
            peak = product_speed(device, model.dtype)
        for length in lengths:
            ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (batch_size, length), device=device)
            num_closed = chunks_closed(length, model.beacon_config.chunk_size)
            ratios = draw_ratios(num_closed, model.beacon_config.ratios, "chunk", seed=0, index=length)
            for way in ways:
                _reset_peak(device)
                with fast():
                    seconds = tuple(_timed(functools.partial(_step, way, model, ids, ratios), device, repeats))
                speed = ids.numel() / statistics.median(seconds)
                share = 4 * _num_weights(model) * speed / peak
                yield Speed(way, length, speed, seconds, share, peak_memory(device))
    finally:
        model.train(was_training)
        model.local_tokens = local_tokens


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product."""
    size = PRODUCT_SIZES.get(device.type, max(PRODUCT_SIZES.values()))
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_timed(lambda: a @ b, device, 5))
    return 2 * size**3 / seconds


def _step(way: str, model: Any, ids: torch.Tensor, ratios: tuple[int, ...]) -> None:
    if way == "loop":
        output = model(ids, labels=ids, beacon_ratio=ratios, logits_to_keep=1)
        output.nll[:, model.beacon_config.chunk_size - 1 :].mean().backward()
    else:
        _step_at_once(model, ids, ratios, is_checkpointed=way == "checkpointed")
    for _, parameter in model.beacon_parameters():
        parameter.grad = None


def _step_at_once(model: Any, ids: torch.Tensor, ratios: tuple[int, ...], *, is_checkpointed: bool) -> None:
    is_target = torch.arange(ids.shape[1]).expand(ids.shape) >= model.beacon_config.chunk_size
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with chunks_at_once(model):
            result = losses(model, ids, is_target, ratios, objective=Objective())
            (result.total / result.num_targets).backward()
    finally:
        if is_checkpointed:
            model.gradient_checkpointing_disable()


def _timed(work: Callable[[], object], device: torch.device, repeats: int) -> Iterator[float]:
    for number in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if number:
            yield time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _num_weights(model: Any) -> int:
    """Weights that every token meets: all but the token embedding, and the head wherever it comes from."""
    own = {id(parameter): parameter.numel() for parameter in model.get_decoder().parameters()}
    beacons = {id(parameter) for _, parameter in model.beacon_parameters()}
    embedding = id(model.get_input_embeddings().weight)
    body = sum(count for key, count in own.items() if key not in beacons and key != embedding)
    return body + model.get_output_embeddings().weight.numel()
