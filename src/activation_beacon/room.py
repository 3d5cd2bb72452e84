"""Room behind a layer's entries, so that decoding appends where it stands instead of copying the cache for each token.

Slots that have been handed out are never written again: whoever holds a view of them, such as a fork, keeps what it saw.
Only the layer whose entries reach to the last filled slot may append; every other one makes room of its own, by copying.
"""

import torch

# B batch · K kv heads · S slots held · C slots of the room · T new slots · D head dim

LEAST_SPARE = 64
GROWTH = 8  # a new room has this part of its entries to spare: each is copied so many times at most, on average
ALIGNED = 16  # slots; heads begin at addresses as even as those of tensors of their own
MOST_PARTS = 64  # large rooms can be cut into so many parts of one size


class Room:
    """Keys and values (B, K, C, D) of one layer, of which the first slots are filled.

    Args:
        keys: (B, K, S, D) that are held; copied.
        values: as keys.
        num_new: slots that will be appended next.

    Attributes:
        whole: keys and values (B, K, C, D), filled or not.
        filled: views (B, K, S, D) of all that is filled.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_new: int) -> None:
        needed = keys.shape[2] + num_new
        size = needed + max(LEAST_SPARE, needed // GROWTH)
        size += -size % max(ALIGNED, 1 << max(0, size.bit_length() - MOST_PARTS.bit_length()))
        self.whole = tuple(held.new_empty((*held.shape[:2], size, held.shape[3])) for held in (keys, values))
        self.filled = (self.whole[0][:, :, :0], self.whole[1][:, :, :0])
        self.append(keys, values)

    @property
    def num_slots(self) -> int:
        """C."""
        return self.whole[0].shape[2]

    def can_append_to(self, keys: torch.Tensor | None, values: torch.Tensor | None, num_new: int) -> bool:
        """Whether these very tensors are all that is filled, and `num_new` slots more have a place here."""
        is_filled = keys is self.filled[0] and values is self.filled[1]
        is_locked = self.whole[0].is_inference() and not torch.is_inference_mode_enabled()
        return is_filled and not is_locked and self.filled[0].shape[2] + num_new <= self.num_slots

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the next slots with (B, K, T, D).

        Returns:
            Views (B, K, S + T, D) of all that is filled.
        """
        start = self.filled[0].shape[2]
        stop = start + keys.shape[2]
        for whole, new in zip(self.whole, (keys, values), strict=True):
            whole[:, :, start:stop].copy_(new)
        return self.fill(keys.shape[2])

    def clear(self) -> None:
        """Put zeros where nothing is filled: what memory held before may be no number, and nought times that is none either."""
        for whole, filled in zip(self.whole, self.filled, strict=True):
            whole[:, :, filled.shape[2] :].zero_()

    def fill(self, num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Note that the next slots hold something; the views (B, K, S + T, D) of all that is filled."""
        stop = self.filled[0].shape[2] + num_new
        self.filled = (self.whole[0][:, :, :stop], self.whole[1][:, :, :stop])
        return self.filled
