"""What callers hand over as texts, in every form that tokenizers and arrays have, as ids and a mask."""

import collections
import functools
import re

import numpy
import pytest
import torch
from transformers import BatchEncoding

from activation_beacon import BeaconConfig
from activation_beacon.batch import NewTokens, as_batch, left_padded
from activation_beacon.errors import InputError
from families import VOCABULARY, with_beacons

ROWS = [[3, 4, 5], [6, 7]]
PADDED = [[3, 4, 5], [0, 6, 7]], [[1, 1, 1], [0, 1, 1]]
ONE = [[3, 4, 5]]


@functools.cache
def model():
    return with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4)))


RAGGED = {
    "lists": ROWS,
    "tuples": ((3, 4, 5), (6, 7)),
    "tensors": [torch.tensor(row) for row in ROWS],
    "arrays": [numpy.array(row) for row in ROWS],
    "small integers": [numpy.array(row, dtype=numpy.uint8) for row in ROWS],
    "lists of numpy's integers": [[numpy.int64(token) for token in row] for row in ROWS],
    "lists of tensors": [[torch.tensor(token) for token in row] for row in ROWS],
    "ids alone": {"input_ids": ROWS},
    "ids and mask": {"input_ids": ROWS, "attention_mask": [[1, 1, 1], [1, 1]]},
    "what a tokenizer returns": BatchEncoding({"input_ids": ROWS, "attention_mask": [[1, 1, 1], [1, 1]]}),
    "a mask of truths": {"input_ids": ROWS, "attention_mask": [[True] * 3, [True] * 2]},
    "tensors and their masks": {
        "input_ids": [torch.tensor(row) for row in ROWS],
        "attention_mask": [torch.ones(3), torch.ones(2)],
    },
}


@pytest.mark.parametrize("name", RAGGED)
def test_texts_of_several_lengths_are_padded_on_the_left(name):
    ids, mask = as_batch(RAGGED[name])
    assert (ids.tolist(), mask.tolist()) == PADDED
    assert ids.dtype == torch.long
    assert [row.tokens_seen for row in model().compress(RAGGED[name]).rows] == [3, 2]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 1, 1], [1, 1]], [[0, 1, 1], [0, 1, 1]]),
        ([[1, 1, 0], [1, 0]], [[1, 1, 0], [0, 1, 0]]),
        ([[1, 1, 1], [0, 1]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_zeros_in_the_masks_of_ragged_texts_are_padding_too(mask, expected):
    texts = {"input_ids": ROWS, "attention_mask": mask}
    assert as_batch(texts)[1].tolist() == expected
    cache = model().compress(texts)
    for row, (ids, kept) in enumerate(zip(ROWS, mask, strict=True)):
        alone = [token for token, is_kept in zip(ids, kept, strict=True) if is_kept]
        assert cache.row(row).token_ids.tolist() == [alone]


SINGLE = {
    "a list": ONE[0],
    "a range": range(3, 6),
    "bytes": bytes(ONE[0]),
    "a deque": collections.deque(ONE[0]),
    "numpy's integers": [numpy.int64(token) for token in ONE[0]],
    "integers of tensors": [torch.tensor(token, dtype=torch.uint8) for token in ONE[0]],
    "an array": numpy.array(ONE[0]),
    "a batch of one": numpy.array(ONE, dtype=numpy.uint16),
    "a tensor of small integers": torch.tensor(ONE, dtype=torch.uint8),
    "a tokenizer's one text": {"input_ids": ONE[0], "attention_mask": [1, 1, 1]},
    "a tokenizer's arrays": {"input_ids": numpy.array(ONE), "attention_mask": numpy.ones((1, 3))},
    "a tokenizer's tensors": {"input_ids": torch.tensor(ONE), "attention_mask": torch.ones(1, 3)},
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_text_is_read_in_every_form(name):
    cache = model().compress(SINGLE[name])
    assert cache.token_ids.tolist() == ONE
    assert cache.token_ids.dtype == torch.long


NO_TEXTS = {
    "a string": ("text", "Texts are read as token ids; got a string. Give tokenizer(text), or its input_ids."),
    "strings": (["a", "b"], "Texts are read as token ids; got a string. Give tokenizer(text), or its input_ids."),
    "a number": (5, "Texts are read as token ids; got int. Give tokenizer(text), or its input_ids."),
    "a set": ({5, 6}, "Texts are read as token ids; got set. Give tokenizer(text), or its input_ids."),
    "another mapping": ({"ids": ROWS, 7: 1}, "A mapping must have input_ids; this one has ids, 7."),
    "an empty mapping": ({}, "A mapping must have input_ids; this one has nothing."),
    "nothing": ([], "The text is empty: there is no token to read. Give at least one."),
    "an array of nothing": (numpy.array([]), "The text is empty: there is no token to read. Give at least one."),
    "an empty row": ([[3], []], "A text of the batch is empty. Give each row at least one token."),
    "fractions": ([3.0, 4.5], "input_ids must be integers; got torch.float32."),
    "a row of fractions": ([[3, 4], [4.5]], "input_ids must be integers; got torch.float32."),
    "truths": ([True, False], "input_ids must be integers; got torch.bool."),
    "a tensor of truths": (torch.tensor([[True, False]]), "input_ids must be integers; got torch.bool."),
    "an array of truths": (numpy.array([[True]]), "input_ids must be integers; got torch.bool."),
    "a tokenizer's truths": ({"input_ids": [[True]]}, "input_ids must be integers; got torch.bool."),
    "texts of texts": ([[[3]], [[4]]], "Each text of a batch must be one list of ids (N,); got one of (1, 1)."),
    "numbers among rows": ([[3, 4], 5], "Each text of a batch must be one list of ids (N,); got one of ()."),
    "an array of nobody knows what": (numpy.array([None, 3]), "input_ids must be integers, in one list for each text;"),
    "rows among numbers": ([3, [4]], "input_ids must be integers, in one list for each text; these are not ("),
    "no ids": ([[3, None]], "input_ids must be integers, in one list for each text; these are not ("),
    "ids beyond 64 bits": ([3, 2**70], "input_ids must be integers, in one list for each text; these are not ("),
    "ids beyond the vocabulary": ([[3, VOCABULARY], [4]], f"Token ids must be within 0..{VOCABULARY - 1}; got"),
    "a shorter mask": (
        {"input_ids": ROWS, "attention_mask": [[1, 1, 1], [1]]},
        "attention_mask must have one value for each id; texts of [3, 2] ids have masks of [3, 1].",
    ),
    "a mask of one text": (
        {"input_ids": ROWS, "attention_mask": [1, 1, 1]},
        "attention_mask must have one value for each id; texts of [3, 2] ids have masks of [1, 1, 1].",
    ),
    "a ragged mask of texts of one length": (
        {"input_ids": [[3, 4], [5, 6]], "attention_mask": [[1, 1], [1]]},
        "attention_mask must have one value for each id; this one has not (",
    ),
    "a mask that is a number": (
        {"input_ids": ROWS, "attention_mask": 1},
        "attention_mask must have one value for each id; this one has not (",
    ),
    "a mask with holes": (
        {"input_ids": [[3, 4, 5], [6, 7]], "attention_mask": [[1, 0, 1], [1, 1]]},
        "attention_mask has holes: each row must be one run of tokens, padded at its ends.",
    ),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_refused_in_one_line(name):
    texts, message = NO_TEXTS[name]
    with pytest.raises(InputError, match=rf"^{re.escape(message)}") as caught:
        model().compress(texts)
    assert "\n" not in str(caught.value)


def test_tokens_are_of_one_dtype_whatever_they_came_as():
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.long):
        assert NewTokens(torch.tensor(ONE, dtype=dtype), [0], [3]).ids.dtype == torch.long
    ids = torch.tensor(ONE)
    assert NewTokens(ids, [0], [3]).ids is ids


def test_padding_texts_of_one_length_adds_nothing():
    ids, mask = left_padded([[3, 4], [5, 6]])
    assert ids.tolist() == [[3, 4], [5, 6]]
    assert mask.tolist() == [[1, 1], [1, 1]]
