"""Beacon projections: a side branch on a projection of the base model, for the beacon rows of a pass only.

The branch hangs on the base's own linear layer as a child module (`q_proj.beacon`) and a forward hook, so that the base's
state-dict keys stay as they are. Which slots are beacons comes in as the keyword argument `beacon_slots`, which the base
hands down to its attention modules; a hook there takes it off and leaves it where the projections of the same thread find
it. Nothing outlives a call, and recomputation under gradient checkpointing passes the same arguments again.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from activation_beacon import matmul

# B batch · T slots in this pass · n beacons in this pass · M input features · N output features


class PassState(threading.local):
    """What the layers of one model must know about the pass in progress, for each thread its own.

    `beacon_slots` (n,) are the slots of the pass that hold beacons, or None, and `anchor_slots` (n,) or (B, n) those of the
    tokens that they begin as; `chunks` says how a pass over several chunks at once is cut into them (`at_once.Chunks`),
    None in ordinary passes; `runs` are the numbers of tokens, and of beacons behind them, of each chunk of the pass, for layers
    that carry a state, `hidden` what such a layer is given, and `before` what it carries; `is_by_onednn` says that products may
    go through it (`matmul`), and `pace` how that goes; `is_disabled` turns the beacons off.
    """

    def __init__(self) -> None:
        self.beacon_slots: torch.Tensor | None = None
        self.anchor_slots: torch.Tensor | None = None
        self.chunks: Any = None
        self.runs: tuple[tuple[int, int], ...] | None = None
        self.hidden: torch.Tensor | None = None
        self.before: Any = None
        self.is_by_onednn = False
        self.pace = matmul.Pace()
        self.is_disabled = False

    def __reduce__(self) -> tuple[type["PassState"], tuple[()]]:
        return (PassState, ())  # a copied or pickled model starts with a state of its own


@contextlib.contextmanager
def products_of(state: PassState, choice: str, num_rows: int) -> Iterator[None]:
    """A pass of so many rows, whose products go through oneDNN.

    Args:
        state: of the model that makes the pass.
        choice: "onednn", or "auto", which leaves few rows to torch while other work holds threads up.
        num_rows: that linear layers project.
    """
    is_watched = choice == "auto" and num_rows <= matmul.FEW_ROWS
    is_by_onednn = not (is_watched and state.pace.begin_step())
    before, state.is_by_onednn = state.is_by_onednn, is_by_onednn
    try:
        yield
    finally:
        state.is_by_onednn = before
    if is_watched and is_by_onednn:
        state.pace.end_step(num_rows)


class OneDnnLinear(nn.Linear):
    """What a linear layer of the base becomes while beacons are attached: the base's own, to the bit, unless a pass says otherwise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project (..., M) to (..., N)."""
        state: PassState | None = getattr(self, "beacon_state", None)  # None: the method was kept from before a detach
        if state is not None and state.is_by_onednn and matmul.can_be_served(input, self.weight):
            return state.pace.linear(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)


class BeaconProjection(nn.Module):
    """The beacons' own copy of one projection: `y = x W^T + b` (section 3.1: W_Q, W_K, W_V of the beacon).

    Anchored, x is the state of a token, the last of its unit or one to be exact about, and of the beacon's own as much as a gate
    lets through: `y = (a + g x) W^T + b`, with g zero at the start. Before training such a beacon is what that token's own key and
    value are, which serves a reader well; training adds what it can see besides.

    Args:
        weight: (N, M), copied.
        bias: (N,) or None, copied.
        state: shared by all projections of a model.
        is_anchored: whether to start from the tokens' states.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, state: PassState, *, is_anchored: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.gate = nn.Parameter(self.weight.new_zeros(weight.shape[1])) if is_anchored else None
        self.state = state

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project what beacons read of the slots (B, T, M) of a pass to (B, n, N)."""
        state = self.state
        assert state.beacon_slots is not None, "called in passes with beacons"
        rows = hidden.index_select(1, state.beacon_slots)
        if self.gate is not None:
            assert state.anchor_slots is not None, "whoever says where beacons are says what they stand for"
            rows = _selected(hidden, state.anchor_slots) + self.gate.to(hidden.dtype) * rows
        weight, bias = self.weight.to(rows.dtype), None if self.bias is None else self.bias.to(rows.dtype)
        if state.is_by_onednn and matmul.can_be_served(rows, weight):
            return matmul.linear(rows, weight, bias)
        return nn.functional.linear(rows, weight, bias)


def _selected(hidden: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows (B, n, M) of hidden states (B, T, M) at slots that all texts share (n,), or at each text's own (B, n)."""
    if slots.dim() == 1:
        return hidden.index_select(1, slots)
    first = torch.arange(0, hidden.shape[0] * hidden.shape[1], hidden.shape[1], device=slots.device)
    return hidden.flatten(0, 1).index_select(0, (slots + first[:, None]).flatten()).unflatten(0, slots.shape)


def replace_beacon_rows(linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook of a base projection: the beacon rows of `output` (B, T, N) become those of `linear.beacon`."""
    beacon: BeaconProjection = linear.beacon  # type: ignore[assignment]
    slots = beacon.state.beacon_slots
    if slots is None:
        return None
    return output.index_copy(1, slots, beacon(args[0]).to(output.dtype))


def take_beacon_slots(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of an attention module or a layer: takes what is ours off its arguments, for those below it to find."""
    state: PassState = module.beacon_state  # type: ignore[assignment]
    state.beacon_slots = kwargs.pop("beacon_slots", None)
    state.anchor_slots = kwargs.pop("beacon_anchor_slots", None)
    state.chunks = kwargs.pop("beacon_chunks", None)
    state.runs = kwargs.pop("beacon_runs", None)
    state.hidden = state.before = None
    return args, kwargs


def forget_beacon_slots(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention module or a layer, called also after an error: leaves nothing behind."""
    state: PassState = module.beacon_state  # type: ignore[assignment]
    state.beacon_slots = state.anchor_slots = state.chunks = state.runs = state.hidden = state.before = None
