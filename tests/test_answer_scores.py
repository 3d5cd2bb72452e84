"""Scores of answers."""

import pytest

from activation_beacon import answer_scores


@pytest.mark.parametrize(
    ("score", "answer", "references", "expected"),
    [
        ("exact_match", "The Lion!", ["lion"], 1.0),
        ("exact_match", "a lion cub", ["lion"], 0.0),
        ("exact_match", "tiger", ["lion", "Tiger."], 1.0),
        ("contains", "It is 7421903, I think.", ["7421903"], 1.0),
        ("contains", "It is 742190.", ["7421903"], 0.0),
        ("contains", "eat a sandwich and sit\nin Dolores Park", ["Eat a sandwich and sit in Dolores Park"], 1.0),
        ("contains", "A5C3-00FF", ["a5c3-00ff"], 1.0),
        ("contains", "", ["x"], 0.0),
        ("contains_whole", "I know.", ["no"], 0.0),
        ("contains_whole", "No, 18 of them.", ["no"], 1.0),
        ("contains_whole", "in 1884", ["18", "84"], 0.0),
        ("contains_whole", "in 1884", ["1884"], 1.0),
        ("contains_whole", "It leaves from platform 128.", ["28"], 0.0),
        ("contains_whole", "It leaves from platform 28.", ["28"], 1.0),
        ("contains_whole", "KX-123456", ["KX-12345"], 0.0),
        ("contains_whole", "**kx-12345**", ["KX-12345"], 1.0),
        ("contains_whole", "答えは東京です。", ["東京"], 1.0),
        ("contains_share", "one and three", ["one", "two", "three", "four"], 0.5),
        ("token_f1", "the brave lion", ["brave lion"], 1.0),
        ("token_f1", "lion tiger", ["lion"], 2 / 3),
        ("token_f1", "lion lion", ["lion"], 2 / 3),
        ("token_f1", "bear", ["lion", "bear"], 1.0),
        ("token_f1", "", ["lion"], 0.0),
        ("token_f1", "the", ["a"], 1.0),
        ("rouge_l", "the lion slept under a tree", ["the lion slept under a tree"], 1.0),
        ("rouge_l", "wholly different words", ["the lion sleeps"], 0.0),
        ("rouge_l", "the lion sleeps here", ["nothing alike", "the lion slept"], 4 / 7),
        ("rouge_l", "Лев спит", ["Лев спит здесь"], 4 / 5),
        ("rouge_l", "今天很好", ["今天天气很好。"], 8 / 10),
        ("rouge_l", "ライオンは寝る", ["ライオンは寝る"], 1.0),
        ("rouge_l", "ber sch ne pfel", ["Über schöne Äpfel"], 0.0),
        ("rouge_l", "U\u0308ber schöne Äpfel", ["Über schöne Äpfel"], 1.0),
        ("rouge_l", "शेर सोता है", ["शेर सोती है"], 2 / 3),
        ("rouge_l", "", ["Лев"], 0.0),
    ],
)
def test_scores(score, answer, references, expected):
    if score == "rouge_l":
        pytest.importorskip("rouge_score")
    assert answer_scores.SCORES[score](answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "is_whole"),
    [
        ("Platform 28.", "28", True),
        ("Platform 28", "28", True),
        ("28, 29 and 30", "28", True),
        ("27, 28, 29", "28", True),
        ("27,28,29", "28", True),
        ("(28)", "28", True),
        ("28% of them", "28", True),
        ("**28**.", "28", True),
        ("28. It leaves at 9.", "28", True),
        ("28.It leaves at 9.", "28", True),
        ("Not 28.5 but 28.", "28", True),
        ("28.5", "28", False),
        ("28.5 metres", "5", False),
        ("128.5", "28.5", False),
        ("It is 28.5.", "28.5", True),
        ("28.50", "28.5", False),
        ("version 1.28.3", "28", False),
        ("version 1.28.3", "1.28", False),
        ("version 1.28.3.", "1.28.3", True),
        ("1,280", "28", False),
        ("1,280", "280", False),
        ("1,280", "1", False),
        ("1,280", "1,280", True),
        ("28,000 people", "28", False),
        ("28,000.5 people", "28,000", False),
        ("1,128,280", "128", False),
        ("28,0001", "28", True),  # no thousands
        ("$28.50", "$28", False),
        ("$28.", "$28", True),
        ("561aba22-eb54-4f11", "561aba22-eb54-4f11", True),
        ("561aba22-eb54-4f11.5", "561aba22-eb54-4f11", False),
        ("on 12.03.1884", "1884", False),
        ("on 12.03.1884", "12.03.1884", True),
        ("", "28", False),
    ],
)
def test_a_number_stands_whole_where_it_is_no_part_of_a_longer_one(answer, reference, is_whole):
    assert answer_scores.contains_whole(answer, [reference]) == is_whole
    assert answer_scores.contains_whole(f"It is {answer}", ["no such", reference]) == is_whole


def test_rouge_of_english_is_rouge_scores_own():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    texts = [
        "The lion's cubs weren't sleeping; they played hide_and_seek (at 4:30 p.m.) on the 28,000th day!",
        "A lion and its cub were asleep. They had been playing hide-and-seek, at 4.30 pm, for days.",
        "running runs ran quickly happily generalizations relational conditional ties dies",
        "“Never,” said he — it cost £5.50…",
        "",
    ]
    for text in texts:
        for other in texts:
            assert answer_scores.rouge_l(text, [other]) == scorer.score(other, text)["rougeL"].fmeasure
