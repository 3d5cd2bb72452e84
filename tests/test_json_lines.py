"""Lines that grow: what a crash cut short is dropped, what is damaged is named."""

import pytest

from activation_beacon.errors import FileFormatError, StorageError
from activation_beacon.json_lines import append_lines, lines_from, read_lines


def test_lines_come_back_and_one_cut_short_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": "ä"}, 2])
    append_lines(path, [[3]])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"b": "\xc3')
    assert lines_from(path, 0) == ([{"a": "ä"}, 2, [3]], len(whole))
    assert path.read_bytes() != whole
    assert read_lines(path) == [{"a": "ä"}, 2, [3]]
    assert path.read_bytes() == whole


def test_what_came_since_is_read_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert lines_from(path, 0) == ([], 0)
    append_lines(path, [1])
    values, stop = lines_from(path, 0)
    append_lines(path, [2, 3])
    assert (values, lines_from(path, stop)[0]) == ([1], [2, 3])


@pytest.mark.parametrize(("start", "place"), [(0, "line 2 is"), (2, "line 1 after byte 2 is")])
def test_a_damaged_line_is_named(tmp_path, start, place):
    path = tmp_path / "lines.jsonl"
    path.write_text("1\n{2\n3\n")
    with pytest.raises(FileFormatError, match=rf"lines\.jsonl, {place} not JSON\. Remove that line"):
        lines_from(path, start)


def test_what_cannot_be_written_or_read_is_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"missing/lines\.jsonl cannot be written: .*What is finished is kept"):
        append_lines(tmp_path / "missing" / "lines.jsonl", [1])
    assert lines_from(tmp_path, 0) == ([], 0)  # a folder holds no lines
