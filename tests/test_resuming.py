"""Closing a chunk that has been read already computes what is missing, to the same cache."""

import pytest
import torch

from activation_beacon import BeaconConfig, forward, grouped
from activation_beacon.forward import _Reader
from activation_beacon.resuming import ChunkRows
from families import needs_onednn, random_ids, widths, with_beacons

CHUNK = 16
APPEND = {"placement": "append"}
ANCHORED = {**APPEND, "anchored": True}
EXACT = {**ANCHORED, "exact_ids": tuple(range(3, 97, 17))}


@pytest.fixture(autouse=True)
def a_pass_for_each_chunk(monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)


def model_of(family="llama", **settings):
    return with_beacons(family, BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8, 16), **settings), attention="sdpa")


def same(cache, expected, tolerance=1e-5):
    assert cache.rows == expected.rows
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.entries(), other.entries(), rtol=0, atol=tolerance)


# --- how much is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "ratio", "held", "new", "expected"),
    [
        (APPEND, 4, CHUNK, 1, [4, 1]),  # the beacons
        (APPEND, 4, 10, 7, [6 + 4, 1]),  # and what is new of the chunk
        (APPEND, 4, 1, 16, [15 + 4, 1]),
        (ANCHORED, 4, CHUNK, 1, [4 + 4, 1]),  # and what the beacons begin as
        (EXACT, 8, CHUNK, 1, [2 + 2, 1]),
        (EXACT, 4, 10, 7, [4 + 6 + 4, 1]),
        (EXACT, 4, 10, 7 + CHUNK, [4 + 6 + 4, CHUNK + 4, 1]),  # nothing is held of the chunk after it
        (EXACT, 4, 4, 13, [CHUNK + 4, 1]),  # no fewer rows than all
        ({**APPEND, "local_tokens": 3}, 4, CHUNK + 3, 1, [4, 4]),  # tokens behind the chunk have seen it raw
        ({}, 4, CHUNK, 1, [CHUNK + 4, 1]),  # tokens see the beacons between them
    ],
    ids=str,
)
@torch.no_grad()
def test_a_pass_computes_what_is_missing(settings, ratio, held, new, expected):
    model, ids = model_of(**settings), random_ids(held + new)
    cache = model.compress(ids[:, :held], ratio=ratio)
    assert widths(model, lambda: model.compress(ids[:, held:], cache=cache)) == expected
    same(cache, model.compress(ids, ratio=ratio))


@torch.no_grad()
def test_a_batch_computes_what_is_missing_in_some_row():
    model, ids = model_of(**ANCHORED), random_ids(CHUNK + 1, batch=2)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, :5] = 0
    cache = model.compress(ids[:, :15], attention_mask=mask, ratio=4)  # tails of 15 and 10
    more = torch.ones(2, 7, dtype=torch.long)
    more[0, :5] = 0
    found = widths(model, lambda: model.compress(ids[:, -7:], attention_mask=more, cache=cache))
    assert found == [4 + 6 + 4, 1]
    same(cache.row(0), model.compress(torch.cat((ids[:1, :15], ids[:1, -2:]), dim=1), ratio=4))
    same(cache.row(1), model.compress(torch.cat((ids[1:, 5:15], ids[1:, -7:]), dim=1), ratio=4))


@torch.no_grad()
def test_a_text_read_anew_at_another_ratio_holds_nothing():
    model, ids = model_of(**EXACT, num_sinks=2), random_ids(60)
    cache = model.compress(ids[:, :30], budget=40)
    assert widths(model, lambda: model.compress(ids[:, 30:], cache=cache, budget=31)) == [CHUNK + 4] * 3 + [12]
    same(cache, model.compress(ids, budget=31))


# --- what it does not serve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["unknown family", "eager", "gradients"])
def test_where_masks_of_ours_do_not_serve_all_is_computed(why):
    model, ids = model_of("diffllama" if why == "unknown family" else "llama", **EXACT), random_ids(CHUNK + 1)
    if why == "eager":
        model.set_attn_implementation("eager")
    with torch.set_grad_enabled(why == "gradients"):
        cache = model.new_cache(ratio=4)
        model(ids[:, :CHUNK], past_key_values=cache)
        assert widths(model, lambda: model(ids[:, CHUNK:], past_key_values=cache)) == [CHUNK + 4, 1]
        same(cache, model.compress(ids, ratio=4))


# --- to the same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [APPEND, ANCHORED, EXACT], ids=["append", "anchored", "exact"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_quantised_memory_serves_as_it_is(settings, bits, monkeypatch):
    model = model_of(**settings, num_sinks=2)
    cache = model.compress(random_ids(2 * CHUNK + 1), ratio=4).quantize(bits)
    cache.crop(-1)  # what the tail has read so far was on a dense memory
    cache = model.compress(random_ids(11, seed=4), cache=cache)
    other, more = cache.fork(), random_ids(40, seed=5)
    logits = model(more, past_key_values=cache).logits
    monkeypatch.setattr(_Reader, "_rows_to_compute", lambda *_: None)
    torch.testing.assert_close(logits, model(more, past_key_values=other).logits, rtol=0, atol=1e-4)
    assert cache.quantized_bits == bits
    same(cache, other, 1e-4)


@pytest.mark.parametrize("settings", [APPEND, EXACT], ids=["append", "exact"])
@torch.no_grad()
def test_writing_over_the_end_of_chunks_gives_the_same_answer(settings, monkeypatch):
    model, ids = model_of(**settings, num_sinks=2), random_ids(CHUNK - 3)
    write = {"max_new_tokens": 3 * CHUNK, "min_new_tokens": 3 * CHUNK, "do_sample": False}
    answers = [model.generate(ids, **write), model.generate(ids, num_beams=3, **write)]
    monkeypatch.setattr(_Reader, "_rows_to_compute", lambda *_: None)
    assert torch.equal(answers[0], model.generate(ids, **write))
    assert torch.equal(answers[1], model.generate(ids, num_beams=3, **write))


@pytest.mark.parametrize("settings", [APPEND, ANCHORED, EXACT, {}], ids=["append", "anchored", "exact", "interleave"])
@needs_onednn
@torch.no_grad()
def test_products_of_onednn_close_chunks_of_a_ragged_batch_to_the_same_cache(settings, monkeypatch):
    monkeypatch.setattr(forward, "FEWEST_IN_SPANS", 1)
    model = model_of(**settings, num_sinks=2)
    texts = [random_ids(length, seed=length) for length in (3 * CHUNK + 9, CHUNK + 7, CHUNK - 2)]
    more = random_ids(2 * CHUNK + 3, batch=3, seed=1)
    model.cpu_matmul = "onednn"
    cache = model.compress([ids[0].tolist() for ids in texts], ratio=4)
    model.compress(more, cache=cache)
    model.cpu_matmul = "torch"
    for row, ids in enumerate(texts):
        same(cache.row(row), model.compress(torch.cat((ids, more[row : row + 1]), dim=1), ratio=4), 1e-4)


# --- rows, by hand -------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    rows = ChunkRows(num_slots=6, num_held=3, num_beacons=2, repeated=torch.tensor([1, 3]))
    assert rows.slots.tolist() == [1, 3, 3, 4, 5]
    assert (rows.row_of(3), rows.row_of(5)) == (2, 4)
    assert rows.repeated_rows.tolist() == [0, 1]
    assert rows.beacon_rows.tolist() == [3, 4]
    assert rows.of(torch.arange(6.0)[None, :, None])[0, :, 0].tolist() == [1, 3, 3, 4, 5]


def test_each_text_has_tokens_of_its_own_to_repeat():
    rows = ChunkRows(num_slots=5, num_held=4, num_beacons=1, repeated=torch.tensor([[0], [2]]))
    assert rows.slots.tolist() == [[0, 4], [2, 4]]
    states = torch.arange(10.0).view(2, 5, 1)
    assert rows.of(states)[..., 0].tolist() == [[0, 4], [7, 9]]
