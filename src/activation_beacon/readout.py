"""Which logits a caller wants of a reading, and where those of each pass go."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import ModelOutput

from activation_beacon.batch import IGNORED, NewTokens

# B batch · N new tokens (columns) · V vocabulary


OF_ONE_PASS = ("output_hidden_states", "output_attentions")  # options for what comes of one pass over all rows


@dataclass
class Wanted:
    """What a caller wants of the logits.

    Attributes:
        first_column: logits are returned from this column on; None for none at all.
        labels: (B, N) next-token targets in the columns of the new tokens, -100 where there is none.
        options: further keyword arguments of the base's forward, for the pass that reads the tail.
    """

    first_column: int | None = None
    labels: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_all(self) -> bool:
        """Whether every token's logits are needed, to be returned or not."""
        return self.labels is not None


class Readout:
    """What came of a reading: filled pass by pass.

    Args:
        wanted: of it.
        new: the tokens that are read.
        seen: for each row, tokens that were read before.

    Attributes:
        logits: (B, N - first column, V), zero in padding; None while there are none.
        nll: (B, N - 1) in nats, NaN where there is no target; None without labels.
        last: the base's output of the tail's pass.
    """

    def __init__(self, wanted: Wanted, new: NewTokens, seen: Sequence[int]) -> None:
        self.wanted = wanted
        self.new = new
        self.seen = seen
        self.logits: torch.Tensor | None = None
        self.nll: torch.Tensor | None = None
        self.last: ModelOutput | None = None
        if wanted.labels is not None:
            shape = (len(seen), max(new.columns - 1, 0))
            self.nll = torch.full(shape, torch.nan, dtype=torch.float32, device=new.ids.device)

    @classmethod
    def of_rows(cls, readouts: Sequence["Readout"], wanted: Wanted, new: NewTokens, seen: Sequence[int]) -> "Readout":
        """What came of the readings of a batch's rows, one by one; there is no last pass of all of them."""
        whole = cls(wanted, new, seen)
        if wanted.labels is not None:
            whole.nll = torch.cat([readout.nll for readout in readouts if readout.nll is not None])
        if wanted.first_column is not None:
            whole.logits = torch.cat([readout.logits for readout in readouts if readout.logits is not None])
        return whole

    def first_wanted(self, members: Sequence[int], starts: Sequence[int], size: int) -> list[int] | None:
        """Tokens of a chunk, which begins at each member's own of `starts`, whose logits are wanted in some row; None for none."""
        first = self._first_column()
        if first is None:
            return None
        lowest = size
        for row, start in zip(members, starts, strict=True):
            lowest = min(lowest, max(0, first - self._column(row, start), self.seen[row] - start))
        return list(range(lowest, size)) if lowest < size else None

    def wanted_slots(self, starts: list[int], counts: list[int], offsets: list[int]) -> list[int] | None:
        """Slots of the tail's pass whose logits are wanted in some row; None where no logits are."""
        first = self._first_column()
        if first is None:
            return None
        slots: set[int] = set()
        for row, (start, count, offset) in enumerate(zip(starts, counts, offsets, strict=True)):
            skipped = max(0, first - self._column(row, start), self.seen[row] - start)
            slots.update(range(offset + skipped, offset + count))
        return sorted(slots)

    def collect(
        self,
        output: Any,
        members: Sequence[int],
        starts: Sequence[int],
        width: int,
        *,
        offsets: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        slots: list[int] | None = None,
    ) -> None:
        """Put a pass's logits (b, wanted, V) into the columns of the caller's batch, and its losses beside them."""
        logits = output.logits
        first_slot = width - logits.shape[1]
        order = slots if slots is not None else list(range(first_slot, width))
        pieces = []
        for b, row in enumerate(members):
            offset = 0 if offsets is None else offsets[b]
            count = width if counts is None else counts[b]
            column = self._column(row, starts[b])
            begin = max(self.seen[row] - starts[b], (self._first_column() or 0) - column, 0) + offset
            chosen = [n for n, slot in enumerate(order) if begin <= slot < offset + count]
            if chosen:
                column = self._column(row, starts[b] + order[chosen[0]] - offset)
                pieces.append((row, column, logits[b, chosen[0] : chosen[-1] + 1]))
        is_all = self._is_all(pieces, logits.shape[1])
        if is_all:
            self.logits = logits  # one pass made them all
        for row, column, piece in pieces:
            self._put_nll(row, column, piece)
            if not is_all:
                self._put_logits(row, column, piece)

    def _column(self, row: int, token: int) -> int:
        """Column of a text's token in the caller's batch; before the new tokens' first for those read earlier."""
        return self.new.starts[row] + token - self.seen[row]

    def _first_column(self) -> int | None:
        return 0 if self.wanted.needs_all else self.wanted.first_column

    def _put_nll(self, row: int, column: int, piece: torch.Tensor) -> None:
        if self.wanted.labels is None or self.nll is None:
            return
        stop = min(column + piece.shape[0], self.nll.shape[1])
        if stop <= column:
            return
        targets = self.wanted.labels[row, column + 1 : stop + 1].to(piece.device)
        losses = torch.nn.functional.cross_entropy(
            piece[: stop - column].float(), targets, ignore_index=IGNORED, reduction="none"
        )
        self.nll[row, column:stop] = losses.masked_fill(targets == IGNORED, torch.nan)

    def _is_all(self, pieces: Sequence[tuple[int, int, torch.Tensor]], width: int) -> bool:
        """Whether the (B, width, V) logits of one pass are what is wanted of every row, each in its column."""
        first = self.wanted.first_column
        if first is None or len(pieces) < len(self.seen) or width != self.new.columns - first:
            return False
        return all(column == first and len(piece) == width for _, column, piece in pieces)

    def _put_logits(self, row: int, column: int, piece: torch.Tensor) -> None:
        first = self.wanted.first_column
        if first is None:
            return
        if self.logits is None:
            self.logits = piece.new_zeros((len(self.seen), self.new.columns - first, piece.shape[-1]))
        skipped = max(0, first - column)
        if skipped < piece.shape[0]:
            begin = column + skipped - first
            self.logits[row, begin : begin + piece.shape[0] - skipped] = piece[skipped:]
