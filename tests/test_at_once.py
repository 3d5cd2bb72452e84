import dataclasses

import pytest
import torch

from activation_beacon import BeaconConfig, at_once
from activation_beacon.at_once import chunks_at_once
from activation_beacon.errors import ConfigError, InputError, RatioError, UnsupportedError
from activation_beacon.sites import AT_ONCE
from families import EAGER_ONLY, FAMILIES, ONE_SETTING, VOCABULARY, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)
ANCHORED = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3, anchored=True)
EXACT = dataclasses.replace(ANCHORED, placement="append", exact_ids=tuple(range(0, VOCABULARY, 31)))
RATIOS = (4, 2, 8, 4)
CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
CASES = [(family, attention) for family, attention in CASES if attention == "eager" or family not in EAGER_ONLY]
FURTHER_CASES = [(family, attention, EXACT) for family in ONE_SETTING for attention in ("sdpa", "eager")]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.beacon_parameters()}


def hidden_chunk_by_chunk(model, ids, ratios):
    """Hidden states of the raw tokens before the head, as the loop over chunks makes them."""
    seen = []
    # Some scale them down before the head rather than the logits after it.
    scale = model.config.logits_scaling if model.config.model_type == "minicpm3" else 1
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(ids, labels=ids, beacon_ratio=ratios)
    finally:
        handle.remove()
    return torch.cat(seen, dim=1) * scale


@pytest.mark.parametrize(
    ("family", "attention", "config"),
    [
        *((*case, CONFIG) for case in CASES),
        *FURTHER_CASES,
        *(("llama", "sdpa", config) for config in (ANCHORED, EXACT)),
        ("phi3", "eager", ANCHORED),
        ("phi3", "eager", EXACT),
    ],
)
def test_all_chunks_at_once_equal_the_loop_over_chunks(family, attention, config):
    model = with_beacons(family, config, attention=attention).train()
    ids = random_ids(4 * CHUNK + 5, batch=2)
    expected = hidden_chunk_by_chunk(model, ids, RATIOS)
    with chunks_at_once(model):
        got = model.hidden_states(ids, RATIOS)
        weights = torch.randn_like(got)
        ours = gradients(model, (got * weights).sum())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    theirs = gradients(model, (expected * weights).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize("tail", [1, 5])
@pytest.mark.parametrize("family", [family for family, attention in CASES if attention == "sdpa"])
def test_masks_that_are_told_give_the_same_states_and_gradients(family, tail, monkeypatch):
    model = with_beacons(family, CONFIG, attention="sdpa").train()
    ids = random_ids(4 * CHUNK + tail, batch=2)
    seen = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(at_once, "TOLD_WITH_GRADIENTS", devices)
        with chunks_at_once(model):
            states = model.hidden_states(ids, RATIOS)
            seen.append({"states": states.detach(), **gradients(model, states.square().sum())})
    for name, written in seen[0].items():
        torch.testing.assert_close(seen[1][name], written, atol=1e-4 * float(written.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("family", "attention", "config"),
    [
        ("gemma3_text", "sdpa", CONFIG),
        ("gemma3_text", "eager", CONFIG),
        ("gemma3_text", "sdpa", ANCHORED),
        ("gemma4-small", "sdpa", ANCHORED),
        ("falcon_h1", "sdpa", EXACT),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(family, attention, config):
    model = with_beacons(family, config, attention=attention).train()
    ids = random_ids(4 * CHUNK + 5)
    with chunks_at_once(model):
        plain = gradients(model, model.hidden_states(ids, RATIOS).square().sum())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = gradients(model, model.hidden_states(ids, RATIOS).square().sum())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4, msg=name)


def test_a_window_that_attention_is_not_told_of_is_refused_where_the_family_is_not_known():
    model, ids = with_beacons("qwen2_moe", CONFIG, attention="sdpa"), random_ids(2 * CHUNK + 5)
    model._beacon.site = dataclasses.replace(model._beacon.site, is_known=False)
    with chunks_at_once(model):
        with pytest.raises(
            UnsupportedError, match=r"^The configuration names a window of 24 tokens, and Qwen2MoeAttention is not told"
        ):
            model.hidden_states(ids, (4, 2))
        model.config.sliding_window = 500
        model.hidden_states(ids, (4, 2))


def test_gradient_checkpointing_is_refused_where_layers_keep_what_they_are_told():
    model, ids = with_beacons("nemotron", CONFIG, attention="sdpa").train(), random_ids(4 * CHUNK + 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with chunks_at_once(model):
        with pytest.raises(
            UnsupportedError, match=r"^Layers of NemotronForCausalLM do not hand .* Leave gradient checkpointing off"
        ):
            model.hidden_states(ids, RATIOS)
        model.eval().hidden_states(ids, RATIOS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_within_the_block_everything_else_stays_as_it_was(attention):
    model = with_beacons("mistral", CONFIG, attention=attention)
    ids = random_ids(3 * CHUNK + 2)
    mask = torch.ones_like(ids)
    calls = {
        "base": lambda: model(ids[:, :CHUNK], attention_mask=mask[:, :CHUNK]).logits,
        "beacons": lambda: model(ids, beacon_ratio=4).logits,
        "generate": lambda: model.generate(ids, attention_mask=mask, beacon_ratio=4, max_new_tokens=3, do_sample=False),
    }
    outside = {name: call() for name, call in calls.items()}
    with chunks_at_once(model):
        assert model.config._attn_implementation == AT_ONCE + attention
        for name, call in calls.items():
            assert torch.equal(call(), outside[name]), name
    assert model.config._attn_implementation == attention


def test_the_block_is_left_as_it_was_found_after_an_error_too():
    model = with_beacons("llama", CONFIG)
    with (
        pytest.raises(RatioError, match="ratio names 1 chunk, but the text of 40 tokens closes 2"),
        chunks_at_once(model),
    ):
        model.hidden_states(random_ids(40), (4,))
    assert model.config._attn_implementation == "eager"


def test_chunks_of_another_size_equal_those_of_a_model_made_for_them():
    model = with_beacons("llama", CONFIG)
    other = with_beacons("llama", BeaconConfig(chunk_size=2 * CHUNK, ratios=(2, 4, 8), num_sinks=3))
    ids = random_ids(70)
    with chunks_at_once(model):
        got = model.hidden_states(ids, (4, 2), chunk_size=2 * CHUNK)
    with chunks_at_once(other):
        expected = other.hidden_states(ids, (4, 2))
    assert torch.equal(got, expected)


def test_training_does_not_depend_on_local_tokens():
    model, ids = with_beacons("llama", CONFIG), random_ids(3 * CHUNK + 5)
    states = []
    for number in (0, 5, 2 * CHUNK):
        model.local_tokens = number
        with chunks_at_once(model):
            states.append(model.hidden_states(ids, (4, 2, 8)))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_text_of_one_chunk_is_read_as_the_base_reads_it():
    model = with_beacons("llama", CONFIG)
    ids = random_ids(CHUNK)
    with chunks_at_once(model):
        got = model.hidden_states(ids, ())
    with model.beacon_disabled():
        expected = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_that_cannot_be_handed_a_chunk_is_refused_by_name(name):
    model = with_beacons("llama", CONFIG)
    model.config._attn_implementation = name
    refused = pytest.raises(UnsupportedError, match=rf"attn_implementation \({name}\) cannot read all chunks")
    with refused, chunks_at_once(model):
        pass


@pytest.mark.parametrize(
    ("ids", "ratios", "options", "error", "text"),
    [
        (torch.tensor([[1, 97]]), (), {}, InputError, r"Token ids must be within 0\.\.96; got 97"),
        (torch.zeros((1, 0), dtype=torch.long), (), {}, InputError, "The text is empty"),
        (random_ids(40), (3, 3), {}, RatioError, r"ratio \(3\) must divide chunk_size"),
        (
            random_ids(40),
            (4, 4),
            {"chunk_size": 12},
            ConfigError,
            r"chunk_size \(12\) must be divisible by every ratio",
        ),
    ],
)
def test_bad_input_is_refused(ids, ratios, options, error, text):
    model = with_beacons("llama", CONFIG)
    with chunks_at_once(model), pytest.raises(error, match=text):
        model.hidden_states(ids, ratios, **options)
