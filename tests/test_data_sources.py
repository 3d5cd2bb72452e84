"""Every record that can be read is read, in order; every one that cannot is named by file and line."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from activation_beacon.data import data_files
from activation_beacon.data.data_files import RECORD_FORMATS, left_out
from activation_beacon.data.sources import Question, ReadReport, documents, questions, read_records
from activation_beacon.errors import ConfigError, FileFormatError, InputError, StorageError, UnsupportedError

zstandard = pytest.importorskip("zstandard")

ROWS = [{"id": f"d{number}", "text": f"Text {number}: größer – ok.\nSecond line."} for number in range(5)]
WAY_OUT = "Mend or remove it, or have bad records skipped (--on-error skip)."


def jsonl(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zst(contents: bytes, **settings) -> bytes:
    return zstandard.ZstdCompressor(**settings).compress(contents)


def put(folder: Path, name: str, contents: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


def put_parquet(path: Path, rows) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", jsonl()),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl().rstrip()),
        ("a.jsonl", jsonl().replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(jsonl(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS[:2]), mtime=0) + gzip.compress(jsonl(ROWS[2:]), mtime=0)),
        ("a.jsonl.zst", zst(jsonl())),
        ("a.jsonl.zst", zst(jsonl(ROWS[:3])) + zst(jsonl(ROWS[3:]))),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_a_file_is_read_record_by_record_in_whatever_pieces_it_comes(tmp_path, monkeypatch, name, contents, block):
    monkeypatch.setattr(data_files, "BLOCK", block)
    path, report = put(tmp_path, name, contents), ReadReport()
    records = list(read_records(path, on_error="stop", report=report))
    assert [record.fields for record in records] == ROWS
    assert (report.records, report.bytes_read, report.skipped) == (5, len(contents), {})
    assert report.summary() == "5 records read, 0 skipped."


def test_lines_are_counted_from_one_and_blank_lines_count(tmp_path):
    path = put(tmp_path, "a.jsonl", b'{"text": "x"}\n\n  \n{"text": "y"}')
    assert [record.place for record in read_records(path)] == [f"{path}, line 1", f"{path}, line 4"]
    assert list(documents(path)) == [("a.jsonl:1", "x"), ("a.jsonl:4", "y")]


def test_a_zstandard_window_of_128_mib_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = put(tmp_path, "a.jsonl.zst", stream.compress(jsonl()) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 27
    assert [record.fields for record in read_records(path, on_error="stop")] == ROWS


@pytest.mark.parametrize(("name", "pack"), [("a.json", bytes), ("a.json.gz", gzip.compress), ("a.json.zst", zst)])
@pytest.mark.parametrize(
    ("value", "places"), [(ROWS, [f"item {number}" for number in range(1, 6)]), (ROWS[0], ["line 1"])]
)
def test_a_json_file_is_one_record_or_an_array_of_them(tmp_path, name, pack, value, places):
    path, report = put(tmp_path, name, pack(b"\xef\xbb\xbf" + json.dumps(value, indent=1).encode())), ReadReport()
    records = list(read_records(path, on_error="stop", report=report))
    assert [record.fields for record in records] == (value if isinstance(value, list) else [value])
    assert [record.place for record in records] == [f"{path}, {place}" for place in places]
    assert (report.records, report.bytes_read) == (len(places), path.stat().st_size)


def test_a_json_file_is_read_if_it_is_named_and_not_for_lying_among_texts(tmp_path):
    named, lines = put(tmp_path, "a.json", b'{"text": "x"}'), put(tmp_path, "b.jsonl", b'{"text": "y"}')
    assert [text for _, text in documents([named, lines])] == ["x", "y"]
    assert [text for _, text in documents(tmp_path)] == [text for _, text in documents(f"{tmp_path}/*")] == ["y"]
    assert [text for _, text in documents(f"{tmp_path}/*.json")] == ["x"]


@pytest.mark.parametrize("pack", [("", bytes), (".gz", gzip.compress), (".zst", zst)], ids=lambda pack: pack[0])
@pytest.mark.parametrize("name", ["book.txt", "handbook.md"])
def test_a_text_file_is_one_document(tmp_path, name, pack):
    ending, packed = pack
    name += ending
    path = put(tmp_path, name, packed("\ufeffOne.\n\nTwo, größer.\n".encode()))
    assert list(documents(path)) == list(documents(tmp_path)) == [(f"{name}:1", "One.\n\nTwo, größer.\n")]
    assert list(documents(path, text_field="body")) == list(documents(path))


def test_parquet_is_read_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr("activation_beacon.data.sources.ROWS", 2)
    path, report = put_parquet(tmp_path / "a.parquet", [*ROWS, {"id": "d5", "text": None}]), ReadReport()
    assert list(documents(path, report=report)) == [(row["id"], row["text"]) for row in ROWS]
    assert report.summary() == f"5 records read, 1 skipped: 1 wrong type ({path}, row 6)."
    assert 0.9 * path.stat().st_size < report.bytes_read <= path.stat().st_size


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    for number, name in enumerate(["b.jsonl", "a.jsonl.gz", "sub/c.jsonl", ".hidden.jsonl", "README.md", "licences"]):
        contents = jsonl([{"id": name, "text": str(number)}])
        put(tmp_path, name, gzip.compress(contents) if name.endswith(".gz") else contents)

    def ids(source):
        return [name for name, _ in documents(source, on_error="stop")]

    assert ids(tmp_path) == ids(str(tmp_path)) == ids(tmp_path / "*") == ["README.md:1", "a.jsonl.gz", "b.jsonl"]
    assert ids(f"{tmp_path}/**/*.jsonl") == ["b.jsonl", "sub/c.jsonl"]
    assert ids(tmp_path / "[b]*.jsonl") == ["b.jsonl"]
    assert ids([tmp_path / "sub", tmp_path / "b.jsonl"]) == ["sub/c.jsonl", "b.jsonl"]


def test_markdown_in_a_folder_of_questions_is_about_them(tmp_path):
    put(tmp_path, "README.md", b"# Questions")
    record = put(tmp_path, "a.jsonl", b'{"question": "Who?", "answer": "I"}\n')
    for source in (tmp_path, f"{tmp_path}/*"):
        assert [each.question for each in questions(source, on_error="stop")] == ["Who?"]
    with pytest.raises(InputError, match=r"README\.md, line 1"):
        list(questions([record, f"{tmp_path}/*.md"], on_error="stop"))


def test_what_is_left_out_of_a_folder_or_a_glob_is_named(tmp_path):
    for name in ("a.txt", "b.md", "notes.docx", "c.json", ".hidden", "sub/d.txt"):
        put(tmp_path, name, b"x")
    rest = "Read are .txt, .md, .jsonl, .parquet; name a .json file, or a subfolder, by itself."
    assert left_out(tmp_path) == f"{tmp_path}: 3 left out (c.json, notes.docx, sub/). {rest}"
    assert left_out(f"{tmp_path}/*") == f"{tmp_path}/*: 2 left out (c.json, notes.docx). {rest}"
    put(tmp_path, "e.pdf", b"x")
    assert left_out(tmp_path) == f"{tmp_path}: 4 left out (c.json, e.pdf, notes.docx, ...). {rest}"
    assert left_out(tmp_path, RECORD_FORMATS).startswith(
        f"{tmp_path}: 5 left out (b.md, c.json, e.pdf, ...). Read are .txt, .jsonl"
    )
    for source in (tmp_path / "sub", tmp_path / "c.json", f"{tmp_path}/*.json", "owner/name", f"{tmp_path}/none"):
        assert left_out(source) is None


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    path = put(tmp_path, "a[1].jsonl", jsonl())
    assert len(list(read_records(path))) == 5


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = b'{"id": "good", "text": "fine"}\n'
BAD_LINES = [
    (b'{"text": "x"', "broken JSON", "the line is not JSON (Expecting ',' delimiter at column 13)"),
    (b"not json", "broken JSON", "the line is not JSON (Expecting value at column 1)"),
    (b'{"text": ' + b"9" * 5000 + b"}", "broken JSON", "the line is not JSON that can be read (Exceeds the limit"),
    (b"[" * 100000, "broken JSON", "the line is not JSON that can be read (maximum recursion depth exceeded"),
    (b'["text"]', "no object", "the line is JSON but no object with fields (a list)"),
    (b'{"text": "caf\xe9"}', "not UTF-8", "bytes that are not UTF-8 (0xe9 at byte 14)"),
    (b'{"text": "a\\ud800"}', "not UTF-8", 'the field "text" holds half a character (a lone surrogate)'),
    (b'{"text": "a"}\0', "binary", "no text but a binary file, or UTF-16 (a NUL at byte 14)"),
    (b'{"text": ""}', "empty document", 'the field "text" is empty'),
    (b'{"text": " \\n "}', "empty document", 'the field "text" is empty'),
    (b'{"id": 3, "body": "x"}', "missing field", 'there is no field "text" (fields: id, body)'),
    (b"{}", "missing field", 'there is no field "text" (fields: none)'),
    (b'{"text": 5}', "wrong type", 'the field "text" is no text but a int'),
    (b'{"text": null}', "wrong type", 'the field "text" is no text but a NoneType'),
]


@pytest.mark.parametrize(("line", "why", "message"), BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_or_stops_the_reading(tmp_path, line, why, message):
    path, report = put(tmp_path, "a.jsonl", GOOD + line + b"\n" + GOOD), ReadReport()
    assert [name for name, _ in documents(path, report=report)] == ["good", "good"]
    assert report.summary() == f"2 records read, 1 skipped: 1 {why} ({path}, line 2)."
    reading = documents(path, on_error="stop")
    assert next(reading) == ("good", "fine")
    with pytest.raises(InputError) as caught:
        next(reading)
    assert str(caught.value).startswith(f"{path}, line 2: {message}")
    assert str(caught.value).endswith(f"). {WAY_OUT}" if message.endswith(")") else WAY_OUT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "contents", "line", "why", "message"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", 3, "not UTF-8", "bytes that are not UTF-8 (0xe9 at byte 12)"),
        ("a.txt", "text\n".encode("utf-16-le"), 1, "binary", "no text but a binary file, or UTF-16 (a NUL at byte 2)"),
        ("a.txt", b"", 1, "empty document", 'the field "text" is empty'),
        ("a.json", b'{\n "text":\n}', 3, "broken JSON", "the file is not JSON (Expecting value at line 3, column 1)"),
        (
            "a.json",
            GOOD + GOOD,
            2,
            "broken JSON",
            "the file is not JSON (Extra data at line 2, column 1); if each line",
        ),
        ("a.json", b"", 1, "broken JSON", "the file is not JSON (Expecting value at line 1, column 1)"),
        ("a.json", b'"text"', 1, "no object", "the file is JSON but no object with fields (a str)"),
        ("a.json", b'{"text":\n"caf\xe9"}', 2, "not UTF-8", "bytes that are not UTF-8 (0xe9 at byte 14)"),
        ("a.json.gz", b"", 1, "file cut short", "the packed file is cut short"),
        ("a.jsonl.zst", b"", 1, "file cut short", "the packed file is cut short"),
        ("a.jsonl.gz", b"", 1, "file cut short", "the packed file is cut short"),
        ("a.jsonl.zst", zst(jsonl())[:-7], None, "file cut short", "the packed file is cut short"),
        ("a.jsonl.gz", gzip.compress(jsonl(), mtime=0)[:-7], None, "file cut short", "the packed file is cut short"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-7], 1, "file cut short", "the packed file is cut short"),
        ("a.jsonl.zst", b"no such frame", 1, "damaged file", "the packed file is damaged from here on ("),
        ("a.jsonl.gz", jsonl(), 1, "damaged file", "the packed file is damaged from here on ("),
        ("a.jsonl.zst", zst(jsonl()) + b"garbage", 6, "damaged file", "the packed file is damaged from here on ("),
        ("a.parquet", b"PAR1 no more", 1, "damaged file", "the file is damaged or cut short ("),
    ],
)
def test_a_bad_file_is_skipped_and_counted_or_stops_the_reading(tmp_path, name, contents, line, why, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path, report = put(tmp_path, name, contents), ReadReport()
    texts = list(documents([path, put(tmp_path, "good.jsonl", GOOD)], report=report))
    assert texts[-1] == ("good", "fine")
    assert report.skipped == {why: 1}
    with pytest.raises(InputError) as caught:
        list(documents(path, on_error="stop"))
    unit = "row" if name.endswith(".parquet") else "line"
    assert str(caught.value).startswith(f"{path}, {unit} {len(texts) if line is None else line}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [zst, gzip.compress])
def test_a_packed_file_cut_anywhere_gives_its_whole_lines_and_is_counted(tmp_path, pack):
    rows = [{"text": f"{number} " * 40} for number in range(200)]
    contents = pack(jsonl(rows))
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    for stop in range(0, len(contents), 5):
        report = ReadReport()
        found = [record.fields for record in read_records(put(tmp_path, name, contents[:stop]), report=report)]
        assert found == rows[: len(found)]
        assert report.skipped == {"file cut short": 1}


def test_the_report_names_the_first_places_of_each_reason_in_one_line(tmp_path):
    path, report = put(tmp_path, "a.jsonl", b"x\n" * 1200 + b"{}\n" + GOOD), ReadReport()
    assert len(list(documents(path, report=report, exclude=["other"]))) == 1
    first = ", ".join(f"{path}, line {number}" for number in (1, 2, 3))
    assert report.summary() == (
        f"1 records read, 1,201 skipped: 1,200 broken JSON ({first}, ...); 1 missing field ({path}, line 1201)."
    )


def test_excluded_documents_are_left_out_with_all_their_parts_and_counted(tmp_path):
    names = ["g/1", "g/12", "g/1#part1of2", "g/1#part2of2", "h#x"]
    path = put(tmp_path, "a.jsonl", jsonl([{"id": name, "text": "x"} for name in names]))
    report = ReadReport()
    left = [name for name, _ in documents(path, exclude=["g/1", "h#x"], on_error="stop", report=report)]
    assert left == ["g/12"]
    assert report.skipped == {"excluded": 4}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.jsonl", StorageError, "There is no file, folder or glob '{}/missing.jsonl'. Name one, or a hub"),
        ("no/*.jsonl", StorageError, "The glob {}/no/*.jsonl holds no file of a known format: .txt, .txt.gz,"),
        (
            "empty",
            StorageError,
            "The folder {}/empty holds no file of a known format: .txt, .txt.gz, .txt.zst, .jsonl,",
        ),
        ("other", StorageError, "The folder {}/other holds no file of a known format (1 others, such as a.csv): .txt,"),
        ("other/a.csv", FileFormatError, "{}/other/a.csv has a format that is not known. Known are .txt, .txt.gz,"),
        ("other/a.parquet.gz", FileFormatError, "{}/other/a.parquet.gz has a format that is not known. Known are"),
    ],
)
def test_no_file_and_an_unknown_format_always_stop_before_anything_is_read(tmp_path, source, error, message):
    put(tmp_path, "other/a.csv", b"x")
    (tmp_path / "empty").mkdir()
    good = put(tmp_path, "good.jsonl", GOOD)
    if source.endswith(".gz"):
        put(tmp_path, source, b"x")
    with pytest.raises(error) as caught:
        next(documents([good, tmp_path / source], on_error="skip"))
    assert str(caught.value).startswith(message.format(tmp_path))


def test_an_unknown_way_with_bad_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='on_error must be "skip" or "stop"; got \'warn\''):
        list(read_records(put(tmp_path, "a.jsonl", GOOD), on_error="warn"))


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    path = put(tmp_path, name, b"x")
    with pytest.raises(UnsupportedError) as caught:
        list(read_records(path))
    assert str(caught.value) == (
        f'Reading {path} needs the package {package}. Run `pip install "activation-beacon[train]"`.'
    )


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "chosen", "split"),
    [
        ("owner/set", ("owner/set",), "train"),
        ("owner/set:test", ("owner/set",), "test"),
        ("owner/set-2.0:validation[:10%]", ("owner/set-2.0",), "validation[:10%]"),
        ("owner/set:train[10:20]+test[-5%:]", ("owner/set",), "train[10:20]+test[-5%:]"),
        ("owner/set:plain_text:validation", ("owner/set", "plain_text"), "validation"),
        ("owner/set:wikitext-103-v1.0:train[10:20]", ("owner/set", "wikitext-103-v1.0"), "train[10:20]"),
    ],
)
def test_a_name_that_is_no_path_is_a_data_set_of_the_hub_and_streamed(monkeypatch, source, chosen, split):
    calls = []
    hub = SimpleNamespace(load_dataset=lambda *names, **settings: calls.append((names, settings)) or ROWS)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert list(documents(source)) == [(row["id"], row["text"]) for row in ROWS]
    assert calls == [(chosen, {"split": split, "streaming": True})]
    assert next(read_records(source)).place == f"{source}, row 1"


@pytest.mark.parametrize(
    "source", ["owner/set:", "owner/set::train", "owner/set:a:", "owner/set:a:b:c", "owner/a.json", "owner/a.md"]
)
def test_what_is_no_name_of_the_hub_is_taken_for_a_file_that_is_not_there(source):
    with pytest.raises(StorageError) as caught:
        list(documents(source))
    assert str(caught.value) == (
        f"There is no file, folder or glob '{source}'. Name one, or a hub data set as owner/name, owner/name:split or "
        "owner/name:config:split."
    )


def test_a_path_of_that_shape_is_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "owner/set/a.jsonl", GOOD)
    assert list(documents("owner/set")) == [("good", "fine")]
    with pytest.raises(StorageError, match=r"There is no file, folder or glob 'owner/other\.jsonl'"):
        list(documents("owner/other.jsonl"))


def test_a_hub_that_fails_is_one_line(monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("No such thing.\nAnd more.")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(StorageError) as caught:
        list(read_records("owner/set"))
    assert str(caught.value) == (
        "There is no file 'owner/set', and as a data set of the hub it cannot be read: No such thing. "
        "Check the name, the configuration and the split (owner/name:config:split), and the network."
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'Run `pip install "activation-beacon\[train\]" datasets`'):
        list(read_records("owner/set"))


# --- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"context": "c", "question": "q", "answer": "a"}, ("c", "q", "a", ("a",))),
        ({"context": "", "question": "q", "answer": "a"}, ("", "q", "a", ("a",))),
        ({"question": "q", "answer": "a", "answers": ["a", "b"]}, ("", "q", "a", ("a", "b"))),
        ({"context": None, "question": "q", "answers": ["b", "c", "b"]}, ("", "q", "b", ("b", "c"))),
        ({"context": "c", "question": "q", "answers": {"text": ["b"], "answer_start": [3]}}, ("c", "q", "b", ("b",))),
        ({"context": "c", "question": "q", "answers": [{"text": "b"}, {"text": "d"}]}, ("c", "q", "b", ("b", "d"))),
    ],
)
def test_questions_are_read_with_all_their_answers(tmp_path, fields, expected):
    path = put(tmp_path, "a.jsonl", jsonl([{"id": 7, **fields}]))
    assert list(questions(path, on_error="stop")) == [Question("7", *expected)]


@pytest.mark.parametrize(
    ("fields", "why", "message"),
    [
        ({"answer": "a"}, "missing field", 'there is no field "question" (fields: answer)'),
        ({"question": "q"}, "missing field", 'there is no field "answer" (fields: question)'),
        ({"question": "q", "answers": []}, "missing field", 'there is no field "answer" (fields: question, answers)'),
        ({"question": "q", "answers": {"text": []}}, "missing field", 'there is no field "answer"'),
        ({"question": " ", "answer": "a"}, "empty question", 'the field "question" is empty'),
        ({"question": "q", "answer": ""}, "empty answer", 'the field "answer" is empty'),
        ({"question": "q", "answers": ["a", 3]}, "wrong type", 'the field "answers" is no text but a int'),
        ({"question": "q", "answer": "a", "context": ["c"]}, "wrong type", 'the field "context" is no text but a list'),
    ],
)
def test_a_bad_question_is_skipped_and_counted_or_stops_the_reading(tmp_path, fields, why, message):
    good = {"id": "g", "question": "q", "answer": "a"}
    path, report = put(tmp_path, "a.jsonl", jsonl([good, fields, good])), ReadReport()
    assert [question.id for question in questions(path, report=report)] == ["g", "g"]
    assert report.summary() == f"2 records read, 1 skipped: 1 {why} ({path}, line 2)."
    with pytest.raises(InputError) as caught:
        list(questions(path, on_error="stop"))
    assert str(caught.value).startswith(f"{path}, line 2: {message}")
