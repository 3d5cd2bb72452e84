"""Finding the places of a decoder that beacons need.

Families of models differ here, in `families`, and in the names by which `recurrent` hands on a cache; nowhere else.

What a family must have: attention modules whose projections are plain linear layers (apart or fused), a cache that holds
rotated keys, and a rotary embedding that moves them. Some of its layers may carry a state in the place of keys and values
(`recurrent`). Known families are described by name; others are tried by structure and then put to the test: a key moved by our
rotation must equal the key that the model itself makes at the new position, and a state must go on where it was left.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from activation_beacon import decoder_inputs
from activation_beacon.dense import is_linear
from activation_beacon.families import (
    CAUSAL_FAMILIES,
    FEED_FORWARD,
    FULL_ATTENTION,
    HYBRID,
    LENDING,
    RECURRENT,
    SLIDING_ATTENTION,
    TESTED_FAMILIES,
    WINDOWED,
    WINDOWED_BY_TYPE,
    is_recurrent,
    layer_types,
    unsupported,
)
from activation_beacon.recurrent import takes_cache
from activation_beacon.rope import LayerRope, Rope, latent_rope, rotary_layout
from activation_beacon.sites import (
    EXPANDS,
    FUSED_NAMES,
    OUTPUT_NAMES,
    DecoderSite,
    LayerSite,
    ProjectionSite,
    values_are_keys,
)
from activation_beacon.trials import check_embeddings_are_taken, check_keys_move, check_states_go_on

ROTARY_NAMES = ("rotary_emb", "pos_emb")
ATTENTION_NAMES = ("self_attn", "attention", "attn")
MIXER = "mixer"  # whatever a layer has, where it has but one part
RECURRENT_NAMES = ("linear_attn", "conv", "mamba", MIXER, "self_attn")
LATENT_QUERIES = "q_a_proj"  # the first of two projections, where queries have a latent too


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
        raise unsupported(model, "its decoder has no list of layers called `layers`")
    rotary = next((found for name in ROTARY_NAMES if (found := getattr(decoder, name, None)) is not None), None)
    if rotary is None and not is_recurrent(config):  # beside states, attention may do without positions
        raise unsupported(
            model, "it has no rotary position embedding (`rotary_emb`), so that stored keys cannot be moved"
        )
    num_states, layers = _num_states(config), layers[: config.num_hidden_layers]
    hybrid = [index for index in num_states if config.layer_types[index] in HYBRID]
    sites = [
        _recurrent_site(model, layer, index, num_states[index])
        if index in num_states and index not in hybrid
        else _layer_site(model, config, layer, index, rotary, projections)
        for index, layer in enumerate(layers)
    ]
    for index in hybrid:
        beside = _recurrent_site(model, layers[index], index, num_states[index])
        sites.append(dataclasses.replace(beside, beside=index))
    is_known = config.model_type in TESTED_FAMILIES | CAUSAL_FAMILIES
    site = DecoderSite(tuple(sites), _max_positions(config), is_known)
    if config.model_type not in TESTED_FAMILIES and next(model.parameters()).device.type != "meta":
        check_embeddings_are_taken(model)
        site = check_keys_move(model, site)
        if site.is_recurrent:
            site = check_states_go_on(model, site)
    return site


def _num_states(config: Any) -> dict[int, int]:
    """Of each layer that transformers keeps a state for, or nothing, how many states of a kind."""
    if not is_recurrent(config):
        return {}
    found = {}
    for index, (layer, kind) in enumerate(zip(DynamicCache(config=config).layers, config.layer_types, strict=True)):
        if kind in FEED_FORWARD:
            found[index] = 0
        elif hasattr(layer, "number_of_states"):
            found[index] = layer.number_of_states
    return found


def _recurrent_site(model: PreTrainedModel, layer: nn.Module, index: int, num_states: int) -> LayerSite:
    mixer = next((found for name in RECURRENT_NAMES if (found := getattr(layer, name, None)) is not None), None)
    if num_states == 0:
        return LayerSite(mixer or layer, layer, (), None, num_states=0, state_shapes=())
    if mixer is None or not hasattr(mixer, "layer_idx") or not takes_cache(type(mixer)):
        raise unsupported(
            model,
            f"layer {index} carries a state, by no module called {' or '.join(RECURRENT_NAMES)} that takes a cache",
        )
    return LayerSite(mixer, mixer, (), None, num_states=num_states)


def _layer_site(
    model: PreTrainedModel,
    config: Any,
    layer: nn.Module,
    index: int,
    rotary: nn.Module | None,
    projections: Sequence[str],
) -> LayerSite:
    names = (*ATTENTION_NAMES, MIXER) if is_recurrent(config) else ATTENTION_NAMES
    attention = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    if attention is None:
        raise unsupported(model, f"layer {index} has no attention module called {' or '.join(names)}")
    if getattr(config, "num_kv_shared_layers", 0) and attention.is_kv_shared_layer:
        rope, window = _layer_rope(model, config, attention, index, rotary), _window(config, index)
        own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
        lender = max(place for place, kind in enumerate(own) if kind == config.layer_types[index])
        return LayerSite(attention, attention, (), rope, window, num_states=0, state_shapes=(), lender=lender)
    sites = tuple(_projection_sites(attention, projections))
    found = "".join(site.name for site in sites)
    # Where values are made of keys, the beacon copy of their projection serves both.
    if missing := [
        name for name in projections if name not in found and not (name == "v" and values_are_keys(attention))
    ]:
        raise unsupported(
            model, f"layer {index} has no projection {', '.join(missing)} of its own that could be replaced"
        )
    return LayerSite(
        attention, attention, sites, _layer_rope(model, config, attention, index, rotary), _window(config, index)
    )


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


def _layer_rope(
    model: PreTrainedModel, config: Any, attention: nn.Module, index: int, rotary: nn.Module | None
) -> Rope | None:
    if rotary is None or not getattr(attention, "use_rope", True):
        return None
    names = getattr(config, "layer_types", None)
    layer_type = names[index] if names and hasattr(rotary, f"{names[index]}_inv_freq") else None
    frequencies = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    if not hasattr(rotary, frequencies):
        raise unsupported(model, f"its rotary embedding has no `{frequencies}`")
    if hasattr(attention, EXPANDS):
        return latent_rope(rotary, frequencies)
    layout = rotary_layout(rotary, frequencies, layer_type)
    if layout is None:
        raise unsupported(model, "its rotary embedding lays out its cosines in a way that is not known")
    return LayerRope(rotary, frequencies, layout, type(attention).__module__)


def _window(config: Any, index: int) -> int | None:
    """The window of a layer of a known family; configurations of others may name one that nobody heeds."""
    names = getattr(config, "layer_types", None)
    by_type = config.model_type in WINDOWED_BY_TYPE and names and names[index] == SLIDING_ATTENTION
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
        raise unsupported(model, "beacons need a decoder with a language modelling head (AutoModelForCausalLM)")
    if getattr(config, "index_topk", None):
        raise unsupported(
            model, "its layers choose what they attend to, by keys of their own that are kept apart (sparse attention)"
        )
    types = layer_types(config)
    keyless = RECURRENT | FEED_FORWARD if is_recurrent(config) else RECURRENT
    if strange := sorted(types - {FULL_ATTENTION, SLIDING_ATTENTION} - HYBRID - keyless):
        raise unsupported(
            model,
            f"its layers are of type {', '.join(strange)}; beacons need those that keep keys and values of every token, or a state",
        )
    if getattr(model, "_is_stateful", False) and not types - keyless:
        raise unsupported(
            model,
            "it is recurrent (linear attention or state space), and no layer of it is said to hold keys and values",
        )
    if "dynamic" in _rope_types(config):
        raise unsupported(
            model, "dynamic NTK scaling changes its frequencies with the length, so that keys cannot be moved"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise unsupported(model, "its tokens see those that follow them")
    if getattr(config, "hidden_size_per_layer_input", 0) and not decoder_inputs.has_layer_embeddings(
        model.get_decoder()
    ):
        raise unsupported(model, "its layers are given embeddings of the token ids, in a way that is not known")
    if decoder_inputs.has_layer_embeddings(model.get_decoder()) and not decoder_inputs.hands_layer_embeddings_on(model):
        raise unsupported(
            model, "this transformers takes no embeddings for its layers beside those of its input. Update transformers"
        )
    if getattr(config, "num_kv_shared_layers", 0) and config.model_type not in LENDING:
        raise unsupported(model, "some of its layers share the keys and values of others, in a way that is not known")
