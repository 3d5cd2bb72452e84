"""The face: golden numbers, the base untouched, attaching and detaching, ratios, gradients, batches, refusals."""

import contextlib
import copy
import inspect
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from activation_beacon import BeaconCache, BeaconConfig, attach, detach
from activation_beacon.config import is_same_fingerprint
from activation_beacon.errors import (
    AttachError,
    CapacityError,
    ConfigError,
    InputError,
    MismatchError,
    RatioError,
    UnsupportedError,
    UnsupportedModelError,
)
from activation_beacon.exact import anchor_tokens
from families import (
    EAGER_ONLY,
    GOLDEN_CASES,
    IN_TURN,
    SIZES,
    TESTED,
    VOCABULARY,
    beacon_tensors,
    golden,
    random_ids,
    randomize,
    tiny,
    with_beacons,
)
from reference import Reference

CHUNK = 16
RATIOS = (2, 4, 8, 16)
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS)
SINKS = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, num_sinks=2)


def close(measured, expected, tolerance=1e-4):
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance, equal_nan=True)


def reference_of(model, base, beacons=None):
    config = model.beacon_config
    return Reference(
        base,
        beacon_tensors(model) if beacons is None else beacons,
        chunk_size=config.chunk_size,
        num_sinks=config.num_sinks,
        placement=config.placement,
        local_tokens=config.local_tokens,
        exact_ids=config.exact_ids,
    )


def same_cache(cache, other, tolerance=1e-5):
    assert cache.rows == other.rows
    assert torch.equal(cache.token_ids, other.token_ids)
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        close(layer.keys, expected.keys, tolerance)
        close(layer.values, expected.values, tolerance)


def padded(rows, *, side):
    """Ids and mask (B, N) of rows of ids."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = row, 1
    return ids, mask


# --- the authors' numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_losses_are_those_of_the_authors(name):
    case = golden(name)
    model, tensors = case.attached(), case.tensors
    output = model(case.ids, labels=case.ids, beacon_ratio=case.ratios or None)
    first = output.nll.shape[1] - tensors["nll"].shape[0]
    assert first == (case.config.chunk_size if case.config.placement == "append" else 0)
    close(output.nll[0, first:], tensors["nll"])
    close(output.nll[0, first:].mean(), tensors["loss"].squeeze())
    if first == 0:
        close(output.loss, tensors["loss"].squeeze())
    close(output.logits[0, -tensors["last_logits"].shape[0] :], tensors["last_logits"])


@pytest.mark.parametrize("name", GOLDEN_CASES)
@torch.no_grad()
def test_what_is_held_is_what_the_authors_hold(name):
    case = golden(name)
    model, tensors = case.attached(), case.tensors
    cache = model.compress(case.ids, ratio=case.ratios or None)
    assert list(cache.ratios) == case.ratios
    tail = case.ids.shape[1] - len(case.ratios) * case.config.chunk_size
    assert (cache.tail_length, cache.tokens_seen) == (tail, case.ids.shape[1])
    num_sinks = case.config.num_sinks if case.ratios else 0
    num_beacons = tensors["memory_keys"].shape[2] if case.ratios else 0
    assert (cache.num_sinks, cache.num_beacons) == (num_sinks, num_beacons)
    if not case.ratios:
        return
    rotate = inspect.getmodule(type(case.base))
    positions = torch.arange(num_sinks + num_beacons)[None]
    for index, layer in enumerate(cache.layers):
        parts = [tensors["sink_keys"][index]] if num_sinks else []
        plain = torch.cat([*parts, tensors["memory_keys"][index]], dim=1)[None]
        cos, sin = case.base.model.rotary_emb(plain, positions)
        close(layer.keys[:, :, : num_sinks + num_beacons], rotate.apply_rotary_pos_emb(plain, plain, cos, sin)[1])
        parts = [tensors["sink_values"][index]] if num_sinks else []
        values = torch.cat([*parts, tensors["memory_values"][index]], dim=1)[None]
        close(layer.values[:, :, : num_sinks + num_beacons], values)


# --- the base, bit for bit ---------------------------------------------------------------------------------------------


KINDS = [
    (family, kind) for family in TESTED for kind in ("eager", "sdpa") if kind == "eager" or family not in EAGER_ONLY
]


@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_texts_up_to_a_chunk_are_read_as_the_base_reads_them(family, attention):
    base, model = tiny(family, attention=attention), with_beacons(family, CONFIG, attention=attention)
    for length in (1, 7, CHUNK):
        ids = random_ids(length)
        for use_cache in (True, False):
            assert torch.equal(model(ids, use_cache=use_cache).logits, base(ids, use_cache=use_cache).logits)
        theirs = base(ids, labels=ids)
        ours = model(ids, labels=ids)
        assert torch.equal(ours.logits, theirs.logits)
        if length > 1:
            assert torch.equal(ours.loss, theirs.loss)
            close(ours.nll.mean(), theirs.loss, 1e-6)


@pytest.mark.parametrize("pieces", [[5, *[1] * (CHUNK - 5)], [6, 7, 1, 1, CHUNK - 15]], ids=["steps", "pieces"])
@pytest.mark.parametrize(("family", "attention"), KINDS)
@torch.no_grad()
def test_pieces_and_decode_steps_up_to_a_chunk_are_the_bases(family, attention, pieces):
    base, model = tiny(family, attention=attention), with_beacons(family, CONFIG, attention=attention)
    ids = random_ids(CHUNK)
    theirs, ours = DynamicCache(), model.new_cache()
    for piece in ids.split(pieces, dim=1):
        expected = base(piece, past_key_values=theirs).logits
        assert torch.equal(model(piece, past_key_values=ours).logits, expected)
    assert ours.cache_length == CHUNK


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_short_padded_batches_are_read_as_the_base_reads_them(family, side):
    base, model = tiny(family), with_beacons(family, CONFIG)
    ids, mask = padded([random_ids(n, n)[0] for n in (CHUNK, 3, 11)], side=side)
    assert torch.equal(model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours = model(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(ours.logits, base(ids, attention_mask=mask, position_ids=positions).logits)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first token of a row has nothing before it but padding
        labels[torch.arange(3), mask.argmax(1)] = -100
    ours, theirs = (m(ids, attention_mask=mask, labels=labels) for m in (model, base))
    assert torch.equal(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss, 1e-5)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)])
def test_the_short_loss_is_normalised_as_the_base_does(num_items):
    base, model, ids = tiny("llama"), with_beacons("llama", CONFIG), random_ids(12)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    assert torch.equal(model(ids, labels=ids, **options).loss, base(ids, labels=ids, **options).loss)


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_disabled_it_is_the_base_at_any_length(family):
    base, model, ids = tiny(family), with_beacons(family, CONFIG), random_ids(5 * CHUNK)
    options = {"max_new_tokens": 20, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with model.beacon_disabled():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids, labels=ids).loss, base(ids, labels=ids).loss)
        ours = model.generate(ids, **options)
    theirs = base.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(score, expected) for score, expected in zip(ours.scores, theirs.scores, strict=True))
    assert not torch.equal(model(ids).logits, base(ids).logits)


@torch.no_grad()
def test_disabling_is_undone_by_an_error_and_may_be_nested():
    model, ids = with_beacons("llama", CONFIG), random_ids(40)
    expected = model(ids, beacon_ratio=4).logits
    with pytest.raises(KeyError), model.beacon_disabled(), model.beacon_disabled():
        raise KeyError
    assert torch.equal(model(ids, beacon_ratio=4).logits, expected)


def test_a_disabled_model_refuses_what_needs_beacons():
    model, ids = with_beacons("llama", CONFIG), random_ids(40)
    cache = model.compress(ids)
    with model.beacon_disabled():
        for call in (
            lambda: model.compress(ids),
            lambda: model(ids, past_key_values=cache),
            lambda: model.generate(ids, context=cache, max_new_tokens=2),
        ):
            with pytest.raises(UnsupportedError, match="disabled"):
                call()


@torch.no_grad()
def test_a_cache_of_transformers_is_left_to_the_base():
    base, model, ids = tiny("llama"), with_beacons("llama", CONFIG), random_ids(3 * CHUNK)
    ours = model(ids, past_key_values=DynamicCache())
    assert torch.equal(ours.logits, base(ids).logits)
    with pytest.raises(UnsupportedError, match="cache"):
        model(ids, past_key_values=DynamicCache(), beacon_ratio=4)


# --- attach and detach -------------------------------------------------------------------------------------------------


def traces(model):
    """All that could be left on a model: classes, attributes, hooks, parameters, flags."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            {key: len(value) for key, value in vars(module).items() if "hooks" in key},
            list(module._modules),
            [(key, parameter.requires_grad) for key, parameter in module.named_parameters(recurse=False)],
            [key for key, _ in module.named_buffers(recurse=False)],
            module.training,
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", [*TESTED, "gpt_neox"])
def test_detach_takes_everything_off(family):
    model = tiny(family)
    next(iter(model.parameters())).requires_grad_(False)
    before, weights = traces(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = attach(model, SINKS)
    assert attached is model
    assert traces(model) != before
    model.compress(random_ids(40))
    model(random_ids(40), labels=random_ids(40), beacon_ratio=4).loss.backward()
    assert detach(model) is model
    assert traces(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    ids = random_ids(50)
    assert torch.equal(model(ids).logits, tiny(family)(ids).logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_attaching_that_fails_half_way_leaves_nothing(monkeypatch, calls, error):
    import activation_beacon.attachment as attachment

    made = []

    def failing(*args, **kwargs):
        if len(made) == calls:
            raise error
        made.append(original(*args, **kwargs))
        return made[-1]

    original = attachment.BeaconProjection
    monkeypatch.setattr(attachment, "BeaconProjection", failing)
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(error):
        attach(model, CONFIG)
    assert traces(model) == before
    monkeypatch.undo()
    assert attach(model, CONFIG).compress(random_ids(40)).tokens_seen == 40


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, projections=("v",)), UnsupportedModelError, "no projection v"),
        (BeaconConfig(chunk_size=1024), ConfigError, "512"),
        (BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, base_fingerprint="0" * 16), MismatchError, "0000000000000000"),
    ],
)
def test_a_config_that_does_not_fit_the_model_leaves_nothing(config, error, message):
    model = tiny("phi3")
    before = traces(model)
    with pytest.raises(error, match=message):
        attach(model, config)
    assert traces(model) == before


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_whose_weights_are_elsewhere_is_refused(whole):
    model = tiny("llama")
    (model if whole else model.model.layers[1]).to("meta")
    before = traces(model)
    with pytest.raises(AttachError, match=r"weights are not in memory \(model\..* is on the meta device"):
        attach(model, CONFIG)
    assert traces(model) == before


def test_attach_twice_and_detach_twice_are_refused():
    model = tiny("llama")
    with pytest.raises(AttachError, match=r"carries no beacons\. Call attach"):
        detach(model)
    attach(model, CONFIG)
    with pytest.raises(AttachError, match=r"carries beacons already\. Call detach"):
        attach(model, CONFIG)
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1
    detach(model)
    with pytest.raises(AttachError):
        detach(model)
    assert isinstance(attach(model, CONFIG), LlamaForCausalLM)


def test_an_attached_model_is_still_its_own_class():
    model = with_beacons("llama", CONFIG)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.beacon_config.chunk_size == CHUNK
    parameters = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels", "beacon_ratio"} <= set(parameters)
    assert set(inspect.signature(tiny("llama").forward).parameters) <= set(parameters)


def test_a_forward_of_another_library_is_called_and_given_back():
    model, calls = tiny("llama"), []
    original = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    attach(model, CONFIG)
    model(random_ids(40))
    assert len(calls) == 3  # two chunks and the tail
    assert detach(model).forward is forward


@pytest.mark.parametrize(
    "wrapped",
    [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel, lambda _: torch.nn.Linear(2, 2)],
)
def test_beacons_are_attached_to_models_of_transformers(wrapped):
    model = tiny("llama")
    outer = wrapped(model)
    before = traces(model)
    with pytest.raises(AttachError, match=r"attached to a model of transformers; got .* Give the model inside it"):
        attach(outer, CONFIG)
    assert traces(model) == before


@pytest.mark.parametrize(("eos", "bos", "token"), [(-1, 5, 5), ([], 5, 5), (VOCABULARY, None, 0), ([-1, 7], 5, 7)])
def test_beacons_start_from_the_first_token_of_these_that_there_is(eos, bos, token):
    model = tiny("llama")
    model.config.eos_token_id, model.config.bos_token_id = eos, bos
    assert torch.equal(attach(model, CONFIG).beacon_embedding, model.get_input_embeddings().weight[token])


def test_a_base_in_a_folder_is_known_by_where_it_is(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    model = attach(LlamaForCausalLM.from_pretrained("models/base"), CONFIG)
    assert model.beacon_config.base_model == str(tmp_path / "models" / "base")


def test_untrained_beacons_start_from_the_base():
    model = attach(tiny("qwen2"), CONFIG)
    assert torch.equal(model.beacon_embedding, model.get_input_embeddings().weight[SIZES["eos_token_id"]])
    attention = model.model.layers[1].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert torch.equal(linear.beacon.weight, linear.weight)
        assert torch.equal(linear.beacon.bias, linear.bias)
    assert not hasattr(attention.o_proj, "beacon")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if "beacon" in name}
    assert len(trained) == 1 + 3 * 3 * 2


@pytest.mark.parametrize("placement", ["interleave", "append"])
@torch.no_grad()
def test_untrained_anchored_beacons_hold_what_the_last_tokens_of_their_units_hold(placement):
    config = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, num_sinks=2, anchored=True, placement=placement)
    model, ids = attach(tiny("qwen2"), config), random_ids(CHUNK + 1)
    cache = model.compress(ids, ratio=4)
    layer = model.model.layers[0]
    with model.beacon_disabled():
        values = layer.self_attn.v_proj(layer.input_layernorm(model.get_input_embeddings()(ids)))
    expected = values.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
    held = [0, 1, *range(3, CHUNK, 4), CHUNK]
    torch.testing.assert_close(cache.layers[0].values, expected[:, :, held], rtol=0, atol=1e-5)


@torch.no_grad()
def test_untrained_exact_beacons_hold_numbers_token_by_token():
    ids = random_ids(2 * CHUNK + 1)
    ids[ids == 50] = 51
    ids[0, 5] = 50
    exact = {"anchored": True, "placement": "append", "exact_ids": (50,)}
    model = attach(tiny("qwen2"), BeaconConfig(chunk_size=2 * CHUNK, ratios=RATIOS, **exact))
    held = model.compress(ids, ratio=2)
    raw = model.compress(ids, ratio=2, spans=[(3, 8, None)])
    places = [anchor_tokens(ids[0, : 2 * CHUNK].tolist(), CHUNK, {50}).index(token) for token in range(3, 8)]
    for layer, expected in zip(held.layers, raw.layers, strict=True):
        torch.testing.assert_close(layer.values[:, :, places], expected.values[:, :, :5], rtol=0, atol=1e-5)


def test_exact_ids_beyond_the_vocabulary_are_refused():
    config = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, anchored=True, placement="append", exact_ids=(5, 97))
    with pytest.raises(
        ConfigError, match=r"^exact_ids names 97, but the base model has 97 tokens\. Use digit_ids of its own"
    ):
        attach(tiny("qwen2"), config)


def test_exact_ids_that_name_no_tokens_yet_are_refused():
    config = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, anchored=True, placement="append", exact_ids="digits")
    with pytest.raises(ConfigError, match=r"^exact_ids \(\"digits\"\) names no tokens yet\. Give "):
        attach(tiny("qwen2"), config)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16, torch.uint64])
@torch.no_grad()
def test_ids_may_be_integers_of_any_kind(dtype):
    """Such as token stores hold."""
    model, ids = with_beacons("llama", SINKS), random_ids(60)
    same_cache(model.compress(ids.to(dtype), ratio=4), model.compress(ids, ratio=4), 0)
    assert torch.equal(model(ids.to(dtype), beacon_ratio=4).logits, model(ids, beacon_ratio=4).logits)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@torch.no_grad()
def test_a_copy_is_independent(duplicate):
    model, ids = with_beacons("llama", SINKS), random_ids(60)
    before = model(ids, beacon_ratio=4).logits
    context = model.compress(ids, ratio=4)
    other = duplicate(model)
    assert isinstance(other, type(model))
    assert torch.equal(other(ids, beacon_ratio=4).logits, before)
    same_cache(other.compress(ids, ratio=4), context, 0)
    randomize(other.beacon_parameters(), 5)
    assert torch.equal(model(ids, beacon_ratio=4).logits, before)
    assert not torch.equal(other(ids, beacon_ratio=4).logits, before)
    with pytest.raises(MismatchError, match="another adapter"):
        other.compress(ids, cache=context.fork())
    with other.beacon_disabled():
        assert torch.equal(model(ids, beacon_ratio=4).logits, before)
    detach(other)
    assert not any(vars(m)["_forward_hooks"] or vars(m)["_forward_pre_hooks"] for m in other.modules())
    assert torch.equal(model(ids, beacon_ratio=4).logits, before)
    detach(model)
    assert torch.equal(model(ids).logits, other(ids).logits)


@torch.no_grad()
def test_a_state_dict_brings_base_and_beacons():
    model, ids = with_beacons("qwen3", SINKS), random_ids(60)
    other = attach(tiny("qwen3", seed=3), SINKS)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids, beacon_ratio=4).logits, model(ids, beacon_ratio=4).logits)
    assert other.adapter_fingerprint == model.adapter_fingerprint
    assert other.base_fingerprint == model.base_fingerprint
    names = set(model.state_dict())
    assert set(tiny("qwen3").state_dict()) == {name for name in names if "beacon" not in name}


@torch.no_grad()
def test_the_fingerprint_follows_the_weights():
    """A context of other weights must be refused however they came there."""
    model = with_beacons("llama", SINKS)
    first, base_print = model.adapter_fingerprint, model.base_fingerprint
    other = copy.deepcopy(model)
    assert other.adapter_fingerprint == first
    other = copy.deepcopy(model)
    randomize(other.beacon_parameters(), 5)
    assert other.adapter_fingerprint != first
    model.beacon_embedding.add_(1)
    second = model.adapter_fingerprint
    assert second != first
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)
    assert model.adapter_fingerprint not in (first, second)
    assert model.base_fingerprint != base_print
    before = model.adapter_fingerprint
    assert is_same_fingerprint(model.to(torch.bfloat16).adapter_fingerprint, before)


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_context_is_refused_after_a_step_of_training(is_fused):
    model, text = with_beacons("llama", SINKS), random_ids(40)
    context = model.compress(text, ratio=4)
    parameters = [parameter for _, parameter in model.beacon_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=is_fused)
    model(text, labels=text, beacon_ratio=4).loss.backward()
    optimizer.step()
    with pytest.raises(MismatchError, match="another adapter"):
        model.generate(random_ids(3), context=context, max_new_tokens=2)


def test_attaching_works_in_inference_mode():
    with torch.inference_mode():
        model = with_beacons("llama", SINKS)
        cache = model.compress(random_ids(40), ratio=4)
    same_cache(cache, with_beacons("llama", SINKS).compress(random_ids(40), ratio=4), 0)


# --- threads -----------------------------------------------------------------------------------------------------------


def test_threads_with_contexts_of_their_own_do_not_disturb_each_other():
    model = with_beacons("llama", SINKS)
    base = tiny("llama")
    texts = [random_ids(70, seed) for seed in range(3)]
    start = threading.Barrier(4)

    def compress_and_ask(text, ratio):
        results = []
        for _ in range(4):
            context = model.compress(text, ratio=ratio)
            question = text[:, :9]
            results.append(model.generate(question, context=context, max_new_tokens=12, do_sample=False))
        return results

    def as_the_base(text):
        results = []
        for _ in range(8):
            with model.beacon_disabled(), torch.no_grad():
                results.append(model(text).logits)
        return results

    def at_once(work, *args):
        start.wait()
        return work(*args)

    alone = [compress_and_ask(text, ratio)[0] for text, ratio in zip(texts, (2, 4, 8), strict=True)]
    with ThreadPoolExecutor(4) as pool:
        asking = [
            pool.submit(at_once, compress_and_ask, text, ratio) for text, ratio in zip(texts, (2, 4, 8), strict=True)
        ]
        disabled = pool.submit(at_once, as_the_base, texts[0])
    for future, expected in zip(asking, alone, strict=True):
        assert all(torch.equal(result, expected) for result in future.result())
    with torch.no_grad():
        expected = base(texts[0]).logits
    assert all(torch.equal(logits, expected) for logits in disabled.result())


# --- ratios ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio", [[8, 2, 4], (8, 2, 4), torch.tensor([8, 2, 4]), numpy.array([8, 2, 4]), range(4, 10, 4)], ids=str
)
@torch.no_grad()
def test_a_sequence_of_ratios_names_each_chunk(ratio):
    model = with_beacons("llama", SINKS)
    ids = random_ids(3 * CHUNK + 5) if len(ratio) == 3 else random_ids(2 * CHUNK + 5)
    expected = [int(each) for each in ratio]
    cache = model.compress(ids, ratio=ratio)
    assert list(cache.ratios) == expected
    output, slow = model(ids, beacon_ratio=ratio), reference_of(model, tiny("llama"))(ids, expected)
    close(output.logits[0], slow.logits)
    same_cache(output.past_key_values, cache)


@pytest.mark.parametrize("ratio", [8, torch.tensor(8), numpy.int64(8), numpy.array(8)], ids=repr)
def test_one_ratio_serves_all_chunks(ratio):
    assert with_beacons("llama", SINKS).compress(random_ids(60), ratio=ratio).ratios == (8, 8, 8)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (3, "must divide"),
        (32, "must not exceed"),
        (1, "at least 2"),
        (True, "at least 2"),
        (4.0, "at least 2"),
        ("8", "auto"),
        ([4, 4], "names 2 chunks.*closes 3"),
        ([], "names 0 chunks|names no chunk"),
    ],
)
def test_ratios_that_cannot_be_are_refused_and_the_cache_keeps_its_own(ratio, message):
    model, ids = with_beacons("llama", SINKS), random_ids(60)
    cache = model.compress(ids[:, :20], ratio=4)
    policy, rows = cache.policy, cache.rows
    for call in (
        lambda: model.compress(ids, ratio=ratio),
        lambda: model(ids, beacon_ratio=ratio),
        lambda: model.compress(ids[:, 20:], ratio=ratio, cache=cache),
        lambda: model(ids[:, 20:], beacon_ratio=ratio, past_key_values=cache),
    ):
        with pytest.raises(RatioError, match=message):
            call()
    assert (cache.policy, cache.rows) == (policy, rows)


@torch.no_grad()
def test_the_models_own_ratio_is_used_where_a_call_names_none():
    model, ids = with_beacons("llama", SINKS), random_ids(60)
    assert model.beacon_ratio == "auto"
    assert model.compress(ids).ratios == (2, 2, 2)
    model.beacon_ratio = 8
    assert model.compress(ids).ratios == (8, 8, 8)
    assert model(ids).past_key_values.ratios == (8, 8, 8)
    assert model.compress(ids, ratio=4).ratios == (4, 4, 4)
    with pytest.raises(RatioError):
        model.beacon_ratio = 7
    assert model.beacon_ratio == 8


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_local_tokens_are_set_on_the_model_and_stay_with_the_context(family, tmp_path):
    model, base, ids = with_beacons(family, SINKS), tiny(family), random_ids(60)
    begun_without = model.compress(ids[:, :30], ratio=4)
    name = model.adapter_fingerprint
    model.local_tokens = 5
    assert (model.local_tokens, model.beacon_config.local_tokens, model.untouched_length) == (5, 5, CHUNK + 5)
    assert model.adapter_fingerprint == name
    with_five = model.compress(ids[:, :50], ratio=4)
    assert (begun_without.tail_length, with_five.tail_length) == (14, 18)
    with_five.save(tmp_path / "five.beacon")
    expected = {5: reference_of(model, base)(ids, 4)}
    model.local_tokens = 0
    expected[0] = reference_of(model, base)(ids, 4)
    held = [(0, begun_without), (5, with_five), (5, BeaconCache.load(tmp_path / "five.beacon", model))]
    held += [(5, model.new_cache(ratio=4, local_tokens=5)), (0, model.new_cache(ratio=4))]
    for number, context in held:
        for token in range(context.tokens_seen, 60):  # 1 at a time: the boundary at 48 tokens, or at 53, is crossed
            logits = model(ids[:, token : token + 1], past_key_values=context).logits[0, -1]
        close(logits, expected[number].logits[-1])
        for layer, keys in zip(context.layers, expected[number].keys, strict=True):
            close(layer.keys[0], keys)


@torch.no_grad()
def test_a_new_cache_of_more_local_tokens_is_the_bases_up_to_them():
    model, base, ids = with_beacons("llama", CONFIG), tiny("llama"), random_ids(CHUNK + 5)
    at_once = model(ids, past_key_values=model.new_cache(local_tokens=5))
    assert torch.equal(at_once.logits, base(ids).logits)
    assert at_once.past_key_values.ratios == ()
    third = model(ids, past_key_values=model.new_cache(local_tokens=5), logits_to_keep=torch.tensor([3])).logits
    assert torch.equal(third, base(ids, logits_to_keep=torch.tensor([3])).logits)
    ids, cache = ids[:, : CHUNK + 2], model.new_cache(local_tokens=5)
    answer = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, base.generate(ids, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_contexts_of_other_local_tokens_are_answered_side_by_side_but_not_stacked():
    model, ids = with_beacons("llama", CONFIG, attention="sdpa"), random_ids(60)
    contexts = [model.compress(ids[:, :50], cache=model.new_cache(ratio=4, local_tokens=n)) for n in (0, 5)]
    alone = [model(ids[:, 50:51], past_key_values=context.fork()).logits[0, -1] for context in contexts]
    with pytest.raises(MismatchError, match=r"^Contexts of one batch must share their local_tokens; these differ\."):
        BeaconCache.stack(contexts)
    for logits, expected in zip(model.read_next(contexts, [int(ids[0, 50])] * 2), alone, strict=True):
        close(logits, expected)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (-1, "local_tokens must be an int of at least 0; got -1."),
        (2.5, "local_tokens must be an int of at least 0; got 2.5."),
        (
            500,
            (
                "A chunk of 16 tokens with its beacons at ratio 16, 500 local tokens takes 517 positions; the base model has "
                "512. Use fewer local tokens."
            ),
        ),
    ],
)
def test_local_tokens_that_cannot_be_are_refused_and_the_model_keeps_its_own(number, message):
    model = with_beacons("llama", CONFIG)
    for change in (lambda: setattr(model, "local_tokens", number), lambda: model.new_cache(local_tokens=number)):
        with pytest.raises(ConfigError) as caught:
            change()
        assert str(caught.value) == message
        assert model.local_tokens == 0
    with pytest.raises(ConfigError, match=r"^local_tokens must be an int of at least 0; got None\.$"):
        model.local_tokens = None


def test_the_number_of_local_tokens_is_saved_with_the_adapter(tmp_path):
    model = with_beacons("llama", CONFIG)
    model.local_tokens = 7
    model.save_pretrained(tmp_path)
    assert BeaconConfig.from_dict(json.loads((tmp_path / "beacon_config.json").read_text())).local_tokens == 7


@torch.no_grad()
def test_auto_is_the_smallest_ratio_that_fits_and_is_chosen_anew_as_the_text_grows():
    positions = 80
    model = with_beacons("llama", SINKS, max_position_embeddings=positions)
    reference = reference_of(model, tiny("llama", max_position_embeddings=positions))
    text = random_ids(600)
    cache, ratios = model.compress(text[:, :100]), []
    for start in range(100, 420, 20):
        model.compress(text[:, start : start + 20], cache=cache)
        assert cache.cache_length <= positions
        at_once = model.compress(text[:, : start + 20])
        same_cache(cache, at_once)
        ratios.append(cache.ratios[0])
        assert set(cache.ratios) == {ratios[-1]}
        for smaller in [ratio for ratio in RATIOS if ratio < ratios[-1]]:
            assert 2 + len(cache.ratios) * CHUNK // smaller + CHUNK > positions
    assert ratios == sorted(ratios)
    assert set(ratios) == {2, 4, 8}
    expected = reference(text[:, :420], ratios[-1])
    for layer, keys in zip(cache.layers, expected.keys, strict=True):
        close(layer.keys[0], keys)


@torch.no_grad()
def test_auto_chooses_anew_in_the_middle_of_decoding():
    model = with_beacons("qwen2", SINKS, max_position_embeddings=48)
    reference = reference_of(model, tiny("qwen2", max_position_embeddings=48))
    text, chosen = random_ids(140), []
    cache = model.compress(text[:, :40])
    for end in range(41, 141):
        logits = model(text[:, end - 1 : end], past_key_values=cache).logits[0, -1]
        close(logits, reference(text[:, :end], cache.ratios[0]).logits[-1])
        chosen.append(cache.ratios[0])
    assert set(chosen) == {2, 4, 8}


def test_a_text_that_no_ratio_fits_is_refused_and_the_cache_stays():
    model = with_beacons("llama", SINKS, max_position_embeddings=48)
    cache = model.compress(random_ids(100))
    before = cache.fork()
    with pytest.raises(CapacityError, match="Read at most"):
        model.compress(random_ids(2000), cache=cache)
    with pytest.raises(CapacityError, match="ratio"):
        model.compress(random_ids(200), ratio=2)
    same_cache(cache, before, 0)
    assert cache.policy == before.policy


@torch.no_grad()
def test_a_budget_holds_at_every_length():
    model = with_beacons("llama", SINKS)
    text, budget = random_ids(400), 50
    cache = model.compress(text[:, :1], budget=budget)
    for end in range(2, 401):
        model.compress(text[:, end - 1 : end], cache=cache)
        assert cache.cache_length <= budget
        assert all(layer.keys.shape[2] == cache.cache_length for layer in cache.layers)
    same_cache(cache, model.compress(text, budget=budget))
    assert cache.ratios[0] > model.compress(text[:, :60], budget=budget).ratios[0]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(
    ("spans", "ratios", "raw", "chunks"),
    [
        ([(5, 11, None)], [8, 8, 8, 8], [(5, 11)], [(8, 2, 6), (8, 2, 0), (8, 2, 0), (8, 2, 0)]),
        ([(0, 8, None)], [8, 8, 8, 8], [(0, 8)], [(8, 1, 6), (8, 2, 0), (8, 2, 0), (8, 2, 0)]),
        ([(40, 50, 2)], [8, 8, 2, 2], [], [(8, 2, 0), (8, 2, 0), (2, 8, 0), (2, 8, 0)]),
        ([(30, 36, None), (3, 4, 4)], [4, 8, 8, 8], [(30, 36)], [(4, 4, 0), (8, 2, 2), (8, 2, 4), (8, 2, 0)]),
        ([(16, 32, None), (20, 21, 4)], [8, 4, 8, 8], [(16, 32)], [(8, 2, 0), (4, 0, 16), (8, 2, 0), (8, 2, 0)]),
        ([(60, 900, None)], [8, 8, 8, 8], [(60, 900)], [(8, 2, 0), (8, 2, 0), (8, 2, 0), (8, 2, 4)]),
    ],
)
@torch.no_grad()
def test_spans_are_kept_raw_or_at_a_lower_ratio(family, spans, ratios, raw, chunks):
    model, ids = with_beacons(family, SINKS), random_ids(70)
    cache = model.compress(ids, ratio=8, spans=spans)
    assert [tuple(chunk) for chunk in cache.rows[0].chunks] == chunks
    assert cache.num_sinks == 2
    length = 2 + sum(num_beacons + num_raw for _, num_beacons, num_raw in chunks) + 6
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.cache_length} == {length}
    slow = reference_of(model, tiny(family))(ids, ratios, raw=raw)
    for layer, keys, values in zip(cache.layers, slow.keys, slow.values, strict=True):
        assert layer.keys.shape[2] == cache.rows[0].entries_within(layer.window)
        close(layer.keys[0], keys[:, layer.dropped :])
        close(layer.values[0], values[:, layer.dropped :])
    pieces = model.compress(ids[:, :21], ratio=8, spans=spans)
    model.compress(ids[:, 21:], cache=pieces)
    same_cache(pieces, cache)


@pytest.mark.parametrize("span", [(0, 3), (0, 4), (5, 11), (40, 41)])
@torch.no_grad()
def test_a_chunk_with_raw_tokens_is_cut_evenly_where_others_are_exact(span):
    exact = {"anchored": True, "placement": "append", "exact_ids": tuple(range(3, 97, 17))}
    model = with_beacons("llama", BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, num_sinks=4, **exact))
    batch = random_ids(70, batch=2)
    contexts = BeaconCache.stack(
        [model.compress(batch[:1], ratio=2, spans=[(*span, None)]), model.compress(batch[1:], ratio=2)]
    )
    for row, raw in enumerate([[span], []]):
        slow = reference_of(model, tiny("llama"))(batch[row], 2, raw=raw)
        for layer, keys, values in zip(contexts.row(row).layers, slow.keys, slow.values, strict=True):
            close(layer.keys[0], keys)
            close(layer.values[0], values)


@torch.no_grad()
def test_rows_of_a_batch_that_close_chunks_together_are_exact_each_by_itself():
    exact = {"anchored": True, "placement": "append", "exact_ids": tuple(range(3, 97, 17))}
    model = with_beacons("llama", BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, num_sinks=2, **exact))
    texts = [random_ids(length, seed=length)[0].tolist() for length in (70, 40, 85, 9)]
    contexts = model.compress(texts, ratio=2)
    for row, text in enumerate(texts):
        same_cache(contexts.row(row), model.compress(text, ratio=2))


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TESTED)
def test_gradients_are_those_of_the_reference(family):
    projections = ("q", "k", "v", "o")
    config = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, num_sinks=2, projections=projections)
    model, base, ids = with_beacons(family, config).train(), tiny(family), random_ids(4 * CHUNK + 6)
    base.requires_grad_(False)
    beacons = {name: tensor.requires_grad_() for name, tensor in beacon_tensors(model).items()}
    ratios = [4, 2, 16, 8]
    loss = model(ids, labels=ids, beacon_ratio=ratios).loss
    loss.backward()
    logits = reference_of(model, base, beacons)(ids, ratios).logits
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    expected.backward()
    close(loss, expected)
    for name, parameter in model.beacon_parameters():
        slow = beacons[name].grad
        # What only the outputs of the last layer's beacons depend on has no use: nobody reads them.
        is_idle = name.startswith(f"layers.{len(base.model.layers) - 1}.") and name.split(".")[2] in "qo"
        assert is_idle == (slow is None or not slow.any())
        if is_idle:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            close(parameter.grad, slow)
    assert all(p.grad is None for name, p in model.named_parameters() if "beacon" not in name)


@pytest.mark.parametrize("placement", ["interleave", "append"])
def test_a_step_of_training_lowers_the_loss(placement):
    config = BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, placement=placement)
    model, ids = with_beacons("llama", config).train(), random_ids(70)
    optimizer = torch.optim.SGD([parameter for _, parameter in model.beacon_parameters()], lr=0.05)
    print_before, losses = model.adapter_fingerprint, []
    for _ in range(4):
        loss = model(ids, labels=ids, beacon_ratio=4).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert model.adapter_fingerprint != print_before
    assert model(ids).past_key_values is None  # in training nothing is held


def test_gradient_checkpointing_is_refused_for_long_texts():
    model = with_beacons("llama", CONFIG)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UnsupportedError, match="Gradient checkpointing"):
        model(random_ids(40), labels=random_ids(40))
    for read in (  # whatever its length: what is said to be held would not be there
        lambda: model.compress(random_ids(10)),
        lambda: model(random_ids(10), past_key_values=model.new_cache()),
        lambda: model.read_next([model.new_cache()], [5]),
    ):
        with pytest.raises(UnsupportedError, match="Gradient checkpointing"):
            read()
    model(random_ids(10), labels=random_ids(10)).loss.backward()  # holds nothing, and says so
    model.eval()
    assert model(random_ids(40)).logits.shape == (1, 40, VOCABULARY)


# --- batches and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(70, 33, 9), (12, 7, 16), (64, 17, 48)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "smollm3"])
@torch.no_grad()
def test_each_row_of_a_padded_batch_has_the_losses_that_it_has_alone(family, side, lengths):
    model = with_beacons(family, SINKS)
    rows = [random_ids(length, length)[0] for length in lengths]
    ids, mask = padded(rows, side=side)
    output = model(ids, attention_mask=mask, labels=ids, beacon_ratio=4)
    everything = []
    for index, row in enumerate(rows):
        alone = model(row[None], labels=row[None], beacon_ratio=4)
        start = ids.shape[1] - len(row) if side == "left" else 0
        expected = torch.full((ids.shape[1] - 1,), torch.nan)
        expected[start : start + len(row) - 1] = alone.nll[0]
        close(output.nll[index], expected)
        close(output.logits[index, start : start + len(row)], alone.logits[0])
        same_cache(output.past_key_values.row(index), alone.past_key_values, 1e-4)
        everything.append(alone.nll[0])
    close(output.loss, torch.cat(everything).mean())


@pytest.mark.parametrize("length", [12, 70])
@torch.no_grad()
def test_labels_of_minus_100_have_no_loss(length):
    model, ids = with_beacons("llama", SINKS), random_ids(length, batch=2)
    labels = ids.clone()
    labels[0, 3:6] = labels[0, 9] = labels[1, : length // 2] = -100
    full = model(ids, labels=ids, beacon_ratio=4)
    output = model(ids, labels=labels, beacon_ratio=4)
    counted = labels[:, 1:] != -100
    close(output.nll, full.nll.masked_fill(~counted, torch.nan))
    close(output.loss, full.nll[counted].mean())
    total = model(ids, labels=labels, beacon_ratio=4, num_items_in_batch=7).loss
    close(total, full.nll[counted].sum() / 7)
    assert torch.equal(output.logits, full.logits)


@torch.no_grad()
def test_labels_other_than_the_ids_are_the_targets():
    model, ids, labels = with_beacons("llama", SINKS), random_ids(70), random_ids(70, seed=9)
    logits = model(ids, beacon_ratio=4).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
    close(model(ids, labels=labels, beacon_ratio=4).nll[0], expected, 1e-5)


@pytest.mark.parametrize("keep", [1, 5, 40, 70, 200])
@torch.no_grad()
def test_logits_may_be_kept_from_the_end(keep):
    model, ids = with_beacons("llama", SINKS), random_ids(70)
    full = model(ids, labels=ids, beacon_ratio=4)
    with_labels = model(ids, labels=ids, beacon_ratio=4, logits_to_keep=keep)
    without = model(ids, beacon_ratio=4, logits_to_keep=keep)
    for output in (with_labels, without):
        close(output.logits, full.logits[:, -keep:], 1e-5)
    close(with_labels.nll, full.nll, 1e-5)


@pytest.mark.parametrize("length", [12, 70])
@torch.no_grad()
def test_without_return_dict_the_same_comes_as_a_tuple(length):
    model, ids = with_beacons("llama", SINKS), random_ids(length)
    loss, logits, cache, nll = model(ids, labels=ids, beacon_ratio=4, return_dict=False)
    output = model(ids, labels=ids, beacon_ratio=4)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(nll, output.nll)
    assert isinstance(cache, BeaconCache)
    assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_hidden_states_are_those_of_the_tail():
    model, ids = with_beacons("llama", SINKS), random_ids(70)
    states = model(ids, beacon_ratio=4, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 6, 32)] * 4


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 40, 32)}, "input_ids"),
        ({"input_ids": random_ids(40), "attention_mask": torch.zeros(1, 1, 40, 40)}, "mask"),
        ({"input_ids": random_ids(40), "position_ids": torch.arange(20).repeat(2)[None]}, "packed sequences"),
        ({"input_ids": random_ids(40), "logits_to_keep": torch.tensor([3])}, "logits_to_keep"),
    ],
)
def test_long_texts_in_other_forms_are_refused(inputs, message):
    model = with_beacons("llama", CONFIG)
    with pytest.raises(UnsupportedError, match=message):
        model(**inputs)
    with model.beacon_disabled():
        assert model(**inputs).logits.shape[0] == 1


@torch.no_grad()
@torch.no_grad()
def test_what_else_a_base_returns_of_a_short_text_is_there():
    base, model, ids = tiny("gpt_oss"), with_beacons("gpt_oss", CONFIG), random_ids(12)
    ours, theirs = (m(ids, labels=ids, output_router_logits=True) for m in (model, base))
    assert ours.keys() - {"nll"} == theirs.keys()
    assert torch.equal(ours.aux_loss, theirs.aux_loss)
    assert torch.equal(ours.loss, theirs.loss)


def test_what_is_left_to_the_base_has_a_loss_and_no_losses_of_tokens():
    base, model, ids = tiny("llama"), with_beacons("llama", CONFIG), random_ids(12)
    holes = torch.ones_like(ids)
    holes[0, 4] = 0
    for inputs in (
        {"input_ids": ids, "attention_mask": holes},
        {"inputs_embeds": base.get_input_embeddings()(ids)},
        {"input_ids": ids, "position_ids": torch.arange(6).repeat(2)[None]},
    ):
        ours = model(**inputs, labels=ids)
        assert torch.equal(ours.loss, base(**inputs, labels=ids).loss)
        assert ours.nll is None
        assert isinstance(model(**inputs, labels=ids, return_dict=False), tuple)


@torch.no_grad()
def test_a_short_text_whose_positions_have_gaps_is_gone_on_with_as_by_the_base():
    base, model, ids, more = tiny("llama"), with_beacons("llama", CONFIG), random_ids(10), random_ids(1, 2)
    positions, later = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 9, 10, 11]]), torch.tensor([[12]])
    ours, theirs = (m(ids, position_ids=positions) for m in (model, base))
    assert torch.equal(ours.logits, theirs.logits)
    ours, theirs = (
        m(more, past_key_values=output.past_key_values, position_ids=later)
        for m, output in ((model, ours), (base, theirs))
    )
    assert torch.equal(ours.logits, theirs.logits)
    with pytest.raises(UnsupportedError, match="do not count up"):
        model(ids, position_ids=positions, past_key_values=model.new_cache())


@pytest.mark.parametrize(
    ("span", "is_late"), [((3, 8, None), True), ((3, 20, 2), True), ((3, 8, 8), False), ((32, 40, 2), False)]
)
def test_a_span_that_comes_too_late_is_refused(span, is_late):
    model, ids = with_beacons("llama", CONFIG), random_ids(60)
    cache = model.compress(ids[:, :40], ratio=4)
    before = cache.fork()
    with pytest.raises(RatioError, match="comes too late") if is_late else contextlib.nullcontext():
        model.compress(ids[:, 40:], cache=cache, spans=[span])
    if is_late:
        same_cache(cache, before)
    model.compress(ids[:, 40:], cache=before, ratio="auto", spans=[span])  # which reads the text anew
    expected = model.compress(ids, ratio="auto", spans=[span])
    same_cache(before, expected)


@pytest.mark.parametrize("span", [(10, 15, None), (12, 18, 2), (10, 40, None)])
def test_a_span_that_is_raw_already_is_none_too_late(span):
    model, ids = with_beacons("llama", CONFIG), random_ids(60)
    cache = model.compress(ids[:, :40], ratio=8, spans=[(10, 14, None), (13, 20, None)])
    is_raw = span[1] <= 20
    with (
        contextlib.nullcontext() if is_raw else pytest.raises(RatioError, match="tokens 16 to 31 have been compressed")
    ):
        model.compress(ids[:, 40:], cache=cache, spans=[span])


def test_numbers_of_any_kind_are_budgets_spans_and_masks():
    model, ids = with_beacons("llama", CONFIG), random_ids(60)
    by_numpy = model.compress(ids, budget=numpy.int64(50), spans=numpy.array([[3, 8, 2]]))
    same_cache(by_numpy, model.compress(ids, budget=50, spans=[(3, 8, 2)]))
    for given in (True, 50.0, "50"):
        with pytest.raises(RatioError, match="budget must be"):
            model.compress(ids, budget=given)
    padded = model.compress([[5, 6, 7], [5, 6, 7]], attention_mask=[[1, 1, 1], [0, 1, 1]])
    assert [row.tokens_seen for row in padded.rows] == [3, 2]
    assert model.compress(torch.tensor([5, 6, 7]), attention_mask=torch.tensor([0, 1, 1])).tokens_seen == 2


def test_short_texts_in_other_forms_are_the_bases():
    base, model, ids = tiny("llama"), with_beacons("llama", CONFIG), random_ids(12)
    embedded = base.get_input_embeddings()(ids)
    packed = torch.arange(6).repeat(2)[None]
    causal = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9)
    for inputs in (
        {"inputs_embeds": embedded},
        {"input_ids": ids, "attention_mask": causal},
        {"input_ids": ids, "position_ids": packed, "use_cache": False},
        {"input_ids": ids, "logits_to_keep": torch.tensor([2, 5])},
    ):
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, VOCABULARY, 4]]), f"within 0..{VOCABULARY - 1}; got {VOCABULARY}"),
        (torch.tensor([[3, -1, 4]]), "got -1"),
        (torch.tensor([[VOCABULARY]]), f"got {VOCABULARY}"),
        (torch.tensor([[-1]]), "got -1"),
        (torch.rand(1, 5), "integers"),
        (torch.rand(1, 1), "integers"),
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        (torch.zeros(0, 5, dtype=torch.long), "at least one row"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"must be \(B, N\)"),
        ([], "empty"),
        ([[3, 4], []], "empty"),
    ],
)
def test_ids_that_are_no_text_are_refused(ids, message):
    model = with_beacons("llama", SINKS)
    with pytest.raises(InputError, match=message):
        model.compress(ids)
    if isinstance(ids, torch.Tensor):
        with pytest.raises(InputError, match=message):
            model(ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1, 1]]), "holes"),
        (torch.tensor([[0, 0, 0, 0, 0]]), "without tokens"),
        (torch.tensor([[1, 1, 1]]), "attention_mask must be"),
        (torch.ones(2, 5, dtype=torch.long), "attention_mask must be"),
    ],
)
def test_masks_that_are_no_padding_are_refused(mask, message):
    with pytest.raises(InputError, match=message):
        with_beacons("llama", SINKS).compress(random_ids(5), attention_mask=mask)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match="labels must be shaped like the ids"):
        with_beacons("llama", SINKS)(random_ids(40), labels=random_ids(39))


def test_a_context_of_another_model_is_refused():
    model, ids = with_beacons("llama", SINKS), random_ids(40)
    for other, what in (
        (with_beacons("llama", SINKS, seed=1), "base model"),
        (attach(tiny("llama"), SINKS), "adapter"),
        (with_beacons("llama", CONFIG), "adapter"),
    ):
        with pytest.raises(MismatchError, match=f"another {what}.*Compress the text again"):
            model.compress(ids, cache=other.compress(ids))
    with pytest.raises(InputError, match="rows"):
        model.compress(random_ids(40, batch=2), cache=model.compress(ids))


# --- architectures -----------------------------------------------------------------------------------------------------

EXPERTS = {"n_routed_experts": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("deepseek_v32", n_group=1, topk_group=1, **EXPERTS), "DeepseekV32.*sparse attention"),
        (lambda: tiny("mamba"), "MambaForCausalLM.*it is recurrent"),
        (lambda: tiny("llama4_text", num_local_experts=2), "Llama4.*chunked_attention"),
        (lambda: tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "Llama.*dynamic NTK"),
        (lambda: tiny("gpt2"), "GPT2.*layers"),
        (lambda: tiny("opt", ffn_dim=32, word_embed_proj_dim=32), "OPT.*no rotary position embedding"),
        (t5, "T5.*decoder with a language modelling head"),
        (lambda: tiny("hunyuan_v1_dense"), "HunYuan.*misses its own keys"),  # norms its keys after rotating them
        (lambda: tiny("gpt_neox_japanese"), "GPTNeoXJapanese.*keyword arguments"),
        (lambda: tiny("llama", hidden_size_per_layer_input=8), "Llama.*embeddings of the token ids"),
        (lambda: tiny("llama", num_kv_shared_layers=1), "Llama.*share the keys"),
        (lambda: tiny("gemma4_text", use_bidirectional_attention="all"), "Gemma4.*see those that follow"),
    ],
)
def test_what_cannot_carry_beacons_is_refused_by_name(make, reason):
    model = make()
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match=f"(?s){reason}.*Tested families: gemma3_text, gpt_oss"):
        attach(model, CONFIG)
    assert traces(model) == before


STRUCTURE = {
    "gemma2": {},
    "diffllama": {},
    "granitemoeshared": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "cohere2_moe": {"sliding_window": 20, "layer_types": IN_TURN, "num_experts": 2, "num_experts_per_tok": 2},
    "exaone_moe": {"sliding_window": 20, "layer_types": IN_TURN},
}


@pytest.mark.parametrize("family", STRUCTURE)
@torch.no_grad()
def test_families_accepted_by_structure_meet_the_reference(family):
    overrides = STRUCTURE[family]
    model, base, ids = with_beacons(family, SINKS, **overrides), tiny(family, **overrides), random_ids(60)
    output, expected = model(ids, beacon_ratio=[4, 8, 2]), reference_of(model, base)(ids, [4, 8, 2])
    close(output.logits[0], expected.logits)
    for layer, keys in zip(output.past_key_values.layers, expected.keys, strict=True):
        close(layer.keys[0], keys)


@torch.no_grad()
def test_longrope_is_served_within_its_short_regime():
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.3],
        "long_factor": [2.0, 4.0],
        "factor": 8.0,
    }
    overrides = {"rope_parameters": longrope, "original_max_position_embeddings": 64}
    model, base, ids = with_beacons("phi3", SINKS, **overrides), tiny("phi3", **overrides), random_ids(150)
    with model.beacon_disabled():  # the base's long frequencies must not stay behind
        assert torch.equal(model(ids).logits, base(ids).logits)
    cache = model.compress(ids)
    assert cache.ratios[0] > 2
    assert cache.cache_length <= 64
    expected = reference_of(model, base)(ids, cache.ratios[0])
    for layer, keys in zip(cache.layers, expected.keys, strict=True):
        close(layer.keys[0], keys)
    with pytest.raises(CapacityError, match="64"):
        model.compress(ids, ratio=2)


def test_a_short_text_with_holes_in_its_mask_is_left_to_the_base():
    model, ids = with_beacons("llama", CONFIG), torch.randint(3, 90, (2, CHUNK))
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    mask[1] = 0
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
        with model.beacon_disabled():
            assert torch.equal(output.logits, model(ids, attention_mask=mask).logits)
    with pytest.raises(InputError, match="attention_mask has holes"):
        model(ids[:1], attention_mask=mask[:1], beacon_ratio=2)


# --- other dtypes, and torch.compile --------------------------------------------------------------------------------------


def test_a_context_of_another_dtype_is_refused_with_the_way_out():
    model = with_beacons("llama", CONFIG)
    context = model.compress(random_ids(40), ratio=4)
    model.bfloat16()
    with pytest.raises(
        MismatchError,
        match=r"^The context is held in torch.float32 on cpu, the model in torch.bfloat16 on cpu\. Use context\.to",
    ):
        model.generate(random_ids(3), context=context, max_new_tokens=2)
    moved = context.to(model.device, model.dtype)

    assert model.generate(random_ids(3), context=moved, max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("how", [torch.compile, lambda model, backend: model.compile(backend=backend) or model])
def test_a_compiled_model_gives_what_it_gives_uncompiled(how):
    model, text = with_beacons("llama", CONFIG), random_ids(60)
    with torch.no_grad():
        expected = model(text, beacon_ratio=4).logits
        answer = model.generate(text, beacon_ratio=4, max_new_tokens=20, do_sample=False)
        compiled = how(model, backend="eager")
        assert torch.equal(compiled(text, beacon_ratio=4).logits, expected)
    assert torch.equal(compiled.generate(text, beacon_ratio=4, max_new_tokens=20, do_sample=False), answer)


# --- after training ----------------------------------------------------------------------------------------------------------


def changed_by_hand(model):
    for _, parameter in model.beacon_parameters():
        parameter.add_(1.0)


def changed_without_a_trace(model):
    """As fused optimisers do."""
    model.train()
    for _, parameter in model.beacon_parameters():
        parameter.data.numpy()[...] += 1.0
    model.eval()


@pytest.mark.parametrize("change", [changed_by_hand, changed_without_a_trace])
@torch.no_grad()
def test_a_context_in_use_is_refused_after_training_token_by_token_too(change):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8)))
    token = torch.tensor([[5]])
    context = model.compress(random_ids(40), ratio=4)
    model(token, past_key_values=context)
    other = copy.deepcopy(model)
    other(token, past_key_values=context)  # the same weights
    change(model)
    before = context.rows
    for call in (
        lambda: model(token, past_key_values=context),
        lambda: model.compress(token, cache=context),
        lambda: model.read_next([context], [5]),
    ):
        with pytest.raises(MismatchError, match="another adapter"):
            call()
    assert context.rows == before
    other(token, past_key_values=context)


@torch.no_grad()
def test_a_context_without_beacons_is_refused_when_beacons_of_other_weights_would_be_made():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8)))
    token = torch.tensor([[5]])
    context = model.compress(random_ids(14), ratio=4)
    model(token, past_key_values=context)
    changed_by_hand(model)
    model(token, past_key_values=context)  # raw: the base's weights are what they were
    before = context.rows
    with pytest.raises(MismatchError, match="another adapter"):
        model(token, past_key_values=context)
    assert (context.rows, context.tokens_seen, context.ratios) == (before, 16, ())


def test_a_change_of_any_beacon_weight_is_noted():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8), anchored=True))
    seen = {model._weights_now()}
    for _, parameter in model.beacon_parameters():
        with torch.no_grad():
            parameter.add_(1.0)
        assert model._weights_now() not in seen
        seen.add(model._weights_now())


@pytest.mark.parametrize("length", [0, 20])
@pytest.mark.parametrize("num_new", [5, 15])
@pytest.mark.parametrize("label", [97, -1])
@torch.no_grad()
def test_labels_of_no_token_are_refused_before_anything_is_read(length, num_new, label):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8)))
    cache = model.compress(random_ids(length, 1), ratio=4) if length else model.new_cache(ratio=4)
    new = random_ids(num_new, 2)
    labels = new.clone()
    labels[0, -1] = label
    before = (cache.rows, cache.num_slots)
    with pytest.raises(
        InputError, match=rf"^labels must be token ids within 0\.\.96, or -100 where none is; got {label}\."
    ):
        model(new, past_key_values=cache, labels=labels)
    assert (cache.rows, cache.num_slots) == before
    labels[0, -1] = -100
    assert model(new, past_key_values=cache, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    "kind", [{}, {"placement": "append", "anchored": True, "local_tokens": 5, "exact_ids": tuple(range(20, 40))}]
)
@torch.no_grad()
def test_torchs_default_device_is_no_concern_of_ours(kind):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8), **kind), attention="sdpa")
    ids, question = random_ids(70), random_ids(5, 3)
    texts = [ids[0].tolist(), ids[0, :30].tolist()]

    def all_of_it():
        context = model.compress(ids, ratio=4)
        batch = model.compress(texts, ratio=4)
        logits = model.read_next([context.fork()], [5])
        loss = model(ids, labels=ids, beacon_ratio=4).loss
        answer = model.generate(question, context=context, max_new_tokens=20, do_sample=False)
        return [answer, loss, logits, *(layer.keys for cache in (context, batch) for layer in cache.layers)]

    expected = all_of_it()
    with torch.device("meta"):
        found = all_of_it()
    assert all(map(torch.equal, found, expected))
