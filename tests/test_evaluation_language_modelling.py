"""Nats per token: each method against the plain definition, on the model without beacons."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from activation_beacon import BeaconConfig
from activation_beacon.errors import CapacityError, InputError, RatioError
from activation_beacon.evaluation import language_modelling as lm
from families import random_ids, tiny, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8))
TOO_FEW = (
    "ratio names 2 chunks, but the text of 90 tokens closes 5. Give one ratio for each chunk of the whole text, "
    "or one int for all."
)
LENGTHS = (3 * CHUNK, 3 * CHUNK + 5, 2 * CHUNK + 1)


@pytest.fixture(scope="module")
def model():
    return with_beacons("llama", CONFIG)


@pytest.fixture(scope="module")
def base():
    return tiny("llama")


@torch.no_grad()
def plain_nll(base, ids):
    """(T - 1,) losses of one forward over the whole text."""
    row = torch.tensor([list(ids)])
    return nn.functional.cross_entropy(base(row).logits[0, :-1], row[0, 1:], reduction="none")


def text(length, seed=0):
    return random_ids(length, seed)[0].tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_full_context_equals_the_base_in_one_forward(model, base, length, monkeypatch):
    monkeypatch.setattr(lm, "PIECE", 7)
    found = lm.full_losses(model, text(length))
    torch.testing.assert_close(found.nll, plain_nll(base, text(length)), atol=1e-5, rtol=0)
    assert found.cache_length == length


@pytest.mark.parametrize("length", LENGTHS)
def test_alone_equals_the_base_on_each_chunk(model, base, length):
    ids = text(length)
    expected = torch.full((length - 1,), torch.nan)
    for start in range(0, length, CHUNK):
        chunk = ids[start : start + CHUNK]
        if len(chunk) > 1:
            expected[start : start + len(chunk) - 1] = plain_nll(base, chunk)
    found = lm.alone_losses(model, ids).nll
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, equal_nan=True)


def test_a_prefix_stands_before_each_chunk(model, base):
    ids = [1, *text(2 * CHUNK + 3)]
    found = lm.alone_losses(model, ids, prefix=[1]).nll
    assert len(found) == len(ids) - 1
    last = ids[2 * CHUNK :]
    torch.testing.assert_close(found[2 * CHUNK :], plain_nll(base, [1, *last])[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", [2, 8])
def test_beacons_equal_the_model_s_own_losses(model, length, ratio):
    row = torch.tensor([text(length)])
    with torch.no_grad():
        expected = model(row, labels=row, beacon_ratio=ratio)
    found = lm.beacon_losses(model, text(length), ratio)
    torch.testing.assert_close(found.nll, expected.nll[0])
    assert found.cache_length == expected.past_key_values.cache_length
    assert found.cache_bytes == expected.past_key_values.cache_bytes


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("number", [5, CHUNK, CHUNK + 3])
@torch.no_grad()
def test_local_tokens_are_measured_as_they_are_decoded(model, length, number):
    ids, cache, logits = text(length), model.new_cache(ratio=4, local_tokens=number), []
    for token in ids:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    expected = nn.functional.cross_entropy(torch.stack(logits[:-1]), torch.tensor(ids[1:]), reduction="none")
    found = lm.beacon_losses(model, ids, 4, local_tokens=number)
    torch.testing.assert_close(found.nll, expected, atol=1e-5, rtol=0)
    assert (found.cache_length, found.cache_bytes) == (cache.cache_length, cache.cache_bytes)
    assert model.local_tokens == 0


@pytest.mark.parametrize("start", [3, CHUNK, CHUNK + 2, 2 * CHUNK + 5])
@pytest.mark.parametrize("number", [0, 5, CHUNK + 3])
@torch.no_grad()
def test_a_text_that_goes_on_from_anywhere_is_measured_as_it_is_decoded(model, start, number):
    ids = text(4 * CHUNK)
    expected = lm.beacon_losses(model, ids, 4, local_tokens=number).nll[start:]
    cache = model.new_cache(ratio=4, local_tokens=number)
    model.compress(ids[:start], cache=cache)
    torch.testing.assert_close(lm.losses_as_decoded(model, cache, ids[start:]), expected, atol=1e-5, rtol=0)


def test_a_method_names_its_local_tokens(monkeypatch, model):
    monkeypatch.setitem(lm.LOCAL_TOKENS, "beacons-local5", 5)
    ids = text(3 * CHUNK)
    expected = lm.loss_record(lm.beacon_losses(model, ids, 4, local_tokens=5), CHUNK)
    found = lm.measure(model, ids, "beacons-local5", ratio=4)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert found["nats"] != lm.measure(model, ids, "beacons", ratio=4)["nats"]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("number", [5, CHUNK, CHUNK + 3])
def test_shuffled_with_the_text_itself_is_what_beacons_of_local_tokens_are(length, number):
    model = with_beacons("llama", dataclasses.replace(CONFIG, local_tokens=number))
    expected = lm.beacon_losses(model, text(length), 4)
    found = lm.shuffled_losses(model, text(length), text(length), 4)
    mask = lm.counted(length, CHUNK)
    torch.testing.assert_close(found.nll[mask], expected.nll[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_shuffled_with_the_text_itself_is_what_beacons_are(model, length):
    expected = lm.beacon_losses(model, text(length), 4)
    found = lm.shuffled_losses(model, text(length), text(length), 4)
    mask = lm.counted(length, CHUNK)
    torch.testing.assert_close(found.nll[mask], expected.nll[mask], atol=1e-5, rtol=0)
    assert torch.equal(found.nll.isnan(), torch.arange(1, length) % CHUNK == 0)
    assert (found.cache_length, found.cache_bytes) == (expected.cache_length, expected.cache_bytes)


def test_shuffled_reads_each_chunk_on_the_beacons_of_the_other_text(model):
    ids, other = text(3 * CHUNK), text(3 * CHUNK, seed=1)
    mixed = [*other[: 2 * CHUNK], *ids[2 * CHUNK :]]
    found = lm.shuffled_losses(model, ids, other, 4).nll[2 * CHUNK :]
    torch.testing.assert_close(found, lm.beacon_losses(model, mixed, 4).nll[2 * CHUNK :], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sinks", "ratio", "windows"), [(0, 2, (0, 8, 16, 24)), (0, 8, (0, 2, 4, 6)), (8, 2, (0, 16, 24, 32))]
)
@pytest.mark.parametrize("prefix", [(), (1,)])
@pytest.mark.parametrize("number", [0, 3])
def test_recent_equals_the_base_on_as_many_tokens_as_there_are_beacons(base, sinks, ratio, windows, prefix, number):
    model = with_beacons("llama", dataclasses.replace(CONFIG, num_sinks=sinks, local_tokens=number))
    ids = text(3 * CHUNK + 5)
    found = lm.recent_losses(model, ids, ratio, prefix=prefix)
    assert len(found.nll) == len(ids) - 1
    assert found.cache_length == windows[-1] + 5 == lm.beacon_losses(model, ids, ratio).cache_length
    for start, window in zip(range(0, len(ids), CHUNK), windows, strict=True):
        before = ids[:start] if window >= start else [*prefix, *ids[start - window + len(prefix) : start]]
        expected = plain_nll(base, [*before, *ids[start : start + CHUNK]])[max(len(before) - 1, 0) :]
        at = max(start - 1, 0)
        torch.testing.assert_close(found.nll[at : at + len(expected)], expected, atol=1e-5, rtol=0)


def test_all_but_the_first_chunk_and_the_first_tokens_count():
    mask = lm.counted(3 * 4, 4)
    tokens = [token for token in range(1, 12) if bool(mask[token - 1])]
    assert tokens == [5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("size", "edges"), [(16, [1, 2, 4, 8, 16]), (12, [1, 2, 4, 8, 12]), (2, [1, 2]), (1024, [2**n for n in range(11)])]
)
def test_ranges_of_positions_cover_a_chunk(size, edges):
    assert lm.position_edges(size) == edges


@pytest.mark.parametrize("method", ["full", "alone", "recent", "beacons"])
def test_every_method_is_measured_on_the_same_tokens(model, method):
    record = lm.measure(model, text(3 * CHUNK + 5), method, ratio=4)
    assert record["tokens"] == 15 + 15 + 4
    assert math.isfinite(record["nats"])


def test_positions_add_up_to_the_mean(model):
    losses = lm.beacon_losses(model, text(3 * CHUNK + 5), 4)
    record = lm.loss_record(losses, CHUNK)
    total = sum(mean * count for _, _, mean, count in record["by_position"])
    assert sum(count for *_, count in record["by_position"]) == record["tokens"]
    assert total / record["tokens"] == pytest.approx(record["nats"])
    first = [float(losses.nll[token - 1]) for token in (CHUNK + 1, 2 * CHUNK + 1, 3 * CHUNK + 1)]
    assert record["by_position"][0] == [1, 2, pytest.approx(sum(first) / 3), 3]


def test_evaluate_gives_what_the_parts_give(model):
    texts = [text(3 * CHUNK, seed) for seed in range(3)]
    table = lm.evaluate(model, texts, (2, 4))
    alone, full, at_4 = (
        [lm.measure(model, ids, name, ratio=4)["nats"] for ids in texts] for name in ("alone", "full", "beacons")
    )
    assert table["full"].value == pytest.approx(sum(full) / 3)
    gap = (sum(alone) - sum(at_4)) / (sum(alone) - sum(full))
    assert table["gap_closed"][4].value == pytest.approx(gap)
    assert set(table["beacons"]) == {2, 4}


def test_evaluate_leaves_the_mode_as_it_was(model):
    model.train()
    try:
        lm.evaluate(model, [text(2 * CHUNK)], (2,))
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda model: lm.measure(model, text(CHUNK), "full"),
            InputError,
            "A text of 16 tokens has none after its first chunk (16) to measure. Use a longer length.",
        ),
        (
            lambda model: lm.measure(model, text(40), "beacons"),
            InputError,
            (
                'method must be "full", "alone", or with a ratio "recent", "beacons", "shuffled" or some of '
                f"{', '.join(lm.LOCAL_TOKENS)}; got 'beacons'."
            ),
        ),
        (
            lambda model: lm.measure(model, text(90), "beacons", ratio=(2, 4)),
            RatioError,
            TOO_FEW,
        ),
        (
            lambda model: lm.measure(model, text(90), "shuffled", ratio=(2, 4), other=text(90)),
            RatioError,
            TOO_FEW,
        ),
        (
            lambda model: lm.measure(model, text(1200), "beacons", ratio=2),
            CapacityError,
            "A text of 1,200 tokens needs 608 positions at ratio 2; the base model has 512. Use ratio 4.",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, call, error, message):
    with pytest.raises(error) as caught:
        call(model)
    assert str(caught.value) == message
