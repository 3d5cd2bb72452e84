"""Moving entries: a stored key goes from position p to p' by one rotation of p' - p (section 3.1: re-encoded positions).

The rotation is made from the model's own inverse frequencies and done by its own `apply_rotary_pos_emb`, which knows how
the family lays out its halves. It is computed in float32 whatever the keys' dtype: in bfloat16 the angle alone would cost
three orders of magnitude of accuracy. Attention scaling (yarn, longrope) is left out: the cached key has it already.

Multi-head latent attention (DeepSeek-V2) caches a latent, of which each head makes its keys and values and which has no position,
and in the place of values one short key that all heads share. That is what is rotated there.
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

    def move_entries(
        self, keys: torch.Tensor, values: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn what a cache holds of a layer, (B, K, n, D) each."""
        return self.move(keys, rotation), values

    def _apply(self, keys: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        apply: Callable[..., Any] = sys.modules[self.module_name].apply_rotary_pos_emb
        if takes_one(apply):
            return apply(keys, *rotation)
        return apply(keys, keys, *rotation)[1]


@dataclass(frozen=True)
class LatentRope:
    """How a layer with latent attention rotates the key that its heads share, the last 2F dims of each head's own."""

    rotary: nn.Module
    frequencies: str  # name of the buffer with the inverse frequencies (F,)
    in_pairs: bool  # whether dims are turned with their neighbours; else with those half of them further on

    def rotation(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (1, n, F) in float32 that turn a key by each of `shifts` (n,) positions."""
        inv_freq = getattr(self.rotary, self.frequencies).to(device=shifts.device, dtype=torch.float32)
        angles = shifts.float()[:, None] * inv_freq
        return angles.cos()[None], angles.sin()[None]

    def move(self, keys: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Turn the last 2F dims of keys (B, K, n, D) by a rotation that `rotation` made."""
        cos, sin = (each[:, None] for each in rotation)
        rest, turned = keys.split([keys.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
        single = turned.float()
        first, second = (single[..., 0::2], single[..., 1::2]) if self.in_pairs else single.chunk(2, dim=-1)
        moved = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(moved, dim=-1).flatten(-2) if self.in_pairs else torch.cat(moved, dim=-1)
        return torch.cat((rest, joined.to(keys.dtype)), dim=-1)

    def move_entries(
        self, keys: torch.Tensor, values: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn what a cache holds of a layer: latents (B, 1, n, R), and shared keys (B, 1, n, 2F) in the place of values."""
        return keys, self.move(values, rotation)


Rope = LayerRope | LatentRope


@functools.cache
def takes_one(apply: Callable[..., Any]) -> bool:
    """Whether a family's rotation is of one tensor (Gemma 4), not of queries and keys together."""
    return list(inspect.signature(apply).parameters)[1] == "cos"


class KeyMover:
    """Moves what one pass leaves behind; each kind of layer makes its rotation once for each device.

    Args:
        ropes: of the layers.
        shifts: (n,) positions that each key is moved by.
    """

    def __init__(self, ropes: Sequence[Rope | None], shifts: torch.Tensor) -> None:
        self.ropes = ropes
        self.shifts = shifts
        self._rotations: dict[tuple[Rope, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def move(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys (B, K, n, D) of one layer, as its attention gets them, at the positions that they now hold."""
        rope = self.ropes[layer]
        return keys if rope is None else rope.move(keys, self._rotation(rope, keys.device))

    def move_entries(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache holds of one layer, (B, K, n, D) each, at the positions that it now holds."""
        rope = self.ropes[layer]
        return (keys, values) if rope is None else rope.move_entries(keys, values, self._rotation(rope, keys.device))

    def _rotation(self, rope: Rope, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        kind = (rope, device)
        if kind not in self._rotations:
            self._rotations[kind] = rope.rotation(self.shifts.to(device))
        return self._rotations[kind]


def latent_rope(rotary: nn.Module, frequencies: str) -> LatentRope:
    """The rotation of a layer with latent attention; some rotate by complex numbers, made of neighbouring dims."""
    inv_freq = getattr(rotary, frequencies)
    probe = torch.zeros(1, 1, 1, dtype=torch.float32, device=inv_freq.device)
    found = rotary(probe, torch.zeros((1, 1), dtype=torch.long, device=inv_freq.device))
    return LatentRope(rotary, frequencies, in_pairs=isinstance(found, torch.Tensor) and found.is_complex())


def rotary_layout(rotary: nn.Module, frequencies: str, layer_type: str | None) -> Layout | None:
    """Find out how a rotary module spreads its F frequencies over cosines; None if no known layout explains them.

    It is asked for position 1, where no scaling scheme has begun to change its frequencies.
    """
    inv_freq = getattr(rotary, frequencies).float()
    probe = torch.zeros(1, 2, 1, dtype=torch.float32, device=inv_freq.device)
    positions = torch.tensor([[0, 1]], device=inv_freq.device)
    if hasattr(rotary, "mrope_section"):  # positions have three axes, which are equal in a text
        positions = positions.expand(3, 1, -1)
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
