"""A sample as ids: what stands before its text, the text, and what is asked."""

import pytest
from tokenizers.processors import TemplateProcessing

from activation_beacon import ChatPrompt
from activation_beacon.evaluation import methods
from activation_beacon.evaluation.contexts import BaseContext
from activation_beacon.evaluation.samples import Question, Sample, answer_sample, asked_ids
from evaluation_models import STORY, beacon_model
from saved_models import byte_tokenizer

BOS = "<|user|>"  # stands for a beginning-of-text token
PLAIN = Sample("plain", STORY[:300], (Question("\nWhat is it?", ("a lion",), max_new_tokens=2),), is_plain=True)


def opening_tokenizer():
    """A tokenizer that puts a token before every text, as Llama's does."""
    tokenizer = byte_tokenizer()
    number = tokenizer.convert_tokens_to_ids(BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, number)])
    return tokenizer


def test_what_the_tokenizer_puts_before_every_text_opens_a_plain_sample():
    tokenizer = opening_tokenizer()
    ids, opening, [asked] = asked_ids(ChatPrompt(tokenizer), PLAIN)
    text = PLAIN.context + PLAIN.questions[0].text
    assert ids + asked == [tokenizer.convert_tokens_to_ids(BOS), *byte_tokenizer()(text)["input_ids"]]
    assert opening == 1
    assert asked_ids(ChatPrompt(byte_tokenizer()), PLAIN)[1] == 0


@pytest.mark.parametrize("context", ["", "a"])
def test_no_more_opens_a_short_sample_than_it_has(context):
    sample = Sample("short", context, PLAIN.questions, is_plain=True)
    ids, opening, _ = asked_ids(ChatPrompt(opening_tokenizer()), sample)
    assert (len(ids), opening) == (1 + len(context), 1)


def test_the_last_tokens_of_a_plain_sample_come_after_what_opens_every_text(monkeypatch):
    read, plainly = [], BaseContext.of
    monkeypatch.setattr(methods.BaseContext, "of", lambda model, ids: [read.append(ids), plainly(model, ids)][1])
    tokenizer = opening_tokenizer()
    answer_sample(beacon_model(), ChatPrompt(tokenizer), PLAIN, "recent", ratio=4)
    [ids] = read
    whole = asked_ids(ChatPrompt(tokenizer), PLAIN)[0]
    assert len(ids) < len(whole)
    assert ids == [whole[0], *whole[1 - len(ids) :]]
