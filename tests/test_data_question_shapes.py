"""Question sets as they are published are read as they are; what is broken in them is named by its path in the record."""

import gzip
import json
from pathlib import Path

import pytest

from activation_beacon.answer_scores import SCORES
from activation_beacon.data.question_shapes import flat_questions
from activation_beacon.data.sources import Question, ReadReport, questions
from activation_beacon.errors import InputError

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": "The Normans came from Normandy.",
                    "qas": [
                        {
                            "id": "s1",
                            "question": "Where from?",
                            "answers": [
                                {"text": "Normandy", "answer_start": 22},
                                {"text": "from Normandy", "answer_start": 17},
                                {"text": "Normandy", "answer_start": 22},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "s2",
                            "question": "When?",
                            "answers": [],
                            "plausible_answers": [{"text": "Normandy", "answer_start": 22}],
                            "is_impossible": True,
                        },
                    ],
                },
                {
                    "context": "Rollo led them.",
                    "qas": [{"id": "s3", "question": "Who?", "answers": [{"text": "Rollo", "answer_start": 0}]}],
                },
            ],
        },
        {"title": "Nothing", "paragraphs": []},
    ],
}
SQUAD_ON_HUB = {
    "id": "s1",
    "title": "Normans",
    "context": "The Normans came from Normandy.",
    "question": "Where from?",
    "answers": {"text": ["Normandy", "from Normandy"], "answer_start": [22, 17]},
}
QUALITY = {
    "article_id": "52845",
    "set_unique_id": "52845_75VB",
    "title": "The Lion",
    "article": "A lion slept under a tree.",
    "questions": [
        {
            "question": "Where did it sleep? ",
            "question_unique_id": "52845_75VB_1",
            "options": ["In a cave", "Under a tree", "On a roof", "At sea"],
            "writer_label": 1,
            "gold_label": 2,
            "validation": [{"untimed_annotator_id": "0001", "untimed_answer": 2}],
            "difficult": 0,
        },
        {"question": "Who slept?", "options": ["A lion", "A tree"], "gold_label": 1},
    ],
}
NARRATIVEQA = {
    "document": {
        "id": "23jncj",
        "kind": "movie",
        "summary": {"text": "Mark finds love.", "tokens": ["Mark"], "title": "Mark (film)"},
        "text": "MOVIE screenplay by Mark.",
    },
    "question": {"text": "Who wrote it?", "tokens": ["Who"]},
    "answers": [{"text": "Mark", "tokens": ["Mark"]}, {"text": "It was Mark", "tokens": ["It"]}],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Green", "paragraph_text": "Steve played Green. ", "is_supporting": True},
        {"idx": 1, "title": "Steve", "paragraph_text": "Steve married Miquette.", "is_supporting": True},
    ],
    "question": "Who married the Green performer?",
    "question_decomposition": [{"id": 1, "question": "Green >> performer", "answer": "Steve"}],
    "answer": "Miquette",
    "answer_aliases": ["Miquette Giraudy"],
    "answerable": True,
}
WHERE = "Where did it sleep?\nAnswer with one of these:\n- In a cave\n- Under a tree\n- On a roof\n- At sea"
WHO = "Who slept?\nAnswer with one of these:\n- A lion\n- A tree"
NORMANDY = ("The Normans came from Normandy.", "Where from?", "Normandy", ("Normandy", "from Normandy"))
MARK = ("Who wrote it?", "Mark", ("Mark", "It was Mark"))
GREEN = (
    "Green\nSteve played Green.\n\nSteve\nSteve married Miquette.",
    "Who married the Green performer?",
    "Miquette",
    ("Miquette", "Miquette Giraudy"),
)


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def put(folder: Path, name: str, *rows) -> Path:
    path = folder / name
    text = "".join(json.dumps(row, indent=2 if ".jsonl" not in name else None) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


PUBLISHED = [
    ("a.json", SQUAD, [Question("s1", *NORMANDY), Question("s3", "Rollo led them.", "Who?", "Rollo", ("Rollo",))]),
    ("a.json.gz", SQUAD, [Question("s1", *NORMANDY), Question("s3", "Rollo led them.", "Who?", "Rollo", ("Rollo",))]),
    ("a.jsonl", SQUAD_ON_HUB, [Question("s1", *NORMANDY)]),
    (
        "a.jsonl",
        QUALITY,
        [
            Question("52845_75VB_1", "A lion slept under a tree.", WHERE, "Under a tree", ("Under a tree",)),
            Question("a.jsonl:1#questions[1]", "A lion slept under a tree.", WHO, "A lion", ("A lion",)),
        ],
    ),
    ("a.jsonl", NARRATIVEQA, [Question("a.jsonl:1", "MOVIE screenplay by Mark.", *MARK)]),
    (
        "a.jsonl",
        {**NARRATIVEQA, "document": without(NARRATIVEQA["document"], "text")},
        [Question("a.jsonl:1", "Mark finds love.", *MARK)],
    ),
    ("a.jsonl", MUSIQUE, [Question("2hop__1_2", *GREEN)]),
    (
        "a.jsonl",
        {**without(MUSIQUE, "answer_aliases", "answerable")},
        [Question("2hop__1_2", *GREEN[:3], GREEN[3][:1])],
    ),
]


@pytest.mark.parametrize(("name", "record", "expected"), PUBLISHED)
def test_a_published_record_is_known_by_its_fields(tmp_path, name, record, expected):
    report = ReadReport()
    assert list(questions(put(tmp_path, name, record), on_error="stop", report=report)) == expected
    assert report.records == len(expected)


@pytest.mark.parametrize("record", [SQUAD_ON_HUB, QUALITY, NARRATIVEQA, MUSIQUE])
def test_a_row_of_parquet_reads_as_the_line_does(tmp_path, record):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    from_rows = list(questions(tmp_path / "a.parquet", on_error="stop"))
    from_lines = list(questions(put(tmp_path, "a.jsonl", record), on_error="stop"))
    assert [without(vars(each), "id") for each in from_rows] == [without(vars(each), "id") for each in from_lines]


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "q", "answer": "a", "document": "a title", "article": "x", "data": []},
        {"context": "c", "question": "q", "answer": "a", "paragraphs": 3, "questions": ["x"]},
        {"context": "c", "question": {"text": "q"}, "document": {"text": "d"}},
        {},
    ],
)
def test_other_records_are_left_as_they_are(fields):
    assert list(flat_questions(fields, pytest.fail)) == [("", fields)]


@pytest.mark.parametrize(
    ("name", "record", "path"),
    [
        ("a.json", SQUAD, ", data[0].paragraphs[0].qas[1]"),
        ("a.jsonl", {**SQUAD_ON_HUB, "answers": {"text": [], "answer_start": []}}, ""),
        ("a.jsonl", {**MUSIQUE, "answerable": False}, ""),
    ],
)
def test_a_question_that_is_unanswerable_is_left_out_and_counted_and_never_stops(tmp_path, name, record, path):
    file, report = put(tmp_path, name, record), ReadReport()
    found = list(questions(file, on_error="stop", report=report))
    assert all(question.id != "s2" for question in found)
    assert report.skipped == {"unanswerable": 1}
    assert report.places == {"unanswerable": [f"{file}, line 1{path}"]}


@pytest.mark.parametrize(
    ("name", "record", "exclude", "left"),
    [
        ("a.json", SQUAD, "s1", ["s3"]),
        ("a.jsonl", QUALITY, "52845_75VB_1", ["a.jsonl:1#questions[1]"]),
        ("a.jsonl", QUALITY, "a.jsonl:1", ["52845_75VB_1"]),
        ("a.jsonl", MUSIQUE, "2hop__1_2", []),
    ],
)
def test_questions_are_excluded_one_by_one(tmp_path, name, record, exclude, left):
    assert [question.id for question in questions(put(tmp_path, name, record), exclude=[exclude])] == left


def test_the_right_option_scores_full_marks_and_no_other_does():
    [question, _] = [fields for _, fields in flat_questions(QUALITY, pytest.fail)]
    options = QUALITY["questions"][0]["options"]
    scores = [SCORES["token_f1"](f"{option}.", [question["answer"]]) for option in options]
    assert scores.index(1.0) == QUALITY["questions"][0]["gold_label"] - 1
    assert scores.count(1.0) == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def squad(article=None, paragraph=None, asked=None):
    """SQuAD's file of one question; each argument replaces what stands at its level."""
    asked = {"id": "x", "question": "q", "answers": [{"text": "a", "answer_start": 0}]} if asked is None else asked
    paragraph = {"context": "c", "qas": [asked]} if paragraph is None else paragraph
    return {"data": [{"paragraphs": [paragraph]} if article is None else article]}


def quality(**changed):
    return {"article": "c", "questions": [{"question": "q", "options": ["a", "b"], "gold_label": 1, **changed}]}


def musique(*paragraphs):
    return {**MUSIQUE, "paragraphs": list(paragraphs)}


def narrativeqa(**changed):
    return {**NARRATIVEQA, "document": {**NARRATIVEQA["document"], **changed}}


BAD_RECORDS = [
    ({"data": "x"}, "", "wrong type", 'the field "data" is no list but a str'),
    ({"data": ["x"]}, "data[0]", "no object", "the item is JSON but no object with fields (a str)"),
    (squad(article={"title": "t"}), "data[0]", "missing field", 'there is no field "paragraphs" (fields: title)'),
    (squad(paragraph={"qas": []}), "data[0].paragraphs[0]", "missing field", 'there is no field "context"'),
    (squad(paragraph={"context": " ", "qas": []}), "data[0].paragraphs[0]", "empty context", "the field"),
    (squad(paragraph={"context": "c"}), "data[0].paragraphs[0]", "missing field", 'there is no field "qas"'),
    (squad(asked=3), "data[0].paragraphs[0].qas[0]", "no object", "the item is JSON but no object"),
    (squad(asked={"answers": []}), "data[0].paragraphs[0].qas[0]", "missing field", 'there is no field "question"'),
    (
        squad(asked={"question": "q", "answers": [], "is_impossible": False}),
        "data[0].paragraphs[0].qas[0]",
        "missing field",
        'there is no field "answer" (fields: question, answers, is_impossible, context)',
    ),
    (
        squad(asked={"question": "q", "answers": [{"answer_start": 3}]}),
        "data[0].paragraphs[0].qas[0]",
        "missing field",
        'there is no field "text" (fields: answer_start)',
    ),
    ({"article": "", "questions": []}, "", "empty context", 'the field "article" is empty'),
    ({"article": "c", "questions": {}}, "", "wrong type", 'the field "questions" is no list but a dict'),
    (quality(question=""), "questions[0]", "empty question", 'the field "question" is empty'),
    (quality(options="ab"), "questions[0]", "wrong type", 'the field "options" is no list but a str'),
    (quality(options=["a", 2]), "questions[0]", "wrong type", 'the field "options" is no text but a int'),
    (quality(options=["a", ""]), "questions[0]", "empty option", 'the field "options" is empty'),
    (quality(gold_label="1"), "questions[0]", "wrong type", 'the field "gold_label" is no integer but a str'),
    (quality(gold_label=0), "questions[0]", "label out of range", 'the field "gold_label" (0) names none of 2 options'),
    (quality(gold_label=3), "questions[0]", "label out of range", 'the field "gold_label" (3) names none of 2 options'),
    (
        {"article": "c", "questions": [{"question": "q", "options": ["a"]}]},
        "questions[0]",
        "missing field",
        'there is no field "gold_label" (fields: question, options)',
    ),
    ({**NARRATIVEQA, "document": "x"}, "", "wrong type", 'the field "document" is no object but a str'),
    (narrativeqa(text=""), "document", "empty context", 'the field "text" is empty'),
    (narrativeqa(text=None, summary=None), "document", "wrong type", 'the field "summary" is no object'),
    (narrativeqa(text=None, summary={}), "document.summary", "missing field", 'there is no field "text"'),
    ({**NARRATIVEQA, "question": {"text": " "}}, "question", "empty question", 'the field "text" is empty'),
    ({**NARRATIVEQA, "answers": [{"text": ""}]}, "", "empty answer", 'the field "text" is empty'),
    ({**NARRATIVEQA, "answers": []}, "", "missing field", 'there is no field "answer"'),
    ({**MUSIQUE, "paragraphs": "x"}, "", "wrong type", 'the field "paragraphs" is no list but a str'),
    (musique(), "", "empty context", 'the field "paragraphs" is empty'),
    (musique({"paragraph_text": "x"}, "y"), "paragraphs[1]", "no object", "the item is JSON but no object"),
    (musique({"title": "t"}), "paragraphs[0]", "missing field", 'there is no field "paragraph_text" (fields: title)'),
    (musique({"title": 3, "paragraph_text": "x"}), "paragraphs[0]", "wrong type", 'the field "title" is no text'),
    (without(MUSIQUE, "answer", "answer_aliases"), "", "missing field", 'there is no field "answer"'),
    ({**MUSIQUE, "answer_aliases": [3]}, "", "wrong type", 'the field "answers" is no text but a int'),
]


@pytest.mark.parametrize(("record", "path", "why", "message"), BAD_RECORDS)
def test_a_bad_part_is_skipped_and_counted_or_stops_the_reading(tmp_path, record, path, why, message):
    file, report = put(tmp_path, "a.jsonl", MUSIQUE, record, MUSIQUE), ReadReport()
    place = f"{file}, line 2" + (f", {path}" if path else "")
    assert [question.id for question in questions(file, report=report)] == ["2hop__1_2", "2hop__1_2"]
    assert report.summary() == f"2 records read, 1 skipped: 1 {why} ({place})."
    with pytest.raises(InputError) as caught:
        list(questions(file, on_error="stop"))
    assert str(caught.value).startswith(f"{place}: {message}")


@pytest.mark.parametrize(
    ("record", "left"),
    [
        ({"data": [3, {"paragraphs": 3}, *SQUAD["data"]]}, ["s1", "s3"]),
        ({**QUALITY, "questions": [{}, *QUALITY["questions"]]}, ["52845_75VB_1", "a.jsonl:1#questions[2]"]),
    ],
)
def test_what_follows_a_bad_part_is_read(tmp_path, record, left):
    assert [question.id for question in questions(put(tmp_path, "a.jsonl", record))] == left
