"""Reading: a text may come in any pieces, in any batch, and be broken off anywhere; and what it costs in memory."""

import copy
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from activation_beacon import BeaconConfig, grouped
from activation_beacon.causal import MOST_ROWS
from activation_beacon.errors import UnsupportedError
from families import EAGER_ONLY, TESTED, beacon_tensors, random_ids, tiny, with_beacons
from reference import Reference

CHUNK = 16
RATIOS = (2, 4, 8, 16)
LENGTH = 5 * CHUNK + 6
EXACT = {"anchored": True, "placement": "append", "exact_ids": tuple(range(3, 97, 17))}


def config(**settings):
    return BeaconConfig(chunk_size=CHUNK, ratios=RATIOS, **settings)


def attached(settings, family="llama"):
    """A tiny model; with torch's own attention where beacons stand at the end, so that read chunks are resumed."""
    resumes = settings.get("placement") == "append" and family not in EAGER_ONLY
    return with_beacons(family, config(**settings), attention="sdpa" if resumes else "eager")


def close(measured, expected, tolerance=1e-5):
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance)


def same_cache(cache, expected, tolerance=1e-5):
    assert cache.rows == expected.rows
    assert torch.equal(cache.token_ids, expected.token_ids)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.get_seq_length() == cache.num_slots
        assert layer.keys.shape[2] == max(row.entries_within(layer.window) for row in cache.rows)
        close(layer.keys, other.keys, tolerance)
        close(layer.values, other.values, tolerance)


def cut(length, seed):
    """Pieces that make up `length`, of any size."""
    draw = random.Random(seed)
    edges = sorted(draw.sample(range(1, length), draw.randint(1, 6)))
    return [stop - start for start, stop in zip([0, *edges], [*edges, length], strict=True)]


def read_in_pieces(model, ids, pieces, **options):
    cache = None
    for piece in ids.split(pieces, dim=1):
        cache = model.compress(piece, cache=cache, **(options if cache is None else {}))
    return cache


def continuation(model, cache):
    return model.generate(random_ids(3, 99), context=cache, max_new_tokens=20, do_sample=False, min_new_tokens=20)


# --- logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "ratio"), [("append", 4), ("interleave", CHUNK), ("interleave", 4)])
def test_the_logits_of_a_chunk_s_last_token_are_its_own_and_no_beacon_s(placement, ratio):
    model = with_beacons("llama", config(placement=placement))
    ids = random_ids(CHUNK + 1)
    whole = model(ids, beacon_ratio=ratio).logits
    close(model(ids, beacon_ratio=ratio, logits_to_keep=2).logits, whole[:, -2:])
    cache = model.compress(ids[:, : CHUNK - 1], ratio=ratio)
    close(model(ids[:, CHUNK - 1 :], past_key_values=cache).logits, whole[:, -2:])


def test_a_last_column_of_padding_only_has_no_logits():
    model = with_beacons("llama", config())
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[:, -1] = 0
    logits = model(random_ids(40, batch=2), attention_mask=mask, beacon_ratio=4, logits_to_keep=1).logits
    assert logits.shape[:2] == (2, 1)
    assert not logits.any()


# --- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_cutting_the_context_anywhere_gives_the_same_cache(family):
    model, ids = with_beacons(family, config(num_sinks=2)), random_ids(LENGTH)
    at_once = model.compress(ids, ratio=4)
    expected = continuation(model, at_once)
    for pieces in (*(cut(LENGTH, seed) for seed in range(3)), [CHUNK] * 5 + [6], [1] * LENGTH):
        cache = read_in_pieces(model, ids, pieces, ratio=4)
        same_cache(cache, at_once)
    assert torch.equal(continuation(model, cache), expected)
    same_cache(cache, at_once)  # generating has not touched it


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"ratio": 2}),
        ({}, {"ratio": 16}),
        ({"num_sinks": 1}, {"ratio": 8}),
        ({"num_sinks": CHUNK}, {"ratio": 8}),
        ({"local_tokens": 5}, {"ratio": 4}),
        ({"local_tokens": 40, "num_sinks": 3}, {"ratio": 4}),
        ({"num_sinks": 2}, {"ratio": [2, 16, 4, 8, 2]}),
        ({"placement": "append"}, {"ratio": 4}),
        ({"placement": "append", "num_sinks": 2, "local_tokens": 5}, {"ratio": [4, 16, 2, 8, 2]}),
        ({"projections": ("q", "k", "v", "o")}, {"ratio": 4}),
        ({"anchored": True, "num_sinks": 2}, {"ratio": [2, 16, 4, 8, 2]}),
        ({**EXACT, "num_sinks": 2}, {"ratio": [2, 8, 4, 8, 2]}),
        ({**EXACT, "num_sinks": 2}, {"ratio": 2, "spans": [(10, 20, None)]}),
        ({**EXACT, "num_sinks": 4}, {"ratio": 4, "spans": [(0, 4, None)]}),
        ({"num_sinks": 2}, {"ratio": "auto"}),
        ({"num_sinks": 2}, {"budget": 45}),
        ({"num_sinks": 2}, {"ratio": 8, "spans": [(10, 20, None), (40, 50, 2), (60, 61, None)]}),
    ],
    ids=str,
)
@torch.no_grad()
def test_cutting_anywhere_under_every_setting(settings, options):
    model, ids = attached(settings), random_ids(LENGTH)
    at_once = model.compress(ids, **options)
    expected = continuation(model, at_once)
    for pieces in (*(cut(LENGTH, seed) for seed in range(10, 16)), [LENGTH - 1, 1], [1] * LENGTH):
        cache = read_in_pieces(model, ids, pieces, **options)
        same_cache(cache, at_once)
    assert torch.equal(continuation(model, cache), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_sinks": 2},
        {"local_tokens": 5},
        {"placement": "append", "num_sinks": 2},
        {"placement": "append", "local_tokens": 5},
        {**EXACT, "num_sinks": 2},
        {**EXACT, "local_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "smollm3"])
@torch.no_grad()
def test_the_logits_of_each_piece_are_those_of_the_text_so_far(family, settings):
    model, ids = attached(settings, family), random_ids(LENGTH)
    known = {"chunk_size": CHUNK, "num_sinks": 0, "local_tokens": 0} | settings
    reference = Reference(tiny(family), beacon_tensors(model), **{k: v for k, v in known.items() if k != "anchored"})
    for seed in range(20, 24):
        cache, stop = model.new_cache(ratio=4), 0
        for piece in ids.split(cut(LENGTH, seed), dim=1):
            stop += piece.shape[1]
            logits = model(piece, past_key_values=cache).logits
            close(logits[0], reference(ids[:, :stop], 4).logits[-piece.shape[1] :], 1e-4)


@torch.no_grad()
def test_reading_on_leaves_a_fork_alone():
    model, ids = with_beacons("llama", config(num_sinks=2)), random_ids(LENGTH)
    cache = model.compress(ids[:, :50], ratio=4)
    fork, before = cache.fork(), [layer.keys.clone() for layer in cache.layers]
    same_cache(model.compress(ids[:, 50:], cache=fork), model.compress(ids, ratio=4))
    assert cache.tokens_seen == 50
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


# --- batches -----------------------------------------------------------------------------------------------------------

LENGTHS = [(86, 33, 9), (16, 17, 15), (70, 70, 70), (1, 86, 48), (97, 33)]


def rows_of(lengths, seed=0):
    return [random_ids(length, seed + index)[0] for index, length in enumerate(lengths)]


def padded(rows, side):
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = row, 1
    return ids, mask


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_each_row_of_a_ragged_batch_is_what_it_is_alone(family, lengths):
    model, rows = with_beacons(family, config(num_sinks=2)), rows_of(lengths)
    alone = [model.compress(row, ratio=4) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        batch = model.compress(ids, attention_mask=mask, ratio=4)
        for index, expected in enumerate(alone):
            same_cache(batch.row(index), expected)
    batch = model.compress([row.tolist() for row in rows], ratio=4)
    for index, expected in enumerate(alone):
        same_cache(batch.row(index), expected)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"num_sinks": 2}, {"ratio": 4}),
        ({"local_tokens": 5}, {"ratio": [4, 2, 16, 8, 2, 4, 8, 2]}),
        ({"num_sinks": 2}, {"budget": 45}),
        ({"placement": "append"}, {"ratio": 2, "spans": [(10, 20, None)]}),
        ({**EXACT, "num_sinks": 2}, {"ratio": 8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "smollm3"])
@torch.no_grad()
def test_ragged_pieces_of_a_ragged_batch(family, settings, options):
    """Each row gets pieces of its own length, some of which close chunks, in its own turn."""
    model = attached(settings, family)
    rounds = [(20, 3, 40), (1, 1, 1), (5, 40, 2), (33, 1, 16), (1, 20, 1)]
    texts = rows_of([sum(lengths) for lengths in zip(*rounds, strict=True)])
    batch, starts = None, [0, 0, 0]
    for number, lengths in enumerate(rounds):
        pieces = [text[start : start + n] for text, start, n in zip(texts, starts, lengths, strict=True)]
        starts = [start + n for start, n in zip(starts, lengths, strict=True)]
        ids, mask = padded(pieces, ("left", "right")[number % 2])
        first = options if batch is None else {}
        batch = model.compress(ids, attention_mask=mask, cache=batch, **first)
        for index, (text, stop) in enumerate(zip(texts, starts, strict=True)):
            same_cache(batch.row(index), model.compress(text[:stop], **options))


@pytest.mark.parametrize("settings", [{"num_sinks": 2}, {"placement": "append"}, EXACT], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_logits_of_ragged_pieces_stand_in_their_columns(side, settings):
    model = attached(settings)
    firsts, seconds = rows_of((50, 20, 5)), rows_of((3, 30, 17), seed=5)
    batch = model.compress(*padded(firsts, side)[:1], attention_mask=padded(firsts, side)[1], ratio=4)
    ids, mask = padded(seconds, side)
    output = model(ids, attention_mask=mask, past_key_values=batch, labels=ids)
    for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        cache = model.compress(first, ratio=4)
        alone = model(second[None], past_key_values=cache, labels=second[None])
        start = ids.shape[1] - len(second) if side == "left" else 0
        close(output.logits[index, start : start + len(second)], alone.logits[0])
        close(output.nll[index, start : start + len(second) - 1], alone.nll[0])
        same_cache(batch.row(index), cache)


@torch.no_grad()
def test_rows_of_one_layout_are_read_in_one_pass(monkeypatch):
    model, passes = with_beacons("llama", config()), []
    model.model.register_forward_hook(lambda *args: passes.append(1))
    model.compress(random_ids(LENGTH), ratio=4)
    alone = len(passes)
    assert alone == 6  # five chunks and the tail
    model.compress(random_ids(LENGTH, batch=3), ratio=4)
    assert len(passes) == 2 * alone


@torch.no_grad()
def test_the_head_is_used_for_wanted_tokens_only():
    model, widths = with_beacons("llama", config()), []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    cache = model.compress(random_ids(LENGTH), ratio=4)
    assert widths == []
    model.generate(random_ids(40), context=cache, max_new_tokens=1)
    model(random_ids(40), past_key_values=cache, logits_to_keep=1)
    assert widths == [1, 1]


# --- breaking off ------------------------------------------------------------------------------------------------------


def state_of(cache):
    tensors = [(layer.keys, layer.values, layer.stored) for layer in cache.layers]
    return cache.rows, cache.policy, cache.token_ids, copy.copy(tensors), cache.num_slots


def assert_untouched(cache, before):
    rows, policy, token_ids, tensors, num_slots = before
    assert (cache.rows, cache.policy, cache.num_slots) == (rows, policy, num_slots)
    assert cache.token_ids is token_ids or torch.equal(cache.token_ids, token_ids)
    for layer, (keys, values, stored) in zip(cache.layers, tensors, strict=True):
        assert layer.stored is stored
        assert layer.get_seq_length() == num_slots
        if num_slots:
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


class Breaking:
    """Raises in the `calls`-th call of a layer's first norm, which every pass calls in every layer."""

    def __init__(self, model, calls, error):
        self.calls, self.error, self.model = calls, error, model

    def __enter__(self):
        self.handles = [
            layer.input_layernorm.register_forward_pre_hook(lambda *args: self.count())
            for layer in self.model.model.layers
        ]

    def count(self):
        self.calls -= 1
        if self.calls < 0:
            raise self.error

    def __exit__(self, *details):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["compress", "forward", "generate", "new ratio"])
@pytest.mark.parametrize("held", [0, 5, CHUNK, 40])
@pytest.mark.parametrize("settings", [{}, EXACT], ids=["interleave", "exact"])
@torch.no_grad()
def test_an_error_in_the_middle_leaves_the_cache_as_it_was(settings, held, call, error, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)  # a pass for each chunk
    model, ids = attached({"num_sinks": 2, **settings}), random_ids(LENGTH)
    cache = model.compress(ids[:, :held], ratio=4) if held else model.new_cache(ratio=4)
    before, rest = state_of(cache), ids[:, held:]
    run = {
        "compress": lambda: model.compress(rest, cache=cache),
        "forward": lambda: model(rest, past_key_values=cache),
        "generate": lambda: model.generate(rest, context=cache, max_new_tokens=20, min_new_tokens=20),
        "new ratio": lambda: model.compress(rest, cache=cache, ratio=[4, 4, 2, 8, 16]),
    }[call]
    for calls in (0, 1, 4, 7, 11):
        with Breaking(model, calls, error), pytest.raises(error):
            run()
        assert_untouched(cache, before)
    assert model._beacon.state.beacon_slots is None
    if call == "compress":
        run()
        same_cache(cache, model.compress(ids, ratio=4))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_an_error_in_a_short_text_leaves_an_empty_cache_empty(error):
    model, ids = with_beacons("llama", config()), random_ids(9)
    expected = model.compress(ids)
    for use in (
        lambda cache: model.compress(ids, cache=cache),
        lambda cache: model(ids, past_key_values=cache).past_key_values,
    ):
        cache = model.new_cache()
        with Breaking(model, 1, error), pytest.raises(error):
            use(cache)
        assert (cache.num_slots, cache.token_ids.shape) == (0, (1, 0))
        assert {layer.get_seq_length() for layer in cache.layers} == {0}
        same_cache(use(cache), expected)


@torch.no_grad()
def test_an_error_leaves_ragged_and_quantised_caches_as_they_were():
    model = with_beacons("llama", config(num_sinks=2))
    ragged = model.compress([row.tolist() for row in rows_of((50, 20))], ratio=4)
    quantised = model.compress(random_ids(50), ratio=4).quantize(8)
    for cache in (ragged, quantised):
        before = state_of(cache)
        for calls in (0, 2, 4, 7):
            with Breaking(model, calls, RuntimeError), pytest.raises(RuntimeError):
                model.compress(random_ids(40, batch=cache.batch_size), cache=cache)
            assert_untouched(cache, before)
            with Breaking(model, calls % 3, RuntimeError), pytest.raises(RuntimeError):
                model.compress(random_ids(1, batch=cache.batch_size), cache=cache)
            assert_untouched(cache, before)


@torch.no_grad()
def test_an_error_in_the_head_leaves_the_cache_as_it_was():
    model, ids = with_beacons("llama", config()), random_ids(LENGTH)
    cache = model.compress(ids[:, :40], ratio=4)
    before = state_of(cache)

    def fail(*args):
        raise RuntimeError("no memory for logits")

    handle = model.lm_head.register_forward_pre_hook(fail)
    for piece in (ids[:, 40:41], ids[:, 40:]):
        with pytest.raises(RuntimeError, match="no memory"):
            model(piece, past_key_values=cache)
        assert_untouched(cache, before)
    handle.remove()
    with pytest.raises(UnsupportedError):
        model(ids[:, 40:], past_key_values=cache, position_ids=torch.zeros(1, LENGTH - 40, dtype=torch.long))
    assert_untouched(cache, before)


# --- progress ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_progress_counts_the_chunks_that_are_closed(capfd):
    model, ids = with_beacons("llama", config()), random_ids(LENGTH)
    calls = []
    cache = model.compress(ids[:, :40], ratio=4, progress=lambda *counts: calls.append(counts))
    assert calls == [(1, 2), (2, 2)]
    model.compress(ids[:, 40:], cache=cache, progress=lambda *counts: calls.append(counts))
    assert calls[2:] == [(1, 3), (2, 3), (3, 3)]
    model.compress(ids[:, :CHUNK], progress=lambda *counts: calls.append(counts))
    assert len(calls) == 5
    model.compress(ids, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err


@torch.no_grad()
def test_an_error_in_the_progress_callback_leaves_the_cache_as_it_was():
    model, ids = with_beacons("llama", config()), random_ids(LENGTH)
    cache = model.compress(ids[:, :40], ratio=4)
    before = state_of(cache)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(ids[:, 40:], cache=cache, progress=stop)
    assert_untouched(cache, before)


# --- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_lengths_and_bytes_are_exact_on_every_layer(family):
    num_chunks, sinks = 64, 2
    model = with_beacons(family, config(num_sinks=sinks), max_position_embeddings=4096)
    cache = model.compress(random_ids(num_chunks * CHUNK + 5), ratio=8)
    num_tail, num_tokens = 5, num_chunks * CHUNK + 5
    memory = sinks + num_chunks * CHUNK // 8
    assert cache.cache_length == memory + num_tail
    per_entry, full = 2 * 2 * 8 * 4, 0
    for layer, site in zip(cache.layers, model._beacon.site.layers, strict=True):
        seen = 10**9 if site.window is None else site.window - 1
        assert layer.keys.shape == layer.values.shape == (1, 2, min(memory, seen) + num_tail, 8)
        assert layer.get_seq_length() == cache.cache_length
        assert layer.num_bytes == (min(memory, seen) + num_tail) * per_entry
        full += min(num_tokens, seen) * per_entry
    assert cache.cache_bytes == sum(layer.num_bytes for layer in cache.layers)
    assert cache.uncompressed_bytes == full
    if not model._beacon.site.windows:
        assert cache.cache_bytes <= full / 8 + CHUNK * per_entry * len(cache.layers)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    assert sum(held.values()) == cache.cache_bytes  # no view keeps a larger tensor alive


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made in the block that are alive, and the most at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.alive, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}:
            if id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.forget, id(storage))
        return result

    def forget(self, key):
        self.alive -= self.sizes.pop(key)


@torch.no_grad()
def test_peak_memory_of_a_long_text_grows_by_its_beacons():
    chunk_size, ratio, short, long = 512, 32, 16 * 1024, 64 * 1024
    settings = {"num_hidden_layers": 2, "max_position_embeddings": 8192, "attention": "sdpa"}
    model = with_beacons("llama", BeaconConfig(chunk_size=chunk_size), **settings)
    peaks = {}
    for length in (short, long):
        text = random_ids(length)
        with LiveTensors() as live:
            cache = model.compress(text, ratio=ratio)
        peaks[length] = live.peak
        assert cache.num_beacons == (length - chunk_size) // ratio
    per_entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
    beacons = (long - short) // ratio
    grown = peaks[long] - peaks[short]
    held = beacons * per_entry
    one_layer = 2 * held  # what attention makes of the keys and values of one layer at a time, a copy for each head
    ids = 2 * 8 * (long - short)
    scores = (
        2 * 4 * MOST_ROWS * beacons
    )  # of a block of queries, where oneDNN makes the products: before and after softmax
    assert grown <= held + one_layer + ids + scores
    assert peaks[long] < long * per_entry  # which the text would hold uncompressed


@torch.no_grad()
def test_closing_a_chunk_holds_one_layer_twice_and_not_the_whole_cache():
    lengths, num_layers = (2048 + 5, 8192 + 5), 16
    settings = {"num_hidden_layers": num_layers, "max_position_embeddings": 8192, "attention": "sdpa"}
    model = with_beacons("llama", BeaconConfig(chunk_size=512), **settings)
    model.cpu_matmul = "torch"
    peaks, held = [], []
    for length in lengths:
        text = random_ids(length)
        with LiveTensors() as live:
            held.append(model.compress(text, ratio=2).cache_bytes)
        peaks.append(live.peak - 8 * 2 * length)  # less the ids
    assert peaks[1] - peaks[0] < 1.5 * (held[1] - held[0])


# --- the last layer ----------------------------------------------------------------------------------------------------


def calls(module, read):
    seen = []
    handle = module.register_forward_pre_hook(lambda *_: seen.append(True))
    try:
        return read(), len(seen)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", TESTED)
@torch.no_grad()
def test_of_the_last_layer_compressing_takes_keys_and_values_only(family):
    model, ids = with_beacons(family, config(num_sinks=2)), random_ids(3 * CHUNK + 5, batch=2)
    layer = model.get_decoder().layers[-1]
    cache, num_calls = calls(layer.mlp, lambda: model.compress(ids, ratio=4))
    assert num_calls == 0
    assert calls(model.get_decoder().layers[-2].mlp, lambda: model.compress(ids, ratio=4))[1] == 4
    handle = layer.register_forward_hook(lambda *_: None)  # someone waits for the layer's end
    waited_for, num_calls = calls(layer.mlp, lambda: model.compress(ids, ratio=4))
    handle.remove()
    assert num_calls == 4
    same_cache(cache, waited_for, 0)


@torch.no_grad()
def test_once_asked_for_hidden_states_a_model_ends_chunks_early_still():
    model, ids = with_beacons("llama", config()), random_ids(2 * CHUNK + 5)
    expected = model(ids, beacon_ratio=4, output_hidden_states=True).hidden_states
    layer = model.get_decoder().layers[-1]
    assert layer._forward_hooks  # transformers' own
    assert calls(layer.mlp, lambda: model.compress(ids, ratio=4))[1] == 0
    found = model(ids, beacon_ratio=4, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("attribute", ["forward", "_compiled_call_impl"])
@torch.no_grad()
def test_a_last_layer_that_another_library_has_wrapped_is_run_to_its_end(attribute):
    model, ids = with_beacons("llama", config()), random_ids(2 * CHUNK + 5)
    expected = model.compress(ids, ratio=4)
    mlp = model.get_decoder().layers[-1].mlp
    calls_seen = []
    inner = mlp.forward

    def wrapped(hidden):
        calls_seen.append(True)
        return inner(hidden)

    setattr(mlp, attribute, wrapped)
    same_cache(model.compress(ids, ratio=4), expected, 0)
    assert len(calls_seen) == 3


@torch.no_grad()
def test_losses_of_every_token_need_the_last_layer_of_every_chunk():
    model, ids = with_beacons("llama", config()), random_ids(2 * CHUNK + 5)
    layer = model.get_decoder().layers[-1]
    assert calls(layer.mlp, lambda: model(ids, labels=ids, beacon_ratio=4))[1] == 3
    assert calls(layer.mlp, lambda: model(ids, beacon_ratio=4, logits_to_keep=1))[1] == 1


def test_a_cache_keeps_what_a_further_call_does_not_name():
    model, text = attached({}), random_ids(60)
    cache = model.compress(text[:, :40], ratio=8)
    model.compress(text[:, 40:], cache=cache, spans=[(40, 44, None)])
    assert cache.ratios == (8, 8, 8)
    assert cache.rows[0].chunks[2].num_raw == 4
    expected = model.compress(text, ratio=8, spans=[(40, 44, None)])
    same_cache(cache, expected)
    model.beacon_ratio = 8
    assert model.compress(text, spans=[(0, 4, None)]).ratios == (8, 8, 8)
    assert model.compress(text, budget=60).policy.ratio == "auto"


# --- what a caller keeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
@pytest.mark.parametrize("held", [5, 20])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", [(14, 1), (14, 9), (3, 14), (12, 12)])
def test_kept_logits_are_those_of_the_last_columns_for_every_row_of_a_ragged_batch(keep, held, side, counts):
    model = with_beacons("llama", config(num_sinks=2), attention="sdpa")
    new, mask = random_ids(14, 2, batch=2), torch.zeros(2, 14, dtype=torch.long)
    for row, count in enumerate(counts):
        mask[row, 14 - count if side == "left" else 0 : 14 if side == "left" else count] = 1
    with torch.no_grad():
        before = model.compress(random_ids(held, 1, batch=2), ratio=4)
        whole = model(new, attention_mask=mask, past_key_values=before.fork()).logits[:, -keep:]
        kept = model(new, attention_mask=mask, past_key_values=before.fork(), logits_to_keep=keep).logits
    is_text = mask[:, -keep:].bool()
    assert kept.shape == whole.shape
    close(kept[is_text], whole[is_text])
    assert not kept[~is_text].any()


class FailAt(TorchDispatchMode):
    """Memory that runs out at the nth operation."""

    def __init__(self, at):
        super().__init__()
        self.count, self.at = 0, at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


NEXT = torch.tensor([[5, 6, 7], [8, 9, 10]])
RAGGED_MASK = torch.tensor([[1, 1, 1], [0, 0, 1]])
BATCH = ((20, 30),)
READINGS = {
    "compress": (BATCH, lambda model, found: model.compress(NEXT, attention_mask=RAGGED_MASK, cache=found[0])),
    "forward": (BATCH, lambda model, found: model(NEXT, attention_mask=RAGGED_MASK, past_key_values=found[0])),
    "a chunk closed": (BATCH, lambda model, found: model(NEXT.repeat(1, 5), past_key_values=found[0])),
    "short, the first": ((), lambda model, found: model(NEXT, attention_mask=RAGGED_MASK, past_key_values=found[0])),
    "read_next": (((20,), (30,), (25,)), lambda model, found: model.read_next(found, [5, 6, 7])),
    "read_next, a chunk closed": (((20,), (32,), (25,)), lambda model, found: model.read_next(found, [5, 6, 7])),
}


@pytest.mark.parametrize("name", READINGS)
@torch.no_grad()
def test_wherever_memory_runs_out_the_callers_caches_are_as_they_were(name):
    model = with_beacons("llama", config(num_sinks=2), attention="sdpa")
    batches, call = READINGS[name]

    def begun():
        texts = [[random_ids(length, length)[0].tolist() for length in lengths] for lengths in batches]
        return [model.compress(each, ratio=4) for each in texts] or [model.new_cache(2)]

    call(model, begun())  # plans are kept from then on
    caches = begun()
    with FailAt(-1) as counted:
        call(model, caches)
    for at in [*range(1, counted.count, 7), *range(max(1, counted.count - 40), counted.count + 1)]:
        caches, before = begun(), begun()
        with pytest.raises(torch.OutOfMemoryError), FailAt(at):
            call(model, caches)
        for cache, other in zip(caches, before, strict=True):
            assert cache.rows == other.rows
            assert torch.equal(cache.token_ids, other.token_ids)
            if cache.num_slots:
                same_cache(cache, other)
    same = [begun(), caches]
    for found in same:
        call(model, found)
    for one, other in zip(*same, strict=True):
        same_cache(one, other)
