"""Packed questions: whole passages in random order, answers that belong to them, every question asked."""

import collections
import itertools
import json
import re

import pytest
import torch

from activation_beacon.data.sources import ReadReport
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.training.conversations import Turn
from activation_beacon.training.questions import PackedQuestions, QuestionGroup, digest_of, read_groups, without
from training_texts import MARKED, UNMARKED, answers_of, letter_tokenizer, num_chunks, text_of

CHUNK, LENGTH = 128, 1024


def group_of(number: int, *, size: int = 60, num_questions: int = 1) -> QuestionGroup:
    """A passage that says its number, and questions that name it."""
    context = f"Passage {number} begins. " + f"word{number} " * (size // 8) + f"End of {number}."
    turns = [Turn(f"What is {place} of {number}?", f"({number}.{place})") for place in range(num_questions)]
    return QuestionGroup(context, tuple(turns))


GROUPS = [group_of(number, size=40 + 13 * number, num_questions=1 + 5 * number % 11) for number in range(20)]
FILLERS = [QuestionGroup(group_of(100 + number).context, ()) for number in range(20)]


def packed(groups=GROUPS, *, seed=0, template=MARKED, **settings) -> PackedQuestions:
    settings = {"length": LENGTH, "chunk_size": CHUNK, **settings}
    return PackedQuestions(groups, letter_tokenizer(template), seed=seed, **settings)


def parts_of(sample) -> tuple[list[str], list[tuple[str, str]]]:
    """Passages, and questions with their answers."""
    opening, *rest = text_of(sample.ids.tolist()).removeprefix("<|user|>").split("<|bot|>")
    *passages, question = opening.removesuffix("<|end|>\n").split("\n\n")
    turns = []
    for text in rest:
        answer, _, following = text.partition("<|end|>")
        turns.append((question, answer))
        question = following.removeprefix("\n<|user|>").removesuffix("<|end|>\n")
    return passages, turns


def asked_in(sampler, epoch=0) -> list[list[tuple[str, str]]]:
    size = len(sampler)
    return [parts_of(sampler.sample(index))[1] for index in range(epoch * size, (epoch + 1) * size)]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, None])
def test_a_sample_fits_the_length_and_has_more_than_two_chunks(template):
    sampler = packed(template=template)
    for index in range(2 * len(sampler)):
        assert 2 * CHUNK < len(sampler.sample(index).ids) <= LENGTH


def test_passages_with_special_tokens_in_them_are_counted_as_they_are_written():
    """As letters, of which there are many more."""
    groups = [
        QuestionGroup(group.context.replace("word", "<|end|>"), group.questions)
        for group in (group_of(number, size=80) for number in range(20))
    ]
    sampler = packed(groups)
    for index in range(2 * len(sampler)):
        assert len(sampler.sample(index).ids) <= LENGTH


def test_passages_are_whole_and_each_question_is_on_one_of_them():
    sampler, contexts = packed(), {group.context for group in GROUPS}
    for index in range(2 * len(sampler)):
        sample = sampler.sample(index)
        passages, turns = parts_of(sample)
        assert set(passages) <= contexts
        assert len(passages) == len(set(passages)) > 1
        assert 1 <= len(turns) <= 4
        assert answers_of(sample) == [f"{answer}<|end|>" for _, answer in turns]
        for question, answer in turns:
            place, number = re.fullmatch(r".*What is (\d+) of (\d+)\?", question).groups()
            assert answer == f"({number}.{place})"
            assert any(passage.startswith(f"Passage {number} begins") for passage in passages)


def test_samples_are_full_or_of_a_length_that_neighbours_share():
    groups = [QuestionGroup(group_of(number).context, (Turn("Which?", "I."),)) for number in range(200)]
    sampler = packed(groups, length=8 * 4 * CHUNK, chunk_size=4 * CHUNK)
    blocks = [[num_chunks(sampler.sample(64 * block + n), 4 * CHUNK) for n in range(0, 64, 9)] for block in range(60)]
    common = [collections.Counter(lengths).most_common(1)[0] for lengths in blocks]
    assert sum(count for _, count in common) > 0.9 * sum(map(len, blocks))
    lengths = collections.Counter(length for length, _ in common)
    assert lengths.keys() == {3, 4, 5, 6, 7, 8}
    assert 20 < lengths[8] < 50


def test_an_epoch_asks_every_question_of_a_context_once_in_turns_of_one_to_four():
    sampler = packed([group_of(7, num_questions=37), *FILLERS])
    orders = []
    for epoch in range(3):
        asked = asked_in(sampler, epoch)
        answers = [answer for turns in asked for _, answer in turns]
        assert sorted(answers) == sorted(f"(7.{place})" for place in range(37))
        assert {len(turns) for turns in asked} <= {1, 2, 3, 4}
        assert len(asked) == 15
        orders.append(answers)
    assert len({tuple(order) for order in orders}) == 3


def test_an_epoch_asks_every_question_and_further_ones_join_in():
    asked = asked_in(packed())
    answers = [answer for turns in asked for _, answer in turns]
    assert set(answers) == {turn.answer for group in GROUPS for turn in group.questions}
    several = [turns for turns in asked if len({re.findall(r"of (\d+)\?", question)[0] for question, _ in turns}) > 1]
    assert len(several) > len(asked) / 4


def test_the_passage_asked_about_stands_anywhere():
    sampler = packed([GROUPS[5], *FILLERS])
    depths = []
    for index in range(60):
        passages, _ = parts_of(sampler.sample(index))
        depths.append(passages.index(GROUPS[5].context) / (len(passages) - 1))
    assert min(depths) == 0
    assert max(depths) == 1
    assert 0.3 < sum(depths) / len(depths) < 0.7


def test_a_question_that_fits_several_contexts_names_its_own():
    groups = [
        QuestionGroup(group_of(number).context, (Turn("Summarise it.", f"S{number}"), Turn(f"Who is {number}?", "I")))
        for number in range(30)
    ]
    referred = collections.Counter()
    for question, answer in itertools.chain(*asked_in(packed(groups))):
        if answer == "I":
            referred[question.startswith("About")] += 1
            continue
        number = answer.removeprefix("S")
        words = " ".join(
            f"Passage {number} begins. word{number} word{number} word{number} word{number} word{number}".split()
        )
        assert question == f'About the passage that begins "{words}": Summarise it.'
    assert 0.1 < referred[True] / referred.total() < 0.4


def test_a_sample_is_a_function_of_seed_and_index_alone():
    indices = list(range(0, 2 * len(packed()), 3))
    unbroken = packed()
    samples = [unbroken.sample(index) for index in indices]
    resumed = packed()
    for index, sample in reversed(list(zip(indices, samples, strict=True))):
        assert torch.equal(resumed.sample(index).ids, sample.ids)
        assert torch.equal(resumed.sample(index).is_target, sample.is_target)
    other = packed(seed=1)
    assert any(
        other.sample(index).ids.tolist() != sample.ids.tolist() for index, sample in zip(indices, samples, strict=True)
    )


def test_questions_without_context_stand_behind_others_contexts_up_to_their_share():
    alone = [QuestionGroup("", (Turn(f"{number} plus 1?", f"{number + 1}!"),)) for number in range(50)]
    sampler = packed([*GROUPS, *alone], standalone_share=0.2)
    seen = set()
    for epoch in range(6):
        kinds = collections.Counter()
        for index in range(epoch * len(sampler), (epoch + 1) * len(sampler)):
            sample = sampler.sample(index)
            passages, turns = parts_of(sample)
            sums = {answer for _, answer in turns if answer.endswith("!")}
            assert len(sample.ids) > 2 * CHUNK
            assert set(passages) <= {group.context for group in GROUPS}
            kinds[bool(sums)] += 1
            seen |= sums
        assert kinds[True] / kinds.total() == pytest.approx(0.2, abs=0.02)
    assert seen == {turn.answer for group in alone for turn in group.questions}
    none = packed([*GROUPS, *alone], standalone_share=0)
    assert not [answer for turns in asked_in(none) for _, answer in turns if answer.endswith("!")]


def test_contexts_that_are_too_long_are_left_out_and_counted():
    long = group_of(99, size=2000, num_questions=6)
    sampler = packed([*GROUPS, long])
    assert sampler.left_out == 6
    assert len(sampler) == len(packed())
    assert not any("Passage 99" in text_of(sampler.sample(index).ids.tolist()) for index in range(len(sampler)))


def test_a_context_of_nearly_the_whole_length_is_asked_about_alone():
    sampler = packed([group_of(1, size=LENGTH - 200, num_questions=9), *FILLERS])
    assert sampler.left_out == 0
    for index in range(len(sampler)):
        passages, turns = parts_of(sampler.sample(index))
        assert any(passage.startswith("Passage 1 begins") for passage in passages)
        assert turns
        assert len(sampler.sample(index).ids) <= LENGTH


@pytest.mark.parametrize(
    ("groups", "counts"),
    [
        ([], "0 contexts of 0 tokens together and 0 of 0 questions are left."),
        ([QuestionGroup("", (Turn("q", "a"),))], "0 contexts of 0 tokens together and 0 of 1 questions are left."),
        (FILLERS, "20 contexts of 1,800 tokens together and 0 of 0 questions are left."),
        ([group_of(1)], "1 contexts of 72 tokens together and 1 of 1 questions are left."),
        ([group_of(1, size=3000)], "0 contexts of 0 tokens together and 0 of 1 questions are left."),
    ],
)
def test_too_few_contexts_are_refused(groups, counts):
    with pytest.raises(InputError) as caught:
        packed(groups)
    assert str(caught.value) == (
        "Questions need contexts of 256 tokens or more together (two chunks), each with its question within 1,024; "
        f"{counts} Name more, or raise the length."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"standalone_share": 1}, "standalone_share must be at least 0 and below 1; got 1."),
        ({"standalone_share": -0.1}, "standalone_share must be at least 0 and below 1; got -0.1."),
        ({"length": 200}, "Use 256, or another chunk_size."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        packed(**settings)
    assert str(caught.value).endswith(message)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_neighbours_with_one_context_are_a_group_and_questions_without_context_stand_alone(tmp_path):
    rows = [
        ("c1", "q1"),
        ("c1 ", "q2"),
        ("c1 ", " q3 "),
        ("c1 ", "q2"),
        ("", "q1"),
        ("", "q4"),
        ("c2", "q1"),
        ("c1", "q5"),
    ]
    lines = [
        {"context": context, "question": question, "answer": f"{n} "} for n, (context, question) in enumerate(rows)
    ]
    path, report = tmp_path / "a.jsonl", ReadReport()
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question": "no answer"}]))
    assert read_groups(path, report=report) == [
        QuestionGroup("c1", (Turn("q1", "0"),)),
        QuestionGroup("c1", (Turn("q2", "1"), Turn("q3", "2"))),
        QuestionGroup("", (Turn("q1", "4"),)),
        QuestionGroup("", (Turn("q4", "5"),)),
        QuestionGroup("c2", (Turn("q1", "6"),)),
        QuestionGroup("c1", (Turn("q5", "7"),)),
    ]
    assert report.summary() == f"8 records read, 1 skipped: 1 missing field ({path}, line 9)."
    with pytest.raises(InputError, match='line 9: there is no field "answer"'):
        read_groups(path, on_error="stop")


def test_questions_that_are_asked_elsewhere_on_the_same_context_are_left_out():
    groups = [
        QuestionGroup("c1", (Turn("q1", "a1"), Turn("q2", "a2"))),
        QuestionGroup("c2", (Turn("q1", "a1"),)),
        QuestionGroup("", (Turn("q1", "a1"),)),
    ]
    others = [QuestionGroup("c1", (Turn("q1", "another"),)), QuestionGroup("", (Turn("q1", "a1"), Turn("q2", "a2")))]
    assert without(groups, others) == [QuestionGroup("c1", (Turn("q2", "a2"),)), groups[1]]
    assert without(groups, []) == groups


def test_a_digest_of_questions_is_another_when_anything_in_them_is():
    groups = [QuestionGroup("c1", (Turn("q1", "a1"), Turn("q2", "a2"))), QuestionGroup("", (Turn("q3", "a3"),))]
    others = [
        groups[::-1],
        groups[:1],
        [QuestionGroup("c1", groups[0].questions[::-1]), groups[1]],
        [QuestionGroup("c", groups[0].questions), groups[1]],
        [QuestionGroup("c1", (Turn("q1", "a1"), Turn("q2", "a"))), groups[1]],
        [QuestionGroup("c1", groups[0].questions[:1]), QuestionGroup("c1", groups[0].questions[1:]), groups[1]],
    ]
    assert len({digest_of(each) for each in [groups, *others]}) == 7
    assert digest_of([QuestionGroup("c1", tuple(groups[0].questions)), groups[1]]) == digest_of(groups)
