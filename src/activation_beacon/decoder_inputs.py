"""What a decoder is given for tokens in the place of their ids: embeddings, and what some hand to each of their layers besides.

Gemma 3n and Gemma 4 hand each layer an embedding of the token's id. Falcon-H1 scales embeddings that it looks up itself.
"""

import inspect
from typing import Any

import torch

# B batch · T slots · L layers · P features that a layer is given

NAME = "per_layer_inputs"  # the argument by which a decoder is handed those of its layers
SCALES = {"falcon_h1": "embedding_multiplier"}  # by which families multiply what they look up, and only that


def has_layer_embeddings(decoder: Any) -> bool:
    """Whether a decoder hands its layers embeddings of the token ids."""
    return bool(getattr(decoder, "hidden_size_per_layer_input", 0)) and hasattr(decoder, "get_per_layer_inputs")


def hands_layer_embeddings_on(model: Any) -> bool:
    """Whether a model hands its decoder those that it is given (Gemma 3n with pictures and sounds does not in older transformers)."""
    return NAME in inspect.signature(type(model.base_model).forward).parameters


def embeddings(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, T, M) that a model makes of tokens (B, T)."""
    found: torch.Tensor = model.get_input_embeddings()(ids)
    config = model.config.get_text_config(decoder=True)
    return found * getattr(config, SCALES[config.model_type]) if config.model_type in SCALES else found


def layer_embeddings(decoder: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a decoder is handed for tokens (B, T) whose input embeddings it is given: (B, T, L, P) by its name, if anything."""
    if not has_layer_embeddings(decoder):
        return {}
    make = decoder.get_per_layer_inputs
    takes_inputs = len(inspect.signature(make).parameters) > 1
    return {NAME: make(ids, None) if takes_inputs else make(ids)}


def layer_embeddings_of_slots(decoder: Any, ids: torch.Tensor, is_beacon: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of slots (B, T) some of which (T,) are beacons.

    These have no id, and are given what the base gives to whatever is no text, such as a picture's patches: that of padding.
    """
    if not has_layer_embeddings(decoder):
        return {}
    padding = decoder.config.pad_token_id or 0
    return layer_embeddings(decoder, ids.masked_fill(is_beacon, padding))
