"""Models of a known shape with random weights: speed does not depend on their values."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconConfig, attach
from activation_beacon.bench.cost import SHAPES

FAMILIES = {"qwen2-7b": "qwen2"}  # the others are Llamas
MANY_POSITIONS = 1 << 22  # so that no length is refused


def random_model(shape: str, *, chunk_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of one of `cost.SHAPES` with untrained beacons on, drawn on the device itself."""
    sizes = SHAPES[shape]
    config = CONFIG_MAPPING[FAMILIES.get(shape, "llama")](
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=MANY_POSITIONS,
        tie_word_embeddings=sizes.is_tied,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        return attach(model, BeaconConfig(chunk_size=chunk_size))
