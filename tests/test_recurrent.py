"""Layers that carry a state: it runs over the tokens alone, beacons read it at a chunk's end, and what is kept of it goes on."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from activation_beacon import BeaconCache, BeaconConfig, attach, detach, load
from activation_beacon.adapt import find_decoder
from activation_beacon.at_once import chunks_at_once
from activation_beacon.bench.cost import ModelShape
from activation_beacon.bench.shapes import read_shape
from activation_beacon.errors import ConfigError, FileFormatError, InputError, UnsupportedError
from activation_beacon.evaluation.contexts import BaseContext, base_cache_bytes
from activation_beacon.evaluation.methods import read_context
from activation_beacon.recurrent import SETTLED, State, StateLayer, stacked
from activation_beacon.server.prefixes import opening, reusable_length
from activation_beacon.training.objective import head
from families import WITH_STATES, beacon_tensors, random_ids, tiny, with_beacons
from test_reference import check_every_step, reference_of

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3, anchored=True, placement="append")
FAMILIES = (
    "qwen3_5_text",
    "granitemoehybrid",
    "lfm2",
    "falcon_h1",
)  # sums and inputs of convolutions; written over in place; inputs alone; beside attention
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return with_beacons(request.param, CONFIG, attention="sdpa")


def tensors_of(cache):
    """All tensors by name; where no chunk has been closed, none of a state at a chunk's end, which may be empty or zero."""
    return {
        f"{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.named_tensors()
        if cache.rows[0].chunks or not name.startswith(SETTLED)
    }


def same(one, other, atol=0.0):
    assert one.rows == other.rows
    assert torch.equal(one.token_ids, other.token_ids)
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol)


def states_of(cache):
    return {index: layer.state for index, layer in enumerate(cache.layers) if not layer.has_entries}


# --- what a state is of ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_STATES)
@torch.no_grad()
def test_beacons_leave_no_trace_in_a_state(family):
    """That of the first layer, whose input is the text alone, is the base's own, whatever the ratio."""
    model, ids = with_beacons(family, CONFIG, attention="sdpa"), random_ids(5 * CHUNK + 7)
    own = DynamicCache(config=model.config)
    tiny(family, attention="sdpa")(ids, past_key_values=own)
    due = [each for kind in (own.layers[0].conv_states, own.layers[0].recurrent_states) for each in kind.values()]
    for ratio in (2, 8):
        layer = next(layer for layer in model.compress(ids, ratio=ratio).layers if not layer.has_entries)
        for tensor, expected in zip((*layer.state.conv, *layer.state.recurrent), due, strict=True):
            assert (tensor is None) == (expected is None)
            if tensor is not None:
                torch.testing.assert_close(tensor, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"local_tokens": 5},
        {"anchored": False},
        {"num_sinks": 0, "local_tokens": 20},
        {"projections": ("q", "k", "v", "o"), "exact_ids": range(3, 40), "local_tokens": 3},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_at_every_step(family, settings):
    config = dataclasses.replace(CONFIG, chunk_size=32, ratios=(2, 4, 16), **settings)
    model = with_beacons(family, config, attention="sdpa")
    prompt = 84 + settings.get("local_tokens", 0)
    check_every_step(model, reference_of(family, model), [4, 16, 2], prompt=prompt, seed=3)


@pytest.mark.parametrize("family", WITH_STATES)
@torch.no_grad()
def test_up_to_a_chunk_disabled_and_detached_it_is_the_base(family):
    base, ids = tiny(family, attention="sdpa"), random_ids(CHUNK)
    expected = base(ids).logits
    answer = base.generate(random_ids(5), max_new_tokens=CHUNK - 5, **GREEDY)
    long = base(random_ids(40)).logits
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = attach(base, CONFIG)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(random_ids(5), max_new_tokens=CHUNK - 5, **GREEDY), answer)
    with model.beacon_disabled():
        assert torch.equal(model(random_ids(40)).logits, long)
    detach(model)
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
    assert torch.equal(base(random_ids(40)).logits, long)


# --- caches ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_text_in_pieces_is_the_text_at_once(model):
    ids = random_ids(4 * CHUNK + 5)
    whole = model.compress(ids, ratio=4)
    for size in (1, 7, CHUNK, CHUNK + 1):
        cache = model.new_cache(ratio=4)
        for piece in ids.split(size, dim=1):
            model.compress(piece, cache=cache)
        same(cache, whole, atol=5e-5)


@torch.no_grad()
def test_a_fork_goes_on_by_itself(model):
    context = model.compress(random_ids(3 * CHUNK + 5), ratio=4)
    before = {name: tensor.clone() for name, tensor in tensors_of(context).items()}
    fork = context.fork()
    for token in random_ids(CHUNK, 1).T:
        model(token[None], past_key_values=fork)
    model.generate(random_ids(5), context=context, max_new_tokens=CHUNK, **GREEDY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(context).items())
    assert len(fork.ratios) == len(context.ratios) + 1


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_cache_as_it_was(model):
    """Wherever it does: in the tail's pass and in one that closes a chunk, in a state's layer and behind it."""
    ids = random_ids(3 * CHUNK + 5)
    for num_new in (1, CHUNK):
        for layer in range(4):
            context = model.compress(ids, ratio=4)
            held = {name: tensor.clone() for name, tensor in tensors_of(context).items()}
            rows = context.rows

            def fail(*_):
                raise MemoryError("no more")

            handle = model.get_decoder().layers[layer].register_forward_hook(fail)
            with pytest.raises(MemoryError):
                model(random_ids(num_new, 1), past_key_values=context)
            handle.remove()
            assert context.rows == rows
            assert all(torch.equal(tensor, held[name]) for name, tensor in tensors_of(context).items())
            expected = model(random_ids(num_new, 1), past_key_values=model.compress(ids, ratio=4)).logits
            assert torch.equal(model(random_ids(num_new, 1), past_key_values=context).logits, expected)


@torch.no_grad()
def test_a_first_pass_that_fails_leaves_an_empty_cache(model):
    cache = model.new_cache()
    handle = model.get_decoder().layers[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(random_ids(5), past_key_values=cache)
    handle.remove()
    assert not tensors_of(cache)
    same(model(random_ids(5), past_key_values=cache).past_key_values, model.compress(random_ids(5)))


@torch.no_grad()
def test_tokens_cannot_be_taken_back(model):
    context = model.compress(random_ids(CHUNK + 5), ratio=4)
    with pytest.raises(
        UnsupportedError, match=r"^crop\(-2\) cannot take tokens back from recurrent layers, .* Keep a fork\(\)"
    ):
        context.crop(-2)
    context.crop(0)
    same(context, model.compress(random_ids(CHUNK + 5), ratio=4))


@torch.no_grad()
def test_bytes_are_those_of_entries_and_states(model):
    short, long = (model.compress(random_ids(length), ratio=4) for length in (CHUNK, 9 * CHUNK))
    states = sum(state.num_bytes for state in states_of(short).values())
    assert sum(state.num_bytes for state in states_of(long).values()) == states > 0
    per_entry = 4 * model._beacon.site.features_held(lambda _: 1)
    assert short.cache_bytes == CHUNK * per_entry + states  # none is settled yet
    assert long.cache_bytes == long.cache_length * per_entry + 2 * states
    assert long.uncompressed_bytes == 9 * CHUNK * per_entry + states
    assert "StateLayer" in map(str, short.layers)
    few = str(model.compress(random_ids(CHUNK + 1), ratio=2))
    assert ("saved" in few) == (model.config.model_type == "lfm2")  # whose states are small
    assert "saved of" in str(long)


@torch.no_grad()
def test_batches_of_contexts_go_on_as_each_alone(model):
    """One of them without a closed chunk, whose state at a chunk's end is empty; they close chunks at different steps."""
    texts = [random_ids(length, length)[0] for length in (3 * CHUNK + 2, 5, 2 * CHUNK + 9)]
    alone = [model.compress(text, ratio=4) for text in texts]
    both = BeaconCache.stack(alone)
    together = model.compress(texts, ratio=4)
    for row, context in enumerate(alone):
        same(together.row(row), context, atol=5e-5)
    for tokens in random_ids(2 * CHUNK, 9, batch=3).T:
        logits = model(tokens[:, None], past_key_values=both).logits
        expected = [
            model(token.view(1, 1), past_key_values=each).logits for token, each in zip(tokens, alone, strict=True)
        ]
        torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=2e-4)
    for row, context in enumerate(alone):
        assert both.row(row).rows == context.rows
    with pytest.raises(InputError, match="An empty context cannot be stacked"):
        BeaconCache.stack([alone[0], model.new_cache()])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_leaves_no_trace(model, side):
    """Of short texts and of long ones: each row is the same text alone, and so are its losses."""
    for lengths in ((9, 4), (3 * CHUNK + 2, 5), (3 * CHUNK + 2, 3 * CHUNK - 1)):
        width = max(lengths)
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        texts = [random_ids(length, length)[0] for length in lengths]
        for row, text in enumerate(texts):
            place = slice(width - len(text), width) if side == "left" else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        labels = ids.masked_fill(mask == 0, -100)
        output = model(ids, attention_mask=mask, labels=labels, use_cache=True)
        for row, text in enumerate(texts):
            alone = model(text[None], labels=text[None], use_cache=True)
            same(output.past_key_values.row(row), alone.past_key_values, atol=5e-5)
            nll = output.nll[row][~output.nll[row].isnan()]
            torch.testing.assert_close(nll, alone.nll[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_of_a_batch_are_answered_as_each_alone(model):
    lengths = (2 * CHUNK + 9, 2 * CHUNK + 9, CHUNK + 3)
    texts = [random_ids(length, number)[0] for number, length in enumerate(lengths)]
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    mask = torch.stack([(torch.arange(width) >= width - len(text)).long() for text in texts])
    options = {"beacon_ratio": 4, "max_new_tokens": CHUNK + 4, **GREEDY}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, text in enumerate(texts):
        assert together[row, width:].tolist() == model.generate(text[None], **options)[0, len(text) :].tolist()


@torch.no_grad()
def test_rows_that_end_before_others_are_left_without_their_padding(model):
    """One of them within its first chunk, one behind a closed one; as each is where it is alone."""
    texts = [random_ids(length, length)[0] for length in (CHUNK + 3, 4, 2 * CHUNK + 9)]
    width = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    mask = torch.stack([(torch.arange(width) >= width - len(text)).long() for text in texts])
    options = {"beacon_ratio": 4, "max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(ids, attention_mask=mask, **options, eos_token_id=96).sequences[:, width:]
    ends = [int(free[0, 2]), int(free[1, 0])]  # rows 0 and 1 end there, or before
    both = model.generate(ids, attention_mask=mask, **options, eos_token_id=ends)
    counts = []
    for row, text in enumerate(texts):
        alone = model.generate(text[None], **options, eos_token_id=ends)
        counts.append(alone.sequences.shape[1] - len(text))
        same(both.past_key_values.row(row), alone.past_key_values, atol=5e-5)
    assert min(counts) < max(counts)
    named = {**options, "beacon_ratio": [4, 4], "max_new_tokens": 2 * CHUNK}  # the prompt's chunks alone
    assert len(model.generate(ids, attention_mask=mask, **named, eos_token_id=ends).past_key_values.rows) == 3


@torch.no_grad()
def test_beams_take_their_states_along(model):
    context, question = model.compress(random_ids(3 * CHUNK + 5), ratio=4), random_ids(5, 2)
    options = {"num_beams": 3, "max_new_tokens": CHUNK, **GREEDY}
    beams = model.generate(question, context=context, **options)
    whole = torch.cat((context.token_ids, question), dim=1)
    assert torch.equal(beams, model.generate(whole, beacon_ratio=4, **options)[:, context.tokens_seen :])


@torch.no_grad()
def test_auto_reads_a_text_anew_from_an_empty_state(model):
    context = model.compress(random_ids(2 * CHUNK + 3), ratio="auto", budget=60)
    grown = model.compress(random_ids(6 * CHUNK, 1), cache=context.fork())
    assert grown.ratios[0] > context.ratios[0]
    whole = torch.cat((random_ids(2 * CHUNK + 3), random_ids(6 * CHUNK, 1)), dim=1)
    same(grown, model.compress(whole, ratio="auto", budget=60), atol=5e-5)


@torch.no_grad()
def test_several_chunks_are_closed_in_one_pass(model):
    passes = []
    handle = (
        model.get_decoder().layers[0].register_forward_pre_hook(lambda layer, args: passes.append(args[0].shape[1]))
    )
    model.compress(random_ids(8 * CHUNK + 2), ratio=4)
    handle.remove()
    assert passes == [8 * (CHUNK + 4), 2]


def test_steps_are_not_recorded(model, monkeypatch):
    monkeypatch.setitem(__import__("activation_beacon.recorded").recorded.RECORDERS, "cpu", lambda step: 1 / 0)
    context = model.compress(random_ids(2 * CHUNK + 3), ratio=4)
    expected = model.generate(random_ids(4), context=context, max_new_tokens=4, **GREEDY)
    model.cuda_graphs = True
    try:
        assert torch.equal(model.generate(random_ids(4), context=context, max_new_tokens=4, **GREEDY), expected)
    finally:
        model.cuda_graphs = False


@torch.no_grad()
def test_what_stood_before_a_text_is_reused_where_its_state_is_held(model, tmp_path):
    ids = random_ids(3 * CHUNK + 9)[0]
    cache = model.compress(ids, ratio=4)
    other = torch.cat((ids[: 3 * CHUNK + 4], random_ids(9, 5)[0]))
    assert reusable_length(cache, torch.cat((ids, ids[:3]))) == len(ids)
    assert reusable_length(cache, other) == 3 * CHUNK  # the tail has been read beyond
    assert reusable_length(cache, torch.cat((ids[: 2 * CHUNK + 4], random_ids(9, 5)[0]))) == 0  # its state has gone
    assert cache.without_tail().save(tmp_path / "c.beacon") > 0
    same(BeaconCache.load(tmp_path / "c.beacon", model), cache.without_tail())
    for length in (len(ids), 3 * CHUNK):
        short = opening(cache, length)
        expected = model.compress(torch.cat((ids[:length], random_ids(6, 6)[0])), ratio=4)
        same(model.compress(random_ids(6, 6), cache=short), expected, atol=5e-5)


# --- files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_contexts_and_adapters_go_through_files(model, tmp_path):
    for length in (5, 3 * CHUNK + 5):
        context = model.compress(random_ids(length), ratio=4)
        context.save(tmp_path / "c.beacon")
        again = BeaconCache.load(tmp_path / "c.beacon", model)
        same(again, context)
        same(BeaconCache.load(tmp_path / "c.beacon"), context)
        assert torch.equal(
            model(random_ids(CHUNK, 1), past_key_values=again).logits,
            model(random_ids(CHUNK, 1), past_key_values=context).logits,
        )
    packed = model.compress(random_ids(3 * CHUNK + 5), ratio=4).quantize(8)
    packed.save(tmp_path / "p.beacon")
    assert BeaconCache.load(tmp_path / "p.beacon", model).quantized_bits == 8
    same(BeaconCache.load(tmp_path / "p.beacon", model), packed)
    base = tiny(model.config.model_type, attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = load(str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    assert all(torch.equal(beacon_tensors(loaded)[name], tensor) for name, tensor in beacon_tensors(model).items())
    same(loaded.compress(random_ids(53), ratio=4), model.compress(random_ids(53), ratio=4), atol=1e-5)


def cut_state(context):
    layer = context.layers[0]
    context.layers[0] = layer.map(lambda tensor: tensor[..., :-1].contiguous())


def without_settled(context):
    layer = context.layers[0]
    context.layers[0] = StateLayer.of(layer.state, State.empty(1))


def of_another_shape_at_the_chunks_end(context):
    layer = context.layers[0]
    context.layers[0] = StateLayer.of(layer.state, layer.settled.map(lambda tensor: tensor[..., :-1].contiguous()))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_state, r"layer 0 must have states .* as the model"),
        (without_settled, r"layer 0 must have states .* as the model; got \(None, None\)"),
        (of_another_shape_at_the_chunks_end, r"a layer holds .* where 20 entries a row are due"),
        (
            lambda context: context.layers.__setitem__(0, StateLayer(1)),
            r"layer 0 must have states .* as the model; got \(None, None\)",
        ),
        (
            lambda context: context.layers.__setitem__(1, context.layers[0].map(torch.clone)),
            r"num_states must be the model's \{0: 1, .*\}; got \{0: 1, 1: 1",
        ),
    ],
)
@torch.no_grad()
def test_files_with_states_of_something_else_are_refused(damage, reason, tmp_path):
    model = with_beacons("qwen3_5_text", CONFIG, attention="sdpa")
    context = model.compress(random_ids(3 * CHUNK + 5), ratio=4)
    assert context.num_slots == 20
    damage(context)
    context.save(tmp_path / "c.beacon")
    with pytest.raises(FileFormatError, match=reason):
        BeaconCache.load(tmp_path / "c.beacon", model)


def test_another_dtype_leaves_sums_as_precise_as_they_are(model):
    context = model.compress(random_ids(3 * CHUNK + 5), ratio=4).to(torch.bfloat16)
    for state in states_of(context).values():
        assert {tensor.dtype for tensor in state.conv} == {torch.bfloat16}
        assert {tensor.dtype for tensor in state.recurrent if tensor is not None} <= {torch.float32}
    assert context.dense_keys.dtype == torch.bfloat16


def test_empty_states_are_zeros_among_others():
    one, none = State((torch.ones(1, 3),), (None,)), State.empty(1)
    both = stacked([one, none, one], [1, 2, 1])
    assert both.conv[0].tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert both.recurrent == (None,)
    assert stacked([none, none], [1, 2]) == none


@torch.no_grad()
def test_batches_are_stacked_with_their_own_states(model):
    """The first of two, neither of which has closed a chunk."""
    short = model.compress([random_ids(5, 1)[0], random_ids(5, 2)[0]], ratio=4)
    contexts = [model.compress(random_ids(2 * CHUNK + 5, seed), ratio=4) for seed in (3, 4)]
    both, new = BeaconCache.stack([short, *contexts]), random_ids(CHUNK + 5, 9)
    for row, context in enumerate(contexts, start=2):
        expected = model(new, past_key_values=context).logits
        torch.testing.assert_close(model(new, past_key_values=both.row(row)).logits, expected, rtol=0, atol=1e-4)
    assert model(new.repeat(4, 1), past_key_values=both).logits.shape[0] == 4


BIASED = {
    "lfm2": {"conv_bias": True},
    "lfm2_moe": {"conv_bias": True},
    "granitemoehybrid": {"mamba_proj_bias": True},
    "bamba": {"mamba_proj_bias": True},
    "nemotron_h": {"use_bias": True},
}


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("family", BIASED)
@torch.no_grad()
def test_padding_that_would_change_a_state_is_not_read(family, scale):
    """Zeros in the place of padding become something by a bias. The base itself has that fault."""
    base = tiny(family, attention="sdpa", **BIASED[family])
    for name, parameter in base.named_parameters():
        if name.endswith("in_proj.bias"):
            parameter.mul_(scale)
    model = attach(base, CONFIG)
    assert model._beacon.site.padding_leaves_traces
    texts = [random_ids(9, 2)[0], random_ids(4, 1)[0]]
    both = model.compress(texts)
    ids = torch.stack([texts[0], torch.nn.functional.pad(texts[1], (5, 0))])
    mask = torch.stack([torch.ones(9), torch.arange(9) >= 5]).long()
    called = model(ids, attention_mask=mask, use_cache=True)
    for row, text in enumerate(texts):
        alone = model(text[None], use_cache=True)
        same(both.row(row), alone.past_key_values, atol=1e-5)
        same(called.past_key_values.row(row), alone.past_key_values, atol=1e-5)
        torch.testing.assert_close(called.logits[row, -len(text) :], alone.logits[0], rtol=0, atol=1e-5)
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)[:, 9:]
    for row, text in enumerate(texts):
        assert answers[row].tolist() == model.generate(text[None], max_new_tokens=6, **GREEDY)[0, len(text) :].tolist()


@pytest.mark.parametrize("family", WITH_STATES)
def test_most_models_leave_no_trace_of_padding(family):
    assert not find_decoder(tiny(family), ("q", "k", "v")).padding_leaves_traces


@torch.no_grad()
def test_where_padding_leaves_traces_the_base_gives_what_rows_in_turn_cannot():
    model = with_beacons("lfm2", CONFIG, attention="sdpa", conv_bias=True)
    ids, mask = random_ids(10, 1, batch=2), torch.ones(2, 10, dtype=torch.long)
    mask[1, :5] = 0
    for given in ({"output_hidden_states": True}, {"logits_to_keep": torch.tensor([2, 9])}):
        output = model(ids, attention_mask=mask, use_cache=True, **given)
        with model.beacon_disabled():
            expected = model(ids, attention_mask=mask, **given)
        assert torch.equal(output.logits, expected.logits)
        assert all(map(torch.equal, output.hidden_states or (), expected.hidden_states or ()))
        same(output.past_key_values.row(1), model.compress(ids[1:, 5:]), atol=1e-5)


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_pass_that_is_interrupted_leaves_nothing_to_the_next(model, has_gradients):
    """Ctrl-C comes as no Exception, and torch calls no hooks after it then."""
    context = model.compress(random_ids(2 * CHUNK + 5), ratio=4)
    expected = model(random_ids(3, 9), past_key_values=context.fork()).logits
    mixer = next(layer.attention for layer in model._beacon.site.layers if layer.num_states)

    def interrupt(*_):
        raise KeyboardInterrupt

    for new in (1, CHUNK):
        handle = mixer.out_proj.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(has_gradients):
            model(random_ids(new, 3), past_key_values=context.fork())
        handle.remove()
        with torch.no_grad():
            torch.testing.assert_close(
                model(random_ids(3, 9), past_key_values=context.fork()).logits, expected, rtol=0, atol=1e-5
            )


@torch.no_grad()
def test_all_that_the_base_gives_of_a_short_text_with_padding_behind_it_is_the_bases(model):
    ids, mask = random_ids(10, 1, batch=2), torch.ones(2, 10, dtype=torch.long)
    mask[0, 9:] = mask[1, 5:] = 0
    given = {"attention_mask": mask, "output_hidden_states": True, "logits_to_keep": torch.tensor([2, 4])}
    output = model(ids, use_cache=True, **given)
    with model.beacon_disabled():
        expected = model(ids, use_cache=False, **given)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    assert torch.equal(output.logits, expected.logits)
    same(output.past_key_values.row(1), model.compress(ids[1:, :5]), atol=1e-5)


@torch.no_grad()
def test_hidden_states_of_rows_that_are_read_in_turn_are_refused(model):
    ids, mask = random_ids(50, 1, batch=2), torch.ones(2, 50, dtype=torch.long)
    mask[1, :45] = 0
    for option in ("output_hidden_states", "output_attentions"):
        with pytest.raises(UnsupportedError, match=rf"^{option} needs rows that are read together; .* one at a time\."):
            model(ids, attention_mask=mask, beacon_ratio=4, **{option: True})
    assert model(ids, beacon_ratio=4, output_hidden_states=True).hidden_states[0].shape[0] == 2


@torch.no_grad()
def test_progress_is_that_of_all_rows(model):
    told = []
    texts = [random_ids(length, 1)[0] for length in (3 * CHUNK + 2, 5, 4 * CHUNK + 9)]
    model.compress(texts, ratio=4, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (7, 7)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {7}


@pytest.mark.parametrize(
    "family", ["bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_5", "kimi_linear", "lfm2"]
)
@pytest.mark.parametrize(("length", "ratio"), [(3 * CHUNK + 1, 2), (2 * CHUNK + 5, CHUNK), (CHUNK + 1, CHUNK)])
def test_gradients_of_single_rows(family, length, ratio):
    """A tail of one token, or one beacon of a chunk: some modules write over the state in a step of one row."""
    model = with_beacons(family, dataclasses.replace(CONFIG, ratios=(2, CHUNK)), attention="sdpa")
    ids, gradients = random_ids(length), {}
    model(ids, beacon_ratio=ratio, use_cache=False).logits.square().mean().backward()
    for name, parameter in model.beacon_parameters():
        gradients[name] = parameter.grad.clone()
    model.zero_grad()
    with chunks_at_once(model):
        hidden = model.hidden_states(ids, [ratio] * ((length - 1) // CHUNK))
        head(model, hidden).square().mean().backward()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, parameter in model.beacon_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=1e-3 * max(1, float(gradients[name].abs().max()))
        )


def test_a_step_on_a_context_has_gradients(model):
    """Through its logits, whatever the module does to the state in a step."""
    context = model.compress(random_ids(2 * CHUNK + 5), ratio=4)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    try:
        model(random_ids(1, 3), past_key_values=context).logits.square().sum().backward()
        assert embedding.grad.abs().max() > 0
    finally:
        embedding.grad = None
        embedding.requires_grad_(False)


# --- what else ---------------------------------------------------------------------------------------------------------


def test_beacons_among_tokens_are_refused_and_not_the_default():
    with pytest.raises(
        ConfigError, match=r"^placement must be 'append' for a base with recurrent layers, .*; got 'interleave'\. Use"
    ):
        attach(tiny("qwen3_5_text"), BeaconConfig(chunk_size=CHUNK, ratios=(2,)))
    base = tiny("qwen3_5_text", max_position_embeddings=4096)
    assert attach(base).beacon_config.placement == "append"


@torch.no_grad()
def test_a_text_as_the_base_holds_it_can_be_asked_again_and_again(model):
    context = BaseContext.of(model, random_ids(700)[0].tolist())
    assert context.cache_bytes == base_cache_bytes(context.cache)
    answers = [context.ask(random_ids(6, 1)[0].tolist(), max_new_tokens=8)[0] for _ in range(2)]
    assert answers[0] == answers[1]
    whole = torch.cat((random_ids(700), random_ids(6, 1)), dim=1)
    with model.beacon_disabled():
        expected = model(whole).logits[0, -1].argmax()
    assert answers[0][0] == int(expected)
    packed = read_context(model, random_ids(700)[0].tolist(), "int8")
    assert packed.cache_bytes < context.cache_bytes
    with pytest.raises(
        UnsupportedError,
        match=r"^The method streaming-llm drops keys and values, and .* carry a state\. Leave it out\.",
    ):
        read_context(model, random_ids(700)[0].tolist(), "streaming-llm", ratio=4)


@pytest.mark.parametrize("family", ["granitemoehybrid", "lfm2_moe", "qwen3_5_text"])
def test_a_config_alone_is_told_what_is_not_counted(family, tmp_path):
    """Without weights, and where there is no rotary embedding, or one of another name."""
    tiny(family).config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"^The operations of recurrent layers \(\w+\) are not counted"):
        read_shape(str(tmp_path))


def test_what_they_cost_is_not_counted(model):
    with pytest.raises(UnsupportedError, match=r"^The operations of recurrent layers \(\w+\) are not counted"):
        ModelShape.of(model.config, {})
