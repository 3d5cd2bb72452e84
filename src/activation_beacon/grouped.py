"""Several chunks closed in one pass, layer by layer.

What a chunk sees of the chunks before it in a layer are entries that come of the layer's input: a pass over several chunks is
exact. All rows go through projections, MLPs and norms together, which small chunks gain by; attention is computed chunk by
chunk: to the memory, to what is kept of the group's earlier chunks, keys moved to where they are held, and causally to itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from activation_beacon.causal import ToldEntries, attend
from activation_beacon.constants import constant
from activation_beacon.entries import ChunkLayer, PassEnded
from activation_beacon.layouts import ROWS_TOGETHER, ROWS_TOGETHER_ON_CUDA, GroupLayout
from activation_beacon.rope import KeyMover

# B batch · H query heads · K kv heads · N slots of all chunks · T slots of one · S entries before it · m before all · D head dim


def rows_together(device: torch.device) -> int:
    """Slots of all texts that go through one pass, if several chunks do."""
    return ROWS_TOGETHER_ON_CUDA if device.type == "cuda" else ROWS_TOGETHER


class ByChunk(ToldEntries):
    """A mask that says "each chunk, what is held before it, and causally itself": T and keys and values (B, K, S + T, D)."""

    def attended_to(
        self, query: torch.Tensor, entries: Sequence[tuple[int, torch.Tensor, torch.Tensor]], *, scale: float | None
    ) -> torch.Tensor:
        """Attention (B, H, N, D) of queries (B, H, N, D), chunk by chunk."""
        outputs = []
        queries = query.split([size for size, _, _ in entries], dim=2)
        for own, (_, keys, values) in zip(queries, entries, strict=True):
            num_shared = own.shape[1] // keys.shape[1]
            keys, values = (states.repeat_interleave(num_shared, dim=1) for states in (keys, values))
            outputs.append(attend(own, keys, values, scale=scale, window=self.window))
        return torch.cat(outputs, dim=2)


class GroupLayer(ChunkLayer):
    """One layer during a pass over several chunks: keeps what they leave behind, and tells the mask what each of them sees.

    Args:
        memory: lends what is held before the chunks.
        group: the chunks.
        mover: moves the keys that are kept.
        index: of the layer.
        mask: that the pass is given.
        attended: makes keys and values of what the layer caches.
        lent_as: its number, if other layers attend to the same.
    """

    def __init__(
        self,
        memory: ChunkLayer,
        group: GroupLayout,
        mover: KeyMover,
        index: int,
        mask: ByChunk,
        attended: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        *,
        lent_as: int | None = None,
    ) -> None:
        super().__init__(memory.held, memory.length, lent=memory.lent, is_sliding=memory.is_sliding)
        self.group = group
        self.mover = mover
        self.index = index
        self.mask = mask
        self.attended = attended
        self.lent_as = lent_as

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what the chunks leave behind, given all slots' entries (B, K, N, D); returns few, which nobody attends to.

        Raises:
            PassEnded: where it `ends_pass`.
        """
        slots = constant(self.group.kept_slots, key_states.device)
        keys, values = (states.index_select(2, slots) for states in (key_states, value_states))
        self.keys, self.values = self.mover.move_entries(keys, values, self.index)
        if self.ends_pass:
            raise PassEnded
        keys, values = self.keys, self.values
        if self.held is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.held(), (keys, values), strict=True))
        before = self.attended(keys, values)
        parts = [states.split(self.group.sizes, dim=2) for states in self.attended(key_states, value_states)]
        self.mask.told(
            [
                (
                    size,
                    *(
                        torch.cat((old[:, :, : self.lent + kept], own), dim=2)
                        for old, own in zip(before, new, strict=True)
                    ),
                )
                for size, kept, *new in zip(self.group.sizes, self.group.num_kept, *parts, strict=False)
            ],
            self.lent_as,
        )
        return key_states[:, :, :1], value_states[:, :, :1]
