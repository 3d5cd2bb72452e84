"""Answers in JSON: what a schema allows, and nothing else."""

import json
import sys

import openai
import pytest
import torch

from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.grammar import Grammars
from activation_beacon.server.sampling import Sampler, Sampling
from evaluation_models import byte_tokenizer
from server_live import BOOK, MODEL, live, live_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["lion", "tiger", "moon"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAT = [{"role": "user", "content": "Who said nothing?"}]


def of_chat(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def model():
    return live_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with live(tmp_path_factory.mktemp("served") / "contexts", model=model) as running:
        yield running


@pytest.fixture(scope="module")
def grammars(model):
    tokenizer = byte_tokenizer()
    return Grammars(tokenizer, model.get_input_embeddings().weight.shape[0], [tokenizer.eos_token_id])


def is_person(text):
    found = json.loads(text)
    return list(found) == ["name", "age"] and found["name"] in ("lion", "tiger", "moon") and 1 <= found["age"] <= 99


def allowed(matcher, size):
    return (matcher.masked(torch.zeros(size)) == 0).nonzero().flatten().tolist()


def test_what_may_come_next_by_hand(grammars, model):
    tokenizer, size = byte_tokenizer(), model.get_input_embeddings().weight.shape[0]
    matcher = grammars.of_schema({"enum": ["ab", "ac", "d"]}).matcher()
    token = {char: tokenizer(char, add_special_tokens=False)["input_ids"][0] for char in '"abcd'}
    for char, following in (('"', "ad"), ("a", "bc"), ("c", '"')):
        assert token[char] in allowed(matcher, size)
        matcher.add(token[char])
        assert allowed(matcher, size) == sorted(token[each] for each in following)
    matcher.add(token['"'])
    assert allowed(matcher, size) == [tokenizer.eos_token_id]


def test_of_what_is_allowed_the_likeliest_is_taken(grammars, model):
    size = model.get_input_embeddings().weight.shape[0]
    quote, a, d = (byte_tokenizer()(char, add_special_tokens=False)["input_ids"][0] for char in '"ad')
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    logits[a], logits[d] = 0.0, 0.1
    sampler = Sampler(Sampling(9, temperature=0.0, grammar=grammars.of_schema({"enum": ["a", "d"]}), num_likeliest=1))
    assert [sampler.choose(logits).token for _ in range(2)] == [quote, d]
    biased = Sampling(
        9, temperature=0.0, grammar=grammars.of_schema({"enum": ["a", "d"]}), logit_bias={a: 1.0, size - 1: 99.0}
    )
    sampler = Sampler(biased)
    assert [sampler.choose(logits).token for _ in range(2)] == [quote, a]
    reported = Sampler(Sampling(9, temperature=0.0, grammar=biased.grammar, num_likeliest=1)).choose(logits)
    assert reported.logprob == pytest.approx(float(logits.log_softmax(-1)[quote]))  # the model's own
    assert reported.likeliest[0][0] == int(logits.argmax())


def test_drawn_tokens_keep_to_it_too(grammars, model):
    size, generator = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(1)
    texts = set()
    for seed in range(8):
        sampler = Sampler(Sampling(99, temperature=1.5, seed=seed, grammar=grammars.of_schema(PERSON)))
        tokens = []
        while not tokens or tokens[-1] != byte_tokenizer().eos_token_id:
            tokens.append(sampler.choose(torch.randn(size, generator=generator)).token)
            assert len(tokens) < 60
        texts.add(byte_tokenizer().decode(tokens, skip_special_tokens=True))
    assert len(texts) > 3
    assert all(map(is_person, texts))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "n": 3, "seed": 4}])
def test_chat_in_json(server, options):
    context = server.create(ratio=8)["id"]
    options = {"response_format": of_chat(PERSON), "max_tokens": 64, **options}
    for about in (None, context):
        reply = server.ask("Who?", context=about, **options)
        assert all(is_person(choice.message.content) for choice in reply.choices)
        assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_a_stream_in_json_beside_others_that_are_not(server):
    plain = server.ask("Who?").choices[0].message.content
    stream = server.ask("Who?", response_format=of_chat(PERSON), max_tokens=64, stream=True)
    assert server.ask("Who?").choices[0].message.content == plain
    assert is_person("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def test_any_object(server):
    bias = {str(byte_tokenizer()("}", add_special_tokens=False)["input_ids"][0]): 100}
    reply = server.ask("Who?", response_format={"type": "json_object"}, max_tokens=64, logit_bias=bias)
    assert json.loads(reply.choices[0].message.content) == {}


def test_a_response_in_json(server):
    form = {"format": {"type": "json_schema", "name": "answer", "schema": PERSON, "strict": True}}
    reply = server.openai.responses.create(model=MODEL, input="Who?", text=form, max_output_tokens=64)
    assert is_person(reply.output_text)
    assert reply.text.format.type == "json_schema"
    assert reply.text.model_dump(by_alias=True, exclude_none=True)["format"] == form["format"]
    bias = {str(byte_tokenizer()("}", add_special_tokens=False)["input_ids"][0]): 100}
    options = {"text": {"format": {"type": "json_object"}}, "extra_body": {"logit_bias": bias}}
    assert server.openai.responses.create(model=MODEL, input="Who?", **options).output_text == "{}"


def test_the_clients_own_parser_takes_it(server):
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    options = {"max_completion_tokens": 400, "logit_bias": {str(byte_tokenizer()('"')["input_ids"][0]): 100}}
    parsed = server.openai.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Person, **options)
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_an_answer_that_is_too_long_is_cut(server):
    reply = server.ask("Who?", response_format=of_chat(PERSON), max_tokens=5)
    assert reply.choices[0].finish_reason == "length"
    assert '{"name": "'.startswith(reply.choices[0].message.content)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"type": "json_schema"}, 'json_schema goes with the type "json_schema", and only with it'),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "and only with it"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema: Field required"),
        ({"type": "yaml"}, "response_format.type"),
        (of_chat({"type": "strin"}), "The JSON schema cannot be served: "),
        (of_chat({"$ref": "http://elsewhere/schema"}), "The JSON schema cannot be served: "),
        (of_chat({"type": "string", "pattern": "("}), "The JSON schema cannot be served: "),
    ],
)
def test_what_is_no_schema_is_refused(server, wanted, message):
    body = {"model": MODEL, "messages": CHAT, "response_format": wanted}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_without_the_library_it_is_named(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(
        UnsupportedError, match=r"need llguidance, which is not installed here: pip install llguidance\.$"
    ):
        Grammars(byte_tokenizer(), 300, [256]).of_schema(PERSON)


def test_without_an_end_there_is_no_format(model):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedError, match="a token that ends an answer"):
        Grammars(tokenizer, 300, []).of_schema(PERSON)


def test_where_the_library_gives_up_it_is_told(grammars):
    """It has limits of its own, and then lets nothing follow any more; a token that it has not allowed is the same to it."""
    inner = {"type": "object", "properties": {f"q{number}": {"type": "string"} for number in range(60)}}
    wide = {f"p{number}": inner for number in range(300)}
    with pytest.raises(
        InputError, match=r"^The JSON schema cannot be served: schema too large\. Change it, or leave it out\.$"
    ):
        grammars.of_schema({"type": "object", "properties": wide})
    matcher = grammars.of_schema(PERSON).matcher()
    with pytest.raises(InputError, match=r"^The JSON schema cannot be kept to: .* Make it simpler, or leave it out\.$"):
        matcher.add(7)


def test_a_long_text_is_answered_in_json(server):
    reply = server.ask(BOOK + " Who?", response_format=of_chat(PERSON), max_tokens=64)
    assert is_person(reply.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        server.openai.completions.create(
            model=MODEL, prompt="Who?", extra_body={"response_format": {"type": "json_object"}}
        )
