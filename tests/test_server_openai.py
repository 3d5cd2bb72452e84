"""The official client against a live server of a tiny model, beside what the model says when it is called directly."""

import itertools
import json
import re

import httpx
import openai
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from activation_beacon import ChatPrompt
from activation_beacon.server.sampling import Chosen, Sampler
from evaluation_models import byte_tokenizer
from server_live import BOOK, MODEL, live, live_model, wait_until
from server_models import plain

CHAT = [{"role": "user", "content": "Who said nothing?"}]


@pytest.fixture(scope="module")
def model():
    return live_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with live(tmp_path_factory.mktemp("served") / "contexts", model=model) as running:
        yield running


def written(model, ids, num_tokens, context=None):
    tokens, _ = plain(model, context if context is not None else model.new_cache(ratio=4), ids, num_tokens)
    return byte_tokenizer().decode(tokens, skip_special_tokens=True)


def chat_ids(messages):
    text = byte_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def chat(server, messages=CHAT, **options):
    options = {"model": MODEL, "max_tokens": 12, "temperature": 0, **options}
    return server.openai.chat.completions.create(messages=messages, **options)


def test_models(server):
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).owned_by == "activation-beacon"


def test_chat(server, model):
    reply = chat(server)
    assert reply.choices[0].message.content == written(model, chat_ids(CHAT), 12)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.object == "chat.completion"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens == len(chat_ids(CHAT))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_a_stream_says_the_same(server, model):
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == written(model, chat_ids(CHAT), 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_long_prompt_is_compressed_on_the_way_in(server, model):
    messages = [{"role": "user", "content": BOOK + "\n\nWho said nothing?"}]
    reply = chat(server, messages)
    assert reply.choices[0].message.content == written(model, chat_ids(messages), 12)
    assert reply.usage.beacon["beacons"] > 0
    assert reply.usage.beacon["cache_bytes"] < reply.usage.beacon["uncompressed_bytes"] / 2


def test_of_a_list_of_ratios_the_last_goes_on(server, model):
    messages = [{"role": "user", "content": BOOK}]
    reply = chat(server, messages, extra_body={"ratio": [2, 8]})
    tokens, grown = plain(model, model.new_cache(ratio=(2, 8)), chat_ids(messages), 12)
    assert reply.choices[0].message.content == byte_tokenizer().decode(tokens, skip_special_tokens=True)
    assert grown.ratios[:4] == (2, 8, 8, 8)
    assert reply.usage.beacon["beacons"] == grown.num_beacons


def test_a_conversation_that_grows_is_not_read_again(server, model):
    messages = [{"role": "user", "content": BOOK + " What about the moon?"}]
    first = chat(server, messages)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And the tiger?"},
    ]
    second = chat(server, messages)
    assert second.usage.prompt_tokens == len(chat_ids(messages))
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert second.usage.beacon["tokens_read"] < 60
    assert second.choices[0].message.content == written(model, chat_ids(messages), 12)


def test_a_context_is_asked_by_its_id(server, model):
    context = server.create(ratio=8)
    prompt = ChatPrompt(byte_tokenizer())
    compressed = model.compress(prompt.opening(BOOK), ratio=8)
    reply = server.ask("Who rose?", context=context["id"])
    assert reply.choices[0].message.content == written(model, prompt.question("Who rose?"), 12, compressed)
    assert reply.usage.prompt_tokens == context["tokens"] + len(prompt.question("Who rose?"))
    assert reply.usage.prompt_tokens_details.cached_tokens == context["tokens"]


def test_a_conversation_on_a_context_is_not_read_again(server, model):
    """Letters only: half a character would be other tokens when it comes back as text."""
    context = server.create(ratio=8)
    prompt = ChatPrompt(byte_tokenizer())
    compressed = model.compress(prompt.opening(BOOK), ratio=8)
    letters = range(65, 91)
    options = {"logit_bias": {str(token): 100 for token in letters}, "extra_body": {"context": context["id"]}}
    answer = chat(server, [{"role": "user", "content": "Who rose?"}], **options).choices[0].message.content
    messages = [
        {"role": "user", "content": "Who rose?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "When?"},
    ]
    reply = chat(server, messages, **options)
    ids = [*prompt.question("Who rose?"), *byte_tokenizer()(answer)["input_ids"], *prompt.follow_up("When?")]
    bias = {(token,): 100.0 for token in letters}
    expected, _ = plain(model, compressed, ids, 12, do_sample=False, sequence_bias=bias)
    assert reply.choices[0].message.content == byte_tokenizer().decode(expected)
    assert reply.usage.prompt_tokens == context["tokens"] + len(ids)
    assert reply.usage.beacon["tokens_read"] == len(prompt.follow_up("When?")) + 1  # the answer's last token too


def test_several_answers_and_seeds(server):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 16}
    one, two = chat(server, **options), chat(server, **options)
    texts = [choice.message.content for choice in one.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in two.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat(server, **options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts
    assert one.usage.completion_tokens == 48


def test_stop(server, model):
    whole = written(model, chat_ids(CHAT), 12)
    stop = whole[4:6]
    reply = chat(server, stop=[stop, "never this"])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    text = "".join(c.choices[0].delta.content or "" for c in chat(server, stop=stop, stream=True))
    assert text == whole[: whole.index(stop)]


def test_logprobs(server, model):
    reply = chat(server, logprobs=True, top_logprobs=3, max_tokens=4)
    content = reply.choices[0].logprobs.content
    assert len(content) == 4
    with torch.no_grad():
        logits = model(torch.tensor([chat_ids(CHAT)]), past_key_values=model.new_cache(ratio=4)).logits[0, -1]
    expected = logits.log_softmax(-1)
    assert content[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert len(content[0].top_logprobs) == 3
    assert content[0].top_logprobs[0].token == content[0].token
    streamed = list(chat(server, logprobs=True, top_logprobs=3, max_tokens=4, stream=True))
    told = [t.logprob for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert told == pytest.approx([each.logprob for each in content], abs=1e-4)


EURO = list("a€b".encode())


@pytest.fixture
def euros(server, monkeypatch):
    """Answers that go on with a€b, a token for each byte."""
    alphabet = sorted(bytes_to_unicode().values())
    ids = [alphabet.index(bytes_to_unicode()[octet]) for octet in EURO]

    def choose(self, logits):
        token = ids[sum(self.written.values()) % len(ids)]
        self.written[token] += 1
        return Chosen(token, -0.5, ((ids[1], -0.5), (ids[2], -0.75), (ids[0], -1.0)))

    monkeypatch.setattr(Sampler, "choose", choose)
    return server


def completion(server, **options):
    """A whole completion's choice, and a stream's choices put together."""
    options = {"model": MODEL, "prompt": "x", "logprobs": 3, **options}
    whole = server.openai.completions.create(**options).choices[0]
    pieces = [piece.choices[0] for piece in server.openai.completions.create(**options, stream=True)]
    streamed = {
        name: [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)]
        for name in ("tokens", "text_offset")
    }
    return whole, "".join(piece.text for piece in pieces), streamed


@pytest.mark.parametrize(
    ("options", "text", "tokens", "offsets"),
    [
        ({"max_tokens": 5}, "a€b", ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"], [0, 1, 1, 1, 2]),
        ({"max_tokens": 9, "stop": "ba"}, "a€", ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"], [0, 1, 1, 1]),
        ({"max_tokens": 9, "stop": "€b"}, "a", ["a"], [0]),
        (
            {"max_tokens": 5, "stop": "b!"},
            "a€b",
            ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"],
            [0, 1, 1, 1, 2],
        ),
        ({"max_tokens": 3, "stop": "zz"}, "a\ufffd", ["a", "bytes:\\xe2", "bytes:\\x82"], [0, 1, 1]),
    ],
)
def test_tokens_are_listed_where_their_text_is_and_those_of_a_stop_text_are_not(euros, options, text, tokens, offsets):
    whole, streamed, listed = completion(euros, **options)
    assert (whole.text, whole.logprobs.tokens, whole.logprobs.text_offset) == (text, tokens, offsets)
    assert (streamed, listed) == (text, {"tokens": tokens, "text_offset": offsets})
    assert list(whole.logprobs.top_logprobs[0]) == ["bytes:\\xe2", "bytes:\\x82", "a"]


def test_a_chat_lists_no_tokens_of_a_stop_text(euros):
    reply = chat(euros, logprobs=True, stop="b", max_tokens=9)
    assert [each.bytes for each in reply.choices[0].logprobs.content] == [[octet] for octet in EURO[:-1]]
    streamed = chat(euros, logprobs=True, stop="b", max_tokens=9, stream=True)
    told = [t.bytes for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert told == [[octet] for octet in EURO[:-1]]


def test_penalties_and_biases_reach_the_sampler(server):
    assert chat(server, logit_bias={"70": 100}, max_tokens=3).choices[0].message.content == byte_tokenizer().decode(
        [70] * 3
    )
    varied = chat(server, logit_bias={"70": 90, "71": 89}, frequency_penalty=2.0, max_tokens=3)
    assert len(set(varied.choices[0].message.content)) > 1


def test_completions(server, model):
    ids = byte_tokenizer()(BOOK)["input_ids"]
    reply = server.openai.completions.create(model=MODEL, prompt=BOOK, max_tokens=9, temperature=0, logprobs=2)
    assert reply.choices[0].text == written(model, ids, 9)
    assert len(reply.choices[0].logprobs.tokens) == 9
    assert reply.choices[0].logprobs.text_offset[0] == 0
    several = server.openai.completions.create(
        model=MODEL, prompt=[ids[:20], ids[5:40]], max_tokens=5, temperature=0, n=2
    )
    expected = [written(model, part, 5) for part in (ids[:20], ids[5:40]) for _ in range(2)]
    assert [choice.text for choice in several.choices] == expected
    stream = server.openai.completions.create(model=MODEL, prompt=BOOK, max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == written(model, ids, 9)


def test_a_completion_follows_a_plain_context(server, model):
    context = server.create(plain=True, ratio=4)
    reply = server.openai.completions.create(
        model=MODEL, prompt=" And then", max_tokens=9, temperature=0, extra_body={"context": context["id"]}
    )
    ids = byte_tokenizer()(BOOK + " And then")["input_ids"]
    assert reply.choices[0].text == written(model, ids, 9)
    with pytest.raises(openai.BadRequestError, match="does not open with the model's chat template"):
        server.ask("Who?", context=context["id"])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "There is no model 'gpt-4' here"),
        ({"extra_body": {"context": "ctx_none"}}, openai.NotFoundError, "There is no context 'ctx_none'"),
        ({"extra_body": {"context": "../../etc/passwd"}}, openai.NotFoundError, "There is no context"),
        ({"temperature": 9}, openai.BadRequestError, "temperature: Input should be less than or equal to 2"),
        ({"n": 0}, openai.BadRequestError, "n: Input should be greater"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "tools is not supported",
        ),
        ({"response_format": {"type": "yaml"}}, openai.BadRequestError, "response_format.type"),
        ({"extra_body": {"wonder": 1}}, openai.BadRequestError, "wonder is not a field of this request"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs needs logprobs"),
        ({"stop": ["x"] * 20}, openai.BadRequestError, "stop takes up to 16 texts"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "is more than fits behind"),
        ({"max_tokens": 2**31}, openai.BadRequestError, "is more than fits behind"),
        ({"extra_body": {"ratio": 3}}, openai.BadRequestError, "ratio"),
        ({"logit_bias": {"5000": 1}}, openai.BadRequestError, "logit_bias names tokens"),
        (
            {"messages": [{"role": "user", "content": "x" * 10**6}]},
            openai.BadRequestError,
            "The text has 76,924 tokens or more, which do not fit. A text of 76,924 tokens needs",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "messages.0: parts of the type 'image_url' are not supported",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}, CHAT[0]]},
            openai.BadRequestError,
            "messages.1: tool_calls is not supported in a message",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": []}, CHAT[0]]},
            openai.BadRequestError,
            "messages.1: content is missing",
        ),
        (
            {"messages": [{"role": "tool", "content": "17", "tool_call_id": "a"}]},
            openai.BadRequestError,
            "messages.0: messages of the role 'tool' are not supported",
        ),
        ({"stop": [None]}, openai.BadRequestError, " - stop: Input should be a valid string"),
        ({"extra_body": {"ratio": "x"}}, openai.BadRequestError, " - ratio: Input should be a valid integer"),
    ],
)
def test_errors_are_in_openais_shape(server, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        chat(server, **options)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert "\n" not in caught.value.body["message"]
    assert re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*|None", str(caught.value.body["param"]))


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b"{", {"content-type": "application/json"}, "The body is not JSON: Expecting property name"),
        (b'{"model": "tiny"}', {}, "The body must be a JSON object. Send it with Content-Type: application/json."),
        (b"7", {"content-type": "application/json"}, "The body must be a JSON object."),
        (b'{"model": "tiny", "prompt": []}', {"content-type": "application/json"}, "prompt: "),
        (b'{"model": "tiny", "prompt": [true]}', {"content-type": "application/json"}, "prompt: "),
    ],
)
def test_bodies_that_are_no_requests(server, content, headers, message):
    reply = server.http.post("/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)
    assert reply.json()["error"]["param"] in (None, "prompt")


def test_answers_may_be_sent_back_as_they_came(server):
    first = chat(server).choices[0].message
    assert chat(server, [CHAT[0], first.model_dump(), {"role": "user", "content": "And then?"}]).choices


def test_many_prompts_are_one_request_to_an_idle_server(model, tmp_path):
    with live(tmp_path / "contexts", model=model, max_waiting=2) as narrow:
        reply = narrow.openai.completions.create(model=MODEL, prompt=["a", "b", "c", "d", "e"], max_tokens=2)
    assert len(reply.choices) == 5


def test_the_second_answer_of_a_seed_is_no_other_seeds_first(server):
    options = {"max_tokens": 20, "temperature": 1}
    texts = {choice.message.content for choice in chat(server, n=3, seed=1, **options).choices}
    for seed in (2, 3):
        assert chat(server, seed=seed, **options).choices[0].message.content not in texts


def test_a_context_longer_than_the_model_can_hold_says_so(server):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, [{"role": "user", "content": BOOK * 20}])
    assert caught.value.code == "context_length_exceeded"


def test_without_a_context_the_chat_template_takes_messages_in_any_order(server, model):
    answer = {"role": "assistant", "content": "Nobody"}
    for messages in ([*CHAT, *CHAT], [*CHAT, answer], [answer]):
        assert chat(server, messages).choices[0].message.content == written(model, chat_ids(messages), 12)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [*CHAT, *CHAT],
            "On a context, messages must alternate between user and assistant, user first; got user, user.",
        ),
        ([*CHAT, {"role": "assistant", "content": "x"}], "On a context, the last message must be the user's"),
    ],
)
def test_on_a_context_users_and_assistants_messages_alternate(server, messages, message):
    context = server.create(ratio=4)
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        chat(server, messages, extra_body={"context": context["id"]})


def test_what_changes_nothing_is_ignored(server):
    assert chat(server, user="me", tools=[], response_format={"type": "text"}, store=False).choices


def test_a_client_that_leaves_a_stream_is_not_written_for(server):
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 800, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert len(list(itertools.islice(reply.iter_lines(), 4))) == 4
    wait_until(lambda: server.server.engine.num_running == 0)
    assert server.server.engine.num_rows == 0


def test_a_client_that_gives_up_waiting_is_not_written_for(server):
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 800}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    wait_until(lambda: server.server.engine.num_running == 0)
    assert server.server.engine.num_rows == 0


def test_comments_of_progress_do_not_disturb_clients(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": BOOK[::-1]}], "max_tokens": 2, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = list(reply.iter_lines())
    assert any(line.startswith(": 3 of ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert all(json.loads(each)["object"] == "chat.completion.chunk" for each in data[:-1])
    assert "".join(c.choices[0].delta.content or "" for c in server.openai.chat.completions.create(**body))


def test_without_a_temperature_answers_are_written_as_generate_does(server, model):
    likeliest = chat(server).choices[0].message.content
    assert chat(server, temperature=None).choices[0].message.content == likeliest
    assert len({choice.message.content for choice in chat(server, temperature=None, n=3, seed=0).choices}) == 3
