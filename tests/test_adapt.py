"""Finding a decoder's layers, projections and rotations, and saying why where there are none."""

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconConfig, attach
from activation_beacon.adapt import find_decoder
from activation_beacon.errors import BeaconError, ConfigError, UnsupportedModelError
from activation_beacon.families import CAUSAL_FAMILIES, TESTED_FAMILIES, WINDOWED, WINDOWED_BY_TYPE
from activation_beacon.trials import check_keys_move, check_states_go_on
from families import ALL_FURTHER, FAMILIES, FULL, MULTIMODAL, ONE_SETTING, RECURRENT, TESTED, WITH_STATES, tiny

QKV = ("q", "k", "v")


def names_of(site) -> list[str]:
    (names,) = {tuple(projection.name for projection in layer.projections) for layer in site.layers}
    return list(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_is_found(family):
    model = tiny(family)
    site = find_decoder(model, QKV)
    assert len(site.layers) == model.config.num_hidden_layers
    assert names_of(site) == (["qkv"] if family == "phi3" else ["q", "k", "v"])
    assert site.max_positions == 512
    for layer, module in zip(site.layers, model.model.layers, strict=True):
        assert layer.attention is module.self_attn
        for projection in layer.projections:
            assert projection.linear in set(module.self_attn.children())


@pytest.mark.parametrize("family", [*FAMILIES, *sorted({*ONE_SETTING} - {"gpt_neox"}), "gemma2"])
def test_the_shape_of_entries_is_that_of_the_models_own_cache(family):
    model = tiny(family)
    cache = model(torch.tensor([[3, 4]]), use_cache=True).past_key_values
    sites = find_decoder(model, QKV).layers
    for index, site in enumerate(sites):
        if site.lender is not None:
            continue
        layer = cache.layers[index if site.beside is None else site.beside]
        if site.num_states == 0:
            assert site.state_shapes == ()
        elif not site.has_entries:
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            assert site.state_shapes == tuple(None if state is None else state.shape[1:] for state in states)
        else:
            assert site.entry_shapes == tuple((each.shape[1], each.shape[3]) for each in (layer.keys, layer.values))


def test_the_shape_of_entries_is_not_guessed():
    site, due = find_decoder(tiny("llama"), QKV), ((2, 8), (2, 8))
    attention = site.layers[0].attention
    attention.v_proj = nn.Linear(32, 24)
    assert site.entry_shapes == (None, due, due)
    del site.layers[1].attention.head_dim
    attention.k_proj = attention.v_proj = nn.Linear(32, 20)
    assert site.entry_shapes == (None, None, due)


def test_all_known_families_are_tested():
    assert set(TESTED) == TESTED_FAMILIES
    text_models = {tiny(name).config.get_text_config(decoder=True).model_type for name in MULTIMODAL}
    named = {own.get("model_type", name) for name, own in ALL_FURTHER.items()}
    assert {*named, *text_models} - TESTED_FAMILIES == CAUSAL_FAMILIES
    assert WINDOWED | WINDOWED_BY_TYPE <= TESTED_FAMILIES | CAUSAL_FAMILIES


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES | CAUSAL_FAMILIES))
def test_windows_that_a_family_has_by_default_are_heeded(family):
    """A model would be taken to see all that its windows hide."""
    if family not in CONFIG_MAPPING:
        pytest.skip("an older transformers has it not")
    config = CONFIG_MAPPING[family]()
    has_windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    assert not has_windows or family in WINDOWED_BY_TYPE


def test_layers_without_positions_are_found():
    ropes = find_decoder(tiny("cohere2"), QKV).ropes
    assert [rope is None for rope in ropes] == [False, True, False]
    assert not any(rope is None for rope in find_decoder(tiny("olmo3"), QKV).ropes)


@pytest.mark.parametrize(
    ("projections", "expected"),
    [(("k",), ["k"]), (("q", "v"), ["q", "v"]), (("q", "k", "v", "o"), ["q", "k", "v", "o"]), (("o",), ["o"])],
)
def test_only_what_is_asked_for_is_found(projections, expected):
    assert names_of(find_decoder(tiny("llama"), projections)) == expected


def test_fused_projections_come_as_a_whole():
    assert names_of(find_decoder(tiny("phi3"), ("q", "k", "v", "o"))) == ["qkv", "o"]
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 has no projection q, k of its own that could be replaced"
    ):
        find_decoder(tiny("phi3"), ("q", "k"))


@pytest.mark.parametrize("family", [*ONE_SETTING, "gemma2"])
def test_families_that_are_not_known_by_name_are_put_to_the_test(family):
    model = tiny(family)
    site = find_decoder(model, QKV)
    assert sum(layer.beside is None for layer in site.layers) == len(model.get_decoder().layers)
    check_keys_move(model, site, tolerance=1e-4)
    if family in WITH_STATES:
        assert site.is_recurrent
        check_states_go_on(model, site, tolerance=1e-4)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        (
            "jamba",
            {"attn_layer_period": 2, "attn_layer_offset": 1},
            r"a text read in two pieces misses the same read in one by \d+%",
        ),
        ("minimax", {"layer_types": [RECURRENT, FULL, RECURRENT]}, "a trial pass with an ordinary cache failed"),
        (
            "recurrent_gemma",
            {},
            "layer 0 carries a state, by no module called linear_attn or conv or mamba or mixer or self_attn that|it is recurrent",
        ),
    ],
)
def test_states_that_cannot_be_gone_on_from_are_refused(family, settings, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        find_decoder(tiny(family, **settings), QKV)


def test_attention_may_do_without_positions_beside_states():
    assert find_decoder(tiny("kimi_linear"), QKV).ropes == (None,) * 4


def test_a_family_that_fails_the_test_is_refused_by_name():
    model = tiny("llama")
    model.config.model_type = "llama-with-a-twist"
    rotary = model.model.rotary_emb
    find_decoder(model, QKV)
    site = find_decoder(model, QKV)
    forward = type(rotary).forward
    rotary.forward = lambda hidden, position_ids: forward(rotary, hidden, position_ids * position_ids)
    assert site.ropes[0].rotary is rotary
    with pytest.raises(
        UnsupportedModelError,
        match=r"^LlamaForCausalLM cannot carry beacons: moving the keys of layer 0 by rotation misses its own keys by \d",
    ):
        check_keys_move(model, site)


def test_a_family_that_scales_only_what_it_looks_up_itself_is_refused():
    model = tiny("diffllama")
    find_decoder(model, QKV)
    decoder, forward = model.model, type(model.model).forward

    def scaled(input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is None:
            inputs_embeds = 3 * decoder.embed_tokens(input_ids)
        return forward(decoder, inputs_embeds=inputs_embeds, **options)

    decoder.forward = scaled
    with pytest.raises(
        UnsupportedModelError, match=r"it makes of embeddings not what it makes of their ids, but misses that by \d"
    ):
        find_decoder(model, QKV)


def test_the_trial_leaves_the_model_as_it_was():
    model = tiny("glm4").train()
    find_decoder(model, QKV)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


OBSTACLES = {
    "sparse attention": (
        {"index_topk": 4},
        "its layers choose what they attend to, by keys of their own that are kept apart (sparse attention)",
    ),
    "linear layers": (
        {"layer_types": ["linear_attention", "full_attention", "chunked_attention"]},
        "its layers are of type chunked_attention; beacons need those that keep keys and values of every token, or a state",
    ),
    "dynamic scaling": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic NTK scaling changes its frequencies with the length, so that keys cannot be moved",
    ),
    "shared keys": ({"num_kv_shared_layers": 1}, "some of its layers share the keys and values of others"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_served_is_refused_with_the_reason(name):
    changes, reason = OBSTACLES[name]
    model = tiny("llama")
    for field, value in changes.items():
        setattr(model.config, field, value)
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model, BeaconConfig(chunk_size=16, ratios=(2,)))
    text = str(caught.value)
    assert text.startswith(f"LlamaForCausalLM cannot carry beacons: {reason}")
    assert text.endswith(f"Tested families: {', '.join(sorted(TESTED_FAMILIES))}.")
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, NotImplementedError)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "its decoder has no list of layers called `layers`"),
        ("opt", "it has no rotary position embedding"),
        ("mamba", "it is recurrent"),
    ],
)
def test_other_architectures_are_refused(family, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        find_decoder(tiny(family, head_dim=None) if family == "mamba" else tiny(family), QKV)


def test_parts_that_are_missing_are_named():
    model = tiny("llama")
    model.model.layers[1].self_attn.k_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has no projection k of its own that could be replaced\."):
        find_decoder(model, QKV)
    model = tiny("llama")
    model.model.layers[2].mixer = model.model.layers[2].self_attn
    del model.model.layers[2].self_attn
    with pytest.raises(
        UnsupportedModelError, match="layer 2 has no attention module called self_attn or attention or attn"
    ):
        find_decoder(model, QKV)
    model = tiny("llama")
    del model.model.rotary_emb
    with pytest.raises(UnsupportedModelError, match=r"it has no rotary position embedding \(`rotary_emb`\)"):
        find_decoder(model, QKV)


def test_longrope_ends_where_its_frequencies_change():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, **factors}
    model = tiny("phi3", rope_parameters=rope, partial_rotary_factor=1.0, original_max_position_embeddings=64)
    assert find_decoder(model, QKV).max_positions == 64


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"chunk_size": 480, "ratios": (2, 4, 8)}, 540),
        ({"chunk_size": 512, "ratios": (2,)}, 768),
        ({"chunk_size": 256, "ratios": (2, 256), "local_tokens": 300}, 557),
        ({"chunk_size": 256, "ratios": (256,), "num_sinks": 256, "local_tokens": 1}, 514),
    ],
)
def test_a_chunk_that_does_not_fit_the_positions_is_refused(settings, needed):
    with pytest.raises(ConfigError) as caught:
        attach(tiny("llama"), BeaconConfig(**settings))
    text = str(caught.value)
    assert f" takes {needed} positions; the base model has 512." in text
    fits_alone = needed - settings.get("local_tokens", 0) <= 512
    assert text.endswith("Use fewer local tokens." if fits_alone else "Use a smaller chunk_size.")
    assert (", 300 local tokens takes" in text) == ("num_sinks" not in settings and "local_tokens" in settings)
    assert (", 256 sinks, 1 local tokens takes" in text) == ("num_sinks" in settings)


def test_a_chunk_that_just_fits_is_read():
    model = attach(tiny("llama"), BeaconConfig(chunk_size=256, ratios=(2, 256), local_tokens=255))
    ids = torch.full((1, 512), 7)
    cache = model.compress(ids)
    assert len(cache.rows[0].chunks) == 1
    assert cache.cache_length <= 512
