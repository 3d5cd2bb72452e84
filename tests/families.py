"""Tiny random models, one for each family of decoders, and the paper authors' tiny models with what they computed.

Weights are drawn here rather than by transformers, which leaves biases at 0 and norms at 1: a family's own traits must
show in the numbers. Beacon weights are drawn apart from the base's, as those of a trained adapter would be.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconConfig, attach, matmul

needs_onednn = pytest.mark.skipif(not matmul.is_offered(), reason="this build of torch has no oneDNN")

torch.set_num_threads(1)  # threads that wait for one another make models as small as these forty times slower

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING, FULL = "sliding_attention", "full_attention"

# What a family has besides SIZES; those after the first ten vary a family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "gemma3_text": (
        "gemma3_text",
        {
            "sliding_window": 20,
            "query_pre_attn_scalar": 8,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 500.0},
                FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0},
            },
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 1.5,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.5,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gpt_oss": (
        "gpt_oss",
        # As many experts as are chosen: a choice among more would turn rounding errors into jumps.
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "sliding_window": 20,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": YARN,
        },
    ),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-deep": ("llama", {"num_hidden_layers": 4}),
}
TESTED = tuple(FAMILIES)[:10]
IN_TURN = [SLIDING, FULL, SLIDING]
GEMMA4 = {
    "sliding_window": 20,
    "layer_types": [SLIDING, SLIDING, FULL],
    "num_global_key_value_heads": 1,
    "global_head_dim": 16,
}
# The last layers attend to keys and values of those before them, and all are given embeddings of the token ids.
LENDING = {
    "num_hidden_layers": 5, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL], "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
LATENT = {
    "head_dim": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}  # fmt: skip
RECURRENT, CONV = "linear_attention", "conv"
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4, "layer_types": [RECURRENT, FULL, RECURRENT, FULL],
}  # fmt: skip
DELTA_EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MAMBA = {
    "num_hidden_layers": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16,
}  # fmt: skip
SHORT_CONV = {"num_hidden_layers": 4, "layer_types": [CONV, FULL, FULL, CONV], "conv_L_cache": 3}
# Some of whose layers carry a state in the place of keys and values.
ALL_RECURRENT: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**LATENT, **EXPERTS, **DELTA, "num_local_experts": 2, "head_dim": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {
        **MAMBA, "mamba_d_ssm": 64, "embedding_multiplier": 1.5, "lm_head_multiplier": 0.7, "key_multiplier": 0.6,
        "attention_out_multiplier": 0.8, "ssm_out_multiplier": 1.3,
    },
    "granitemoehybrid": {
        **MAMBA, "layer_types": [RECURRENT, FULL, FULL, RECURRENT], "num_local_experts": 2, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16, "position_embedding_type": None,
    },
    "kimi_linear": {
        **LATENT, **EXPERTS, **DELTA, "num_experts": 2, "q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "lfm2": SHORT_CONV,
    "lfm2_moe": {
        **SHORT_CONV, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1,
    },
    "lfm3": {**SHORT_CONV, "layer_types": [CONV, SLIDING, FULL, CONV], "sliding_window": 20},
    "nemotron_h": {
        "layers_block_type": [RECURRENT, FULL, "mlp", RECURRENT, "moe"], "num_hidden_layers": 5, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16, "n_routed_experts": 2,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": DELTA,
    "qwen3_5_moe_text": {**DELTA, **DELTA_EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **DELTA_EXPERTS, "decoder_sparse_step": 1},
}  # fmt: skip
# Further families, with what they have besides SIZES. As many experts as are chosen, as above.
ALL_FURTHER: dict[str, dict[str, Any]] = {
    **ALL_RECURRENT,
    "afmoe": {"sliding_window": 20, "layer_types": IN_TURN, "num_experts": 2, "num_experts_per_tok": 2},
    "apertus": {"rope_parameters": LLAMA3},
    "arcee": {},
    "cohere": {},
    "cohere2": {"sliding_window": 20, "layer_types": IN_TURN},
    "deepseek_v2": {**LATENT, **EXPERTS, "topk_method": "greedy", "rope_parameters": YARN | {"mscale_all_dim": 0.7, "mscale": 0.7}},
    "deepseek_v3": {**LATENT, **EXPERTS, "q_lora_rank": None},
    "cwm": {"sliding_window": 20, "layer_types": IN_TURN, "rope_parameters": LLAMA3},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 2, "moe_k": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 16},
    "exaone4": {"sliding_window": 20, "layer_types": IN_TURN},
    "gemma": {},
    "gemma3n_text": {
        **LENDING, "sliding_window": 20, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 5,
        "intermediate_size": [48] * 5,
    },
    "gemma4-small": {"model_type": "gemma4_text", **GEMMA4, **LENDING},
    "gemma4_text": {**GEMMA4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    "gemma4_unified_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": {**LATENT, **EXPERTS},
    "gpt_neox": {},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "helium": {},
    "hyperclovax": {},
    "minicpm3": LATENT,
    "minimax_m2": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": 20, "layer_types": IN_TURN},
    "ministral3": {"sliding_window": 24, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "mistral4": {
        **LATENT, **EXPERTS, "head_dim": 12,
        "rope_parameters": {
            **YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16, "partial_rotary_factor": 1 / 3,
        },
    },
    "mixtral": {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo3": {"sliding_window": 20, "layer_types": IN_TURN},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 2},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "qwen2_moe": {
        "sliding_window": 24, "use_sliding_window": True, "layer_types": IN_TURN, "num_experts": 2, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        "sliding_window": 24, "use_sliding_window": True, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "stablelm": {},
    "starcoder2": {"sliding_window": 24},
    "youtu": LATENT,
}  # fmt: skip
# An older transformers has fewer.
FURTHER = {name: own for name, own in ALL_FURTHER.items() if own.get("model_type", name) in CONFIG_MAPPING}

PICTURE, VIDEO = 90, 91  # token ids in whose place pictures are put
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16, "patch_size": 4,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": PICTURE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
# Models that take pictures or sounds, too: what their text model has besides SIZES, and what they have besides.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        FAMILIES["gemma3_text"][1],
        {
            "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": PICTURE, "boi_token_index": 92,
            "eoi_token_index": 93,
        },
    ),
    "gemma4": (
        {
            **GEMMA4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        {
            "vision_config": None, "audio_config": None, "image_token_id": PICTURE, "video_token_id": VIDEO,
            "audio_token_id": 93, "boi_token_id": 92,
        },
    ),
    "gemma4-small-multimodal": (
        {**GEMMA4, **LENDING},
        {
            "model_type": "gemma4", "vision_config": None, "audio_config": None, "image_token_id": PICTURE, "video_token_id": VIDEO,
            "audio_token_id": 93, "boi_token_id": 92,
        },
    ),
    "glm4v": ({"rope_parameters": MROPE}, {"vision_config": {**QWEN_VISION, "image_size": 16}, **QWEN_TOKENS}),
    "glm4v_moe": (
        {"rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}, **ALL_FURTHER["glm4_moe"]},
        {"vision_config": {**QWEN_VISION, "image_size": 16}, **QWEN_TOKENS},
    ),
    "internvl": ({"model_type": "qwen2"}, {"vision_config": {"model_type": "internvl_vision", **VISION}, "image_token_id": PICTURE}),
    "llava": (
        {"model_type": "llama"},
        {"vision_config": {"model_type": "clip_vision_model", **VISION}, "image_token_index": PICTURE},
    ),
    "mistral3": (
        {"model_type": "ministral3", **ALL_FURTHER["ministral3"]},
        {"vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION}, "image_token_index": PICTURE, "spatial_merge_size": 1},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": MROPE},
        {"vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]}, **QWEN_TOKENS},
    ),
    "qwen2_vl": (
        {"rope_parameters": MROPE, "sliding_window": 24, "use_sliding_window": True, "layer_types": IN_TURN},
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}, **QWEN_TOKENS},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", **SHORT_CONV},
        {"vision_config": {"model_type": "siglip2_vision_model", "num_patches": 16, **VISION}, "image_token_id": PICTURE},
    ),
    "qwen3_5": ({"rope_parameters": MROPE, **DELTA}, {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16}, **QWEN_TOKENS}),
    "qwen3_5_moe": (
        {"rope_parameters": MROPE, **DELTA, **DELTA_EXPERTS},
        {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16}, **QWEN_TOKENS},
    ),
    "qwen3_vl": (
        {"rope_parameters": MROPE},
        {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN_TOKENS},
    ),
    "qwen3_vl_moe": (
        {"rope_parameters": MROPE, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN_TOKENS},
    ),
}  # fmt: skip
ONE_SETTING = (*FURTHER, *MULTIMODAL)  # families that are tested at one setting
WITH_STATES = (*(name for name in ALL_RECURRENT if name in FURTHER), "lfm2_vl", "qwen3_5", "qwen3_5_moe")
WITH_LENDERS = ("gemma3n_text", "gemma4-small", "gemma4-small-multimodal")
EAGER_ONLY = frozenset({"gpt_oss"})


def tiny(family: str, seed: int = 0, *, attention: str = "eager", **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` (a key of FAMILIES, FURTHER or MULTIMODAL, or a model type), the same for the same seed.

    Args:
        attention: attention implementation.
        overrides: fields of the family's config, of its text model's where it has one.
    """
    if family in MULTIMODAL:
        own, others = copy.deepcopy(MULTIMODAL[family])  # configs change what they are given
        config = CONFIG_MAPPING[others.pop("model_type", family)](text_config={**SIZES, **own, **overrides}, **others)
    else:
        model_type, own = copy.deepcopy(FAMILIES.get(family, (family, FURTHER.get(family, {}))))
        config = CONFIG_MAPPING[own.pop("model_type", model_type)](**{**SIZES, **own, **overrides})
    auto_class: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    model = auto_class.from_config(config, attn_implementation=attention, dtype=torch.float32)
    randomize(model.named_parameters(), seed)
    return model.eval()


@torch.no_grad()
def randomize(parameters: Any, seed: int) -> None:
    """Draw named parameters anew so that attention, norms, biases and multipliers all matter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(parameter + 0.2 * noise)
        elif parameter.dim() < 2 or name.endswith("bias") or "embed" in name or "lm_head" in name:
            parameter.copy_(0.3 * noise)
        else:
            gain = 1.6 if any(key in name for key in ("q_proj", "k_proj", "qkv", ".q.", ".k.")) else 1.0
            is_transposed = parameter.dim() > 2 and parameter.shape[-2] > 1  # experts; filters of one channel are not
            fan_in = parameter.shape[-2 if is_transposed else -1]
            parameter.copy_(noise * gain / math.sqrt(fan_in))


def with_beacons(
    family: str, config: BeaconConfig, seed: int = 0, *, attention: str = "eager", **overrides: Any
) -> Any:
    """`tiny(family, seed)` with beacons attached whose weights are drawn apart from the base's."""
    model = attach(tiny(family, seed, attention=attention, **overrides), config)
    randomize(model.beacon_parameters(), seed + 100)
    return model


def widths(model: Any, read: Any) -> list[int]:
    """Rows of each pass of the decoder that a call makes."""
    found: list[int] = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda layer, args: found.append(args[0].shape[1]))
    try:
        read()
    finally:
        handle.remove()
    return found


def beacon_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of a model's beacon weights, by their names in an adapter's file."""
    return {name: parameter.detach().clone() for name, parameter in model.beacon_parameters()}


def random_ids(length: int, seed: int = 0, *, batch: int = 1) -> torch.Tensor:
    """Ids (batch, length), none of them special."""
    generator = torch.Generator().manual_seed(7 + seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


# --- the authors' cases ------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = tuple(sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors")))


@dataclass
class Golden:
    """One case of `golden/`, in this package's words."""

    base: PreTrainedModel
    config: BeaconConfig
    beacons: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]

    @property
    def ids(self) -> torch.Tensor:
        return self.tensors["input_ids"]

    @property
    def ratios(self) -> list[int]:
        return self.tensors["ratios"].tolist()

    def attached(self) -> Any:
        """The base, a copy of it, with these beacons on."""
        model = attach(copy.deepcopy(self.base), self.config)
        with torch.no_grad():
            for name, parameter in model.beacon_parameters():
                parameter.copy_(self.beacons[name])
        return model


def golden(name: str) -> Golden:
    """Read a case of `golden/`."""
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    weights = load_file(GOLDEN / name / "model.safetensors")
    own = {key: value for key, value in settings.items() if not key.startswith("beacon_") and key in KEPT_SETTINGS}
    config = CONFIG_MAPPING[settings["model_type"]](**own)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    base.load_state_dict({key: tensor for key, tensor in weights.items() if "beacon" not in key})
    projections = tuple(settings["beacon_param"])
    beacons = {"embedding": weights["model.beacon_embed_tokens.weight"][0]}
    for key, tensor in weights.items():
        if ".beacon_" in key and "embed" not in key:
            _, _, layer, _, projection, kind = key.split(".")
            letter = projection.split("_")[1]
            if letter in projections and f"{key.replace('beacon_', '')}" in weights:
                beacons[f"layers.{layer}.{letter}.{kind}"] = tensor
    beacon_config = BeaconConfig(
        chunk_size=settings["beacon_window"],
        ratios=tuple(settings["beacon_ratio"]),
        projections=projections,
        num_sinks=settings["beacon_sink_size"],
        placement=settings["beacon_pos"],
    )
    return Golden(base, beacon_config, beacons, load_file(GOLDEN / name / "golden.safetensors"))


KEPT_SETTINGS = frozenset(
    {
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
