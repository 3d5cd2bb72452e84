"""Needles: hidden where they should be, asked without the compressor's knowledge, scored so that the harness can fail."""

import random
from pathlib import Path

import pytest

from activation_beacon.answer_scores import SCORES
from activation_beacon.errors import InputError
from activation_beacon.evaluation import samples as samples_module
from activation_beacon.evaluation.multi_turn import multi_turn_samples
from activation_beacon.evaluation.needles import DEPTHS, KINDS, make_needle, needle_samples, window
from activation_beacon.evaluation.results import Results
from activation_beacon.evaluation.samples import TooShort, answer_sample
from activation_beacon.evaluation.summary import lengths_of, select
from activation_beacon.evaluation.tasks import multi_turn
from activation_beacon.evaluation.tasks import needles as needles_task
from evaluation_models import STORY, beacon_model, byte_prompt, ids_of

PROMPT = byte_prompt()
BACKGROUND = ids_of(STORY)
LENGTH = 700


@pytest.fixture(scope="module")
def model():
    return beacon_model()


@pytest.fixture(scope="module")
def needles():
    return list(needle_samples(PROMPT, BACKGROUND, LENGTH))


@pytest.mark.parametrize("kind", [*KINDS, "passkey", "fact"])
def test_a_needle_says_what_is_asked_and_the_question_does_not(kind):
    for seed in range(200):
        needle = make_needle(kind, random.Random(seed))
        assert needle == make_needle(kind, random.Random(seed))
        assert not set("{}") & set(needle.statement + needle.question.text)
        [answer] = needle.question.references
        assert answer in needle.statement
        assert answer not in needle.question.text


def test_a_pass_key_is_asked_for_by_name_and_hidden_in_its_well_known_words(needles):
    [sample] = needle_samples(PROMPT, BACKGROUND, LENGTH, kinds=["passkey"], depths=1)
    [question] = sample.questions
    [key] = question.references
    assert len(key) == 5
    assert key.isdecimal()
    assert f"The pass key is {key}. Remember it. {key} is the pass key." in sample.context
    assert question.text == "What is the pass key?"
    assert sample.facts == {"kind": "passkey", "depth": 0.5}
    assert "passkey" not in {other.facts["kind"] for other in needles}


def test_there_is_one_needle_of_each_kind_at_each_depth(needles):
    places = [(s.facts["kind"], s.facts["depth"]) for s in needles]
    assert sorted(places) == sorted((kind, round(step / (DEPTHS - 1), 3)) for step in range(DEPTHS) for kind in KINDS)
    assert len({s.id for s in needles}) == len(needles)


def test_the_first_needles_are_of_all_kinds_and_of_depths_far_apart(needles):
    assert [s.facts["kind"] for s in needles[:3]] == list(KINDS)
    assert [s.facts["depth"] for s in needles[: 4 * len(KINDS) : len(KINDS)]] == [0.0, 0.333, 0.667, 1.0]


@pytest.mark.parametrize("depths", [1, 2, 5, 7, 14])
def test_any_number_of_depths_is_covered(depths):
    found = {s.facts["depth"] for s in needle_samples(PROMPT, BACKGROUND, LENGTH, depths=depths, kinds=["number"])}
    assert found == ({0.5} if depths == 1 else {round(step / (depths - 1), 3) for step in range(depths)})


def test_depths_may_be_named():
    samples = list(needle_samples(PROMPT, BACKGROUND, LENGTH, depths=(0.25, 1.0), kinds=["number"], repeats=2))
    assert [sample.facts["depth"] for sample in samples] == [0.25, 1.0, 0.25, 1.0]
    for sample in samples:
        [answer] = sample.questions[0].references
        assert sample.context.index(answer) / len(sample.context) == pytest.approx(sample.facts["depth"], abs=0.25)


def test_needles_stand_once_and_near_their_depth(needles):
    for sample in needles:
        [answer] = sample.questions[0].references
        assert sample.context.count(answer) == 1
        assert sample.context.index(answer) / len(sample.context) == pytest.approx(sample.facts["depth"], abs=0.25)


def test_text_question_and_answer_fill_the_length_and_no_more(needles):
    for sample in needles:
        [question] = sample.questions
        used = len(PROMPT.opening(sample.context)) + len(PROMPT.question(question.text)) + question.max_new_tokens
        assert LENGTH - 20 <= used <= LENGTH


def numbers(samples):
    return {s.questions[0].references for s in samples if s.facts["kind"] == "number"}


def test_the_same_seed_gives_the_same_needles_and_another_seed_others(needles):
    assert list(needle_samples(PROMPT, BACKGROUND, LENGTH)) == needles
    assert not numbers(needles) & numbers(needle_samples(PROMPT, BACKGROUND, LENGTH, seed=1))


def test_a_short_background_is_taken_up_again():
    assert window([1, 2, 3], 7, random.Random(0)) in (
        [1, 2, 3, 1, 2, 3, 1],
        [2, 3, 1, 2, 3, 1, 2],
        [3, 1, 2, 3, 1, 2, 3],
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_needle("haystack", random.Random(0)),
            "There is no needle of kind 'haystack'. Use some of sentence, number, uuid, passkey, fact.",
        ),
        (
            lambda: list(needle_samples(PROMPT, [], LENGTH)),
            "There is no background text to hide needles in. Give a file with some.",
        ),
    ],
)
def test_what_cannot_be_hidden_is_refused(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message


def too_short(make, length):
    with pytest.raises(TooShort) as error:
        list(make(length))
    return error.value


@pytest.mark.parametrize("kind", [*KINDS, "passkey", "fact"])
def test_a_length_without_room_for_any_text_is_refused_with_the_least_one(kind):
    error = too_short(lambda length: needle_samples(PROMPT, BACKGROUND, length, kinds=[kind], depths=1), 50)
    assert 50 < error.least < 400
    assert str(error) == (
        f"A length of 50 tokens has no room for template, question, answer and some text: this sample needs {error.least}. Use a "
        "longer length."
    )


def test_turns_without_room_are_refused():
    error = too_short(lambda length: multi_turn_samples(PROMPT, BACKGROUND, length, count=2), 400)
    assert 400 < error.least < 1200


# --- asking ----------------------------------------------------------------------------------------------------------


class Parrot:
    """A reader that forgets nothing: its answer is all that it has read."""

    cache_length = cache_bytes = seconds = 0

    def __init__(self, ids):
        self.ids = list(ids)
        self.asked = []

    def ask(self, ids, *, max_new_tokens):
        self.asked.append(PROMPT.tokenizer.decode(ids))
        return self.ids, self


@pytest.fixture
def parrots(monkeypatch):
    made = []

    def read(model, ids, method, *, ratio, opening):
        made.append(Parrot(ids))
        return made[-1]

    monkeypatch.setattr(samples_module, "read_context", read)
    return made


def test_a_perfect_reader_finds_every_needle_and_with_shuffled_contexts_none(needles, parrots):
    own = [answer_sample(None, PROMPT, sample, "full")["score"] for sample in needles]
    others = [
        answer_sample(None, PROMPT, sample, "shuffled", context=needles[index - 1].context)["score"]
        for index, sample in enumerate(needles)
    ]
    assert set(own) == {1.0}
    assert set(others) == {0.0}


@pytest.mark.parametrize("kind", [*KINDS, "passkey", "fact"])
def test_a_needle_counts_only_where_it_stands_whole(kind):
    for seed in range(50):
        question = make_needle(kind, random.Random(seed)).question
        [needle] = question.references
        score = SCORES[question.score]
        assert score(f"It is {needle.upper()}.", question.references) == 1.0
        assert score(f"It is {needle}, I think", question.references) == 1.0
        for wrong in (f"1{needle}", f"{needle}0", f"x{needle}", needle[:-1]):
            assert score(f"It is {wrong}.", question.references) == 0.0


def test_published_scores_are_what_the_stored_answers_get():
    published = Results(Path(__file__).parents[1] / "docs/results")
    for task in (
        needles_task(PROMPT, BACKGROUND),
        multi_turn(PROMPT, BACKGROUND),
    ):  # needles do not depend on the tokenizer
        assert published.run["tasks"][task.name]["settings"]["score"] == task.settings["score"]
        records = [record for record in published.of_task(task.name) if "answers" in record]
        assert records
        for length in lengths_of(records):
            questions = {sample.id: sample.questions for sample in task.samples(length)}
            for record in select(records, length=length):
                pairs = zip(record["answers"], questions[record["sample"]], strict=True)
                assert record["scores"] == [SCORES[each.score](answer, each.references) for answer, each in pairs]


def test_results_of_a_looser_score_are_not_mixed_in():
    tasks = (needles_task(PROMPT, BACKGROUND), multi_turn(PROMPT, BACKGROUND))
    assert {task.settings["score"] for task in tasks} == {"contains_whole"}
    for task in tasks:
        assert {each.score for each in next(task.samples(1200)).questions} == {"contains_whole"}


def test_the_question_is_not_read_with_the_context(needles, parrots):
    answer_sample(None, PROMPT, needles[0], "full")
    [parrot] = parrots
    assert needles[0].questions[0].text not in PROMPT.tokenizer.decode(parrot.ids)
    assert needles[0].questions[0].text in parrot.asked[0]


def test_three_turns_ask_for_three_needles_on_one_reading(parrots):
    samples = list(multi_turn_samples(PROMPT, BACKGROUND, 1200, count=4))
    for sample in samples:
        record = answer_sample(None, PROMPT, sample, "full")
        assert record["scores"] == [1.0, 1.0, 1.0]
        assert len(record["answer_seconds"]) == 3
    assert len(parrots) == 4
    assert all("<|assistant|>" in question for question in parrots[0].asked)
    assert [question.startswith("<|end|>") for question in parrots[0].asked] == [False, True, True]
    kinds = {tuple(len(question.references[0]) for question in sample.questions) for sample in samples}
    assert len(kinds) > 1


@pytest.mark.parametrize("method", ["full", "beacons"])
def test_a_record_holds_what_was_measured(model, needles, method):
    record = answer_sample(model, PROMPT, needles[0], method, ratio=4)
    ids = PROMPT.opening(needles[0].context)
    expected = len(ids) if method == "full" else model.compress(ids, ratio=4).cache_length
    assert record["cache_length"] == expected
    assert record["context_tokens"] == len(ids)
    assert record["score"] == 0.0
    assert (record["kind"], record["depth"]) == ("sentence", 0.0)
    assert len(record["answers"]) == 1
