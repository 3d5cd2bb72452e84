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
    matcher = grammars.of_schema({"enum": ["ab", "ac", "d"]})
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
    """The long answer is not yet at its end when the short one has come: they were decoded together."""
    ones = {"type": "array", "items": {"const": 1}, "minItems": 150, "maxItems": 150}
    plain = server.ask("Who?").choices[0].message.content
    stream = server.ask("Who?", response_format=of_chat(ones), max_tokens=600, stream=True)
    pieces = [next(stream) for _ in range(5)]
    assert server.ask("Who?").choices[0].message.content == plain
    assert server.server.engine.num_rows == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [*pieces, *stream])
    assert json.loads(text) == [1] * 150


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
    assert reply.choices[0].message.content == '{"nam'


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


def chain(length, link):
    """A schema of so many that each refer to the next."""
    links = {str(number): link({"$ref": f"#/$defs/{number + 1}"}) for number in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(length): {"type": "string"}}}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "a long chain": (
        chain(4000, lambda ref: {"type": "array", "items": ref}),
        "what its 4,001 references lead to is nested",
    ),
    "references alone": (chain(4000, lambda ref: ref), "what its 4,001 references lead to is nested"),
    "many in each": (
        chain(100, lambda ref: {"allOf": [{"allOf": [{"anyOf": [ref]}]}]}),
        "references lead to is nested",
    ),
    "deep": (nested(2000), "it is nested more than 100 deep"),
    "not a number": ({"type": "number", "minimum": float("nan")}, "numbers that are not finite"),
    "infinite": ({"type": "number", "maximum": float("inf")}, "numbers that are not finite"),
    "half a character": ({"const": "\ud800"}, "half of a surrogate pair"),
    "a huge number": ({"type": "number", "minimum": 10**400}, ""),
    "what made it panic": ({"type": "string", "pattern": ["xSECRET" + "é" * 60]}, "pattern must be str"),
    "likewise": ({"type": "string", "minLength": "é" * 60}, "minLength must be int"),
    "large": ({"enum": ["x" * 100 + str(number) for number in range(10_000)]}, "it has more than 1,000,000 characters"),
    "references that lead nowhere": (
        {"anyOf": [{"$ref": f"#/x{number}"} for number in range(30_000)]},
        "30,000 references",
    ),
    "without end": ({"$ref": "#"}, ""),
    "too many ways": (
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}},
        "",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_before_anything_is_read(grammars, name, capfd):
    schema, message = HOSTILE[name]
    with pytest.raises(
        InputError, match=r"^The JSON schema cannot be (served|kept to): .+ Change it, or leave it out\.$"
    ) as caught:
        grammars.of_schema(schema)
    told = str(caught.value)
    assert message in told
    assert not any(word in told for word in ("<state>", "lexer_cost", "Enable", "SECRET"))
    assert "SECRET" not in capfd.readouterr().err


def test_deep_but_honest_schemas_are_served(grammars):
    for schema in (
        nested(40),
        chain(60, lambda ref: {"type": "array", "items": ref}),
        {
            "properties": {"pattern": {"type": "string"}, "minLength": {}, "enum": {"enum": ["a"]}},
            "required": ["pattern"],
        },
        {"const": {"pattern": 3, "minLength": "x", "$ref": 7}},
        {"type": "object", "properties": {"self": {"$ref": "#"}}},
    ):
        assert grammars.of_schema(schema)


def test_the_layout_is_not_the_clients(grammars, model):
    schema = {"x-guidance": {"whitespace_pattern": "a*"}, "type": "object"}
    size = model.get_input_embeddings().weight.shape[0]
    matcher = grammars.of_schema(schema)
    token = {char: byte_tokenizer()(char, add_special_tokens=False)["input_ids"][0] for char in "{a"}
    matcher.add(token["{"])
    assert token["a"] not in allowed(matcher, size)


def test_a_grammar_that_gives_up_leaves_no_answer_in_the_log(server, caplog):
    inner = {"r": {"$ref": "#/$defs/r"}}
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["SECRETNAME"]}, "x": {"$ref": "#/$defs/r"}},
        "required": ["name", "x"],
        "additionalProperties": False,
        "$defs": inner,
    }
    body = {"model": MODEL, "messages": CHAT, "response_format": of_chat(schema), "max_tokens": 64}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert not any(word in reply.text + caplog.text for word in ("<state>", "Tokens:", "S‧E‧C"))


def test_an_end_that_the_tokenizer_has_not_is_left_out():
    grammar = Grammars(byte_tokenizer(), 300, [256, 299]).of_schema({"const": 1})
    assert allowed(grammar, 300) == [byte_tokenizer()("1", add_special_tokens=False)["input_ids"][0]]


def test_a_tokenizer_that_cannot_be_read_is_told_once_and_again(monkeypatch):
    from llguidance import hf

    calls = []
    monkeypatch.setattr(hf, "from_tokenizer", lambda *args, **options: calls.append(1) or int("x"))
    grammars = Grammars(byte_tokenizer(), 300, [256])
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"^llguidance cannot read the model's tokenizer, so it answers in no format"
        ):
            grammars.of_schema(PERSON)
    assert len(calls) == 1


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


def test_a_token_that_is_not_allowed_is_refused(grammars):
    matcher = grammars.of_schema(PERSON)
    assert not matcher.allows(7)
    with pytest.raises(InputError, match=r"^The JSON schema cannot be kept to: .* Change it, or leave it out\.$"):
        matcher.add(7)


def test_a_long_text_is_answered_in_json(server):
    reply = server.ask(BOOK + " Who?", response_format=of_chat(PERSON), max_tokens=64)
    assert is_person(reply.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        server.openai.completions.create(
            model=MODEL, prompt="Who?", extra_body={"response_format": {"type": "json_object"}}
        )
