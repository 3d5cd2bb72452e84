"""What is hidden can be found again, nothing else of the text is changed, and the answer is what was hidden."""

import collections
import random
import re

import pytest
import torch

from activation_beacon.errors import ConfigError, InputError
from activation_beacon.evaluation import needles as evaluated
from activation_beacon.training import needle_words
from activation_beacon.training.needles import KINDS, Needles, Reconstruction, find_cue, make_needle
from activation_beacon.training.samplers import RunData, stage_samplers
from activation_beacon.training.settings import Stage, TrainingSettings
from training_texts import (
    MARKED,
    UNMARKED,
    answers_of,
    letter_tokenizer,
    num_chunks,
    store_of_texts,
    text_of,
    text_with,
)

CHUNK, LENGTH = 1024, 8192
SHAPES = {
    "number": r"\d{7}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "word": r"[a-z]+-[a-z]+",
    "sentence": r"[a-z]+( [A-Za-z]+){3,}",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    lengths = [30000, 2500, 9000, 60000, 4000]
    texts = [text_with(number, length) for number, length in enumerate(lengths)]
    return store_of_texts(tmp_path_factory.mktemp("needles"), texts)


def needles(store, *, seed=0, template=MARKED, **settings) -> Needles:
    settings = {"length": LENGTH, "chunk_size": CHUNK, **settings}
    return Needles(store, letter_tokenizer(template), seed=seed, **settings)


def reconstruction(store, *, seed=0, template=MARKED) -> Reconstruction:
    return Reconstruction(store, letter_tokenizer(template), length=LENGTH, chunk_size=CHUNK, seed=seed)


def document_of(sample) -> str:
    """The first message, without its question."""
    return text_of(sample.ids.tolist()).partition("<|bot|>")[0].removeprefix("<|user|>").rpartition("\n\n")[0]


# --- needles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_in_the_statement_and_not_in_the_question(kind):
    for seed in range(200):
        needle = make_needle(kind, random.Random(seed))
        assert needle == make_needle(kind, random.Random(seed))
        assert needle.answer in needle.statement
        assert needle.answer not in needle.question
        assert needle.question.endswith(("?", "."))
        shapes = [SHAPES[kind]] if kind in SHAPES else [SHAPES[name] for name in ("number", "uuid", "word")]
        assert kind == "fact" or any(re.fullmatch(shape, needle.answer) for shape in shapes)
        assert not re.search("[{}]", needle.statement + needle.question)


def test_needles_of_one_kind_differ():
    for kind in KINDS:
        made = [make_needle(kind, random.Random(seed)) for seed in range(300)]
        assert len({needle.statement for needle in made}) > 290
        assert len({needle.question for needle in made}) > {"sentence": 30, "fact": 250}.get(kind, 290)


def test_a_needle_of_several_keys_hides_as_many_statements_of_one_form():
    counts = collections.Counter()
    for seed in range(200):
        needle = make_needle("multi", random.Random(seed))
        counts[1 + len(needle.others)] += 1
        assert len({needle.statement, *needle.others}) == 1 + len(needle.others)
        assert not any(needle.answer in other for other in needle.others)
        key = re.search(r"the [a-z]+ [a-z]+(?=\W*$)|the [a-z]+ [a-z]+(?= have)", needle.question).group()
        assert key in needle.statement
        assert not any(key in other for other in needle.others)
    assert counts.keys() == {3, 4, 5, 6, 7, 8}


def test_facts_are_answered_in_short_and_in_whole_sentences():
    made = [make_needle("fact", random.Random(seed)) for seed in range(400)]
    is_whole = [needle.answer == needle.statement for needle in made]
    assert 0.4 < sum(is_whole) / len(made) < 0.6
    assert len({re.sub(r"\W+|[A-Z]\w*|\d+", " ", needle.statement).split()[0] for needle in made}) > 4
    assert all(len(needle.answer) < 40 for needle, whole in zip(made, is_whole, strict=True) if not whole)


def test_an_unknown_kind_is_refused(store):
    for make in (lambda: make_needle("pin", random.Random(0)), lambda: needles(store, kinds=("word", "pin"))):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == (
            "There is no needle of kind 'pin'. Use some of word, number, uuid, sentence, multi, fact."
        )
    with pytest.raises(ConfigError, match=r"kinds names no needle\. Use some of word"):
        needles(store, kinds=())


def test_a_stage_hides_the_kinds_that_it_names(store):
    stage = Stage(documents=0.0, needles=1.0, needle_kinds=("number",), length=LENGTH, chunk_size=CHUNK)
    settings = TrainingSettings(output="run", documents=("texts",), stages=(stage,))
    [sampler] = stage_samplers(settings, RunData(store, None, [], []), letter_tokenizer(MARKED), print)
    answers = [answer for index in range(20) for answer in answers_of(sampler.sample(index))]
    assert all(re.match(SHAPES["number"], answer) for answer in answers), answers


def test_no_word_list_is_shared_with_the_evaluation():
    for name in ("ACTS", "PLACES", "TIMES", "CITIES", "NAMES", "SURNAMES"):
        assert not set(getattr(needle_words, name)) & set(getattr(evaluated, name))
    assert not set(needle_words.NOUNS) & set(evaluated.THINGS)
    trained, asked = ({form[0] for form in forms} for forms in (needle_words.FACT_FORMS, evaluated.FACTS))
    assert not trained & asked


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, UNMARKED, None])
@pytest.mark.parametrize("kind", [needles, reconstruction])
def test_a_sample_fits_its_length_and_has_more_than_two_chunks(store, kind, template):
    sampler = kind(store, template=template)
    for index in range(0, 64 * 12, 9):
        sample = sampler.sample(index)
        assert 2 * CHUNK < len(sample.ids) <= LENGTH
        assert len(sample.is_target) == len(sample.ids)
        assert not sample.is_target[:CHUNK].any()


def test_where_a_short_length_was_drawn_a_sample_with_much_to_ask_is_longer(store, monkeypatch):
    monkeypatch.setattr("activation_beacon.training.needles.drawn_length", lambda *_, **__: 40)
    lengths = [len(needles(store).sample(index).ids) for index in range(5)]
    assert all(40 < length <= LENGTH for length in lengths)


def test_every_answer_was_hidden_in_the_document_and_the_rest_is_the_document(store):
    sampler, turns = needles(store), collections.Counter()
    for index in range(0, 64 * 8, 5):
        sample = sampler.sample(index)
        document, answers = document_of(sample), answers_of(sample)
        turns[len(answers)] += 1
        assert all(answer.removesuffix("<|end|>") in document for answer in answers)
        number = re.search(r"of (\d) is here", document)[1]
        found = [int(place) for place in re.findall(rf"Sentence (\d+) of {number} is here\.", document)]
        assert found == list(range(found[0], found[0] + len(found)))
    assert turns.keys() == {1, 2, 3, 4}


def test_needles_stand_at_every_depth(store):
    sampler, depths = needles(store, kinds=("number",)), []
    for index in range(150):
        sample = sampler.sample(index)
        document = document_of(sample)
        depths += [document.index(answer.removesuffix("<|end|>")) / len(document) for answer in answers_of(sample)]
    tenths = collections.Counter(int(10 * depth) for depth in depths)
    assert len(depths) > 250
    assert min(tenths[tenth] for tenth in range(10)) > len(depths) / 30


@pytest.mark.parametrize("kind", ["word", "number", "uuid", "sentence"])
def test_only_the_kinds_that_are_named_are_hidden(store, kind):
    sampler = needles(store, kinds=(kind,))
    answers = [answer.removesuffix("<|end|>") for index in range(20) for answer in answers_of(sampler.sample(index))]
    assert answers
    assert all(re.fullmatch(SHAPES[kind], answer) for answer in answers)


@pytest.mark.parametrize("kind", [needles, reconstruction])
def test_a_sample_is_a_function_of_seed_and_index_alone(store, kind):
    sampler = kind(store)
    samples = {index: sampler.sample(index) for index in range(0, 300, 11)}
    resumed = kind(store)
    for index in reversed(samples):
        assert torch.equal(resumed.sample(index).ids, samples[index].ids)
        assert torch.equal(resumed.sample(index).is_target, samples[index].is_target)
    other = kind(store, seed=1)
    assert any(other.sample(index).ids.tolist() != sample.ids.tolist() for index, sample in samples.items())


def test_lengths_are_full_or_shared_by_neighbours(tmp_path):
    sampler = needles(store_of_texts(tmp_path, [text_with(0, 200000)]))
    lengths = [{num_chunks(sampler.sample(64 * block + n), CHUNK) for n in (0, 20, 63)} for block in range(40)]
    assert all(len(found) == 1 for found in lengths)
    counts = collections.Counter(found.pop() for found in lengths)
    assert counts.keys() == {3, 4, 5, 6, 7, 8}
    assert 12 < counts[8] < 34


def test_documents_that_are_too_short_are_refused(tmp_path):
    store = store_of_texts(tmp_path, ["Too short."])
    for kind in (needles, reconstruction):
        with pytest.raises(InputError, match="No document has the two chunks"):
            kind(store)


def test_a_length_without_room_for_a_question_is_refused(tmp_path):
    store = store_of_texts(tmp_path, [text_with(0, 300)])
    with pytest.raises(ConfigError, match=r"Samples of 32 tokens have no room for a question\. Use longer ones"):
        needles(store, length=32, chunk_size=16).sample(0)


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_the_answer_is_what_follows_the_cue_in_whole_words(store):
    sampler, sizes = reconstruction(store), []
    for index in range(0, 64 * 8, 5):
        sample = sampler.sample(index)
        document, (answer,) = document_of(sample), answers_of(sample)
        answer = answer.removesuffix("<|end|>")
        question = text_of(sample.ids.tolist()).partition("<|bot|>")[0].removeprefix(f"<|user|>{document}\n\n")
        words = re.search('"(.*)"', question)[1].split(" ")
        assert len(words) == 12
        (cue,) = re.finditer(r"\s+".join(map(re.escape, words)), document)
        rest = document[cue.end() :]
        assert rest.lstrip().startswith(answer)
        assert answer == answer.strip()
        following = rest.lstrip()[len(answer) :]
        assert not following or following[0].isspace()
        sizes.append(len(answer))
    assert max(sizes) <= 300
    assert min(sizes) > 60
    assert 150 < sum(sizes) / len(sizes) < 250


def test_a_cue_is_found_in_any_text():
    for text in ("word " * 50, "no spaces at all".replace(" ", "") * 30, "short text", "a\n\nb\tc " * 40, "x" * 5000):
        for seed in range(20):
            cue, start = find_cue(text, random.Random(seed))
            assert cue
            assert cue in text[:start]
            assert cue == cue.strip()
            assert not text[start : start + 1].isspace()
    text = (
        "one two three four five six seven eight nine ten eleven twelve " * 3
        + "The end comes after these twelve words, and not a word before them, friend."
    )
    unique = [find_cue(text, random.Random(seed))[0] for seed in range(20)]
    assert all(text.count(cue) == 1 for cue in unique)
