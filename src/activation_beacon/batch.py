"""Batches of token ids as callers hand them over: ragged, padded, with labels; and the losses of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activation_beacon.entries import take
from activation_beacon.errors import InputError

# B batch · N new tokens (columns) · V vocabulary

IGNORED = -100


@dataclass
class NewTokens:
    """The tokens to be read, as they stand in the caller's batch.

    Attributes:
        ids: (B, N), padded at either side.
        starts: column of each row's first token.
        counts: tokens of each row.
    """

    ids: torch.Tensor
    starts: list[int]
    counts: list[int]

    @property
    def columns(self) -> int:
        """N."""
        return self.ids.shape[1]

    def right_aligned(self) -> torch.Tensor:
        """Ids (B, max count), padding first."""
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        return take(self.ids, range(len(ends)), ends, max(self.counts), dim=1)


def left_padded(
    texts: Sequence[Sequence[int]], *, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) of texts of any length, padded on the left as tokenizers do for decoders."""
    width = max(len(text) for text in texts)
    ids = torch.zeros((len(texts), width), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.as_tensor(text, dtype=torch.long, device=device)
        mask[row, width - len(text) :] = 1
    return ids, mask


def as_batch(texts: Sequence[Any] | Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and mask of one list of ids, of several of any length, or of what a tokenizer returns."""
    if isinstance(texts, Mapping):
        ids, mask = texts["input_ids"], texts.get("attention_mask")
        if mask is None and not isinstance(ids, torch.Tensor):
            return as_batch(ids)
        return torch.as_tensor(ids), None if mask is None else torch.atleast_2d(torch.as_tensor(mask))
    if isinstance(texts, str) or (len(texts) and isinstance(texts[0], str)):
        raise InputError("Texts are read as token ids; got a string. Give tokenizer(text), or its input_ids.")
    if not len(texts):
        raise InputError("The text is empty: there is no token to read. Give at least one.")
    if isinstance(texts[0], int):
        return torch.tensor([list(texts)], dtype=torch.long), None
    if any(len(text) == 0 for text in texts):
        raise InputError("A text of the batch is empty. Give each row at least one token.")
    return left_padded(texts)


def runs(mask: torch.Tensor) -> tuple[list[int], list[int]]:
    """First column and number of tokens of each row of a mask (B, N)."""
    counts = mask.bool().sum(dim=1)
    if not bool((counts > 0).all()):
        raise InputError("attention_mask leaves a row without tokens. Give each row at least one.")
    if not has_one_run_each(mask):
        raise InputError("attention_mask has holes: each row must be one run of tokens, padded at its ends.")
    return mask.bool().int().argmax(dim=1).tolist(), counts.tolist()


def has_one_run_each(mask: torch.Tensor) -> bool:
    """Whether each row of a mask (B, N) is one run of tokens, with nothing but padding around it."""
    edges = nn.functional.pad(mask.bool().int(), (1, 1)).diff(dim=1)
    return bool(((edges == 1).sum(dim=1) == 1).all())


def targets(labels: torch.Tensor, new: NewTokens) -> torch.Tensor:
    """Labels (B, N) with everything ignored that is padding, or first in its row with nothing before it."""
    if labels.shape != new.ids.shape:
        raise InputError(f"labels must be shaped like the ids {tuple(new.ids.shape)}; got {tuple(labels.shape)}.")
    columns = torch.arange(new.columns, device=labels.device)[None]
    first = torch.tensor(new.starts, device=labels.device)[:, None]
    stop = first + torch.tensor(new.counts, device=labels.device)[:, None]
    return labels.masked_fill((columns <= first) | (columns >= stop), IGNORED)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Next-token losses (B, N - 1) in nats of logits (B, N, V), NaN where there is no target."""
    targets = targets[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses.masked_fill(targets == IGNORED, torch.nan)


def mean_loss(nll: torch.Tensor, num_items: Any) -> torch.Tensor:
    """Mean over the targets, or over `num_items` where a trainer accumulates over several batches."""
    total = nll.nansum()
    return total / (nll.isfinite().sum() if num_items is None else num_items)
