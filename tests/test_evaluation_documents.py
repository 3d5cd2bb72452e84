"""Documents: read from every kind of file, refused with file and line, cut to tokens."""

import gzip
import json

import pytest

from activation_beacon.errors import FileFormatError, StorageError
from activation_beacon.evaluation import documents as docs

RECORDS = [{"id": "first", "text": "The lion."}, {"text": "The tiger, café."}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS) + "\n"


class Words:
    """A tokenizer with one token for each word, and perhaps a beginning-of-text token."""

    def __init__(self, opening=()):
        self.opening = list(opening)

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        words = [len(word) for word in text.split()]
        return {"input_ids": [*(self.opening if add_special_tokens else []), *words]}


def write(folder, name, content=LINES):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_documents(tmp_path, name):
    found = list(docs.read_documents([write(tmp_path, name)]))
    assert found == [docs.Document("first", "The lion."), docs.Document(f"{name}:2", "The tiger, café.")]


def test_a_text_file_is_one_document(tmp_path):
    paths = [write(tmp_path, "a.txt", "One\n\ntwo"), write(tmp_path, "b.md", "# Three")]
    assert list(docs.read_documents(paths)) == [docs.Document("a.txt", "One\n\ntwo"), docs.Document("b.md", "# Three")]


def test_another_field_can_hold_the_text(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"body": "x"}\n')
    assert [document.text for document in docs.read_documents([path], field="body")] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "x", FileFormatError, "{path} is of no known kind. Give one of .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst."),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', FileFormatError, "{path}, line 2 is not JSON ("),
        ("a.jsonl", "\n[1]\n", FileFormatError, "{path}, line 2 is a list, not an object with fields."),
        ("a.jsonl", '{"id": 1, "body": 2}\n', FileFormatError, '{path}, line 1 has no text in "text". Its fields: body, id.'),
        ("a.jsonl", '{"text": 3}\n', FileFormatError, '{path}, line 1 has no text in "text". Its fields: text.'),
        ("a.jsonl", b"\xff\xfe", FileFormatError, "{path} is damaged or cut short after line 0 ("),
        ("a.txt", b"ab\xff", FileFormatError, "{path} is not UTF-8 at offset 2. Convert it first."),
        ("a.txt", None, StorageError, "{path} does not exist. Name a file of documents."),
        ("a.jsonl", None, StorageError, "{path} does not exist. Name a file of documents."),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], FileFormatError, "{path} is damaged or cut short after line"),
        ("a.jsonl.gz", b"not gzip", FileFormatError, "{path} is damaged or cut short after line 0 ("),
        ("a.jsonl.zst", b"not zstd", FileFormatError, "{path} is damaged or cut short after line 0 ("),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, error, message):
    path = tmp_path / name
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error) as caught:
        list(docs.read_documents([path]))
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        list(docs.read_documents([tmp_path / "a.jsonl"]))


def test_texts_are_the_first_tokens_of_documents_that_are_long_enough():
    given = [docs.Document(str(count), "word " * count) for count in (9, 10, 5000, 3, 11)]
    found = list(docs.texts(iter(given), Words(), length=10, limit=2))
    assert [(text.id, text.ids) for text in found] == [("10", [4] * 10), ("5000", [4] * 10)]


def test_a_prefix_counts_as_part_of_the_text():
    [found] = docs.texts(iter([docs.Document("x", "a bb ccc dddd")]), Words(), length=4, prefix=[99])
    assert found.ids == [99, 1, 2, 3]


def test_a_long_text_is_cut_as_if_it_had_been_tokenised_whole():
    text = " ".join("x" * (1 + number % 7) for number in range(20_000))
    expected = Words()(text)["input_ids"][:1000]
    assert docs.first_ids(Words(), text, 1000) == expected


def test_a_text_of_few_tokens_and_many_characters_is_tokenised_whole():
    text = "x" * 100_000 + " y" * 70
    assert docs.first_ids(Words(), text, 60) == [100_000, *[1] * 59]


@pytest.mark.parametrize("opening", [[], [7], [7, 8]])
def test_the_prefix_is_what_the_tokenizer_puts_in_front(opening):
    assert docs.prefix_ids(Words(opening)) == opening
