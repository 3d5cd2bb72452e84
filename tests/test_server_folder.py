"""Contexts on disk: found again, whole or set aside, in a folder or in an object store; and caches in memory by bytes."""

import errno
import json
import os
import threading
import time

import pytest

from activation_beacon.cache import BeaconCache
from activation_beacon.errors import FileFormatError, InputError, StorageError
from activation_beacon.server import folder as folder_module
from activation_beacon.server.folder import Folder, Record, new_id
from activation_beacon.server.memory import Memory
from families import random_ids
from server_models import assert_same_cache, serving_model


@pytest.fixture(scope="module")
def context():
    return serving_model().compress(random_ids(60), ratio=4)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder(str(tmp_path / "contexts"))
    return Folder(f"memory://contexts-{tmp_path.name}")


def saved(folder, context, name="a book"):
    return folder.save(Record(new_id(), name, int(time.time())), context)


def test_a_context_is_found_again_by_another_server(folder, context):
    record = saved(folder, context)
    again = Folder(folder.url)
    assert again.list() == [record]
    assert again.find(record.id) == record
    assert_same_cache(again.load(record.id), context, atol=0)
    assert (record.tokens, record.beacons, record.ratios) == (60, 12, (4,))
    assert record.file_bytes > record.cache_bytes


def test_numbers_that_are_lost_are_made_anew(folder, context):
    record = saved(folder, context)
    folder.fs.rm_file(f"{folder.root}/{record.id}.json")
    found = Folder(folder.url).find(record.id)
    assert found.name == record.id
    assert found.beacons == record.beacons
    assert folder.fs.exists(f"{folder.root}/{record.id}.json")


def test_a_file_of_beacon_compress_is_served_too(tmp_path, context):
    folder = Folder(str(tmp_path))
    context.save(tmp_path / "book.beacon")
    assert [record.id for record in folder.list()] == ["book"]
    assert folder.find("book").tokens == 60


@pytest.fixture
def nobody_copies(monkeypatch):
    """Files as if nobody had written to them for long."""
    monkeypatch.setattr(folder_module, "STILL_S", -1.0)


def test_a_damaged_file_is_set_aside_and_reported(folder, context, nobody_copies):
    good, bad = saved(folder, context), saved(folder, context, "damaged one")
    path = f"{folder.root}/{bad.id}.beacon"
    content = bytearray(folder.fs.cat_file(path))
    content[-9] ^= 1
    folder.fs.pipe_file(path, bytes(content))
    with pytest.raises(FileFormatError):
        folder.load(bad.id)
    assert not folder.fs.exists(path)
    assert folder.fs.exists(f"{path}.damaged")
    for each in (folder, Folder(folder.url)):
        by_id = {record.id: record for record in each.list()}
        assert by_id[good.id].error is None
        assert by_id[bad.id].name == "damaged one"
        assert f"{bad.id}.beacon.damaged" in by_id[bad.id].error
    folder.delete(bad.id)
    assert [record.id for record in folder.list()] == [good.id]


def test_a_file_cut_short_is_noticed_when_listed(folder, context):
    record = saved(folder, context)
    path = f"{folder.root}/{record.id}.beacon"
    folder.fs.pipe_file(path, folder.fs.cat_file(path)[:-100])
    (found,) = Folder(folder.url).list()
    assert "damaged" in found.error


def test_a_file_that_is_still_being_copied_is_left_alone(folder, context):
    content = folder.fs.cat_file(f"{folder.root}/{saved(folder, context).id}.beacon")
    path = f"{folder.root}/copy.beacon"
    folder.fs.pipe_file(path, content[: len(content) // 2])
    assert folder.find("copy").error == "The file is damaged, or is still being written."
    with pytest.raises(FileFormatError):
        folder.load("copy")
    folder.fs.pipe_file(path, content)
    assert folder.find("copy").error is None
    assert_same_cache(folder.load("copy"), context, atol=0)


def test_a_damaged_file_is_read_once_for_any_number_of_looks(folder, context, monkeypatch):
    record = saved(folder, context)
    path = f"{folder.root}/{record.id}.beacon"
    folder.fs.pipe_file(path, folder.fs.cat_file(path)[:-100])
    looking, read = Folder(folder.url), []
    load = looking._loaded
    monkeypatch.setattr(looking, "_loaded", lambda each: read.append(each) or load(each))
    assert looking.list() == looking.list()
    assert read == [record.id]


def test_what_cannot_be_read_hides_no_other_context(tmp_path, context):
    folder = Folder(str(tmp_path))
    record = saved(folder, context)
    (tmp_path / "folder.beacon").mkdir()
    assert folder.list() == [record]
    assert folder.find("folder") is None
    context.save(tmp_path / "closed.beacon")

    def closed(context_id):
        raise StorageError(f"{context_id} cannot be read: Permission denied.")

    folder._read = closed
    assert {each.id: each.error for each in folder.list()} == {
        record.id: None,
        "closed": "closed cannot be read: Permission denied.",
    }


def test_what_is_deleted_while_it_is_written_stays_deleted(folder, context, monkeypatch):
    record, started, go_on = saved(folder, context), threading.Event(), threading.Event()
    write = folder._written

    def slow(*values):
        started.set()
        go_on.wait(10)
        return write(*values)

    monkeypatch.setattr(folder, "_written", slow)
    writing = threading.Thread(target=folder.replace, args=(record, context))
    writing.start()
    started.wait(10)
    deleting = threading.Thread(target=folder.delete, args=(record.id,))
    deleting.start()
    go_on.set()
    writing.join(10)
    deleting.join(10)
    assert folder.list() == []
    assert folder.replace(record, context) is None
    assert folder.list() == []


def test_a_batch_is_not_served(tmp_path, context):
    type(context).stack([context, context]).save(tmp_path / "two.beacon")
    folder = Folder(str(tmp_path))
    with pytest.raises(InputError, match="holds a batch of 2 contexts"):
        folder.load("two")
    assert folder.find("two").error is not None


def test_a_changed_file_has_another_version(folder, context):
    record = saved(folder, context)
    before = folder.version(record.id)
    assert before == Folder(folder.url).version(record.id)
    folder.save(record, serving_model().compress(random_ids(80), ratio=4))
    assert folder.version(record.id) != before
    assert folder.find(record.id).tokens == 80


@pytest.fixture(scope="module")
def longer():
    return serving_model().compress(random_ids(80), ratio=4)


def test_who_looks_while_a_context_is_saved_finds_its_name(folder, context, longer, monkeypatch):
    looking, seen = Folder(folder.url), []
    write = folder._write_numbers

    def watched(record):
        seen.append(looking.find(record.id))
        write(record)
        seen.append(looking.find(record.id))

    monkeypatch.setattr(folder, "_write_numbers", watched)
    record = folder.save(Record(new_id(), "a book", 17), context)
    grown = folder.save(record, longer)
    assert {(each.name, each.created) for each in seen if each is not None} == {("a book", 17)}
    assert grown.tokens == 80
    for each in (folder, looking, Folder(folder.url)):
        assert each.find(record.id) == grown


def test_killed_before_the_numbers_are_written_a_context_keeps_its_name(folder, context, longer, monkeypatch):
    record = folder.save(Record(new_id(), "a book", 17), context)

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "_write_numbers", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save(record, longer)
    with pytest.raises(KeyboardInterrupt):
        folder.save(Record(new_id(), "another book", 18), context)
    (found,) = Folder(folder.url).list()
    assert (found.id, found.name, found.created, found.tokens) == (record.id, "a book", 17, 80)


def test_a_context_that_is_replaced_while_it_is_examined_has_the_numbers_of_the_new_one(
    folder, context, longer, monkeypatch
):
    record = saved(folder, context)
    folder.fs.rm_file(f"{folder.root}/{record.id}.json")
    looking, replacements = Folder(folder.url), [longer]
    load = looking._read

    def slow(context_id):
        cache = load(context_id)
        if replacements:
            folder.save(record, replacements.pop())
        return cache

    monkeypatch.setattr(looking, "_read", slow)
    assert looking.find(record.id).tokens == 80
    for each in (folder, looking, Folder(folder.url)):
        assert (each.find(record.id).tokens, each.find(record.id).name) == (80, "a book")


def test_a_context_that_is_deleted_while_it_is_looked_at_is_gone(folder, context, monkeypatch):
    record, looking = saved(folder, context), Folder(folder.url)
    noted = looking._noted

    def late(context_id):
        known = noted(context_id)
        folder.delete(context_id)
        return known

    monkeypatch.setattr(looking, "_noted", late)
    assert looking.find(record.id) is not None  # it was there
    assert looking.find(record.id) is None
    other = saved(folder, context)
    folder.fs.rm_file(f"{folder.root}/{other.id}.json")
    assert looking.find(other.id) is None


def test_a_whole_file_in_the_place_of_a_damaged_one_is_served(folder, context):
    record = saved(folder, context)
    path = f"{folder.root}/{record.id}.beacon"
    content = folder.fs.cat_file(path)
    folder.fs.pipe_file(path, content[:-100])
    with pytest.raises(FileFormatError):
        folder.load(record.id)
    folder.fs.pipe_file(path, content)
    assert folder.find(record.id) == Folder(folder.url).find(record.id) == record


@pytest.mark.parametrize("bad_id", ["../secret", "a/b", "", "a" * 65, "a.b", "x\0y", "é"])
def test_no_path_of_a_clients_choosing_is_opened(folder, bad_id):
    assert folder.find(bad_id) is None
    with pytest.raises(InputError, match="letters, digits"):
        folder.load(bad_id)


def test_half_written_files_are_removed_when_they_are_old(tmp_path):
    old, young = tmp_path / ".a.beacon.12ab.part", tmp_path / ".b.beacon.12ab.part"
    for part in (old, young):
        part.write_bytes(b"half")
    long_ago = time.time() - 2 * folder_module.PART_AGE_S
    os.utime(old, (long_ago, long_ago))
    assert Folder(str(tmp_path)).list() == []
    assert not old.exists()
    assert young.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        Folder(str(tmp_path / "file" / "contexts"))
    with pytest.raises(StorageError, match="cannot be opened"):
        Folder("nosuchstore://bucket")


class Sized:
    def __init__(self, cache_bytes):
        self.cache_bytes = cache_bytes


def test_the_least_recently_used_goes_first():
    memory = Memory(100)
    for key in "abc":
        memory.put(key, Sized(30))
    assert memory.get("a") is not None
    memory.put("d", Sized(30))
    assert list(memory) == ["c", "a", "d"]
    memory.put("big", Sized(101))
    assert "big" not in memory
    assert memory.num_bytes == 90
    memory.put("a", Sized(10))
    assert memory.num_bytes == 70
    memory.drop("nothing")
    assert memory.get("b") is None


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "/secret/place/.ctx.json.0a1b2c3d.part")


def test_in_a_full_folder_files_without_numbers_are_served_and_deleted(folder, context, monkeypatch):
    record = saved(folder, context)
    folder.fs.rm_file(f"{folder.root}/{record.id}.json")
    looking = Folder(folder.url)
    monkeypatch.setattr(folder_module, "write_text", full)
    monkeypatch.setattr(looking.fs, "pipe_file", full)
    assert looking.find(record.id).tokens == 60
    assert [each.error for each in looking.list()] == [None]
    assert_same_cache(looking.load(record.id), context, atol=0)
    looking.delete(record.id)
    assert not looking.has(record.id)


@pytest.mark.parametrize(
    ("broken", "act"),
    [
        ("ls", lambda folder, _: folder.list()),
        ("ls", lambda folder, _: folder.num_bytes()),
        ("info", lambda folder, known: folder.find(known)),
        ("info", lambda folder, known: folder.version(known)),
        ("info", lambda folder, known: folder.has(known)),
        ("exists", lambda folder, _: folder.find("other")),
        ("exists", lambda folder, known: folder.delete(known)),
        ("rm_file", lambda folder, known: folder.delete(known)),
    ],
)
def test_what_a_folder_does_not_allow_is_one_error_without_its_place(folder, context, monkeypatch, broken, act):
    record = saved(folder, context)
    monkeypatch.setattr(folder.fs, broken, full)
    with pytest.raises(StorageError) as caught:
        act(folder, record.id)
    assert str(caught.value) == "The folder of contexts cannot be used: No space left on device. Ask its operator."


def test_errors_do_not_say_where_the_folder_is(folder, context, monkeypatch, nobody_copies):
    record = saved(folder, context)
    path = f"{folder.root}/{record.id}.beacon"
    folder.fs.pipe_file(path, folder.fs.cat_file(path)[:-100])
    with pytest.raises(FileFormatError) as caught:
        folder.load(record.id)
    assert str(caught.value).startswith(f"{record.id}.beacon is damaged")
    monkeypatch.setattr(BeaconCache, "save", lambda _cache, path: full(path))
    with pytest.raises(StorageError) as caught:
        saved(folder, context)
    assert "/" not in str(caught.value)
    assert "No space left on device" in str(caught.value)


def test_names_that_files_have_while_they_are_written_are_not_told():
    text = "/a b/.ctx_1.beacon.0a1b2c3d.part cannot be written: /a b is closed."
    assert folder_module._without(text, "/a b") == "ctx_1.beacon cannot be written: the folder is closed."


@pytest.mark.parametrize(
    "values",
    [
        {"created": "yesterday"},
        {"created": None},
        {"tokens": 1.5},
        {"name": ["a"]},
        {"ratios": "4"},
        {"ratios": [4, "8"]},
        {"error": 7},
        {"quantized_bits": "8"},
    ],
)
def test_numbers_of_wrong_types_are_made_anew(folder, context, values):
    good, bad = saved(folder, context), saved(folder, context)
    path = f"{folder.root}/{bad.id}.json"
    folder.fs.pipe_file(path, json.dumps({**json.loads(folder.fs.cat_file(path)), **values}).encode())
    listed = {each.id: each for each in Folder(folder.url).list()}
    assert listed[good.id] == good
    assert (listed[bad.id].name, listed[bad.id].ratios, listed[bad.id].error) == (bad.id, (4,), None)
