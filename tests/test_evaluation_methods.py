"""Every method against the plain model, and at the size that it promises."""

import pytest
import torch

from activation_beacon.errors import InputError
from activation_beacon.evaluation import contexts, methods
from activation_beacon.evaluation.contexts import BaseContext
from evaluation_models import CHUNK, CONFIG, OWN, beacon_model
from families import random_ids, tiny, with_beacons

TEXT = random_ids(5 * CHUNK + 7)[0].tolist()
QUESTION = random_ids(9, seed=1)[0].tolist()
NEXT = random_ids(6, seed=2)[0].tolist()
NEW = 12
ALL = tuple(methods.METHODS)


@pytest.fixture(scope="module")
def model():
    return beacon_model()


@pytest.fixture(scope="module")
def base():
    return tiny("llama", **OWN, max_position_embeddings=4096)


def plain_answer(base, ids, max_new_tokens=NEW):
    """What transformers' own generate gives, without the end mark."""
    row = torch.tensor([ids])
    out = base.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=max_new_tokens, do_sample=False)
    return [token for token in out[0, len(ids) :].tolist() if token != OWN["eos_token_id"]]


def asked(model, method, ratio=4, text=TEXT):
    held = methods.read_context(model, text, method, ratio=ratio, opening=3)
    return held.ask(QUESTION, max_new_tokens=NEW)[0]


@pytest.mark.parametrize("piece", [11, 512])
def test_full_answers_as_the_base_model_does(model, base, piece, monkeypatch):
    monkeypatch.setattr(contexts, "PIECE", piece)
    assert asked(model, "full") == plain_answer(base, TEXT + QUESTION)


def test_a_text_of_one_chunk_is_answered_as_the_base_does_by_beacons_too(model, base):
    text = TEXT[: CHUNK - len(QUESTION) - NEW]
    assert asked(model, "beacons", text=text) == plain_answer(base, text + QUESTION)


@pytest.mark.parametrize("ratio", [2, 8])
def test_beacons_answer_as_generate_does(model, ratio):
    context = model.compress(TEXT, ratio=ratio)
    row = torch.tensor([QUESTION])
    expected = model.generate(row, context=context, max_new_tokens=NEW, do_sample=False)[0, len(QUESTION) :].tolist()
    assert asked(model, "beacons", ratio) == [token for token in expected if token != OWN["eos_token_id"]]


def test_quantised_beacons_answer_as_generate_does(model):
    context = model.compress(TEXT, ratio=2).quantize(8)
    row = torch.tensor([QUESTION])
    expected = model.generate(row, context=context, max_new_tokens=NEW, do_sample=False)[0, len(QUESTION) :].tolist()
    assert asked(model, "beacons-int8", 2) == [token for token in expected if token != OWN["eos_token_id"]]


def kept_by(method, count, opening):
    if method == "recent":
        return TEXT[:opening] + TEXT[len(TEXT) - (count - opening) :]
    head = (count + 1) // 2
    return TEXT[:head] + TEXT[len(TEXT) - (count - head) :]


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("method", ["recent", "head-tail"])
def test_truncation_answers_as_the_base_on_what_is_left(model, base, method, ratio):
    count = 5 * CHUNK // ratio + 7
    assert asked(model, method, ratio) == plain_answer(base, kept_by(method, count, 3) + QUESTION)


@torch.no_grad()
def slow_streaming(model, ids, count, piece):
    """StreamingLLM by its definition: unrotated keys at the positions that they hold in the cache, a layer at a time.

    With one layer of attention a key depends on its own token alone, so it can be made anew at any position.
    """
    kept = []
    for start in range(0, len(ids), piece):
        kept += ids[start : start + piece]
        if len(kept) > count:
            kept = kept[: methods.SINKS] + kept[len(kept) - (count - methods.SINKS) :]
    with model.beacon_disabled():
        return model(torch.tensor([kept]), use_cache=True).past_key_values.layers[0]


@pytest.mark.parametrize("piece", [16, 37, 512])
def test_streaming_holds_sinks_and_last_tokens_at_their_positions_in_the_cache(piece, monkeypatch):
    model = with_beacons("llama", CONFIG, **{**OWN, "num_hidden_layers": 1, "max_position_embeddings": 4096})
    monkeypatch.setattr(methods, "PIECE", piece)
    held = methods.read_context(model, TEXT, "streaming-llm", ratio=4)
    expected = slow_streaming(model, TEXT, 5 * CHUNK // 4 + 7, piece)
    torch.testing.assert_close(held.cache.layers[0].keys, expected.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held.cache.layers[0].values, expected.values, atol=1e-5, rtol=1e-5)


def test_streaming_with_room_for_all_is_the_full_context(model, monkeypatch):
    monkeypatch.setattr(methods, "beacon_entries", lambda model, num_tokens, ratio: num_tokens)
    assert asked(model, "streaming-llm") == asked(model, "full")


@pytest.mark.parametrize("method", [name for name in ALL if methods.METHODS[name].has_ratio])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_methods_with_a_ratio_hold_as_many_entries_as_beacons(model, method, ratio):
    number = methods.LOCAL_TOKENS.get(method, 0)
    held = methods.read_context(model, TEXT, method, ratio=ratio, opening=3)
    closed = max(0, len(TEXT) - 1 - number) // CHUNK
    assert held.cache_length == len(TEXT) - closed * (CHUNK - CHUNK // ratio)
    assert (
        held.cache_length == model.compress(TEXT, cache=model.new_cache(local_tokens=number), ratio=ratio).cache_length
    )


def test_the_number_of_entries_is_known_without_reading():
    for sinks, local in ((0, 0), (4, 0), (2, 5)):
        config = type(CONFIG)(chunk_size=CHUNK, ratios=(2, 4), num_sinks=sinks, local_tokens=local)
        model = with_beacons("llama", config)
        for length in (1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 6):
            held = model.compress(random_ids(length), ratio=4).cache_length
            assert methods.beacon_entries(model, length, 4) == held


@pytest.mark.parametrize(("method", "octets"), [("int8", 8 + 4), ("int4", 4 + 4)])  # of a vector of 8: codes and scales
def test_a_quantised_cache_is_smaller_and_near_the_full_one(model, method, octets):
    full = methods.read_context(model, TEXT, "full")
    held = methods.read_context(model, TEXT, method)
    assert held.cache_bytes * 8 * 4 == full.cache_bytes * octets
    error = max(
        float((one.keys - other.keys).abs().max())
        for one, other in zip(held.cache.layers, full.cache.layers, strict=True)
    )
    assert 0 < error < 1


def test_eight_bits_are_nearer_than_four(model):
    full, eight, four = (
        methods.read_context(model, TEXT, name).cache.layers[0].keys for name in ("full", "int8", "int4")
    )
    assert (eight - full).abs().mean() * 4 < (four - full).abs().mean()


@pytest.mark.parametrize("method", ALL)
def test_asking_leaves_the_context_as_it_was(model, method):
    held = methods.read_context(model, TEXT, method, ratio=4, opening=3)
    first = held.ask(QUESTION, max_new_tokens=NEW)[0]
    held.ask(NEXT, max_new_tokens=2 * CHUNK)
    assert held.ask(QUESTION, max_new_tokens=NEW)[0] == first


@pytest.mark.parametrize("stops", [False, True])
def test_a_second_turn_answers_as_if_all_had_been_read_at_once(model, base, stops, monkeypatch):
    first = plain_answer(base, TEXT + QUESTION)
    ends = {first[4]} if stops else set()
    monkeypatch.setattr(contexts, "end_ids", lambda named: ends)
    answer, grown = BaseContext.of(model, TEXT).ask(QUESTION, max_new_tokens=NEW)
    assert answer == (first[: first.index(first[4])] if stops else first)
    monkeypatch.setattr(contexts, "end_ids", lambda named: {OWN["eos_token_id"]})
    assert grown.ask(NEXT, max_new_tokens=NEW)[0] == plain_answer(base, TEXT + QUESTION + answer + NEXT)


def test_a_second_turn_on_beacons_answers_as_compressing_all_would(model):
    answer, grown = methods.read_context(model, TEXT, "beacons", ratio=4).ask(QUESTION, max_new_tokens=NEW)
    again = methods.read_context(model, TEXT + QUESTION + answer, "beacons", ratio=4)
    assert grown.ask(NEXT, max_new_tokens=NEW)[0] == again.ask(NEXT, max_new_tokens=NEW)[0]


@pytest.mark.parametrize(
    ("method", "ratio", "message"),
    [
        ("best", 4, "There is no method 'best'. Use some of " + ", ".join(ALL) + "."),
        ("beacons", None, "The method beacons needs a ratio, such as 8."),
    ],
)
def test_methods_that_cannot_be_run_are_refused(model, method, ratio, message):
    with pytest.raises(InputError) as error:
        methods.read_context(model, TEXT, method, ratio=ratio)
    assert str(error.value) == message
