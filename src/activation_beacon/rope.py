"""Moving keys: a stored key goes from position p to p' by one rotation of p' - p (section 3.1: re-encoded positions).

The rotation is made from the model's own inverse frequencies and done by its own `apply_rotary_pos_emb`, which knows how
the family lays out its halves. It is computed in float32 whatever the keys' dtype: in bfloat16 the angle alone would cost
three orders of magnitude of accuracy. Attention scaling (yarn, longrope) is left out: the cached key has it already.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

# B batch · K kv heads · n entries · D head dim · F frequencies

Layout = Literal["half", "repeated", "interleaved"]


@dataclass(frozen=True)
class LayerRope:
    """How one layer rotates its keys; None in place of it for a layer without positions (NoPE)."""

    rotary: nn.Module
    frequencies: str  # name of the buffer with the inverse frequencies (F,)
    layout: Layout
    module_name: str  # the modeling module, whose apply_rotary_pos_emb is used

    def rotation(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (1, n, F or 2F) in float32 that turn a key by each of `shifts` (n,) positions."""
        inv_freq = getattr(self.rotary, self.frequencies).to(device=shifts.device, dtype=torch.float32)
        angles = shifts.float()[:, None] * inv_freq
        if self.layout == "repeated":
            angles = torch.cat((angles, angles), dim=-1)
        elif self.layout == "interleaved":
            angles = angles.repeat_interleave(2, dim=-1)
        return angles.cos()[None], angles.sin()[None]

    def move(self, keys: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Turn keys (B, K, n, D) by a rotation that `rotation` made; dims beyond its 2F stay as they are."""
        single = keys.float()
        num_turned = rotation[0].shape[-1] * (2 if self.layout == "half" else 1)
        turned, rest = single[..., :num_turned], single[..., num_turned:]
        moved = self._apply(turned, rotation)
        return (torch.cat((moved, rest), dim=-1) if rest.shape[-1] else moved).to(keys.dtype)

    def _apply(self, keys: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        apply: Callable[..., Any] = sys.modules[self.module_name].apply_rotary_pos_emb
        if takes_one(apply):
            return apply(keys, *rotation)
        return apply(keys, keys, *rotation)[1]


@functools.cache
def takes_one(apply: Callable[..., Any]) -> bool:
    """Whether a family's rotation is of one tensor (Gemma 4), not of queries and keys together."""
    return list(inspect.signature(apply).parameters)[1] == "cos"


class KeyMover:
    """Moves the keys that one pass leaves behind; each kind of layer makes its rotation once for each device.

    Args:
        ropes: of the layers.
        shifts: (n,) positions that each key is moved by.
    """

    def __init__(self, ropes: Sequence[LayerRope | None], shifts: torch.Tensor) -> None:
        self.ropes = ropes
        self.shifts = shifts
        self._rotations: dict[tuple[LayerRope, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def move(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys (B, K, n, D) of one layer at the positions that they now hold."""
        rope = self.ropes[layer]
        if rope is None:
            return keys
        kind = (rope, keys.device)
        if kind not in self._rotations:
            self._rotations[kind] = rope.rotation(self.shifts.to(keys.device))
        return rope.move(keys, self._rotations[kind])


def rotary_layout(rotary: nn.Module, frequencies: str, layer_type: str | None) -> Layout | None:
    """Find out how a rotary module spreads its F frequencies over cosines; None if no known layout explains them.

    It is asked for position 1, where no scaling scheme has begun to change its frequencies.
    """
    inv_freq = getattr(rotary, frequencies).float()
    probe = torch.zeros(1, 2, 1, dtype=torch.float32, device=inv_freq.device)
    positions = torch.tensor([[0, 1]], device=inv_freq.device)
    cos, _ = rotary(probe, positions) if layer_type is None else rotary(probe, positions, layer_type)
    measured = (cos[0, 1] / cos[0, 0]).float()  # position 0 has nothing but the attention scaling
    candidates: dict[Layout, torch.Tensor] = {
        "half": inv_freq.cos(),
        "repeated": torch.cat((inv_freq, inv_freq)).cos(),
        "interleaved": inv_freq.repeat_interleave(2).cos(),
    }
    for layout, expected in candidates.items():
        if measured.shape == expected.shape and torch.allclose(measured, expected, atol=1e-4):
            return layout
    return None
