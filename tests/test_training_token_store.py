"""A store holds what the tokenizer says, in the order of the sources, and is whole or not there."""

import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from activation_beacon.data.sources import ReadReport
from activation_beacon.errors import ConfigError, FileFormatError, InputError, StorageError
from activation_beacon.training import token_store
from activation_beacon.training.token_store import BuildProgress, TokenStore, build_token_store, tokenizer_fingerprint

WORDS = ["[UNK]", "[BOS]", "one", "two", "three", "four", "five"]


def tokenizer_of(*more: str) -> PreTrainedTokenizerFast:
    """One id for each word; opens a text with [BOS] unless told not to."""
    from tokenizers.processors import TemplateProcessing

    words = {word: number for number, word in enumerate([*WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]", model_max_length=4)


def texts_of(count: int) -> list[str]:
    return [" ".join(WORDS[2 + (number * 7 + step) % 5] for step in range(1 + number % 9)) for number in range(count)]


def put(path: Path, texts: list[str], *, start: int = 0) -> Path:
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts, start)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents_of(store: TokenStore) -> dict[str, list[int]]:
    return {name: store.document(index).tolist() for index, name in enumerate(store.ids)}


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    texts = texts_of(40)
    return [put(tmp_path / "b.jsonl", texts[:25]), put(tmp_path / "a.jsonl", texts[25:], start=25)]


def test_a_digest_is_of_tokens_and_bounds_and_of_nothing_else(tmp_path):
    def digest(texts, name="a.jsonl", **options):
        return build_token_store(put(tmp_path / name, texts), tokenizer_of(), tmp_path / "stores", **options).digest

    known = digest(["one two three", "four"])
    assert len(known) == 16
    assert digest(["one two three", "four"], name="b.jsonl", exclude=["none"]) == known
    assert digest(["one  two three", "four", "one"], name="c.jsonl", max_tokens=4) == known
    others = [["one two", "three four"], ["one two three four"], ["four", "one two three"], ["one two three", "five"]]
    digests = {digest(texts, name=f"{number}.jsonl") for number, texts in enumerate(others)}
    assert len(digests | {known}) == 5


def test_a_store_without_the_documents_of_another_is_one_in_which_they_never_were(tmp_path):
    def store(name, texts):
        return build_token_store(put(tmp_path / name, texts), tokenizer_of(), tmp_path / "stores")

    texts = ["one two three", "four", "five four", "four", "two one three"]
    whole, others = store("a.jsonl", texts), store("b.jsonl", ["four", "three one two", "five"])
    left = whole.without(others)
    assert contents_of(left) == {"d0": [2, 3, 4], "d2": [6, 5], "d4": [3, 2, 4]}
    assert (len(left), left.num_tokens, left.lengths.tolist()) == (3, 8, [3, 2, 3])
    assert left.digest not in (whole.digest, whole.without(store("c.jsonl", ["five four"])).digest)
    assert whole.without(store("d.jsonl", ["five"])) is whole
    assert contents_of(left.without(store("e.jsonl", ["five four"]))) == {"d0": [2, 3, 4], "d4": [3, 2, 4]}
    again = pickle.loads(pickle.dumps(left))
    assert (contents_of(again), again.digest) == (contents_of(left), left.digest)
    with pytest.raises(IndexError, match="There is no document 3: the store holds 3"):
        left.document(3)


def test_a_store_holds_what_the_tokenizer_says_in_the_order_of_the_sources(tmp_path, sources):
    tokenizer = tokenizer_of()
    store = build_token_store(sources, tokenizer, tmp_path / "stores")
    expected = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts_of(40)]
    assert list(contents_of(store).items()) == [(f"d{number}", ids) for number, ids in enumerate(expected)]
    assert len(store) == 40
    assert store.num_tokens == sum(map(len, expected))
    assert store.lengths.tolist() == [len(ids) for ids in expected]
    assert store.summary == "40 records read, 0 skipped."
    assert isinstance(store.document(3), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.document(3)[0] = 5


def test_workers_make_the_same_store(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 40)  # many jobs, of several documents or one
    alone = build_token_store(sources, tokenizer_of(), tmp_path / "alone", min_tokens=3)
    store = build_token_store(sources, tokenizer_of(), tmp_path / "stores", min_tokens=3, workers=2)
    files = {path.name: path.read_bytes() for path in alone.folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in store.folder.iterdir()}
    assert alone.folder.name == store.folder.name


@pytest.mark.parametrize("workers", [0, 2])
def test_the_document_that_reaches_the_most_tokens_is_the_last(tmp_path, monkeypatch, sources, workers):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 40)
    whole = build_token_store(sources, tokenizer_of(), tmp_path / "stores", min_tokens=3)
    last = next(number for number in range(len(whole)) if whole.lengths[: number + 1].sum() >= 61)
    store = build_token_store(
        sources, tokenizer_of(), tmp_path / "stores", min_tokens=3, max_tokens=61, workers=workers
    )
    assert 61 <= store.num_tokens < 61 + 9
    assert list(contents_of(store).items()) == list(contents_of(whole).items())[: last + 1]


@pytest.mark.parametrize(("size", "dtype"), [((1 << 16) - 1, np.uint16), (1 << 16, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, size, dtype):
    words = [f"w{number}" for number in range(len(WORDS), size)]
    source = put(tmp_path / "a.jsonl", [f"one {words[-1]}"])
    store = build_token_store(source, tokenizer_of(*words), tmp_path / "stores")
    assert store.document(0).dtype == dtype
    assert store.document(0).tolist() == [2, size - 1]


def test_short_excluded_and_bad_documents_are_left_out_and_counted(tmp_path):
    source = put(tmp_path / "a.jsonl", ["one two three", "one", "", "two three four", "five five five"])
    report = ReadReport()
    store = build_token_store(source, tokenizer_of(), tmp_path, min_tokens=3, exclude=["d3"], report=report)
    assert contents_of(store) == {"d0": [2, 3, 4], "d4": [6, 6, 6]}
    assert store.summary == report.summary()
    assert report.skipped == {"empty document": 1, "excluded": 1, "shorter than 3 tokens": 1}


def test_progress_ends_where_the_store_is_complete(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 40)
    seen: list[BuildProgress] = []
    store = build_token_store(sources, tokenizer_of(), tmp_path / "stores", progress=seen.append)
    total = sum(path.stat().st_size for path in sources)
    assert len(seen) > 5
    assert seen[-1] == BuildProgress(len(store), store.num_tokens, total, total)
    for before, after in itertools.pairwise(seen):
        assert before.documents < after.documents
        assert before.tokens < after.tokens
        assert before.bytes_done <= after.bytes_done


def test_another_process_gets_the_store_by_name(tmp_path, sources):
    store = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    octets = pickle.dumps(store)
    assert len(octets) < 500
    assert contents_of(pickle.loads(octets)) == contents_of(store)


# --- found again ------------------------------------------------------------------------------------------------------


def refuse(*args):
    raise AssertionError("the store was made anew")


def test_a_store_of_the_same_sources_is_opened_and_not_made_anew(tmp_path, monkeypatch, sources):
    first = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    moved = [put(tmp_path / "elsewhere" / path.name, []) for path in sources]
    for path, copy in zip(sources, moved, strict=True):
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(token_store, "_write_store", refuse)
    for again in (sources, moved):
        store = build_token_store(again, tokenizer_of(), tmp_path / "stores", workers=2)
        assert store.folder == first.folder
        assert contents_of(store) == contents_of(first)
        assert store.summary == first.summary


def change_contents(sources: list[Path]) -> None:
    put(sources[0], texts_of(25)[::-1])


def change_a_name(sources: list[Path]) -> None:
    sources[0] = sources[0].rename(sources[0].with_name("c.jsonl"))


@pytest.mark.parametrize(
    ("change", "more_words", "settings"),
    [
        (change_contents, [], {}),
        (change_a_name, [], {}),
        (list.reverse, [], {}),
        (list, ["six"], {}),
        (list, [], {"min_tokens": 2}),
        (list, [], {"max_tokens": 20}),
        (list, [], {"exclude": ["d1"]}),
        (list, [], {"on_error": "stop"}),
        (list, [], {"text_field": "id"}),
    ],
)
def test_a_change_of_anything_that_matters_makes_another_store(tmp_path, sources, change, more_words, settings):
    first = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    before = contents_of(first)
    change(sources)
    second = build_token_store(sources, tokenizer_of(*more_words), tmp_path / "stores", **settings)
    assert second.folder != first.folder
    assert contents_of(TokenStore(first.folder)) == before


def test_a_tokenizer_is_known_again_whatever_it_was_used_for():
    tokenizer = tokenizer_of()
    name = tokenizer_fingerprint(tokenizer)
    tokenizer(["one two three", "one"], truncation=True, padding=False, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == name == tokenizer_fingerprint(tokenizer_of())
    assert tokenizer_fingerprint(tokenizer_of("six")) != name


# --- whole or not there -----------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """As Ctrl-C: no error that anybody catches."""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [_Stopped, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, sources, workers, stop):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 40)

    def interrupt(progress: BuildProgress) -> None:
        if progress.documents > 10:
            raise stop

    stores = tmp_path / "stores"
    with pytest.raises((_Stopped, StorageError)):
        build_token_store(sources, tokenizer_of(), stores, progress=interrupt, workers=workers)
    assert list(stores.iterdir()) == []
    assert len(build_token_store(sources, tokenizer_of(), stores)) == 40


def test_what_a_killed_build_left_is_not_taken_for_a_store(tmp_path, monkeypatch, sources):
    first = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    aside = first.folder.with_name(f".{first.folder.name}.0000.part")
    first.folder.rename(aside)
    (aside / "header.json").unlink()
    assert contents_of(build_token_store(sources, tokenizer_of(), tmp_path / "stores"))
    with pytest.raises(StorageError, match=r"holds no tokens: there is no header\.json"):
        TokenStore(aside)


def test_another_process_that_was_faster_is_welcome(tmp_path, sources):
    stores = tmp_path / "stores"

    def overtake(progress: BuildProgress) -> None:
        build_token_store(sources, tokenizer_of(), stores)

    store = build_token_store(sources, tokenizer_of(), stores, progress=overtake)
    assert len(store) == 40
    assert [path.name for path in stores.iterdir()] == [store.folder.name]


def test_a_bad_record_stops_the_build_when_asked(tmp_path):
    source = put(tmp_path / "a.jsonl", ["one two", "", "three"])
    with pytest.raises(InputError, match=r'a\.jsonl, line 2: the field "text" is empty'):
        build_token_store(source, tokenizer_of(), tmp_path / "stores", on_error="stop")
    assert list((tmp_path / "stores").iterdir()) == []


def test_no_document_left_is_an_error_that_says_why(tmp_path):
    source = put(tmp_path / "a.jsonl", ["one two", "", "three"])
    with pytest.raises(InputError) as caught:
        build_token_store(source, tokenizer_of(), tmp_path / "stores", min_tokens=3)
    assert str(caught.value) == (
        f"No document is left to train on: 2 records read, 3 skipped: 1 empty document ({source}, line 2); "
        "2 shorter than 3 tokens (d0, d2). Name other sources."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 0}, "min_tokens must be at least 1; got 0."),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0."),
        ({"workers": -1}, "workers must be at least 0; got -1."),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, sources, settings, message):
    with pytest.raises(ConfigError) as caught:
        build_token_store(sources, tokenizer_of(), tmp_path, **settings)
    assert str(caught.value) == message


DAMAGES = {
    "a cut array": ("tokens.npy", lambda contents: contents[:-4], "The token store {} is damaged ("),
    "other lengths": ("ids.json", lambda contents: b'["d0"]', "The token store {} is damaged (its files have other"),
    "cut ids": ("ids.json", lambda contents: contents[:-4], "The token store {} is damaged ("),
    "no array": ("offsets.npy", lambda contents: b"", "The token store {} is damaged ("),
    "a cut header": ("header.json", lambda contents: contents[:-4], "The token store {} is damaged (header.json: "),
    "another header": ("header.json", lambda contents: b"[]", "{}/header.json is no header of a token store."),
    "another version": (
        "header.json",
        lambda contents: contents.replace(b'"version": 1', b'"version": 9'),
        "{} has format version 9; this release reads 1. Delete the folder; it is made anew.",
    ),
    "no sizes": (
        "header.json",
        lambda contents: contents.replace(b'"tokens":', b'"no":'),
        "The token store {} is damaged (its files have other",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_by_name(tmp_path, sources, damage):
    store = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    name, change, message = DAMAGES[damage]
    path = store.folder / name
    path.write_bytes(change(path.read_bytes()))
    for opening in (TokenStore, lambda folder: build_token_store(sources, tokenizer_of(), folder.parent)):
        with pytest.raises(FileFormatError) as caught:
            opening(store.folder)
        assert str(caught.value).startswith(message.format(store.folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 40])
def test_a_document_that_is_not_there_is_an_index_error(tmp_path, sources, index):
    store = build_token_store(sources, tokenizer_of(), tmp_path / "stores")
    with pytest.raises(IndexError, match=f"There is no document {index}: the store holds 40, counted from 0"):
        store.document(index)


class _DiesWhenUnpickled:
    """A tokenizer whose worker ends at once."""

    def __len__(self) -> int:
        return 7

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __reduce__(self):
        return (sys.exit, (3,))


def test_a_worker_that_dies_is_one_line(tmp_path, sources):
    with pytest.raises(StorageError, match=r"The texts cannot be tokenised: one of the processes ended abruptly\. Use"):
        build_token_store(sources, _DiesWhenUnpickled(), tmp_path / "stores", workers=1)
