"""Answers of `generate` and of the command line that a JSON schema allows."""

import json
import sys

import pytest
import torch
from transformers import GenerationConfig

from activation_beacon import BeaconConfig, SchemaLogitsProcessor, attach
from activation_beacon.errors import InputError, UnsupportedError
from evaluation_models import byte_tokenizer
from families import random_ids, tiny

WORDS = ["lion", "tiger", "moon"]
SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": WORDS}, "age": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["who", "age"],
    "additionalProperties": False,
}
CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    base = tiny("llama", vocab_size=300)
    base.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    return attach(base, CONFIG)


def is_kept_to(text):
    found = json.loads(text)
    return list(found) == ["who", "age"] and found["who"] in WORDS and 10 <= found["age"] <= 99


def answers(model, tokenizer, *, schema=SCHEMA, prompt=None, **options):
    prompt = random_ids(7) if prompt is None else prompt
    processors = [SchemaLogitsProcessor(model, tokenizer, schema)]
    out = model.generate(prompt, max_new_tokens=60, logits_processor=processors, **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, prompt.shape[1] :]]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 5},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 3, "temperature": 3.0},
    ],
)
@pytest.mark.parametrize("is_on_a_context", [False, True])
def test_every_answer_keeps_to_the_schema(model, tokenizer, options, is_on_a_context):
    torch.manual_seed(0)
    context = model.compress(random_ids(50), ratio=4) if is_on_a_context else None
    found = answers(model, tokenizer, context=context, **options)
    assert len(found) == options.get("num_return_sequences", 1)
    assert all(map(is_kept_to, found))


def test_rows_of_a_batch_follow_it_by_themselves(model, tokenizer):
    prompts = random_ids(7, batch=3)
    together = answers(model, tokenizer, prompt=prompts, do_sample=False)
    assert together == [answers(model, tokenizer, prompt=row[None], do_sample=False)[0] for row in prompts]
    assert all(map(is_kept_to, together))


def test_the_likeliest_of_what_is_allowed_is_taken(model, tokenizer):
    """Beside a loop by hand that tries what each token would lead to."""
    choices = [f'"{word}"' for word in ("lion", "lily", "tiger", "mouse")]
    text, prompt = "", random_ids(7)
    with model.beacon_disabled(), torch.no_grad():
        while text not in choices:
            ids = torch.cat((prompt, torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)), dim=1)
            logits = model(ids).logits[0, -1]
            nexts = {choice[len(text)] for choice in choices if choice.startswith(text)}
            text += max(nexts, key=lambda char: float(logits[tokenizer(char)["input_ids"][0]]))
    assert answers(model, tokenizer, schema={"enum": [json.loads(each) for each in choices]}, do_sample=False) == [text]


@pytest.mark.parametrize(
    "schema", [{"type": "strin"}, {"$ref": "http://elsewhere/schema"}, {"type": "string", "pattern": "("}]
)
def test_what_is_no_schema_is_refused(model, tokenizer, schema):
    with pytest.raises(InputError, match=r"^The JSON schema cannot be served: .+ Change it, or leave it out\.$"):
        SchemaLogitsProcessor(model, tokenizer, schema)


def test_without_the_library_it_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(
        UnsupportedError, match=r"need llguidance, which is not installed here: pip install llguidance\.$"
    ):
        SchemaLogitsProcessor(model, tokenizer, SCHEMA)
