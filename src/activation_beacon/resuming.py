"""Closing a chunk whose first tokens have been read already, raw: what a pass still has to compute.

No token of a chunk sees beacons that stand at its end (placement "append"), so that the keys and values which the tail holds
are those that the chunk's own pass would make. What is left to compute are the chunk's new tokens, the beacons, and once
more the tokens that beacons begin as: their states are wanted, and nobody keeps these. At ratio 8 that is a quarter of a
chunk that has been read whole, rather than nine eighths.
"""

from dataclasses import dataclass

import torch

# B texts · R rows of a pass · T slots of a chunk · h of its tokens held · n beacons · M model dim


@dataclass(frozen=True)
class ChunkRows:
    """Which slots of a chunk a pass computes, in its order: repeated tokens, new tokens, beacons.

    Attributes:
        num_slots: T, tokens and behind them the beacons.
        num_held: h, tokens whose keys and values the tail holds.
        num_beacons: n.
        repeated: slots (n,) or (B, n) of the tokens that the beacons begin as; none (0,) where they begin as none.
    """

    num_slots: int
    num_held: int
    num_beacons: int
    repeated: torch.Tensor

    @property
    def num_repeated(self) -> int:
        """Rows in front whose keys and values are not wanted."""
        return self.repeated.shape[-1]

    @property
    def slots(self) -> torch.Tensor:
        """The slot (R,) or (B, R) of each row."""
        rest = torch.arange(self.num_held, self.num_slots, device=self.repeated.device)
        return torch.cat((self.repeated, rest.expand(*self.repeated.shape[:-1], -1)), dim=-1)

    @property
    def beacon_rows(self) -> torch.Tensor:
        """The rows (n,) of the beacons."""
        stop = self.row_of(self.num_slots)
        return torch.arange(stop - self.num_beacons, stop, device=self.repeated.device)

    @property
    def repeated_rows(self) -> torch.Tensor:
        """The rows (n,) of the tokens that the beacons begin as, in the beacons' order."""
        return torch.arange(self.num_repeated, device=self.repeated.device)

    def row_of(self, slot: int) -> int:
        """The row of a slot that is not held."""
        return slot - self.num_held + self.num_repeated

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """The rows (B, R, ...) out of what all slots have (B, T, ...)."""
        slots = self.slots.expand(states.shape[0], -1)
        return states.take_along_dim(slots.view(*slots.shape, *[1] * (states.dim() - 2)), dim=1)
