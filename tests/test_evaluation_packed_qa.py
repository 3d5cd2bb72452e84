"""Packed questions and reading back: what is asked about is there, once, within the length."""

import json
import re

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.answer_scores import SCORES
from activation_beacon.data.sources import ReadReport
from activation_beacon.errors import InputError
from activation_beacon.evaluation.packed_qa import Passage, packed_samples, read_passages
from activation_beacon.evaluation.reconstruction import CUE_WORDS, WORDS, reconstruction_samples
from activation_beacon.evaluation.samples import TooShort, answer_sample, asked_ids
from evaluation_models import OWN, STORY, beacon_model, byte_prompt, ids_of
from families import with_beacons

PROMPT = byte_prompt()
PASSAGES = [
    Passage(f"p{n}", f"Passage {n} says that {'x' * (20 + 7 * n)}.", ((f"What says {n}?", (f"x{n}",)),))
    for n in range(12)
]
LENGTH = 500


@pytest.fixture(scope="module")
def samples():
    return list(packed_samples(PROMPT, PASSAGES, LENGTH))


def used(sample):
    longest = max(len(PROMPT.question(each.text)) + each.max_new_tokens for each in sample.questions)
    return len(PROMPT.opening(sample.context)) + longest


def test_passages_of_one_id_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = {"context": f"The story of {name}.", "question": "Whose?", "answer": name}
        (tmp_path / name / "qa.jsonl").write_text(json.dumps(record) + "\n")
    passages = read_passages([tmp_path / "a", tmp_path / "b"])
    assert [(passage.id, passage.context) for passage in passages] == [
        ("qa.jsonl:1", "The story of a."),
        ("qa.jsonl:1#2", "The story of b."),
    ]


def test_every_passage_is_asked_about_once_and_stands_in_its_context(samples):
    assert sorted(sample.id for sample in samples) == sorted(passage.id for passage in PASSAGES)
    own = {passage.id: passage.context for passage in PASSAGES}
    assert all(sample.context.split("\n\n").count(own[sample.id]) == 1 for sample in samples)


def test_other_passages_fill_up_the_length(samples):
    for sample in samples:
        assert LENGTH - 130 < used(sample) <= LENGTH
        assert sample.facts["passages"] == len(sample.context.split("\n\n")) > 1


def test_passages_stand_at_all_places(samples):
    assert len({sample.facts["place"] for sample in samples}) > 3


def test_the_same_seed_gives_the_same_samples(samples):
    assert list(packed_samples(PROMPT, PASSAGES, LENGTH)) == samples
    assert [s.id for s in packed_samples(PROMPT, PASSAGES, LENGTH, seed=1)] != [s.id for s in samples]


def test_passages_that_do_not_fit_are_left_out():
    found = list(packed_samples(PROMPT, PASSAGES, 170))
    assert 0 < len(found) < len(PASSAGES)
    assert all(used(sample) <= 170 for sample in found)


@pytest.mark.parametrize(("answer", "score"), [("a lion", "token_f1"), ("word " * 30, "rouge_l")])
def test_long_answers_are_measured_as_summaries(answer, score):
    [sample] = packed_samples(PROMPT, [Passage("p", "Text.", (("Why?", (answer,)),))], 2000)
    assert sample.questions[0].score == score


def test_several_questions_are_asked_on_one_reading():
    pytest.importorskip("rouge_score")
    passage = Passage("p", "Text. " * 20, tuple((f"Why {n}?", ("x",)) for n in range(5)))
    [sample] = packed_samples(PROMPT, [passage], LENGTH)
    record = answer_sample(beacon_model(), PROMPT, sample, "beacons", ratio=4)
    assert len(record["scores"]) == 3
    assert record["is_conversation"] is False


# --- files -----------------------------------------------------------------------------------------------------------


def test_records_of_one_context_become_one_passage(tmp_path):
    rows = [
        {"id": "a", "context": "One.", "question": "Q1?", "answer": "A1"},
        {"id": "b", "context": "Two.", "question": "Q2?", "answer": "A2", "answers": ["A2", "A3"]},
        {"id": "c", "context": "One.", "question": "Q4?", "answer": "A4"},
        {"id": "d", "context": "", "question": "1+1?", "answer": "2"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_passages([path]) == [
        Passage("a", "One.", (("Q1?", ("A1",)), ("Q4?", ("A4",)))),
        Passage("b", "Two.", (("Q2?", ("A2", "A3")),)),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"context": "One.", "answer": "A"},
        {"context": "One.", "question": " ", "answer": "A"},
        {"context": "One.", "question": "Q?"},
        {"context": "One.", "question": "Q?", "answers": [1]},
        {"context": 1, "question": "Q?", "answer": "A"},
    ],
)
def test_records_that_are_no_questions_are_named(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, line 1: .* Mend or remove it"):
        read_passages([path])


def test_all_answers_of_a_published_set_are_accepted(tmp_path):
    asked = {"id": "s", "question": "Where?", "answers": [{"text": "Normandy"}, {"text": "France"}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "One.", "qas": [asked]}]}]}))
    [sample] = packed_samples(PROMPT, read_passages([path]), LENGTH)
    [question] = sample.questions
    assert [SCORES[question.score](answer, question.references) for answer in ("in Normandy", "France", "Spain")] == [
        pytest.approx(2 / 3), 1, 0
    ]  # fmt: skip


SKIPPED = [
    {"context": "One.", "question": "Q1?", "answer": "A1"},
    {"context": "One.", "answer": "A"},
    {"context": "One.", "question": "Q?", "answers": {"text": [], "answer_start": []}},
    {"id": "d", "context": "", "question": "1+1?", "answer": "2"},
]


def test_what_is_skipped_is_told_by_file_and_line(tmp_path, caplog):
    path, report = tmp_path / "q.jsonl", ReadReport()
    path.write_text("".join(json.dumps(row) + "\n" for row in SKIPPED))
    summary = (
        f"2 records read, 3 skipped: 1 missing field ({path}, line 2); 1 unanswerable ({path}, line 3); "
        "1 without context (d)."
    )
    assert len(read_passages([path], on_error="skip")) == 1
    assert caplog.messages == [f"Questions: {summary}"]
    read_passages([path], on_error="skip", report=report)
    assert report.summary() == summary
    assert len(caplog.messages) == 1


def test_nothing_is_told_where_nothing_was_skipped(tmp_path, caplog):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(SKIPPED[0]))
    read_passages([path], on_error="skip")
    assert caplog.messages == []


def test_nothing_to_ask_about_is_refused():
    with pytest.raises(InputError) as error:
        next(packed_samples(PROMPT, [], LENGTH))
    assert str(error.value) == (
        "There is no passage with a context to ask about. Give records with context, question and answer."
    )


def test_a_length_that_fits_no_passage_is_refused_with_the_least_one():
    for length in (1, 80):
        with pytest.raises(TooShort) as error:
            list(packed_samples(PROMPT, PASSAGES, length))
    least = error.value.least
    assert [sample.id for sample in packed_samples(PROMPT, PASSAGES, least)] == ["p0"]
    with pytest.raises(TooShort):
        next(packed_samples(PROMPT, PASSAGES, least - 1))


# --- reading back ----------------------------------------------------------------------------------------------------


def test_what_is_to_be_repeated_follows_the_cue():
    background = ids_of(" ".join(f"word{number}" for number in range(2000)))
    for sample in reconstruction_samples(PROMPT, background, 2000, count=5):
        [question] = sample.questions
        words = sample.context.split()
        cue = question.text.split('"')[1].split()
        start = words.index(cue[0])
        assert words[start : start + CUE_WORDS] == cue
        assert " ".join(words[start + CUE_WORDS : start + CUE_WORDS + WORDS]) == question.references[0]
        assert len(question.references[0].split()) == WORDS
        assert used(sample) <= 2000


@pytest.mark.parametrize(
    ("chunk_size", "local_tokens", "expected"),
    [
        (1024, 0, {"compressed", "raw tail", "both"}),
        (512, 500, {"compressed", "raw tail", "both"}),
        (944, 0, {"compressed"}),  # reading the question closes the last chunk of the context
    ],
)
def test_the_kind_says_where_the_passage_is_held_when_the_answer_begins(chunk_size, local_tokens, expected):
    config = BeaconConfig(chunk_size=chunk_size, ratios=(8,), local_tokens=local_tokens)
    model = with_beacons("llama", config, **OWN, max_position_embeddings=4096)
    background = ids_of(" ".join(f"word{number}" for number in range(2000)))
    kinds = set()
    for sample in reconstruction_samples(PROMPT, background, 2080, count=6, config=config):
        context, _, [asked] = asked_ids(PROMPT, sample)
        cache = model.compress(context, ratio=8)
        model(torch.tensor([asked]), past_key_values=cache)
        read, num_closed = [*context, *asked], len(context) + len(asked) - cache.tail_length
        [passage] = sample.questions[0].references
        is_in = {
            "compressed": passage in PROMPT.tokenizer.decode(read[:num_closed]),
            "raw tail": passage in PROMPT.tokenizer.decode(read[num_closed:]),
        }
        assert sample.facts["kind"] == next((kind for kind, found in is_in.items() if found), "both")
        kinds.add(sample.facts["kind"])
    assert kinds == expected


@pytest.mark.parametrize("length", [1, 300, 600])
def test_a_length_without_room_for_what_is_to_be_repeated_is_refused(length):
    background = ids_of(" ".join(f"word{number}" for number in range(2000)))
    with pytest.raises(TooShort) as error:
        list(reconstruction_samples(PROMPT, background, length, count=1))
    assert length < error.value.least < 900


def test_without_an_adapter_s_settings_nothing_is_said_of_where_the_passage_is_held():
    known = reconstruction_samples(PROMPT, ids_of(STORY), 1500, count=4, config=BeaconConfig(chunk_size=512))
    for one, other in zip(known, reconstruction_samples(PROMPT, ids_of(STORY), 1500, count=4), strict=True):
        assert {**other.facts, "kind": one.facts["kind"]} == one.facts
        assert (one.id, one.context, one.questions) == (other.id, other.context, other.questions)
        assert "kind" not in other.facts


def test_reading_back_differs_from_sample_to_sample():
    samples = list(reconstruction_samples(PROMPT, ids_of(STORY), 1500, count=4))
    assert len({sample.context for sample in samples}) == 4
    assert list(reconstruction_samples(PROMPT, ids_of(STORY), 1500, count=4)) == samples
