"""A cache cut back and read on is the cache of the text read at once."""

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.server.prefixes import common_length, longest, opening, reusable_length
from families import random_ids
from server_models import CONFIG, assert_same_cache, serving_model


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
    ids = random_ids(200)
    caches = [model.compress(ids[:, :length], ratio="auto") for length in (20, 60, 40)]
    assert longest(caches, ids[0, :100], 512) == (1, 60)
    few_positions = 90
    assert longest(caches[1:], ids[0], few_positions) is None
    assert longest([], ids[0], None) is None
