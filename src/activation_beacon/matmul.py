"""Matrix products of float32 on a CPU, through oneDNN where that is faster than what torch does otherwise, and as precise.

torch's builds for x86 leave these products to MKL, which holds back on processors that are not Intel's: on an AMD EPYC with
AVX-512 it is half as fast as oneDNN, which the same builds contain. Two ways lead there. A linear layer can call it by name
(`OneDnnLinear`): always precise, each thread for itself, without gradients. All else, attention and gradients among it, follows
a setting of the process that lets torch round to bfloat16; on processors that cannot multiply such matrices (those without
AMX) nothing is rounded. That is tried before it is relied on.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from activation_beacon.projection import PassState

CHOICES = ("auto", "onednn", "torch")
FEW_ROWS = 16  # up to which reading the weights takes longest
MANY_ROWS = 256  # from which attention gains by the setting; with fewer it loses
WORTH_IT = 1.15  # times as fast, for "auto" to choose it
EXACT = 1e-5  # relative error of a product, above which it has been rounded

_TORCHS_OWN: Any = getattr(torch.backends.mkldnn, "matmul", None)  # of the process; from torch 2.9 on

_Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class OneDnnLinear(nn.Linear):
    """What a linear layer of the base becomes while beacons are attached: still the base's, in all other passes to the bit."""

    beacon_state: PassState

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project (..., M) to (..., N)."""
        if self.beacon_state.is_by_onednn and _can_be_served(self, input):
            return _by_onednn(input, self.weight, self.bias)
        return super().forward(input)


def _by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _can_be_served(linear: nn.Linear, rows: torch.Tensor) -> bool:
    return (
        rows.device.type == linear.weight.device.type == "cpu"
        and rows.dtype is linear.weight.dtype is torch.float32
        and rows.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


@contextlib.contextmanager
def fast_products(
    state: PassState, choice: str, *, device: torch.device, dtype: torch.dtype, num_rows: int, num_queries: int
) -> Iterator[None]:
    """A pass whose products may go through oneDNN.

    Args:
        state: of the model that makes the pass.
        choice: out of `CHOICES`; "auto" is what is faster on this machine.
        device, dtype: of the model's weights.
        num_rows: that linear layers project.
        num_queries: of one call of attention.
    """
    if device.type != "cpu" or dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        yield
        return
    before, state.is_by_onednn = state.is_by_onednn, is_chosen(choice, num_rows)
    is_wide = state.is_by_onednn and num_queries >= MANY_ROWS
    try:
        with everything_by_onednn() if is_wide else contextlib.nullcontext():
            yield
    finally:
        state.is_by_onednn = before


def is_chosen(choice: str, num_rows: int) -> bool:
    """Whether products of so many rows go through oneDNN on this machine."""
    if choice == "torch" or not is_offered():
        return False
    return choice == "onednn" or _gain(num_rows <= FEW_ROWS, torch.get_num_threads()) > WORTH_IT


@functools.cache
def is_offered() -> bool:
    """Whether this build of torch has the product that is called by name."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Setting:
    """The setting of the process, on as long as somebody wants it, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._before = ""

    def turn_on(self) -> None:
        with self._lock:
            if not self._wanted:
                self._before = _TORCHS_OWN.fp32_precision
                _TORCHS_OWN.fp32_precision = "bf16"
            self._wanted += 1

    def turn_off(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                _TORCHS_OWN.fp32_precision = self._before


_SETTING = _Setting()  # torch keeps it for the whole process, so that it can be counted in one place only


def training_products(
    choice: str, *, device: torch.device, dtype: torch.dtype
) -> contextlib.AbstractContextManager[None]:
    """A block for forward and backward passes over many rows; see `fast_products`."""
    is_served = device.type == "cpu" and dtype is torch.float32 and is_chosen(choice, MANY_ROWS)
    return everything_by_onednn() if is_served else contextlib.nullcontext()


@contextlib.contextmanager
def everything_by_onednn() -> Iterator[None]:
    """All products of float32 in the block, in all threads, gradients among them; nothing happens where they would be rounded."""
    if not _is_setting_exact():
        yield
        return
    _SETTING.turn_on()
    try:
        yield
    finally:
        _SETTING.turn_off()


@functools.cache
def _is_setting_exact() -> bool:
    if not torch.backends.mkldnn.is_available() or _TORCHS_OWN is None:
        return False
    rows, weight = _sample(64, 512), _sample(512, 512)
    expected = rows.double() @ weight.double().T
    _SETTING.turn_on()
    try:
        found = nn.functional.linear(rows, weight).double()
    finally:
        _SETTING.turn_off()
    return bool((found - expected).norm() <= EXACT * expected.norm())


@functools.cache
def _gain(is_few: bool, num_threads: int) -> float:  # noqa: ARG001 - another number of threads, another answer
    """How many times as fast oneDNN is here, for products of one row or of many; what is not precise gains nothing."""
    rows = _sample(1 if is_few else 512, 1024)
    weights = _sample(8 * 2048, 1024).split(2048)[: 8 if is_few else 1]  # for one row, more than caches hold
    expected = rows.double() @ weights[0].double().T
    found = _by_onednn(rows, weights[0], None).double()
    if not (found - expected).norm() <= EXACT * expected.norm():
        return 0.0
    return _seconds(nn.functional.linear, rows, weights) / _seconds(_by_onednn, rows, weights)


@torch.no_grad()
def _seconds(product: _Product, rows: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for weight in weights:
            product(rows, weight, None)
        times.append(time.perf_counter() - start)
    return min(times)


def _sample(*shape: int) -> torch.Tensor:
    """Numbers without a pattern that draw on nobody's random numbers."""
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).sin_().view(shape)
