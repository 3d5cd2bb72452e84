"""Conversations as they are published are read as they are; what is broken in them is named."""

import json

import pytest

from activation_beacon.data.chat_shapes import flat_chat
from activation_beacon.data.data_files import BadRecord
from activation_beacon.data.sources import Chat, ReadReport, chats
from activation_beacon.errors import InputError


def said(*pairs, by="role", text="content"):
    return [{by: role, text: content} for role, content in pairs]


@pytest.mark.parametrize(
    ("record", "system", "turns"),
    [
        ({"messages": said(("user", "Who?"), ("assistant", "Ann."))}, "", [("Who?", "Ann.")]),
        (
            {"messages": said(("system", "Be brief."), ("user", "Who?"), ("assistant", "Ann."), ("user", "Where?"),
                              ("assistant", " Here. "))},
            "Be brief.", [("Who?", "Ann."), ("Where?", "Here.")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "A st"}, {"type": "text", "text": "ory."}]},
                          {"role": "assistant", "content": [{"text": "Well."}]}]},
            "", [("A story.", "Well.")],
        ),
        (
            {"conversations": said(("gpt", "Hello!"), ("human", "Who?"), ("gpt", "Ann."), by="from", text="value")},
            "", [("Who?", "Ann.")],
        ),
        (
            {"conversation": said(("user", "One."), ("user", "Two."), ("assistant", "A."), ("assistant", "B."),
                                  ("user", "And?"))},
            "", [("One.\n\nTwo.", "A.\n\nB.")],
        ),
        ({"instruction": "Sum it up.", "input": "A story.", "output": "Short."}, "", [("Sum it up.\n\nA story.", "Short.")]),
        ({"instruction": "Sum it up.", "input": "", "output": "Short."}, "", [("Sum it up.", "Short.")]),
        (
            {"instruction": "And?", "output": "Bob.", "history": [["Who?", "Ann. "], ["Where?", "Here."]], "system": " S"},
            "S", [("Who?", "Ann."), ("Where?", "Here."), ("And?", "Bob.")],
        ),
        ({"instruction": "Who?", "output": "Ann.", "history": [], "system": ""}, "", [("Who?", "Ann.")]),
        ({"instruction": "Who?", "output": "Ann.", "history": None, "system": None}, "", [("Who?", "Ann.")]),
        (
            {"system": "S", "conversations": said(("human", "Who?"), ("gpt", "Ann."), by="from", text="value")},
            "S", [("Who?", "Ann.")],
        ),
        (
            {"system": "S", "messages": said(("system", "S"), ("user", "Who?"), ("assistant", "Ann."))},
            "S", [("Who?", "Ann.")],
        ),
        (
            {"system": "S", "messages": said(("system", "T"), ("user", "Who?"), ("assistant", "Ann."))},
            "S\n\nT", [("Who?", "Ann.")],
        ),
        ({"prompt": "Who?", "completion": " Ann."}, "", [("Who?", "Ann.")]),
        (
            {"prompt": said(("system", "S"), ("user", "Who?")), "completion": said(("assistant", "Ann."))},
            "S", [("Who?", "Ann.")],
        ),
    ],
)  # fmt: skip
def test_each_shape_is_made_flat(record, system, turns):
    assert flat_chat(record) == (system, turns)


@pytest.mark.parametrize(
    ("record", "why", "detail"),
    [
        ({"text": "a"}, "no conversation", "there is none of the fields messages, conversations, prompt and completion, or "),
        ({"messages": "a"}, "wrong type", 'the field "messages" is no list but a str'),
        ({"messages": ["a"]}, "no object", "the item is JSON but no object"),
        ({"messages": said(("judge", "a"))}, "unknown role", 'the role "judge" is none of system, '),
        ({"messages": [{"content": "a"}]}, "missing field", 'there is no field "from" (fields: content)'),
        ({"messages": said(("user", " "))}, "empty message", 'the field "content" is empty'),
        ({"messages": said(("user", "a"))}, "no answer", "no message of a user is answered"),
        ({"messages": said(("assistant", "a"))}, "no answer", "no message of a user is answered"),
        ({"messages": []}, "no answer", "no message of a user is answered"),
        (
            {"messages": said(("user", "a"), ("system", "b"), ("assistant", "c"))},
            "system message within", "a system message stands after",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "not text", 'a message has a part of type "image_url"',
        ),
        ({"system": 3, "messages": said(("user", "a"), ("assistant", "b"))}, "wrong type", 'the field "system" is no text but'),
        ({"instruction": "a", "output": "b", "history": "c"}, "wrong type", 'the field "history" is no list but a str'),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "no pair", 'the field "history" holds something else than'),
        ({"instruction": "a", "output": "b", "history": ["cd"]}, "no pair", 'the field "history" holds something else than'),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "empty message", 'the field "history" is empty'),
        ({"instruction": 3, "output": "a"}, "wrong type", 'the field "instruction" is no text but a int'),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(record, why, detail):
    with pytest.raises(BadRecord) as caught:
        flat_chat(record)
    assert caught.value.why == why
    assert caught.value.detail.startswith(detail)


def test_conversations_are_read_from_files_and_broken_ones_are_counted(tmp_path):
    path = tmp_path / "chats.jsonl"
    good = {"id": "a", "messages": said(("user", "Who?"), ("assistant", "Ann."))}
    lines = [json.dumps(good), json.dumps({"text": "a"}), "no JSON", json.dumps({**good, "id": "left out"})]
    path.write_text("\n".join(lines))
    report = ReadReport()
    found = list(chats(path, exclude=["left out"], report=report))
    assert found == [Chat("a", "", (("Who?", "Ann."),))]
    assert (report.records, report.skipped) == (1, {"no conversation": 1, "broken JSON": 1, "excluded": 1})
    with pytest.raises(InputError, match=r"chats\.jsonl, line 2: there is none of the fields messages"):
        list(chats(path, on_error="stop"))
