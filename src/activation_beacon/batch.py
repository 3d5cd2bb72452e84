"""Batches of token ids as callers hand them over: ragged, padded, with labels; and the losses of their tokens."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activation_beacon.constants import sent
from activation_beacon.errors import InputError, reason
from activation_beacon.rows import take

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

    def __post_init__(self) -> None:
        self.ids = as_ids(self.ids)

    @property
    def columns(self) -> int:
        """N."""
        return self.ids.shape[1]

    @property
    def begins_in_padding(self) -> bool:
        """Whether some row does."""
        return any(self.starts)

    @property
    def ends_in_padding(self) -> bool:
        """Whether some row does."""
        return any(start + count < self.columns for start, count in zip(self.starts, self.counts, strict=True))

    def right_aligned(self) -> torch.Tensor:
        """Ids (B, max count), padding first."""
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        return take(self.ids, range(len(ends)), ends, max(self.counts), dim=1)


def left_padded(
    texts: Sequence[Sequence[int] | torch.Tensor], *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) of texts of any length, padded on the left as tokenizers do for decoders."""
    width = max(len(text) for text in texts)
    ids = torch.zeros((len(texts), width), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.as_tensor(text, dtype=torch.long, device=device)
        mask[row, width - len(text) :] = 1
    return ids, mask


def as_batch(texts: Sequence[Any] | torch.Tensor | Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and mask of one list of ids, of several of any length, of an array or tensor, or of what a tokenizer returns.

    Raises:
        InputError: if they are no integers, or a text of several is empty.
    """
    if not isinstance(texts, Mapping):
        return _padded(_rows(texts))
    if "input_ids" not in texts:
        raise InputError(f"A mapping must have input_ids; this one has {', '.join(map(str, texts)) or 'nothing'}.")
    rows, mask = _rows(texts["input_ids"]), texts.get("attention_mask")
    return _padded(rows) if mask is None else _with_mask(rows, mask)


def _rows(texts: Any) -> torch.Tensor | list[torch.Tensor]:
    """Texts as ids: a tensor of what is one text, or has a shape; a list of rows (N,) of several."""
    if hasattr(texts, "ndim"):
        return as_ids(texts)
    is_list = hasattr(texts, "__len__") and hasattr(texts, "__getitem__") and not isinstance(texts, str)
    if not is_list or (len(texts) and isinstance(texts[0], str)):
        got = "a string" if is_list or isinstance(texts, str) else type(texts).__name__
        raise InputError(f"Texts are read as token ids; got {got}. Give tokenizer(text), or its input_ids.")
    if not len(texts):
        raise InputError("The text is empty: there is no token to read. Give at least one.")
    if isinstance(texts[0], int | float) or getattr(texts[0], "ndim", None) == 0:
        return as_ids(list(texts))[None]
    rows = [as_ids(text) for text in texts]
    if strange := [tuple(row.shape) for row in rows if row.dim() != 1]:
        raise InputError(f"Each text of a batch must be one list of ids (N,); got one of {strange[0]}.")
    if any(row.shape[0] == 0 for row in rows):
        raise InputError("A text of the batch is empty. Give each row at least one token.")
    return rows


def as_tensor(values: Any) -> torch.Tensor:
    """A tensor where it is; anything else in the host's memory, whatever torch's default device."""
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")


def as_ids(values: Any) -> torch.Tensor:
    """Token ids of any kind of integer as torch's embeddings take them.

    Raises:
        InputError: for anything but integers.
    """
    with _refusing("input_ids must be integers, in one list for each text; these are not"):
        ids = as_tensor(values)
    if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
        raise InputError(f"input_ids must be integers; got {ids.dtype}.")
    return ids.long()


def _padded(rows: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (rows, None) if isinstance(rows, torch.Tensor) else left_padded(rows)


def _with_mask(rows: torch.Tensor | list[torch.Tensor], mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask where the caller has one: what is added to ragged rows is padding, as is what they have as zeros."""
    with _refusing("attention_mask must have one value for each id; this one has not"):
        if isinstance(rows, torch.Tensor) or len({len(row) for row in rows}) == 1:
            ids = rows if isinstance(rows, torch.Tensor) else torch.stack(rows)
            return ids, torch.atleast_2d(as_tensor(mask))
        masks = [as_tensor(row) for row in mask]
    if [row.shape for row in masks] != [row.shape for row in rows]:
        lengths = [[row.numel() for row in each] for each in (rows, masks)]
        raise InputError(
            f"attention_mask must have one value for each id; texts of {lengths[0]} ids have masks of {lengths[1]}."
        )
    return left_padded(rows)[0], left_padded(masks)[0]


@contextlib.contextmanager
def _refusing(rule: str) -> Iterator[None]:
    """Turns what torch says of something that is no tensor into an error that begins with the rule."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{rule} ({reason(error)}).") from error


def runs(mask: torch.Tensor) -> tuple[list[int], list[int]]:
    """First column and number of tokens of each row of a mask (B, N)."""
    mask = mask.cpu()  # once: every answer is wanted here
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
    first = sent(new.starts, labels.device)[:, None]
    stop = first + sent(new.counts, labels.device)[:, None]
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
