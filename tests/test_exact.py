"""Which tokens beacons begin as."""

import dataclasses
import random

import pytest

from activation_beacon import BeaconConfig, digit_ids
from activation_beacon.errors import ConfigError
from activation_beacon.exact import anchor_tokens, with_digits
from reference import exact_anchors

E = 99  # an exact token


def text(length, *exact):
    return [E if place in exact else 1 for place in range(length)]


@pytest.mark.parametrize(
    ("ids", "num_beacons", "expected"),
    [
        pytest.param(text(12), 3, [3, 7, 11], id="none: the last of each unit"),
        pytest.param(text(12, 6), 3, [3, 7, 11], id="no room: as if there were none"),
        pytest.param(text(20, 6), 10, [2, 4, 5, 6, 7, 8, 10, 13, 16, 19], id="a token and two beside it"),
        pytest.param(text(20, 0), 10, [0, 1, 2, 4, 6, 9, 11, 14, 16, 19], id="at the beginning"),
        pytest.param(text(20, 19), 10, [1, 3, 6, 8, 11, 13, 16, 17, 18, 19], id="at the end"),
        pytest.param(text(8, *range(8)), 4, [1, 3, 5, 7], id="nothing but exact ones"),
    ],
)
def test_by_hand(ids, num_beacons, expected):
    assert list(anchor_tokens(ids, num_beacons, {E})) == expected


def test_as_many_runs_as_fit_are_taken_whole_and_spread():
    ids = text(200, *range(5, 200, 10))  # twenty runs of five tokens; there is room for ten of them
    chosen = set(anchor_tokens(ids, 100, {E}))
    whole = [start for start in range(3, 200, 10) if chosen.issuperset(range(start, start + 5))]
    assert whole == list(range(13, 200, 20))


def test_a_table_that_cannot_be_held_leaves_the_numbers_beside_it_alone():
    assert set(range(98, 103)) <= set(anchor_tokens(text(1024, 100, *range(500, 580)), 128, {E}))


def test_runs_that_still_fit_are_taken_after_those_that_are_spread():
    ids = text(64, 4, 14, 24, *range(42, 58))  # three runs of five and one of twenty, with room for nineteen
    chosen = set(anchor_tokens(ids, 38, {E}))
    assert all(chosen.issuperset(range(place - 2, place + 3)) for place in (4, 14, 24))


@pytest.mark.parametrize("seed", range(40))
def test_any_text_has_as_many_anchors_as_beacons_in_order_and_as_the_reference_has_them(seed):
    draw = random.Random(seed)
    ids = draw.choices([1, E], weights=[draw.choice([1, 5, 30]), 1], k=64)
    for ratio in (2, 4, 8, 32, 64):
        anchors = anchor_tokens(ids, 64 // ratio, {E})
        assert len(anchors) == len(set(anchors)) == 64 // ratio
        assert list(anchors) == sorted(anchors)
        assert set(anchors) <= set(range(64))
        assert list(anchors) == exact_anchors(ids, 64 // ratio, [E])


class Tokenizer:
    all_special_ids = (0,)

    def get_vocab(self):
        tokens = ["<|reserved_1|>", "7", "Ġ42", "a1", "<0x39>", "Â²", "Ġyear", "٣", "<|im_2|>"]
        return {token: index for index, token in enumerate(tokens)}

    def get_added_vocab(self):
        return {"<|im_2|>": 8}


def test_a_tokenizer_without_digits_is_refused_and_ids_that_are_named_are_kept():
    asked = BeaconConfig(anchored=True, placement="append", exact_ids="digits")
    assert with_digits(asked, Tokenizer()).exact_ids == (1, 2, 3, 7)
    named = dataclasses.replace(asked, exact_ids=(5,))
    assert with_digits(named, Tokenizer()) is named
    bare = Tokenizer()
    bare.get_vocab = lambda: {"a": 1}
    with pytest.raises(
        ConfigError, match=r"^exact_ids \(\"digits\"\) finds none: no token of the tokenizer holds a digit\."
    ):
        with_digits(asked, bare)


def test_tokens_that_hold_a_digit_are_named_without_special_ones_and_bytes():
    assert digit_ids(Tokenizer()) == (1, 2, 3, 7)
