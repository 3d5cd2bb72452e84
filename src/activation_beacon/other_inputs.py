"""What a base takes besides ids: pictures and sounds, and what says where in the text they are.

Chunks are read from ids, so a text with anything else is either left to the base as a whole, with a cache of its own, or
refused by name. What says of a text that nothing else is in it is dropped.
"""

from collections.abc import Mapping
from typing import Any

import torch

from activation_beacon.errors import UnsupportedError

# B batch · T tokens · A axes of positions, which are equal in a text

KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # 0 for those of a text
# What tokenizers tell of a text beside its ids; nobody reads it here.
OF_TOKENIZERS = frozenset(
    {
        "special_tokens_mask",
        "offset_mapping",
        "length",
        "overflowing_tokens",
        "overflow_to_sample_mapping",
        "num_truncated_tokens",
    }
)
# What a pass is given by us, or follows from the cache.
OURS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "cache_position",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "num_items_in_batch",
    }
)


def without_kinds_of_text(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without kinds of tokens that are 0 for each, as processors hand them over with any text."""
    return {
        name: value
        for name, value in inputs.items()
        if not (name in KINDS_OF_TOKENS and hasattr(value, "any") and not bool(value.any()))
    }


def other_input(inputs: Mapping[str, Any]) -> str | None:
    """The name of an input, a tensor or what holds some, that is neither ids nor ours; None where there is none."""
    return next((name for name, value in inputs.items() if name not in OURS and _holds_tensors(value)), None)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):  # an encoder's output is one
        return any(_holds_tensors(each) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(each) for each in value)
    return isinstance(value, torch.Tensor) or (hasattr(value, "__array__") and value.ndim > 0)  # numpy's, too


def refuse_other_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse what a base takes besides ids in a text that is compressed, or goes on from one: it would be lost.

    Raises:
        UnsupportedError: naming one of them.
    """
    name = other_input(inputs)
    if name is not None:
        raise UnsupportedError(
            f"{name} cannot go with a text that is compressed: beacons stand for tokens. "
            "Leave it out; or keep the text within a chunk, without a context or a ratio; or use beacon_disabled()."
        )


def positions_of(position_ids: torch.Tensor, row: int, start: int, count: int) -> torch.Tensor:
    """Positions (A, count) of a row's text, of position ids (1 or B, T), or (A, 1 or B, T) with axes for pictures."""
    axes = position_ids if position_ids.dim() == 3 else position_ids[None]
    return axes[:, min(row, axes.shape[1] - 1), start : start + count]
