"""One more token of several texts in one pass: each text goes on as it would alone."""

import copy
import dataclasses

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.errors import CapacityError, InputError
from activation_beacon.ragged import OwnEntries
from activation_beacon.sites import understands_told_masks
from families import FAMILIES, ONE_SETTING, WITH_STATES, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)
LENGTHS = (1, CHUNK - 2, CHUNK + 1, 5 * CHUNK + 3, 3 * CHUNK + 9)
RATIOS = (2, 4, 8, "auto", 4)


def contexts_of(model):
    ids = random_ids(max(LENGTHS), batch=len(LENGTHS), seed=3)
    return [model.compress(row[:length], ratio=ratio) for row, length, ratio in zip(ids, LENGTHS, RATIOS, strict=True)]


def entries(context):
    return [tensor for layer in context.layers for _, tensor in layer.dense().named_tensors()]


def assert_same(ours, alone, tolerance=2e-5):
    assert ours.rows == alone.rows
    assert torch.equal(ours.token_ids, alone.token_ids)
    for tensor, expected in zip(entries(ours), entries(alone), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, *ONE_SETTING])
@torch.no_grad()
def test_each_context_goes_on_as_alone_across_chunks(family):
    config = dataclasses.replace(CONFIG, placement="append") if family in WITH_STATES else CONFIG
    model = with_beacons(family, config, attention="eager" if family == "gpt_oss" else "sdpa")
    assert understands_told_masks(model, model._beacon.site) == (family != "gpt_oss")
    ours, alone = contexts_of(model), contexts_of(model)
    new = random_ids(CHUNK + 3, batch=len(LENGTHS), seed=4)  # each closes a chunk at another step
    for tokens in new.T:
        logits = model.read_next(ours, tokens)
        expected = [
            model(input_ids=token.view(1, 1), past_key_values=each).logits[0, -1]
            for each, token in zip(alone, tokens, strict=True)
        ]
        torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=2e-4)
    for each, other in zip(ours, alone, strict=True):
        assert_same(each, other, 1e-4 if family in WITH_STATES else 2e-5)


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("llama", {"sliding_window": 6}, {None}),  # left over from a conversion: Llama heeds none
        ("olmo2", {"sliding_window": 6}, {None}),
        ("mistral", {"sliding_window": 6}, {6}),
        ("mistral", {"sliding_window": None}, {None}),
        ("phi3", {"sliding_window": 6, "layer_types": ["full_attention"] * 3}, {6}),  # which it does not heed
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}, {None, 6}),
        ("qwen3", {"sliding_window": 6, "use_sliding_window": False}, {None}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_windows_are_those_that_the_family_heeds(family, settings, windows):
    model = with_beacons(family, CONFIG, attention="sdpa", **settings)
    assert {layer.window for layer in model._beacon.site.layers} == windows
    contexts = [model.compress(random_ids(length, length), ratio=4) for length in (CHUNK - 3, 3 * CHUNK + 5)]
    alone = [context.fork() for context in contexts]
    logits = model.read_next(contexts, [5, 6])
    for row, (context, token) in enumerate(zip(alone, (5, 6), strict=True)):
        expected = model(input_ids=torch.tensor([[token]]), past_key_values=context).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)


def passes(model, call):
    """How many rows each pass of the base reads."""
    sizes = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    try:
        call()
    finally:
        handle.remove()
    return sizes


@torch.no_grad()
def test_rows_that_close_no_chunk_are_read_in_one_pass():
    model = with_beacons("llama", CONFIG, attention="sdpa")
    assert passes(model, lambda: model.read_next(contexts_of(model)[1:], [1, 2, 3, 4]))[-1] == 4
    full = model.compress(random_ids(CHUNK), ratio=4)  # its next token closes a chunk
    others = contexts_of(model)[1:]
    assert passes(model, lambda: model.read_next([full, *others], [1, 2, 3, 4, 5])) == [1, 1, 4]


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_contexts_and_forks(bits):
    model = with_beacons("llama", CONFIG, attention="sdpa")
    context = model.compress(random_ids(4 * CHUNK + 3), ratio=4).quantize(bits)
    ours, alone = [context.fork(), context.fork()], [context.fork(), context.fork()]
    for tokens in ([5, 6], [7, 8]):
        logits = model.read_next(ours, tokens)
        for row, (each, token) in enumerate(zip(alone, tokens, strict=True)):
            expected = model(input_ids=torch.tensor([[token]]), past_key_values=each).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)
    assert context.tokens_seen == 4 * CHUNK + 3
    for each, other in zip(ours, alone, strict=True):
        assert_same(each, other)


@torch.no_grad()
def test_nothing_is_copied_when_others_join_or_leave():
    model = with_beacons("llama", CONFIG, attention="sdpa")
    first, second, third = contexts_of(model)[2:]
    model.read_next([first, second], [1, 2])
    room = first.layers[0].room
    model.read_next([third, first], [1, 2])
    model.read_next([first, second, third], [1, 2, 3])
    assert first.layers[0].room is room
    assert first.tokens_seen == LENGTHS[2] + 3


@torch.no_grad()
def test_a_compacted_context_holds_its_own_bytes_only():
    model = with_beacons("llama", CONFIG, attention="sdpa")
    context, other = contexts_of(model)[2:4]
    model.read_next([context, other], [1, 2])
    small = context.compacted()
    held = [(layer.keys, layer.keys.untyped_storage().nbytes()) for layer in (context.layers[0], small.layers[0])]
    assert held[0][1] > held[0][0].nbytes
    assert held[1][1] == held[1][0].nbytes == held[0][0].nbytes
    assert_same(small, context, tolerance=0)


BAD = [
    (lambda c: ([], []), InputError, "one token for each"),
    (lambda c: (c, [1]), InputError, "one token for each"),
    (lambda c: ([c[0], c[0]], [1, 2]), InputError, "the same context twice"),
    (lambda c: (c, torch.ones(2, 1, dtype=torch.long)), InputError, "one token for each"),
    (lambda c: ([c[0], c[0].concatenate([c[1], c[1]])], [1, 2]), InputError, "rows"),
]


@pytest.mark.parametrize(("given", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(given, error, words):
    contexts = contexts_of(with_beacons("llama", CONFIG, attention="sdpa"))[1:3]
    contexts_given, tokens = given(contexts)
    with pytest.raises(error, match=words):
        with_beacons("llama", CONFIG, attention="sdpa").read_next(contexts_given, tokens)


@pytest.mark.parametrize("at", ["plan", "closing", "together"])
def test_on_an_error_all_contexts_stay_as_they_were(at):
    model = with_beacons("llama", CONFIG, attention="sdpa")
    contexts = [model.compress(random_ids(CHUNK), ratio=4), *contexts_of(model)[1:]]
    before = [copy.deepcopy([entries(each), each.rows, each.token_ids]) for each in contexts]
    if at == "plan":
        object.__setattr__(model._beacon.site, "max_positions", CHUNK)
        error = CapacityError
    else:
        error = RuntimeError
        seen = []

        def fail(_, args):
            seen.append(args[0].shape[0])
            if (at == "together") == (args[0].shape[0] > 1) and len(seen) > 1:
                raise RuntimeError("no memory")

        model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model.read_next(contexts, [1, 2, 3, 4, 5])
    for each, (tensors, rows, ids) in zip(contexts, before, strict=True):
        assert each.rows == rows
        assert torch.equal(each.token_ids, ids)
        assert all(map(torch.equal, entries(each), tensors))


def test_what_is_made_of_the_mask_says_the_same():
    mask = OwnEntries.on(torch.device("cpu"))
    mask.entries = [(torch.zeros(1), torch.zeros(1))]
    assert mask[:, :, :, :7].to(torch.bool).entries is mask.entries
