"""Finding the places of a decoder that beacons need. Families of models differ here and nowhere else.

What a family must have: attention modules whose projections are plain linear layers (apart or fused), a cache that holds
rotated keys, and a rotary embedding that moves them. Known families are described by name; others are tried by structure
and then put to the test: a key moved by our rotation must equal the key that the model itself makes at the new position.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from activation_beacon.dense import is_linear, tensors_of
from activation_beacon.errors import UnsupportedModelError
from activation_beacon.rope import LayerRope, Rope, latent_rope, rotary_layout

# Families whose tiny random models are compared with a slow reference in the tests.
TESTED_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "granite", "olmo2", "smollm3", "gpt_oss"}
)
# Further ones whose masks are transformers' own for causal attention, in windows or not, and nothing else; their tiny random
# models are compared with it, too, at one setting.
CAUSAL_FAMILIES = frozenset(
    {
        "afmoe", "apertus", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe",
        "exaone4", "gemma", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text",
        "glm4v_text", "gpt_neox", "granitemoe", "helium", "hyperclovax", "minicpm3", "minimax_m2", "ministral", "ministral3",
        "mistral4", "mixtral", "nanochat", "nemotron", "olmo", "olmo3", "olmoe", "persimmon", "phi", "phimoe",
        "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss",
        "stablelm", "starcoder2", "youtu",
    }
)  # fmt: skip
# All layers have the configuration's window, if it names one.
WINDOWED = frozenset({"mistral", "phi3", "ministral3", "mixtral", "phimoe", "qwen3_moe", "starcoder2"})
# Those of type "sliding_attention" have it.
WINDOWED_BY_TYPE = frozenset(
    {
        "qwen2", "qwen3", "gemma3_text", "smollm3", "gpt_oss", "afmoe", "cohere2", "cwm", "exaone4", "gemma4_text",
        "gemma4_unified_text", "ministral", "olmo3", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text",
    }
)  # fmt: skip
FULL_ATTENTION = "full_attention"
AT_ONCE = "beacon_chunks_with_"  # before the name of the attention that it hands chunks to, see at_once
ATTENTION_NAMES = ("self_attn", "attention", "attn")
FUSED_NAMES = {"qkv_proj": "qkv", "query_key_value": "qkv", "kv_a_proj_with_mqa": "kv"}
EXPANDS = "expand_kv"  # the method that makes keys and values of latents
LATENT_QUERIES = "q_a_proj"  # the first of two projections, where queries have a latent too
OUTPUT_CAPTURING = "transformers.utils.output_capturing"  # the module of its hooks
OUTPUT_NAMES = ("o_proj", "dense", "out_proj")
MOVED_BY = 7  # positions, in the trial of moved keys
STILL = 1e-3  # of their size, by which keys that are not rotated may differ there

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
EntryShapes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class ProjectionSite:
    """One linear layer of the base that gets a beacon branch.

    Attributes:
        name: what it projects to: q, k, v, o; qkv where they are fused; kv where it gives the latent that keys and values are made of.
        linear: the base's own layer.
    """

    name: str
    linear: nn.Module


@dataclass(frozen=True)
class LayerSite:
    """One decoder layer.

    Attributes:
        attention: its attention module.
        told: the module that a pass's keyword arguments reach: the attention, or the whole layer where it does not hand them on.
        projections: those in it that get a beacon branch.
        rope: how its keys are rotated; None: not at all.
        window: entries that a slot sees, itself included; None for all before it, and in families that are not known.
    """

    attention: nn.Module
    told: nn.Module
    projections: tuple[ProjectionSite, ...]
    rope: Rope | None
    window: int | None = None

    @property
    def device(self) -> torch.device:
        """Where its weights are; layers may be on several GPUs."""
        return next(tensors_of(self.attention)).device

    @property
    def expand(self) -> Expand | None:
        """What its attention makes keys and values (B, H, n, D) with, where it caches latents; None where it caches them."""
        return getattr(self.attention, EXPANDS, None)

    def attended(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what the layer caches, (B, K, n, D) each."""
        return (keys, values) if self.expand is None else self.expand(keys, values)

    @property
    def entry_shapes(self) -> EntryShapes | None:
        """Heads and dims of the keys and of the values that it leaves in a cache; None where its projections do not tell."""
        if self.expand is not None:
            return (1, self.attention.kv_lora_rank), (1, self.attention.qk_rope_head_dim)  # type: ignore[return-value]
        dim = getattr(self.attention, "head_dim", None)
        width = _projected_width(self.attention)
        return None if type(dim) is not int or not dim or width is None or width % dim else ((width // dim, dim),) * 2


@dataclass(frozen=True)
class DecoderSite:
    """A decoder as far as beacons are concerned.

    Attributes:
        layers: one site for each layer.
        max_positions: positions that the base was made for; None where it has no limit.
        is_known: whether the family is one of `TESTED_FAMILIES` or `CAUSAL_FAMILIES`: others may add what they like to a causal mask.
    """

    layers: tuple[LayerSite, ...]
    max_positions: int | None
    is_known: bool = False

    @property
    def is_plainly_causal(self) -> bool:
        """Whether every layer is known to see all entries before a slot, and nothing else."""
        return self.is_known and all(layer.window is None for layer in self.layers)

    @property
    def num_copies(self) -> int:
        """As how many heads in a row transformers hands each head of keys and values to attention; 1 where layers differ."""
        counts = {getattr(layer.attention, "num_key_value_groups", 1) for layer in self.layers}
        return counts.pop() if len(counts) == 1 else 1

    @property
    def entry_shapes(self) -> tuple[EntryShapes | None, ...]:
        """Heads and dims of each layer's keys, and of its values, where they are known."""
        return tuple(layer.entry_shapes for layer in self.layers)

    @property
    def features_per_entry(self) -> int | None:
        """Numbers that a token leaves in a cache, in all layers; None where it is not known."""
        shapes = [shape for layer in self.entry_shapes for shape in layer or ((0, 0),)]
        return sum(heads * dim for heads, dim in shapes) if all(all(shape) for shape in shapes) else None

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """How each layer's keys are rotated."""
        return tuple(layer.rope for layer in self.layers)


def find_decoder(model: PreTrainedModel, projections: Sequence[str]) -> DecoderSite:
    """Find layers, projections and rotary embeddings of a causal language model.

    Args:
        model: any decoder of transformers with a language modelling head.
        projections: which projections get a branch, out of q, k, v, o.

    Raises:
        UnsupportedModelError: if the architecture cannot carry beacons, with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    _refuse_known_obstacles(model, config)
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _unsupported(model, "its decoder has no list of layers called `layers`")
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise _unsupported(
            model, "it has no rotary position embedding (`rotary_emb`), so that stored keys cannot be moved"
        )
    sites = tuple(
        _layer_site(model, config, layer, index, rotary, projections)
        for index, layer in enumerate(layers[: config.num_hidden_layers])
    )
    is_known = config.model_type in TESTED_FAMILIES | CAUSAL_FAMILIES
    site = DecoderSite(sites, _max_positions(config), is_known)
    if config.model_type not in TESTED_FAMILIES and next(model.parameters()).device.type != "meta":
        return check_keys_move(model, site)
    return site


def understands_told_masks(model: Any, site: DecoderSite) -> bool:
    """Whether a `causal.LowerRight` may stand for the mask of a pass: it must reach torch's own attention as it is."""
    return site.is_plainly_causal and _attends_by_torch(model)


def understands_rows_apart(model: Any, site: DecoderSite) -> bool:
    """Whether a `ragged.OwnEntries` may stand for the mask of a pass, likewise; it knows windows."""
    return site.is_known and _attends_by_torch(model)


def _attends_by_torch(model: Any) -> bool:
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return str(attention).removeprefix(AT_ONCE) == "sdpa"


def can_end_early(decoder: Any, site: DecoderSite) -> bool:
    """Whether a pass of the decoder may be left from within its last layer, because nobody waits for the layer's end.

    Hooks do (FSDP gathers and frees weights in them), and so may compiled modules and a `forward` that another library
    has put on an instance (accelerate offloads weights there). The hooks that transformers leaves on a model which was once
    asked for hidden states do not: they look at passes that are asked for some, and these are not left.
    """
    last = decoder.layers[len(site.layers) - 1]
    hooks = (*decoder._forward_hooks.values(), *last._forward_hooks.values())
    is_waited_for = any(getattr(hook, "__module__", None) != OUTPUT_CAPTURING for hook in hooks)
    return not is_waited_for and all(
        "forward" not in vars(module) and module._compiled_call_impl is None for module in (decoder, *last.modules())
    )


def check_keys_move(model: PreTrainedModel, site: DecoderSite, *, tolerance: float = 2e-2) -> DecoderSite:
    """Compare moved keys with the model's own at the new position, in every layer.

    A token that stands alone attends to itself wherever it stands, so that its keys differ by their rotation only.

    Returns:
        The site, as the trial has found it: layers whose keys are the same at both positions have no rotary embedding in it
        (Cohere 2 has some), and layers that keep from their attention what they are told are told themselves (Nemotron's).

    Raises:
        UnsupportedModelError: naming the layer whose keys differ by more than `tolerance`, relative to their size; or if
            neither attention modules nor layers are handed the keyword argument that tells where the beacons are.
    """
    (here, told), (there, _) = (_lone_token_entries(model, site, position) for position in (0, MOVED_BY))
    layers = [dataclasses.replace(layer, told=module) for layer, module in zip(site.layers, told, strict=True)]
    for index, (rope, before, after) in enumerate(zip(site.ropes, here, there, strict=True)):
        if rope is not None and _difference(before, after) <= STILL:
            layers[index] = dataclasses.replace(layers[index], rope=None)
            continue
        try:
            moved = before
            if rope is not None:
                moved = rope.move_entries(*before, rope.rotation(torch.tensor([MOVED_BY], device=before[0].device)))
        except (RuntimeError, TypeError, AttributeError) as failure:
            raise _unsupported(model, f"the keys of layer {index} cannot be moved by rotation ({failure})") from failure
        error = _difference(moved, after)
        if not error <= tolerance:
            raise _unsupported(
                model, f"moving the keys of layer {index} by rotation misses its own keys by {error:.0%}"
            )
    return dataclasses.replace(site, layers=tuple(layers))


def _difference(entries: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """By which keys, or values if it is more, differ from others, relative to their size."""
    pairs = zip(entries, others, strict=True)
    return torch.stack([(one - two).norm() / two.norm().clamp(min=1e-30) for one, two in pairs]).max()


@torch.no_grad()
def _lone_token_entries(
    model: PreTrainedModel, site: DecoderSite, position: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[nn.Module]]:
    """Keys and values that each layer keeps of a token by itself, and the module in each that keyword arguments reach."""
    embedding = model.get_input_embeddings().weight
    reached: set[nn.Module] = set()

    def note(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if kwargs.pop("beacon_slots", None) is not None:
            reached.add(attention)
        return args, kwargs

    def note_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        if kwargs.get("beacon_slots") is not None:
            reached.add(layer)

    layers = model.get_decoder().layers[: len(site.layers)]
    token = torch.linspace(-1, 1, embedding.shape[-1], dtype=model.dtype, device=embedding.device)[None, None]
    cache = DynamicCache()
    was_training = model.training
    model.eval()
    handles = [layer.attention.register_forward_pre_hook(note, with_kwargs=True) for layer in site.layers]
    handles += [layer.register_forward_pre_hook(note_layer, with_kwargs=True) for layer in layers]
    try:
        model.get_decoder()(
            inputs_embeds=token,
            position_ids=torch.tensor([[position]], device=embedding.device),
            past_key_values=cache,
            use_cache=True,
            beacon_slots=torch.zeros(1, dtype=torch.long, device=embedding.device),
        )
        entries = [(layer.keys.float(), layer.values.float()) for layer in cache.layers]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unsupported(model, f"a trial pass with an ordinary cache failed ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    told = [
        one.attention if one.attention in reached else layer for one, layer in zip(site.layers, layers, strict=True)
    ]
    if not reached.issuperset(told):
        raise _unsupported(model, "it does not hand keyword arguments (`beacon_slots`) down to its layers")
    if len(entries) != model.config.get_text_config(decoder=True).num_hidden_layers:
        raise _unsupported(model, "not every layer keeps keys of its own")
    return entries, told


def _layer_site(
    model: PreTrainedModel, config: Any, layer: nn.Module, index: int, rotary: nn.Module, projections: Sequence[str]
) -> LayerSite:
    attention = next((getattr(layer, name) for name in ATTENTION_NAMES if hasattr(layer, name)), None)
    if attention is None:
        raise _unsupported(model, f"layer {index} has no attention module called {' or '.join(ATTENTION_NAMES)}")
    sites = tuple(_projection_sites(attention, projections))
    found = "".join(site.name for site in sites)
    # Where values are made of keys, the beacon copy of their projection serves both.
    if missing := [
        name for name in projections if name not in found and not (name == "v" and _values_are_keys(attention))
    ]:
        raise _unsupported(
            model, f"layer {index} has no projection {', '.join(missing)} of its own that could be replaced"
        )
    return LayerSite(
        attention, attention, sites, _layer_rope(model, config, attention, index, rotary), _window(config, index)
    )


def _values_are_keys(attention: nn.Module) -> bool:
    """Whether one projection gives keys and values (Gemma 4)."""
    return is_linear(getattr(attention, "k_proj", None)) and getattr(attention, "v_proj", attention) is None


def _projection_sites(attention: nn.Module, projections: Sequence[str]) -> Iterator[ProjectionSite]:
    for fused, name in FUSED_NAMES.items():
        if is_linear(getattr(attention, fused, None)) and set(name) <= set(projections):
            yield ProjectionSite(name, getattr(attention, fused))
    if "q" in projections and is_linear(getattr(attention, LATENT_QUERIES, None)):
        yield ProjectionSite("q", getattr(attention, LATENT_QUERIES))
    for name in ("q", "k", "v"):
        linear = getattr(attention, f"{name}_proj", None)
        if name in projections and linear is not None and is_linear(linear):
            yield ProjectionSite(name, linear)
    if "o" in projections:
        output = next(
            (getattr(attention, name) for name in OUTPUT_NAMES if is_linear(getattr(attention, name, None))), None
        )
        if output is not None:
            yield ProjectionSite("o", output)


def _projected_width(attention: nn.Module) -> int | None:
    """Features that an attention module projects to keys, and as many to values; None where it does not tell."""
    keys, values = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
    if _values_are_keys(attention):
        values = keys
    if is_linear(keys) and is_linear(values):
        return keys.out_features if keys.out_features == values.out_features else None  # type: ignore[union-attr]
    all_three = (getattr(attention, name, None) for name, to in FUSED_NAMES.items() if to == "qkv")
    fused = next((linear for linear in all_three if is_linear(linear)), None)
    output = next((linear for name in OUTPUT_NAMES if is_linear(linear := getattr(attention, name, None))), None)
    return None if fused is None or output is None else (fused.out_features - output.in_features) // 2


def _layer_rope(
    model: PreTrainedModel, config: Any, attention: nn.Module, index: int, rotary: nn.Module
) -> Rope | None:
    if not getattr(attention, "use_rope", True):
        return None
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[index] if layer_types and hasattr(rotary, f"{layer_types[index]}_inv_freq") else None
    frequencies = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    if not hasattr(rotary, frequencies):
        raise _unsupported(model, f"its rotary embedding has no `{frequencies}`")
    if hasattr(attention, EXPANDS):
        return latent_rope(rotary, frequencies)
    layout = rotary_layout(rotary, frequencies, layer_type)
    if layout is None:
        raise _unsupported(model, "its rotary embedding lays out its cosines in a way that is not known")
    return LayerRope(rotary, frequencies, layout, type(attention).__module__)


def _window(config: Any, index: int) -> int | None:
    """The window of a layer of a known family; configurations of others may name one that nobody heeds."""
    layer_types = getattr(config, "layer_types", None)
    by_type = config.model_type in WINDOWED_BY_TYPE and layer_types and layer_types[index] != FULL_ATTENTION
    is_windowed = config.model_type in WINDOWED or by_type
    return (getattr(config, "sliding_window", None) or None) if is_windowed else None


def _max_positions(config: Any) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    original = _rope_settings(config).get("original_max_position_embeddings")
    if "longrope" in _rope_types(config) and original:  # its frequencies change beyond
        return min(limit or original, int(original))
    return limit


def _rope_settings(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _rope_types(config: Any) -> set[str]:
    settings = _rope_settings(config)
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return {str(each["rope_type"]) for each in (settings, *nested) if each.get("rope_type")}


def _refuse_known_obstacles(model: PreTrainedModel, config: Any) -> None:
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(model, "beacons need a decoder with a language modelling head (AutoModelForCausalLM)")
    if getattr(config, "index_topk", None):
        raise _unsupported(
            model, "its layers choose what they attend to, by keys of their own that are kept apart (sparse attention)"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if strange := sorted(layer_types - {FULL_ATTENTION, "sliding_attention"}):
        raise _unsupported(
            model, f"its layers are of type {', '.join(strange)}, which keep no keys and values for every token"
        )
    if getattr(model, "_is_stateful", False):
        raise _unsupported(model, "it is recurrent (linear attention or state space), with no cache of keys and values")
    if "dynamic" in _rope_types(config):
        raise _unsupported(
            model, "dynamic NTK scaling changes its frequencies with the length, so that keys cannot be moved"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise _unsupported(model, "its tokens see those that follow them")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise _unsupported(model, "its layers are given embeddings of the token ids, and beacons have none")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _unsupported(model, "some of its layers share the keys and values of others")


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    families = ", ".join(sorted(TESTED_FAMILIES))
    return UnsupportedModelError(f"{type(model).__name__} cannot carry beacons: {reason}. Tested families: {families}.")
