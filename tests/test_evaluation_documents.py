"""Documents: read from every kind of file, refused with file and line, cut to tokens."""

import gzip
import hashlib
import json

import pytest

from activation_beacon.data.sources import ReadReport
from activation_beacon.errors import FileFormatError, InputError, StorageError
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


def test_a_source_is_known_again_by_its_contents_wherever_it_lies(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "a.jsonl")
        write(tmp_path / name, "b.txt", "One")
    here, there = (
        docs.digests([tmp_path / name / "a.jsonl", tmp_path / name, f"{tmp_path}/{name}/*.txt"])
        for name in ("here", "there")
    )
    assert here == there
    assert here[0] == hashlib.sha256(LINES.encode()).hexdigest()[:16]
    assert len(set(here)) == 3
    write(tmp_path / "there", "b.txt", "Two")
    changed = docs.digests([tmp_path / "there" / "a.jsonl", tmp_path / "there", f"{tmp_path}/there/*.txt"])
    assert [one == other for one, other in zip(changed, here, strict=True)] == [True, False, False]


def test_a_hub_data_set_is_known_by_its_name_alone():
    assert docs.digests(["owner/name:train"]) == [None]
    assert docs.digests([]) == []


def test_a_text_file_is_one_document(tmp_path):
    paths = [write(tmp_path, "a.txt", "One\n\ntwo"), write(tmp_path, "b.md", "# Three")]
    assert list(docs.read_documents(paths)) == [
        docs.Document("a.txt:1", "One\n\ntwo"),
        docs.Document("b.md:1", "# Three"),
    ]


def test_another_field_can_hold_the_text(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"body": "x"}\n')
    assert [document.text for document in docs.read_documents([path], field="body")] == ["x"]


def test_a_field_can_say_of_which_kind_a_document_is(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"id": "1", "text": "x", "group": "law"}\n{"id": "2", "text": "y"}\n')
    assert list(docs.read_documents([path], kind_field="group", on_error="skip")) == [docs.Document("1", "x", "law")]
    with pytest.raises(InputError, match=r'line 2: there is no field "group" \(fields: id, text\)'):
        list(docs.read_documents([path], kind_field="group"))
    [text] = docs.texts(iter([docs.Document("x", "a bb", "law")]), Words(), length=2)
    assert text.kind == "law"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", b"x", FileFormatError, "{path} has a format that is not known."),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', InputError, "{path}, line 2: the line is not JSON ("),
        (
            "a.jsonl",
            b'{"id": 1, "body": 2}\n',
            InputError,
            '{path}, line 1: there is no field "text" (fields: id, body)',
        ),
        ("a.jsonl.zst", None, StorageError, "There is no file, folder or glob '{path}'."),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        list(docs.read_documents([str(path)]))
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_packed_file_that_is_cut_short_is_not_taken_for_a_whole_one(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(LINES.encode()) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(first)  # every record is there, and the end of the frame is not
    with pytest.raises(InputError, match="cut short"):
        list(docs.read_documents([path]))


def test_bad_records_are_skipped_where_that_is_asked_for_and_told_by_file_and_line(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text"\n{"text": "y"}\n{"text": ""}\n')
    assert [document.text for document in docs.read_documents([path], on_error="skip")] == ["x", "y"]
    assert caplog.messages == [
        f"Documents: 2 records read, 2 skipped: 1 broken JSON ({path}, line 2); 1 empty document ({path}, line 4)."
    ]


def test_what_was_skipped_is_told_when_enough_was_read_and_not_before(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text"\n{"text": "x"}\n{"text": "y"}\n{"text"\n')
    reading = docs.read_documents([path], on_error="skip")
    next(reading)
    assert caplog.messages == []
    reading.close()
    assert caplog.messages == [f"Documents: 1 records read, 1 skipped: 1 broken JSON ({path}, line 1)."]


@pytest.mark.parametrize(("content", "summary"), [(LINES, "2 records read, 0 skipped."), ("[]\n" + LINES, None)])
def test_nothing_is_told_where_nothing_was_skipped_or_the_caller_tells_it(tmp_path, caplog, content, summary):
    path, report = write(tmp_path, "a.jsonl", content), ReadReport()
    assert len(list(docs.read_documents([path], on_error="skip", report=report))) == 2
    assert report.summary() == (summary or f"2 records read, 1 skipped: 1 no object ({path}, line 1).")
    list(docs.read_documents([write(tmp_path, "b.jsonl")], on_error="skip"))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "is_other"),
    [
        ("a.yaml", True),
        ("deep/utils.py", True),
        ("new.txt", True),
        (".cache/x", False),
        ("deep/.hidden", False),
        ("deep/__pycache__/utils.pyc", False),
    ],
)
def test_a_folder_is_known_by_all_that_lies_in_it_but_hidden_and_compiled_files(tmp_path, name, is_other):
    for folder in ("here", "there"):
        for file, text in (("a.yaml", "task: a"), ("deep/utils.py", "x = 1")):
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text(text)
    assert docs.folder_digest(tmp_path / "here") == docs.folder_digest(tmp_path / "there")
    (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "there" / name).write_text("another")
    assert (docs.folder_digest(tmp_path / "here") != docs.folder_digest(tmp_path / "there")) is is_other


def test_a_file_of_a_folder_that_was_moved_within_it_makes_another_folder(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a")
    before = docs.folder_digest(tmp_path)
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    assert docs.folder_digest(tmp_path) != before


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
