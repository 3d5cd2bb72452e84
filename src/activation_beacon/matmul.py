"""Matrix products of float32 on a CPU, by oneDNN where that is faster than what torch takes by itself, and as precise.

torch's builds for x86 leave these products to MKL, which holds back on processors that are not Intel's: on an AMD EPYC with
AVX-512 it is half as fast as oneDNN, which the same builds contain. Passes without gradients call oneDNN by name. Gradients
cannot; training turns on a setting of the process instead, which lets torch round to bfloat16. On processors that cannot multiply
such matrices (those without AMX) nothing is rounded, and that is tried before it is relied on.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

CHOICES = ("auto", "onednn", "torch")
FEW_ROWS = 16  # up to which reading the weights takes longest
WORTH_IT = 1.15  # times as fast, for "auto" to choose it
EXACT = 1e-5  # relative error of a product, above which it has been rounded

_PRECISION: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch's setting for the process; from 2.9 on

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows (..., M) times a contiguous weight (N, M), plus a bias (N,), by oneDNN: (..., N)."""
    bias = None if bias is None else bias.contiguous()  # its strides are not looked at
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def can_be_served(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` can take these: plain float32 on a CPU, nothing that has a way of its own to be multiplied, no gradients."""
    return (
        rows.dtype is weight.dtype is torch.float32
        and rows.device.type == weight.device.type == "cpu"
        and type(rows) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_contiguous()
        and rows.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def is_chosen(choice: str, num_rows: int) -> bool:
    """Whether products of so many rows go through oneDNN on this machine."""
    if choice == "torch" or not is_offered():
        return False
    return choice == "onednn" or _gain(num_rows <= FEW_ROWS, torch.get_num_threads()) > WORTH_IT


@functools.cache
def is_offered() -> bool:
    """Whether this build of torch has the product that is called by name."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Pace:
    """Whether products of steps of few rows are held up, and better left to torch for a while.

    Threads share each product and wait for one another. Where another process keeps a processor busy they wait some
    milliseconds each time; torch's own product of one row waits for nobody. Only products are timed: what else a step takes,
    attention to a longer cache, says nothing of them.
    """

    HELD_UP = 4.0  # times the fastest step so far of as many rows
    PATIENCE = 3  # steps in a row
    PAUSE = 256  # steps

    def __init__(self) -> None:
        self._fastest: dict[int, float] = {}
        self._seconds = 0.0
        self._slow = self._pause = 0

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`matmul.linear`, timed."""
        start = time.perf_counter()
        product = linear(rows, weight, bias)
        self._seconds += time.perf_counter() - start
        return product

    def begin_step(self) -> bool:
        """Whether the products of the step that comes now are held up, and to be left to torch."""
        self._seconds = 0.0
        self._pause = max(0, self._pause - 1)
        return self._pause > 0

    def end_step(self, num_rows: int) -> None:
        """A step of so many rows is done; one none of whose products oneDNN could take says nothing."""
        seconds = self._seconds
        if not seconds:
            return
        fastest = self._fastest[num_rows] = min(seconds, self._fastest.get(num_rows, seconds))
        self._slow = self._slow + 1 if seconds > self.HELD_UP * fastest else 0
        if self._slow == self.PATIENCE:
            self._slow, self._pause = 0, self.PAUSE


# --- training ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training_products(choice: str, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A block for forward and backward passes over many rows; while it lasts, so does the setting, for the whole process.

    Args:
        choice: out of `CHOICES`.
        device, dtype: of the model's weights.
    """
    is_served = device.type == "cpu" and dtype is torch.float32 and is_chosen(choice, FEW_ROWS + 1)
    if not is_served or not _is_setting_exact():
        yield
        return
    with _SETTING:
        yield


class _Setting:
    """torch's setting, on as long as somebody wants it, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._wanted:
                self._before = _PRECISION.fp32_precision
                _PRECISION.fp32_precision = "bf16"
            self._wanted += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted and _PRECISION.fp32_precision == "bf16":  # else somebody has set it meanwhile
                _PRECISION.fp32_precision = self._before


_SETTING = _Setting()  # torch keeps it for the process, so that it can be counted in one place only


@functools.cache
def _is_setting_exact() -> bool:
    if not torch.backends.mkldnn.is_available() or _PRECISION is None:
        return False
    rows, weight = _sample(64, 512), _sample(512, 512)
    with _SETTING:
        found = nn.functional.linear(rows, weight)
    return _is_exact(found, rows, weight)


# --- trying ------------------------------------------------------------------------------------------------------------


@functools.cache
@torch.no_grad()
def _gain(is_few: bool, num_threads: int) -> float:  # noqa: ARG001 - another number of threads, another answer
    """How many times as fast oneDNN is here, for products of one row or of many; what is not precise gains nothing."""
    rows = _sample(1 if is_few else 512, 1024)
    weights = _sample(8 * 2048, 1024).split(2048)[: 8 if is_few else 1]  # for one row, more than caches hold
    if not _is_exact(linear(rows, weights[0]), rows, weights[0]):
        return 0.0
    products: tuple[Product, Product] = (nn.functional.linear, linear)
    seconds = [[_seconds(product, rows, weights) for product in products] for _ in range(5)]  # in turn
    by_torch, by_onednn = (min(column) for column in zip(*seconds, strict=True))
    return by_torch / by_onednn


def _seconds(product: Product, rows: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    for weight in weights:
        product(rows, weight, None)
    return time.perf_counter() - start


def _is_exact(found: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> bool:
    expected = rows.double() @ weight.double().T
    return bool((found.double() - expected).norm() <= EXACT * expected.norm())


def _sample(num_rows: int, width: int) -> torch.Tensor:
    """Numbers (num_rows, width) without a pattern, that draw on nobody's random numbers."""
    return torch.arange(num_rows * width, dtype=torch.float32, device="cpu").sin_().view(num_rows, width)
