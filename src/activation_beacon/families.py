"""What is known of families of decoders by their names, and the error for those that cannot carry beacons."""

from typing import Any

from activation_beacon.errors import UnsupportedModelError

# Families whose tiny random models are compared with a slow reference in the tests.
TESTED_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "granite", "olmo2", "smollm3", "gpt_oss"}
)
# Further ones whose masks are transformers' own for causal attention, in windows or not, and nothing else; their tiny random
# models are compared with it, too, at one setting.
CAUSAL_FAMILIES = frozenset(
    {
        "afmoe", "apertus", "arcee", "bailing_hybrid", "bamba", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3",
        "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1", "gemma", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm",
        "glm4", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm4v_text", "gpt_neox", "granitemoe", "granitemoehybrid", "helium",
        "hyperclovax", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral4",
        "mixtral", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo3", "olmo_hybrid", "olmoe", "persimmon", "phi", "phimoe",
        "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
        "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "stablelm", "starcoder2", "youtu",
    }
)  # fmt: skip
# All layers have the configuration's window, if it names one.
WINDOWED = frozenset({"mistral", "phi3", "ministral3", "mixtral", "phimoe", "qwen3_moe", "starcoder2"})
# Those of type "sliding_attention" have it.
WINDOWED_BY_TYPE = frozenset(
    {
        "qwen2", "qwen3", "gemma3_text", "smollm3", "gpt_oss", "afmoe", "cohere2", "cwm", "exaone4", "gemma3n_text", "gemma4_text",
        "gemma4_unified_text", "lfm3", "ministral", "olmo3", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text",
    }
)  # fmt: skip
# Their last layers attend to keys and values of layers before them, and say so (`is_kv_shared_layer`).
LENDING = frozenset({"gemma3n_text", "gemma4_text", "gemma4_unified_text"})
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
RECURRENT = frozenset({"linear_attention", "conv"})  # types of layers that carry a state
HYBRID = frozenset({"hybrid"})  # of those that carry one beside keys and values
FEED_FORWARD = frozenset(
    {"mlp", "moe"}
)  # of those that are nothing else, where attention and states have layers to themselves


def layer_types(config: Any) -> frozenset[str]:
    """What transformers calls the layers of a text model's configuration; nothing where it has no names for them."""
    return frozenset(getattr(config, "layer_types", None) or ())


def is_recurrent(config: Any) -> bool:
    """Whether some layers carry a state."""
    return bool(layer_types(config) & (RECURRENT | HYBRID))


def unsupported(model: Any, reason: str) -> UnsupportedModelError:
    """The error for a model that cannot carry beacons."""
    families = ", ".join(sorted(TESTED_FAMILIES))
    return UnsupportedModelError(f"{type(model).__name__} cannot carry beacons: {reason}. Tested families: {families}.")
