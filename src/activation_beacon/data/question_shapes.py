"""The shapes in which question sets are published, made flat: one context, one question, its answers.

A record tells its shape by its fields:

- SQuAD's file: `data[].paragraphs[]` with `context` and `qas[]` of `question` and `answers[].text`. Its form on the hub is flat.
- QuALITY: `article` and `questions[]` with `question`, `options` and `gold_label`, counted from 1.
- NarrativeQA: `document.text` (or, in records without stories, `document.summary.text`), `question.text`, `answers[].text`.
- MuSiQue: `paragraphs[]` with `title` and `paragraph_text`, `question`, `answer`, `answer_aliases`, `answerable`.

QuALITY's options are listed below the question and the answer is the right one's words, not a letter: answers are free text,
scored by the words they share with the right one, and a letter stands in nearly every text ("A" is an article, which scores drop).
"""

from collections.abc import Callable, Iterator
from typing import Any

from activation_beacon.data.data_files import BadRecord
from activation_beacon.data.fields import field_of, object_of, text_of

Fields = dict[str, Any]
Refuse = Callable[[str, BadRecord], None]
Shape = Callable[[Fields, Refuse], Iterator[tuple[str, Fields]]]

GAP = "\n\n"
CHOICE = "Answer with one of these:"


def flat_questions(fields: Fields, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    """The questions of one record, each with the fields "context", "question", and "answer" or "answers".

    Args:
        fields: of the record; those of no shape that is known are handed on as they are.
        refuse: is told each part that cannot be used, by its path within the record.

    Yields:
        The path within the record, such as "questions[0]" ("" where the record is one question), and the flat fields.
    """
    yield from _shape_of(fields)(fields, refuse)


def is_unanswerable(fields: Fields) -> bool:
    """Whether flat fields say that the context does not answer, as SQuAD 2.0 and MuSiQue have it."""
    answers = fields.get("answers")
    is_empty = isinstance(answers, dict) and answers.get("text") == answers.get("answer_start") == []
    return is_empty or fields.get("is_impossible") is True or fields.get("answerable") is False


def _shape_of(fields: Fields) -> Shape:
    if "context" in fields:
        return _flat
    if "question" not in fields:
        return _squad if "data" in fields else _quality if {"article", "questions"} <= fields.keys() else _flat
    if "paragraphs" in fields:
        return _musique
    return _narrativeqa if "document" in fields and isinstance(fields["question"], dict) else _flat


def _flat(fields: Fields, _refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    yield "", fields


def _squad(fields: Fields, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    for article_path, article in _objects(fields, "data", "", refuse):
        for path, paragraph in _objects(article, "paragraphs", article_path, refuse):
            try:
                context = text_of(paragraph, "context", empty="empty context")
            except BadRecord as bad:
                refuse(path, bad)
                continue
            for question_path, asked in _objects(paragraph, "qas", path, refuse):
                yield question_path, {**asked, "context": context}


def _quality(fields: Fields, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    try:
        context = text_of(fields, "article", empty="empty context")
    except BadRecord as bad:
        refuse("", bad)
        return
    for path, asked in _objects(fields, "questions", "", refuse):
        try:
            question, answer = _choice(asked)
        except BadRecord as bad:
            refuse(path, bad)
            continue
        yield path, {"id": asked.get("question_unique_id"), "context": context, "question": question, "answer": answer}


def _choice(asked: Fields) -> tuple[str, str]:
    """A question with its options below it, and the right one."""
    question = text_of(asked, "question", empty="empty question")
    options = [
        text_of({"options": option}, "options", empty="empty option").strip()
        for option in field_of(asked, "options", list, "list")
    ]
    label = field_of(asked, "gold_label", int, "integer")
    if not 1 <= label <= len(options):
        raise BadRecord("label out of range", f'the field "gold_label" ({label}) names none of {len(options)} options')
    return "\n".join([question.strip(), CHOICE, *(f"- {option}" for option in options)]), options[label - 1]


def _narrativeqa(fields: Fields, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    path = ""
    try:
        document, path = field_of(fields, "document", dict, "object"), "document"
        if document.get("text") is None:
            document, path = field_of(document, "summary", dict, "object"), "document.summary"
        context = text_of(document, "text", empty="empty context")
        path = "question"
        question = text_of(fields["question"], "text", empty="empty question")
    except BadRecord as bad:
        refuse(path, bad)
        return
    yield "", {**fields, "context": context, "question": question}


def _musique(fields: Fields, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    path, texts = "", []
    try:
        for number, paragraph in enumerate(field_of(fields, "paragraphs", list, "list")):
            path = f"paragraphs[{number}]"
            texts.append(_titled(object_of(paragraph, "item")))
    except BadRecord as bad:
        refuse(path, bad)
        return
    if not texts:
        refuse("", BadRecord("empty context", 'the field "paragraphs" is empty'))
        return
    yield "", {**fields, "context": GAP.join(texts), "answers": fields.get("answer_aliases")}


def _titled(paragraph: Fields) -> str:
    text = text_of(paragraph, "paragraph_text", empty="empty context").strip()
    return f"{text_of(paragraph, 'title', empty='empty title').strip()}\n{text}" if paragraph.get("title") else text


def _objects(fields: Fields, name: str, path: str, refuse: Refuse) -> Iterator[tuple[str, Fields]]:
    """The objects of a list, with their paths; what is none is refused."""
    try:
        items = field_of(fields, name, list, "list")
    except BadRecord as bad:
        refuse(path, bad)
        return
    for number, item in enumerate(items):
        inner = f"{path}.{name}[{number}]".removeprefix(".")
        try:
            found = object_of(item, "item")
        except BadRecord as bad:
            refuse(inner, bad)
            continue
        yield inner, found
