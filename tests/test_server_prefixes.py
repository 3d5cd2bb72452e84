"""A cache cut back and read on is the cache of the text read at once."""

import asyncio
import dataclasses

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.server.library import Library
from activation_beacon.server.prefixes import common_length, longest, opening, reusable_length
from activation_beacon.server.settings import Settings
from families import random_ids
from server_models import CONFIG, GREEDY, Heard, assert_same_cache, engine_of, run_until_over, serving_model


@pytest.fixture(scope="module", params=[CONFIG, BeaconConfig(chunk_size=16, ratios=(2, 8), local_tokens=5)])
def model(request):
    return serving_model(request.param)


@pytest.mark.parametrize(
    ("one", "other", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [1], 0), ([5], [6], 0)]
)
def test_common_length(one, other, length):
    assert common_length(torch.tensor(one), torch.tensor(other)) == length


@pytest.mark.parametrize("ratio", [2, 8])
def test_wherever_two_texts_part_what_they_share_is_reused_exactly(model, ratio):
    held_ids = random_ids(75)
    held = model.compress(held_ids, ratio=ratio)
    spared = []
    for shared in range(0, 76, 5):
        text = torch.cat((held_ids[:, :shared], random_ids(30, 9)), dim=1)
        length = reusable_length(held, text[0])
        assert length <= shared
        spared.append(length)
        if length:
            grown = model.compress(text[:, length:], cache=opening(held, length))
            assert_same_cache(grown, model.compress(text, ratio=ratio))
    assert spared[0] == 0
    assert spared[-1] == 75
    assert {16, 32, 48} <= set(spared)  # ends of chunks, where the texts part behind a closed one


def test_the_same_text_again_leaves_one_token_to_be_read(model):
    ids = random_ids(40)
    held = model.compress(ids, ratio=2)
    assert reusable_length(held, ids[0]) == 39


def test_a_shorter_text_is_not_served_by_chunks_that_it_does_not_close(model):
    ids = random_ids(75)
    held = model.compress(ids, ratio=2)
    for length in range(2, 75, 4):
        text = ids[:, :length]
        spared = reusable_length(held, text[0])
        if spared:
            assert_same_cache(
                model.compress(text[:, spared:], cache=opening(held, spared)), model.compress(text, ratio=2)
            )


def test_the_longest_is_found_unless_auto_would_choose_another_ratio(model):
    ids, empty = random_ids(200), model.new_cache(ratio="auto")
    caches = [model.compress(ids[:, :length], ratio="auto") for length in (20, 60, 40)]
    assert longest(caches, ids[0, :100], empty, 512) == (1, 60)
    few_positions = 90
    assert longest(caches[1:], ids[0], empty, few_positions) is None
    assert longest([], ids[0], empty, None) is None


def test_a_shorter_text_is_not_served_at_the_ratio_that_auto_chose_for_a_longer_one(model):
    ids, few_positions = random_ids(200), 90
    model = serving_model(model.beacon_config, max_position_embeddings=few_positions)
    held = model.compress(ids, ratio="auto")
    assert held.ratios[0] > 2
    spared = {}
    for length in range(2, 200, 6):
        text = ids[:, :length]
        found = longest([held], text[0], model.new_cache(ratio="auto"), few_positions)
        expected = model.compress(text, ratio="auto")
        spared[length] = found is not None
        if found is not None:
            assert_same_cache(model.compress(text[:, found[1] :], cache=opening(held, found[1])), expected)
    assert not spared[38]
    assert spared[194]


def test_on_a_context_what_is_spared_is_what_reading_it_would_give(model):
    """A context of another ratio than "auto" would choose: read on as it is until a chunk is due, and then anew."""
    ids, other = random_ids(80), random_ids(80, 9)
    context = model.compress(ids[:, :40], ratio=8)
    context.policy = model.ratio_policy("auto")
    kept = [model.compress(ids[:, 40:length], cache=context.fork()) for length in (46, 75)]
    num_spared = 0
    for shared in range(41, 75):
        text = torch.cat((ids[:, :shared], other[:, :3]), dim=1)
        found = longest(kept, text[0], context, model.max_positions)
        if found is not None:
            index, length = found
            assert length > 40
            grown = model.compress(text[:, length:], cache=opening(kept[index], length))
            assert_same_cache(grown, model.compress(text[:, 40:], cache=context.fork()))
            num_spared += 1
    assert num_spared > 20


def test_a_text_is_compared_where_the_caches_are(model, tmp_path, monkeypatch):
    """Tensors that are made without a device would be another device's here, as they are where the model is on a GPU."""

    async def in_this_thread(call):
        return call()

    monkeypatch.setattr("activation_beacon.server.library.asyncio.to_thread", in_this_thread)
    ids = random_ids(60)
    library = Library(model, engine_of(model), Settings(folder=str(tmp_path)))
    empty = model.new_cache(ratio=2)
    asyncio.run(library.keep("scope", model.compress(ids, ratio=2)))
    with torch.device("meta"):
        start, unread = asyncio.run(library.start("scope", empty, [*ids[0].tolist(), 7, 8]))
    assert (start.tokens_seen, unread) == (60, [7, 8])
    library.close()


def test_a_grown_conversation_takes_the_place_of_what_it_has_grown_from(model, tmp_path):
    ids, other = random_ids(60), random_ids(50, seed=5)
    library = Library(model, engine_of(model), Settings(folder=str(tmp_path)))

    async def kept(texts):
        for text in texts:
            await library.keep("scope", model.compress(text, ratio=2))

    asyncio.run(kept([ids[:, :40], other, ids]))
    assert sorted(library.memory.peek(key).tokens_seen for key in library.memory) == [50, 60]
    library.close()


APPENDED = BeaconConfig(chunk_size=16, ratios=(2, 8), placement="append", anchored=True)


@pytest.mark.parametrize(
    ("family", "spared"), [("llama", 64), ("gemma3_text", 69), ("mistral", 69), ("qwen3_5_text", 64)]
)
def test_a_text_is_answered_once_more_without_being_read_again(family, spared, tmp_path):
    """Also where the answer has closed chunks behind which a cache cannot be cut back; of states the end of a chunk is held."""
    model = serving_model(APPENDED, family=family)
    engine = engine_of(model)
    library = Library(model, engine, Settings(folder=str(tmp_path)))
    prompt = random_ids(70)[0].tolist()
    long = dataclasses.replace(GREEDY, max_tokens=60)
    first = Heard(engine, model.new_cache(ratio=2), prompt, long)
    run_until_over(engine, first)

    async def kept_and_found(heard, ids):
        await library.keep("scope", heard.done.cache, heard.done.before)
        return await library.start("scope", model.new_cache(ratio=2), ids)

    start, unread = asyncio.run(kept_and_found(first, prompt))
    assert (start.tokens_seen, unread) == (spared, prompt[spared:])
    again = Heard(engine, start, unread, long)
    run_until_over(engine, again)
    assert again.ids() == first.ids()
    assert_same_cache(again.cache, first.cache)
    assert len(library.memory) == (1 if family == "llama" else 2)
    grown, unread = asyncio.run(kept_and_found(again, [*prompt, *first.ids()[:-1], 3]))  # the conversation goes on
    assert (grown.tokens_seen, unread) == (70 + 59, [3])
    assert len(library.memory) == (1 if family == "llama" else 2)  # in place of the first ones
    other = [*prompt[:66], 9, 8, 7]  # the same document, another question
    start, _ = asyncio.run(library.start("scope", model.new_cache(ratio=2), other))
    assert start.tokens_seen == (66 if family in ("gemma3_text", "mistral") else 64)
    library.close()
