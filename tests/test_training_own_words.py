"""Questions that the base has answered itself: made, answered, judged, and written whole."""

import json
import re
import sys

import pytest
import torch

from activation_beacon import BeaconConfig, attach
from activation_beacon.base_models import load_pretrained_base
from activation_beacon.books import read_demo_book
from activation_beacon.data.sources import Question
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.processes import Processes
from activation_beacon.training.needle_words import KINDS
from activation_beacon.training.own_words import (
    Asked,
    BaseAnswers,
    is_right,
    needle_questions,
    short_questions,
    write_own_words,
)
from activation_beacon.training.questions import read_groups
from launched import run_together
from saved_models import save_base
from training_texts import text_with

TEXTS = [text_with(number, 3000) for number in range(3)]


def asked_of(numbers) -> list[Asked]:
    return [Asked("questions", question(number)) for number in numbers]


def question(number: int, context: str = "The lion sleeps.", answer: str = "lion") -> Question:
    return Question(f"q{number}", f"{context} It is {number}.", f"Who sleeps, {number}?", answer, (answer,))


@pytest.fixture
def base(tmp_path):
    return load_pretrained_base(str(save_base(tmp_path / "base")))


# --- what is asked -----------------------------------------------------------------------------------------------------


def test_needles_stand_whole_in_short_passages_of_the_texts():
    made = needle_questions(TEXTS, 60, seed=3)
    assert made == needle_questions(TEXTS, 60, seed=3)
    assert made != needle_questions(TEXTS, 60, seed=4)
    assert made[:20] == needle_questions(TEXTS, 20, seed=3)
    assert len({each.question.id for each in made}) == 60
    assert {each.kind for each in made} == {f"needles: {kind}" for kind in KINDS}
    for _, each in made:
        assert each.answer in each.context
        assert each.answers == (each.answer,)
        assert 200 < len(each.context) < 2000
        assert "Sentence" in each.context
        assert each.context == each.context.strip()


def test_no_more_documents_are_read_than_are_needed():
    def endless():
        yield "short"
        while True:
            yield TEXTS[0]

    assert len(needle_questions(endless(), 3)) == 3
    assert needle_questions(endless(), 0) == []


def test_a_text_without_blanks_is_cut_all_the_same():
    ((_, made),) = needle_questions(["字" * 3000], 1, kinds=("number",))
    assert made.context.count("字") >= 300


@pytest.mark.parametrize(
    ("texts", "kinds", "error", "message"),
    [
        (TEXTS, ("sword",), ConfigError, "no needle of kind 'sword'"),
        (["too short"], ("word",), InputError, "No document has 2,000 characters"),
        ([], ("word",), InputError, "No document has 2,000 characters"),
    ],
)
def test_what_nothing_can_be_hidden_in_is_refused(texts, kinds, error, message):
    with pytest.raises(error, match=message):
        needle_questions(texts, 1, kinds=kinds)


def test_questions_on_long_passages_and_on_none_are_passed_over():
    given = [question(number, "word " * (10 * number)) for number in range(8)] + [
        Question("n", "", "Why?", "x", ("x",))
    ]
    found = short_questions(given, max_words=43)
    assert sorted(each.question.id for each in found) == ["q0", "q1", "q2", "q3", "q4"]
    assert short_questions(given, max_words=43, limit=2) == found[:2]
    assert short_questions(given, max_words=43, seed=1) != found


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The number is 7421903.", ["7421903"], True),
        ("The number is 742190.", ["7421903"], False),
        ("It is in the old mill", ["in the old mill by the river"], True),
        ("It is somewhere else entirely, far away", ["in the old mill by the river"], False),
        ("", ["lion"], False),
        ("I know nothing of it at all.", ["no"], False),
        ("It was finished in 1884.", ["18"], False),
        ('The password is "Dune-Jade-003."', ["dune-jade-003"], True),
        ("答えは東京です。", ["東京"], True),
    ],
)
def test_what_is_right(answer, references, expected):
    assert is_right(answer, references) is expected


def slow_answer(answers: BaseAnswers, asked: Question) -> str | None:
    """Token by token, alone, without a cache."""
    ids, made = answers.prompt_ids(asked), []
    for _ in range(answers.max_new_tokens):
        with torch.inference_mode():
            logits = answers.model(torch.tensor([ids + made]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in answers.ends:
            return answers.tokenizer.decode(made[:-1], skip_special_tokens=True).strip()
    return None


@pytest.mark.parametrize("has_beacons", [False, True])
def test_a_batch_gives_what_each_question_gives_alone(base, has_beacons):
    model, tokenizer = base
    asked = [question(number, "word " * (5 * number)) for number in range(5)]
    free = BaseAnswers(model, tokenizer, max_new_tokens=12)
    frequent = [slow_tokens(free, each)[4] for each in asked[:2]]
    model.generation_config.eos_token_id = frequent  # tokens that a random model does come to
    answers = BaseAnswers(model, tokenizer, max_new_tokens=12)
    expected = [slow_answer(answers, each) for each in asked]
    assert None not in expected[:2]
    if has_beacons:
        attach(model, BeaconConfig(chunk_size=16, ratios=(2, 4)))
    assert answers.batch(asked) == expected


def slow_tokens(answers: BaseAnswers, asked: Question) -> list[int]:
    ids = answers.prompt_ids(asked)
    start = len(ids)
    for _ in range(answers.max_new_tokens):
        with torch.inference_mode():
            ids = [*ids, int(answers.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[start:]


def test_a_model_without_an_end_of_answers_is_refused(base):
    model, tokenizer = base
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="which token ends an answer"):
        BaseAnswers(model, tokenizer)


# --- the file ----------------------------------------------------------------------------------------------------------


class Replies(BaseAnswers):
    """Answers by rule, and a note of what was asked; cut after so many batches."""

    def __init__(self, base, *, after: int = 1000, **settings):
        super().__init__(*base, batch_size=4, **settings)
        self.after, self.asked = after, []

    def batch(self, questions):
        if not self.after:
            raise KeyboardInterrupt
        self.after -= 1
        self.asked += [each.id for each in questions]
        return [self.reply(int(each.id[1:])) for each in questions]

    @staticmethod
    def reply(number: int) -> str | None:
        return (f"The lion does, number {number}.", "A tiger.", None)[number % 3]


def test_right_answers_are_written_and_can_be_trained_on(base, tmp_path):
    target, shown = tmp_path / "own.jsonl", []
    asked = asked_of(range(30))
    counts = write_own_words(Replies(base), asked, target, progress=lambda *line: shown.append(line))
    assert (counts.asked, counts.kept, counts.wrong, counts.unended, counts.too_long) == (30, 10, 10, 10, 0)
    assert counts.kinds == {"questions": (30, 10)}
    assert shown[0][:2] == (0, 30)
    assert shown[-1][:2] == (30, 30)
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["id"] for record in records] == [f"q{number}" for number in range(0, 30, 3)]
    assert records[1]["answers"] == ["The lion does, number 3.", "lion"]
    groups = read_groups(str(target))
    assert [turn.answer for group in groups for turn in group.questions] == [record["answer"] for record in records]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "own.jsonl"]


def test_kinds_of_needles_are_counted_apart(base, tmp_path):
    class Right(Replies):
        def batch(self, questions):
            return [f"It is {each.answer}." for each in questions]

    asked = needle_questions(TEXTS, 20, kinds=("number", "fact"))
    base[0].config.max_position_embeddings = 4000  # a token for each letter
    counts = write_own_words(Right(base), asked, tmp_path / "own.jsonl")
    assert counts.kept == 20
    assert set(counts.kinds) == {"needles: number", "needles: fact"}
    assert counts.to_dict()["kinds"]["needles: fact"] == list(counts.kinds["needles: fact"])


def test_what_was_cut_goes_on_where_it_stood(base, tmp_path):
    asked = asked_of(range(30))
    write_own_words(Replies(base), asked, tmp_path / "whole.jsonl")
    cut, rest = Replies(base, after=3), Replies(base)
    with pytest.raises(KeyboardInterrupt):
        write_own_words(cut, asked, tmp_path / "own.jsonl")
    assert not (tmp_path / "own.jsonl").exists()
    write_own_words(rest, asked, tmp_path / "own.jsonl")
    assert len(cut.asked) == 12
    assert sorted(cut.asked + rest.asked) == sorted(each.question.id for each in asked)
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_parts_of_other_questions_are_not_gone_on_with(base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_own_words(Replies(base, after=1), asked_of(range(30)), tmp_path / "own.jsonl")
    others = asked_of(range(1, 31))
    for answers, asked in (
        (Replies(base), others),
        (Replies(base, max_new_tokens=9), asked_of(range(30))),
    ):
        with pytest.raises(
            ConfigError, match=r"own.jsonl.part-0 was begun with other questions or settings. Remove it"
        ):
            write_own_words(answers, asked, tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([], "no questions to answer"), ([1, 2, 4], r"none of 3 questions rightly \(1 answers did not end\)")],
)
def test_nothing_to_write_is_said(base, tmp_path, numbers, message):
    with pytest.raises(InputError, match=message):
        write_own_words(Replies(base), asked_of(numbers), tmp_path / "own.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_the_base_has_no_positions_for_is_not_asked(base, tmp_path):
    answers = Replies(base)
    asked = asked_of([0, 3])
    answers.model.config.max_position_embeddings = len(answers.prompt_ids(asked[0].question)) + answers.max_new_tokens
    long = Asked("questions", question(6, "The lion sleeps and sleeps."))
    counts = write_own_words(answers, [long, *asked], tmp_path / "own.jsonl")
    assert (counts.asked, counts.kept, counts.too_long) == (2, 2, 1)
    assert sorted(answers.asked) == ["q0", "q3"]
    with pytest.raises(InputError, match=r"\(1 do not fit the base's positions\)"):
        write_own_words(answers, [long], tmp_path / "none.jsonl")


def test_what_another_number_of_processes_left_is_used(base, tmp_path):
    asked = asked_of(range(30))
    write_own_words(Replies(base), asked, tmp_path / "whole.jsonl")

    class Second(Processes):
        def barrier(self):
            """The other one is gone."""

    second, rest = Replies(base, after=2), Replies(base)
    with pytest.raises(KeyboardInterrupt):
        write_own_words(second, asked, tmp_path / "own.jsonl", group=Second(1, 2, 1))
    assert second.asked
    assert all(int(name[1:]) % 2 for name in second.asked)
    write_own_words(rest, asked, tmp_path / "own.jsonl")
    assert not set(second.asked) & set(rest.asked)
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from activation_beacon.base_models import load_pretrained_base
from activation_beacon.books import read_demo_book
from activation_beacon.processes import processes
from activation_beacon.training.needle_words import KINDS
from activation_beacon.training.own_words import write_own_words
from test_training_own_words import Replies, asked_of

with processes() as group:
    replies = Replies(load_pretrained_base(sys.argv[1]))
    write_own_words(replies, asked_of(range(30)), Path(sys.argv[2]), group=group)
    assert len(replies.asked) == 15
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does(base, tmp_path):
    write_own_words(Replies(base), asked_of(range(30)), tmp_path / "whole.jsonl")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "base"), str(tmp_path / "own.jsonl")]
    ended = run_together(2, command)
    assert [status for status, _ in ended] == [0, 0], "\n".join(output for _, output in ended)
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.default_model
@pytest.mark.slow
def test_the_default_model_answers_short_passages_in_its_own_words(tmp_path):
    asked = needle_questions([read_demo_book()], 4, kinds=("number",))
    answers = BaseAnswers(*load_pretrained_base("default"), batch_size=4)
    counts = write_own_words(answers, asked, tmp_path / "own.jsonl")
    assert counts.kept >= 1
    for line in (tmp_path / "own.jsonl").read_text(encoding="utf-8").splitlines():
        own, value = json.loads(line)["answers"]
        assert re.fullmatch(r"\d{7}", value)
        assert value in own
        assert len(own) > len(value) + 10  # a sentence, where question sets have the number alone
