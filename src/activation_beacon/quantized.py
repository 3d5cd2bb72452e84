"""Keys or values in 8 or 4 bits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# B batch · K kv heads · P stored slots · D head dim · G group of a quantised vector

GROUP = 32


@dataclass(frozen=True)
class Quantized:
    """Keys or values in 8 or 4 bits: asymmetric, one scale and least value for each group of a vector.

    Attributes:
        codes: (B, K, P, D) uint8, or (B, K, P, D/2) with two 4-bit codes in a byte.
        scale, least: (B, K, P, D/G) float16.
        bits: 8 or 4.
        dtype: of the tensor that it came from.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor
    bits: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, bits: int) -> "Quantized":
        """Quantise (B, K, P, D)."""
        dim = tensor.shape[-1]
        group = next(size for size in range(min(GROUP, dim), 0, -1) if dim % size == 0)
        grouped = tensor.detach().float().unflatten(-1, (-1, group))
        least, most = grouped.amin(-1), grouped.amax(-1)
        least = least.to(torch.float16)
        scale = ((most - least.float()) / (2**bits - 1)).clamp(min=1e-6).to(torch.float16)
        steps = (grouped - least.float()[..., None]) / scale.float()[..., None]
        codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
        if bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return cls(codes, scale, least, bits, tensor.dtype)

    def dense(self) -> torch.Tensor:
        """The tensor (B, K, P, D) again, in its own dtype."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        grouped = codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        return (grouped * self.scale.float()[..., None] + self.least.float()[..., None]).flatten(-2).to(self.dtype)

    def unpacks_to(self, dim: int) -> bool:
        """Whether its parts are those of vectors of so many values."""
        num_groups = self.scale.shape[3]
        has_codes = self.codes.dtype == torch.uint8 and self.codes.shape[3] * 8 == dim * self.bits
        has_groups = self.scale.shape == self.least.shape and num_groups > 0 and dim % num_groups == 0
        return has_codes and has_groups and self.scale.dtype == self.least.dtype == torch.float16

    @property
    def length(self) -> int:
        """Slots held."""
        return self.codes.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.least))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Quantized":
        """The same change made to each part: it may select rows or slots, or move them to a device."""
        return Quantized(change(self.codes), change(self.scale), change(self.least), self.bits, self.dtype)

    def joined(self, other: "Quantized") -> "Quantized":
        """`other` appended along the slots."""
        parts = zip((self.codes, self.scale, self.least), (other.codes, other.scale, other.least), strict=True)
        codes, scale, least = (torch.cat(pair, dim=2) for pair in parts)
        return Quantized(codes, scale, least, self.bits, self.dtype)
