"""OpenAI's Responses API: the official client against a live server, beside what the model says when it is called directly."""

import json

import openai
import pytest
from openai.types.responses import Response

from activation_beacon import ChatPrompt
from activation_beacon.server.failures import NotFoundError
from activation_beacon.server.responses import Kept, Responses
from activation_beacon.server.schema import Message
from evaluation_models import byte_tokenizer
from server_live import BOOK, MODEL, live, live_model
from server_models import plain

QUESTION = "Who said nothing?"


@pytest.fixture(scope="module")
def model():
    return live_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with live(tmp_path_factory.mktemp("served") / "contexts", model=model) as running:
        yield running


def respond(server, said=QUESTION, **options):
    options = {"model": MODEL, "max_output_tokens": 12, "temperature": 0, **options}
    return server.openai.responses.create(input=said, **options)


def refused(server, **options):
    """Status, message and parameter of an error."""
    options = {"model": MODEL, "input": QUESTION, **options}
    reply = server.http.post("/v1/responses", json=options)
    error = reply.json()["error"]
    return reply.status_code, error["message"], error["param"]


def chat_ids(messages):
    text = byte_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def written(model, ids, context=None, **options):
    tokens, _ = plain(model, context if context is not None else model.new_cache(ratio=4), ids, 12, **options)
    return byte_tokenizer().decode(tokens, skip_special_tokens=True)


def letters():
    """Nothing but letters: half a character would be other tokens when it comes back as text."""
    return {"extra_body": {"logit_bias": {str(token): 100 for token in range(65, 91)}}}


def user(text):
    return {"role": "user", "content": text}


def test_a_response(server, model):
    reply = respond(server, metadata={"a": "b"})
    ids = chat_ids([user(QUESTION)])
    assert reply.output_text == written(model, ids)
    assert (reply.object, reply.status, reply.model, reply.metadata) == ("response", "incomplete", MODEL, {"a": "b"})
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert (reply.temperature, reply.top_p, reply.max_output_tokens) == (0.0, 1.0, 12)
    assert [(item.type, item.role, item.status) for item in reply.output] == [("message", "assistant", "incomplete")]
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(ids), 12)
    assert reply.usage.total_tokens == len(ids) + 12
    assert reply.usage.output_tokens_details.reasoning_tokens == 0


def test_it_is_what_the_official_client_checks_it_for(server):
    """The client takes anything; validated, it must be a response without anything missing."""
    reply = server.http.post("/v1/responses", json={"model": MODEL, "input": QUESTION, "max_output_tokens": 4})
    strict = Response.model_validate(reply.json(), strict=True)
    assert strict.output[0].content[0].type == "output_text"


def test_an_answer_that_ends_by_itself_is_complete(server):
    whole = respond(server, **letters()).output_text
    reply = respond(server, extra_body={"stop": [whole[3]], **letters()["extra_body"]})
    assert (reply.status, reply.incomplete_details) == ("completed", None)
    assert reply.output_text == whole[: whole.index(whole[3])]
    assert reply.completed_at >= reply.created_at
    assert reply.output[0].status == "completed"


@pytest.mark.parametrize(
    "said",
    [
        [user(QUESTION)],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
        [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Who said"}, {"type": "text", "text": " nothing?"}],
            }
        ],
    ],
)
def test_what_is_said_may_come_in_items(server, said):
    assert respond(server, said).output_text == respond(server).output_text


def test_instructions_are_a_system_message(server, model):
    reply = respond(server, instructions="Be brief.")
    assert reply.output_text == written(model, chat_ids([{"role": "system", "content": "Be brief."}, user(QUESTION)]))
    assert reply.instructions == "Be brief."


def test_a_stream_says_the_same(server):
    whole, events = respond(server), list(respond(server, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-4].text
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == (whole.output_text, 12)
    assert events[0].response.status == "in_progress"
    assert {event.item_id for event in events[4:-4]} == {last.output[0].id}
    assert server.openai.responses.retrieve(last.id).output_text == whole.output_text


def test_a_helper_of_the_client_follows_a_stream(server):
    with server.openai.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=12, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == respond(server).output_text


def test_events_are_named_and_progress_is_told(server):
    body = {"model": MODEL, "input": BOOK, "max_output_tokens": 2, "stream": True, "ratio": 8}
    lines = server.http.post("/v1/responses", json=body).text.split("\n")
    assert any(line.startswith(": ") and line.endswith("chunks read") for line in lines)
    named = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    told = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert named == told


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_conversation_goes_on_by_the_id_of_its_last_response(server, model, is_streamed):
    said = BOOK + f" What about the moon? {is_streamed}"
    reply = respond(server, said, stream=is_streamed, **letters())
    first = list(reply)[-1].response if is_streamed else reply
    second = respond(server, "And the tiger?", previous_response_id=first.id, **letters())
    messages = [user(said), {"role": "assistant", "content": first.output_text}, user("And the tiger?")]
    bias = {(token,): 100.0 for token in range(65, 91)}
    assert second.output_text == written(model, chat_ids(messages), do_sample=False, sequence_bias=bias)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens == len(chat_ids(messages))
    assert second.usage.beacon["tokens_read"] < 60
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    third = respond(server, "Both?", previous_response_id=second.id, instructions="Be brief.", **letters())
    assert third.usage.input_tokens > second.usage.input_tokens + len(chat_ids([user("Both?")]))


def test_instructions_are_not_carried_over(server):
    first = respond(server, "One?", instructions="Be brief.", **letters())
    second = respond(server, "Two?", previous_response_id=first.id)
    again = respond(server, [user("One?"), {"role": "assistant", "content": first.output_text}, user("Two?")])
    assert second.output_text == again.output_text
    assert second.usage.input_tokens == again.usage.input_tokens


def test_the_output_may_be_sent_back_as_input(server):
    first = respond(server, **letters())
    back = [user(QUESTION), *[item.model_dump() for item in first.output], user("Two?")]
    assert respond(server, back).output_text == respond(server, "Two?", previous_response_id=first.id).output_text


def test_a_conversation_on_a_context_stays_on_it(server, model):
    context = server.create(ratio=8)
    prompt = ChatPrompt(byte_tokenizer())
    compressed = model.compress(prompt.opening(BOOK), ratio=8)
    options = {"extra_body": {**letters()["extra_body"], "context": context["id"]}}
    first = respond(server, "Who rose?", **options)
    second = respond(server, "When?", previous_response_id=first.id, **letters())
    ids = [*prompt.question("Who rose?"), *byte_tokenizer()(first.output_text)["input_ids"], *prompt.follow_up("When?")]
    bias = {(token,): 100.0 for token in range(65, 91)}
    assert second.output_text == written(model, ids, compressed, do_sample=False, sequence_bias=bias)
    assert second.usage.input_tokens == context["tokens"] + len(ids)
    other = server.create(text="Another text, about another lion.")
    status, message, _ = refused(server, previous_response_id=second.id, context=other["id"])
    assert status == 400
    assert message.startswith(
        f"Response {second.id} is about context {context['id']}, and what goes on from it is, too"
    )
    none = respond(server)
    assert (
        f"Response {none.id} is about no context"
        in refused(server, previous_response_id=none.id, context=other["id"])[1]
    )


def test_instructions_belong_before_a_context(server):
    context = server.create(ratio=8)
    first = respond(server, "Who rose?", extra_body={"context": context["id"]})
    for options in ({"context": context["id"]}, {"previous_response_id": first.id}):
        status, message, _ = refused(server, instructions="Be brief.", **options)
        assert status == 400
        assert message.startswith(
            "instructions cannot follow a context. Give them as `system` when the context is made"
        )


def test_a_finished_response_is_no_stream(server):
    reply = respond(server)
    assert server.http.get(f"/v1/responses/{reply.id}", params={"stream": True}).status_code == 400


def test_a_conversation_keeps_its_ratio(server):
    first = respond(server, BOOK, extra_body={"ratio": 8, **letters()["extra_body"]})
    second = respond(server, "And?", previous_response_id=first.id, **letters())
    assert second.usage.beacon["tokens_read"] < 60
    assert second.usage.beacon["beacons"] >= first.usage.beacon["beacons"]
    fresh = respond(server, "And?", previous_response_id=first.id, extra_body={"ratio": 2})
    assert fresh.usage.beacon["beacons"] > 2 * first.usage.beacon["beacons"]


def test_probabilities_of_tokens(server):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 4}
    listed = respond(server, **options).output[0].content[0].logprobs
    chat = server.ask(QUESTION, max_tokens=4, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(listed) == len(chat) == 4
    for mine, theirs in zip(listed, chat, strict=True):
        assert (mine.token, mine.bytes) == (theirs.token, theirs.bytes)
        assert [each.token for each in mine.top_logprobs] == [each.token for each in theirs.top_logprobs]
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    streamed = [
        entry
        for event in respond(server, stream=True, **options)
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in listed], abs=1e-4)
    assert respond(server, top_logprobs=2).output[0].content[0].logprobs == []


def test_responses_are_kept_until_they_are_deleted(server):
    reply = respond(server)
    assert server.openai.responses.retrieve(reply.id).model_dump() == reply.model_dump()
    server.openai.responses.delete(reply.id)
    with pytest.raises(openai.NotFoundError, match="There is no response"):
        server.openai.responses.retrieve(reply.id)
    assert server.http.delete(f"/v1/responses/{reply.id}").status_code == 404
    unkept = respond(server, store=False)
    assert unkept.store is False
    status, message, _ = refused(server, previous_response_id=unkept.id)
    assert status == 404
    assert message == (
        f"There is no response {unkept.id!r} here: a server keeps at most 1,000 of its own, until it ends. "
        "Send the whole conversation as input."
    )


def test_the_least_recently_used_responses_go_first():
    kept = Responses(most=2)
    for name in "abc":
        kept.keep(Kept({"id": name}, (), None, None))
        if name == "b":
            kept.get("a")
    assert kept.get("a").told["id"] == "a"
    assert kept.get("c").told["id"] == "c"
    with pytest.raises(NotFoundError, match="There is no response 'b' here: a server keeps at most 2 of"):
        kept.get("b")


def test_long_conversations_count_by_their_length():
    kept = Responses(most_chars=138)
    say = [Message(role="user", content="x" * 45), Message(role="assistant", content="y" * 15)]
    for name, messages in (("a", say[1:]), ("b", say), ("c", say[:1]), ("d", say * 3)):
        kept.keep(Kept({"id": name}, tuple(messages), None, None))
        if name == "c":
            assert [kept.get(each).told["id"] for each in ("b", "c")] == ["b", "c"]  # too many with a
            kept.delete("c")
    assert kept.get("d").num_chars == 180 + len('{"id": "d"}')  # the last is kept, however long
    for name in "abc":
        with pytest.raises(NotFoundError):
            kept.get(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input: send a text, or a list of messages."),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "items of the type 'function_call_output'",
        ),
        (
            {"input": [{"type": "reasoning", "summary": []}]},
            "items of the type 'reasoning' are not supported. Send messages",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "parts of the type 'input_image'",
        ),
        ({"input": [{"role": "tool", "content": "x"}]}, "messages of the role 'tool' are not supported"),
        ({"input": [{"role": "user"}]}, "content is missing"),
        ({"input": [{"role": "user", "content": "x", "audio": "y"}]}, "audio is not supported in a message"),
        ({"tools": [{"type": "web_search"}]}, "tools is not supported. Leave it out."),
        ({"background": True}, "background is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "schema goes with the type"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"n": 2}, "n is not a field of this request"),
        ({"max_tokens": 3}, "max_tokens is not a field of this request"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "max_output_tokens (100,000) is more than fits behind the"),
        ({"previous_response_id": "resp_none"}, "There is no response 'resp_none' here"),
        ({"model": "gpt"}, "There is no model 'gpt' here"),
        ({"context": "ctx_none"}, "ctx_none"),
        ({"temperature": 3}, "temperature"),
        ({"instructions": 3}, "instructions"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(number): "b" for number in range(17)}}, "metadata"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server, options, message):
    status, told, _ = refused(server, **options)
    assert status in (400, 404)
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "harmless",
    [
        {
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "truncation": "disabled",
            "background": False,
        },
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None, "summary": None}},
        {"include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False}, "user": "me"},
        {"service_tier": "auto", "prompt_cache_key": "a", "safety_identifier": "b", "max_tool_calls": 3},
    ],
)
def test_what_changes_nothing_is_taken(server, harmless):
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": 12, "temperature": 0, **harmless}
    reply = server.http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["output"][0]["content"][0]["text"] == respond(server).output_text


def test_a_failure_within_a_stream_is_told_in_it(model, tmp_path):
    with live(tmp_path / "contexts", model=model, answer_s=0.0) as server:
        events = list(respond(server, BOOK, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"
    assert "took longer" in events[-1].response.error.message
    assert events[-1].sequence_number == len(events) - 1
