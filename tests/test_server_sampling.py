"""Sampling against transformers' own warpers; text that is written as it comes."""

import itertools

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from activation_beacon.server.sampling import Sampler, Sampling, probabilities_of
from activation_beacon.server.writing import HALF, Writer, token_bytes
from evaluation_models import byte_tokenizer


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.7, 0.9, None), (1.5, 0.3, 20), (1.0, 1.0, 5)]
)
def test_probabilities_are_those_of_transformers_warpers(temperature, top_p, top_k):
    logits = torch.randn(97) * 3
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None]) if temperature != 1 else logits[None]
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    ours = probabilities_of(logits, Sampling(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k))
    torch.testing.assert_close(ours / ours.sum(), theirs[0].softmax(-1))


def test_no_top_p_at_all_leaves_the_likeliest():
    logits = torch.randn(97)
    sampler = Sampler(Sampling(max_tokens=1, top_p=0.0))
    assert all(sampler.choose(logits).token == int(logits.argmax()) for _ in range(20))


def test_penalties_and_biases_move_the_choice():
    logits = torch.zeros(9)
    logits[3], logits[4] = 2.0, 1.5
    greedy = Sampler(Sampling(max_tokens=9, temperature=0.0, presence_penalty=1.0))
    assert [greedy.choose(logits).token for _ in range(3)] == [3, 4, 3]
    biased = Sampler(Sampling(max_tokens=9, temperature=0.0, logit_bias={7: 100.0}))
    assert biased.choose(logits).token == 7
    assert logits[7] == 0


def test_text_comes_in_whole_characters():
    ids = byte_tokenizer()("naïve 🦁 lions")["input_ids"]
    writer = Writer(byte_tokenizer())
    pieces = [writer.add(token) for token in ids]
    assert "".join(pieces) + writer.finish() == "naïve 🦁 lions"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🦁" in pieces


def test_half_a_character_at_the_end_is_shown_as_such():
    ids = byte_tokenizer()("🦁")["input_ids"][:2]
    writer = Writer(byte_tokenizer())
    assert [writer.add(token) for token in ids] == ["", ""]
    assert "\ufffd" in writer.finish()


@pytest.mark.parametrize(
    ("text", "stop", "written", "is_stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("tower", "three"), "one two ", True),
        ("one two", ("two!",), "one two", False),
        ("aaab", ("aab",), "a", True),
        ("end", ("end",), "", True),
    ],
)
def test_a_stop_text_is_never_shown_not_even_in_part(text, stop, written, is_stopped):
    writer, shown = Writer(byte_tokenizer(), stop), ""
    for token in byte_tokenizer()(text)["input_ids"]:
        shown += writer.add(token)
        assert written.startswith(shown)
        if writer.is_stopped:
            break
    assert shown + writer.finish() == written
    assert writer.is_stopped == is_stopped


def test_bytes_of_tokens_are_those_of_the_text_though_characters_are_cut():
    tokenizer, text = byte_tokenizer(), "größer, 猫"
    ids = tokenizer(text)["input_ids"]
    found = [token_bytes(tokenizer, token) for token in ids]
    assert list(itertools.chain(*found)) == list(text.encode())
    assert any(HALF in tokenizer.decode([token]) for token in ids)


class Pieces:
    """A vocabulary of another kind, of which one token is half a character."""

    def __init__(self, piece):
        self.piece = piece

    def decode(self, ids):
        return HALF

    def convert_ids_to_tokens(self, token):
        return self.piece


@pytest.mark.parametrize(("piece", "octets"), [("<0xE7>", [0xE7]), ("Ġç", [0x20, 0xE7]), ("猫", None)])
def test_bytes_of_half_a_character_are_told_where_the_vocabulary_says_them(piece, octets):
    assert token_bytes(Pieces(piece), 0) == octets
