"""The shapes in which conversations are published, made flat: a system text, then questions and answers in turn.

A record tells its shape by its fields:

- OpenAI's, and transformers': `messages[]` with `role` and `content`, a text or a list of parts of type "text".
- ShareGPT's: `conversations[]` with `from` and `value`.
- TRL's: `prompt` and `completion`, each a text or a list of messages.
- Alpaca's: `instruction`, often `input`, and `output`; what was said before in `history[]`, as pairs.

Each may have a system text of its own in `system`, beside its messages.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from activation_beacon.data.data_files import BadRecord
from activation_beacon.data.fields import field_of, object_of, text_of

Fields = dict[str, Any]
Message = tuple[str, str]  # role and text

GAP = "\n\n"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), ASSISTANT),
}
LISTS = ("messages", "conversations", "conversation")
SHAPES = "messages, conversations, prompt and completion, or instruction and output"


def flat_chat(fields: Fields) -> tuple[str, list[tuple[str, str]]]:
    """The conversation of one record.

    Messages of one role in a row become one. What stands before the first question, but for a system text, and questions
    after the last answer are left out.

    Returns:
        The system text ("" for none), and each question with its answer.

    Raises:
        BadRecord: if the shape is not known, a message is no text, a role is not known, or nothing is answered.
    """
    merged = [
        (role, GAP.join(text for _, text in run))
        for role, run in itertools.groupby(_messages_of(fields), key=lambda message: message[0])
    ]
    system = merged.pop(0)[1] if merged and merged[0][0] == SYSTEM else ""
    if any(role == SYSTEM for role, _ in merged):
        raise BadRecord("system message within", "a system message stands after the first message of another role")
    if merged and merged[0][0] == ASSISTANT:
        merged.pop(0)
    turns = [(question, answer) for (_, question), (_, answer) in zip(merged[::2], merged[1::2], strict=False)]
    if not turns:
        raise BadRecord("no answer", "no message of a user is answered")
    return system, turns


def _messages_of(fields: Fields) -> list[Message]:
    messages = _said(fields)
    if not fields.get("system"):
        return messages
    opening = (SYSTEM, text_of(fields, "system", empty="empty message").strip())
    return messages if messages[:1] == [opening] else [opening, *messages]


def _said(fields: Fields) -> list[Message]:
    for name in LISTS:
        if name in fields:
            return _listed(fields, name)
    if {"prompt", "completion"} <= fields.keys():
        return [*_side(fields, "prompt", USER), *_side(fields, "completion", ASSISTANT)]
    if {"instruction", "output"} <= fields.keys():
        asked = [text_of(fields, "instruction", empty="empty message").strip()]
        if fields.get("input"):
            asked.append(text_of(fields, "input", empty="empty message").strip())
        answer = text_of(fields, "output", empty="empty message").strip()
        return [*_history(fields), (USER, GAP.join(asked)), (ASSISTANT, answer)]
    known = ", ".join(map(str, fields)) or "none"
    raise BadRecord("no conversation", f"there is none of the fields {SHAPES} (fields: {known})")


def _history(fields: Fields) -> Iterator[Message]:
    """What stands in pairs of a question and its answer, if anything does."""
    for pair in field_of(fields, "history", list, "list") if fields.get("history") else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRecord(
                "no pair", 'the field "history" holds something else than pairs of a question and its answer'
            )
        for role, text in zip((USER, ASSISTANT), pair, strict=True):
            yield role, text_of({"history": text}, "history", empty="empty message").strip()


def _side(fields: Fields, name: str, role: str) -> list[Message]:
    if isinstance(fields[name], list):
        return _listed(fields, name)
    return [(role, text_of(fields, name, empty="empty message").strip())]


def _listed(fields: Fields, name: str) -> list[Message]:
    return [_message(object_of(item, "item")) for item in field_of(fields, name, list, "list")]


def _message(item: Fields) -> Message:
    said_by = "role" if "role" in item else "from"
    name = text_of(item, said_by, empty="empty role")
    if name not in ROLES:
        raise BadRecord("unknown role", f'the role "{name}" is none of {", ".join(ROLES)}')
    held = "content" if "content" in item else "value"
    if not isinstance(item.get(held), list):
        return ROLES[name], text_of(item, held, empty="empty message").strip()
    parts = [object_of(part, "item") for part in item[held]]
    if other := next((part for part in parts if part.get("type", "text") != "text"), None):
        raise BadRecord("not text", f'a message has a part of type "{other["type"]}"')
    return ROLES[name], "".join(text_of(part, "text", empty="empty message") for part in parts).strip()
