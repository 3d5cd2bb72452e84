"""Embeddings of the token ids that some decoders hand to each of their layers (Gemma 3n, Gemma 4), beside that of their input."""

import inspect
from typing import Any

import torch

# B batch · T slots · L layers · P features that a layer is given

NAME = "per_layer_inputs"  # the argument by which a decoder is handed them


def are_given(decoder: Any) -> bool:
    """Whether a decoder hands its layers embeddings of the token ids."""
    return bool(getattr(decoder, "hidden_size_per_layer_input", 0)) and hasattr(decoder, "get_per_layer_inputs")


def of_ids(decoder: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a decoder is handed for tokens (B, T) whose input embeddings it is given: (B, T, L, P) by its name, if anything."""
    if not are_given(decoder):
        return {}
    make = decoder.get_per_layer_inputs
    takes_inputs = len(inspect.signature(make).parameters) > 1
    return {NAME: make(ids, None) if takes_inputs else make(ids)}


def of_slots(decoder: Any, ids: torch.Tensor, is_beacon: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of slots (B, T) some of which (T,) are beacons.

    These have no id, and are given what the base gives to whatever is no text, such as a picture's patches: that of padding.
    """
    if not are_given(decoder):
        return {}
    padding = decoder.config.pad_token_id or 0
    return of_ids(decoder, ids.masked_fill(is_beacon, padding))
