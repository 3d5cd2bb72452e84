"""The package against the slow reference, at every decode step; and first the reference against the authors' numbers."""

import functools

import pytest
import torch

from activation_beacon import BeaconConfig
from families import (
    EAGER_ONLY,
    GOLDEN_CASES,
    ONE_SETTING,
    TESTED,
    beacon_tensors,
    golden,
    random_ids,
    tiny,
    with_beacons,
)
from reference import Reference, is_latent, lay_out

TOLERANCE = 1e-4
ROUNDING = {"bailing_hybrid": 5e-4}  # its base alone, read in two pieces, differs by 2e-4 from the same read in one
CHUNK = 32
PROMPT, STEPS = (
    84,
    22,
)  # the third chunk is full at 96 tokens, and closed when the 97th is read (the 102nd with 5 local ones)


def close(measured, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance)


def reference_of(family, model, seed=0, **overrides):
    config = model.beacon_config
    return Reference(
        tiny(family, seed, **overrides),
        beacon_tensors(model),
        chunk_size=config.chunk_size,
        num_sinks=config.num_sinks,
        placement=config.placement,
        local_tokens=config.local_tokens,
        exact_ids=config.exact_ids,
    )


def check_cache(cache, expected, attention=(), tolerance=TOLERANCE):
    """Compare what is held, and what attention makes of it where that is something else."""
    assert cache.cache_length == next(keys for keys in expected.keys if keys is not None).shape[1]
    for index, (layer, *wanted) in enumerate(zip(cache.layers, expected.keys, expected.values, strict=True)):
        if index in expected.states:
            for state, due in zip((layer.state, layer.settled), expected.states[index], strict=True):
                tensors = [tensor for _, tensor in state.named_tensors()]
                assert len(tensors) == len(due)
                for tensor, one in zip(tensors, due, strict=True):
                    close(tensor, one, tolerance)
            continue
        if wanted[0] is None:
            assert not list(layer.named_tensors())
            continue
        held = (layer.keys, layer.values)
        if attention and is_latent(attention[index]):
            held = attention[index].expand_kv(*held)
        seen = cache.cache_length - cache.rows[0].entries_within(layer.window)  # from here on, by what is still to come
        close(held[0][0], wanted[0][:, seen:], tolerance)
        close(held[1][0], wanted[1][:, seen:], tolerance)


@torch.no_grad()
def check_every_step(model, reference, ratio, *, prompt=PROMPT, steps=STEPS, seed=0, tolerance=TOLERANCE):
    """Decode greedily, and compare logits and all that is held after each token."""
    text = random_ids(prompt, seed)
    attention = [layer.attention for layer in model._beacon.site.layers]
    cache = model.compress(text[:, :-1], ratio=ratio)
    check_cache(cache, reference(text[:, :-1], ratio), attention, tolerance)
    closed_before = len(cache.ratios)
    for _ in range(steps):
        logits = model(text[:, -1:], past_key_values=cache).logits[0, -1]
        expected = reference(text, ratio)
        close(logits, expected.logits[-1], tolerance)
        check_cache(cache, expected, attention, tolerance)
        text = torch.cat((text, logits.argmax().view(1, 1)), dim=1)
    assert len(cache.ratios) == closed_before + 1
    assert cache.tokens_seen == prompt + steps - 1


# --- the reference itself ----------------------------------------------------------------------------------------------


def test_there_are_seven_golden_cases():
    assert len(GOLDEN_CASES) == 7


@pytest.mark.parametrize("name", GOLDEN_CASES)
@torch.no_grad()
def test_the_reference_meets_the_authors_numbers(name):
    case = golden(name)
    config, tensors = case.config, case.tensors
    reference = Reference(
        case.base,
        case.beacons,
        chunk_size=config.chunk_size,
        num_sinks=config.num_sinks,
        placement=config.placement,
        local_tokens=0,
    )
    result = reference(case.ids, case.ratios)
    nll = torch.nn.functional.cross_entropy(result.logits[:-1], case.ids[0, 1:], reduction="none")
    first = nll.shape[0] - tensors["nll"].shape[0]  # appended beacons: the first chunk is left out
    assert first in ((0, config.chunk_size) if config.placement == "append" else (0,))
    close(nll[first:], tensors["nll"])
    close(nll[first:].mean(), tensors["loss"].squeeze())
    close(result.logits[-tensors["last_logits"].shape[0] :], tensors["last_logits"])
    num_sinks = config.num_sinks if case.ratios else 0
    num_beacons = tensors["memory_keys"].shape[2] if case.ratios else 0
    for layer, (keys, values) in enumerate(zip(result.unrotated_keys, result.values, strict=True)):
        memory = slice(num_sinks, num_sinks + num_beacons)
        if num_beacons:
            close(keys[:, memory], tensors["memory_keys"][layer])
            close(values[:, memory], tensors["memory_values"][layer])
        if num_sinks:
            close(keys[:, :num_sinks], tensors["sink_keys"][layer])
            close(values[:, :num_sinks], tensors["sink_values"][layer])


def test_a_layout_by_hand():
    layout = lay_out(9, chunk_size=4, ratios=[2, 4], num_sinks=1)
    b = None
    assert layout.token == [0, 1, b, 2, 3, b, 4, 5, 6, 7, b, 8]
    assert layout.chunk == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert layout.read_at == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 4]
    assert layout.held_at == [0, b, 1, b, b, 2, b, b, b, b, 3, b]
    assert layout.anchor == [0, 1, 1, 3, 4, 4, 6, 7, 8, 9, 9, 11]


def test_an_appended_layout_with_raw_tokens_by_hand():
    layout = lay_out(5, chunk_size=4, ratios=[2], placement="append", raw=[(1, 4)])
    b = None
    assert layout.token == [0, 1, 2, 3, b, b, 4]
    assert layout.read_at == [0, 1, 2, 3, 4, 5, 4]
    assert layout.held_at == [b, 0, 1, 2, 3, b, b]  # the second beacon's unit is raw
    assert layout.anchor == [0, 1, 2, 3, 1, 3, 6]


def test_an_exact_layout_by_hand():
    ids = [*range(12), 99, *range(13, 24), 7]  # 99 is exact, and two tokens to each side of it
    layout = lay_out(25, chunk_size=24, ratios=[2], placement="append", ids=ids, exact_ids=[99])
    assert layout.anchor[24:36] == [1, 4, 7, 9, 10, 11, 12, 13, 14, 17, 20, 23]
    full = lay_out(25, chunk_size=24, ratios=[3], placement="append", ids=ids, exact_ids=[99])
    assert full.anchor[24:32] == [2, 5, 8, 11, 14, 17, 20, 23]  # five tokens are more than half of eight beacons


@pytest.mark.parametrize("length", [4, 5])
def test_a_full_chunk_stays_raw_until_a_further_token_is_read(length):
    assert len(lay_out(length, chunk_size=4, ratios=[2]).token) == (4 if length == 4 else 7)
    assert len(lay_out(length + 3, chunk_size=4, ratios=[2], local_tokens=3).token) == (7 if length == 4 else 10)


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_the_reference_of_a_short_text_is_the_base_model(family):
    reference = Reference(tiny(family), {"embedding": torch.zeros(32)}, chunk_size=CHUNK)
    ids = random_ids(CHUNK)
    close(reference(ids, 2).logits, tiny(family)(ids).logits[0])


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_what_was_compressed_matters_to_what_follows(family):
    """Otherwise the comparisons below would show nothing."""
    model = with_beacons(family, BeaconConfig(chunk_size=CHUNK))
    reference, ids = reference_of(family, model), random_ids(70)
    other = ids.clone()
    other[0, 40] = 3 + (ids[0, 40] - 2) % 90
    assert (reference(ids, 8).logits[-1] - reference(other, 8).logits[-1]).abs().max() > 0.01


# --- the package against it --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _pair(family, num_sinks, attention, anchored=False):
    config = BeaconConfig(chunk_size=CHUNK, num_sinks=num_sinks, anchored=anchored)
    model = with_beacons(family, config, attention=attention)
    return model, reference_of(family, model)


@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("family", TESTED)
def test_every_family_ratio_and_sink_at_every_step(family, num_sinks, ratio):
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    check_every_step(*_pair(family, num_sinks, attention), ratio, seed=ratio)


@pytest.mark.parametrize("ratio", [2, 8, 32])
@pytest.mark.parametrize("family", TESTED)
def test_every_family_with_anchored_beacons_at_every_step(family, ratio):
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    check_every_step(*_pair(family, 4, attention, anchored=True), ratio, seed=ratio)


@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("family", [*TESTED, "mistral-full"])
def test_mixed_ratios_at_every_step_in_eager_attention(family, num_sinks):
    check_every_step(*_pair(family, num_sinks, "eager"), [2, 32, 8], seed=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ONE_SETTING)
def test_further_families_at_every_step(family, attention):
    config = BeaconConfig(chunk_size=CHUNK, num_sinks=4, anchored=True, placement="append", exact_ids=(10, 40))
    model = with_beacons(family, config, attention=attention)
    tolerance = ROUNDING.get(family, TOLERANCE)
    check_every_step(
        model, reference_of(family, model), 4, steps=16, seed=2, tolerance=tolerance
    )  # two behind the third chunk


@pytest.mark.parametrize("family", ["llama-yarn", "llama-llama3", "llama-biases", "llama-deep", "mistral-full"])
def test_variants_of_a_family_at_every_step(family):
    check_every_step(*_pair(family, 4, "sdpa"), 8, seed=2)


SETTINGS = [
    {"placement": "append"},
    {"placement": "append", "num_sinks": 4},
    {"local_tokens": 5},
    {"local_tokens": 5, "num_sinks": 4},
    {"projections": ("q", "k", "v", "o")},
    {"projections": ("v",)},
    {"num_sinks": CHUNK},
    {"anchored": True, "local_tokens": 5, "projections": ("q", "k", "v", "o")},
    {"anchored": True, "placement": "append", "num_sinks": 4},
    {"anchored": True, "placement": "append", "num_sinks": 4, "exact_ids": (10, 40)},
    {"anchored": True, "placement": "append", "local_tokens": 5, "exact_ids": range(3, 40)},
    {"placement": "append", "local_tokens": 40, "num_sinks": 1, "projections": ("q", "k", "v", "o")},
]


def is_possible(family, settings):
    """Fused projections have a beacon copy together or not at all."""
    return family != "phi3" or {"q", "k", "v"} <= set(settings.get("projections", "qkv"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(family, settings, id=f"{family}-{number}")
        for family in ("llama", "llama-biases", "gpt_oss", "phi3")
        for number, settings in enumerate(SETTINGS)
        if is_possible(family, settings)
    ],
)
def test_every_setting_at_every_step(family, settings):
    model = with_beacons(family, BeaconConfig(chunk_size=CHUNK, **settings))
    reference = reference_of(family, model)
    prompt = PROMPT + settings.get("local_tokens", 0)
    check_every_step(model, reference, [4, 16, 2], prompt=prompt, seed=3)


@pytest.mark.parametrize("family", TESTED)
def test_the_logits_of_all_tokens_of_a_long_text(family):
    model, reference = _pair(family, 4, "eager")
    ids = random_ids(5 * CHUNK + 7, seed=4)
    with torch.no_grad():
        output, expected = model(ids, beacon_ratio=[4, 2, 16, 32, 8]), reference(ids, [4, 2, 16, 32, 8])
    close(output.logits[0], expected.logits)
    check_cache(output.past_key_values, expected)
