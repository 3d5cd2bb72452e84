"""Files are whole or not there: nothing half-written stays, nothing damaged is read."""

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from activation_beacon import BeaconCache, BeaconConfig, files
from activation_beacon.errors import BeaconError, FileFormatError, MismatchError, StorageError, reason
from activation_beacon.files import build_folder, read_context_file, whole_file, write_context_file, write_text
from families import VOCABULARY, random_ids, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=1)


def model_of(config: BeaconConfig, seed: int = 0):
    return with_beacons("llama", config, seed)


@functools.cache
def beacon_model():
    return model_of(CONFIG)


def context_of(length: int = 38) -> BeaconCache:
    return beacon_model().compress(random_ids(length), ratio=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "book.beacon"
    context_of().save(path)
    return path


def assert_same(one: BeaconCache, other: BeaconCache) -> None:
    assert (one.rows, one.policy, one.config, one.num_slots) == (
        other.rows,
        other.policy,
        other.config,
        other.num_slots,
    )
    assert (one.base_fingerprint, one.adapter_fingerprint) == (other.base_fingerprint, other.adapter_fingerprint)
    assert torch.equal(one.token_ids, other.token_ids)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        pairs = list(zip(mine.named_tensors(), theirs.named_tensors(), strict=True))
        assert all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1]) for a, b in pairs)


# --- contexts there and back -------------------------------------------------------------------------------------------------

POLICIES = {
    "one ratio": {"ratio": 4},
    "a sequence": {"ratio": (2, 8, 4, 4)},
    "auto": {},
    "a budget": {"budget": 40},
    "spans": {"ratio": 8, "spans": [(3, 9, None), (20, 21, 2)]},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_context_comes_back_as_it_was_and_goes_on_alike(tmp_path, name):
    context = beacon_model().compress(random_ids(60), **POLICIES[name])
    num_bytes = context.save(tmp_path / "book.beacon")
    assert num_bytes == (tmp_path / "book.beacon").stat().st_size
    loaded = BeaconCache.load(tmp_path / "book.beacon", beacon_model())
    assert_same(loaded, context)
    assert str(loaded) == str(context)
    answers = [beacon_model().generate(random_ids(3), context=c, max_new_tokens=20) for c in (loaded, context)]
    assert torch.equal(*answers)
    for cache in (loaded, context):
        beacon_model().compress(random_ids(20, 5), cache=cache)
    assert_same(loaded, context)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.quantize(8),
        lambda c: c.quantize(4),
        lambda c: c.to(torch.bfloat16),
        lambda c: c.to(torch.bfloat16).quantize(8),
        lambda c: BeaconCache.stack([c, context_of(5), context_of(20)]),
        lambda c: BeaconCache.stack([c, context_of(60)]).row(0),
        lambda c: context_of(5),
        lambda c: context_of(5).quantize(8),
    ],
)
def test_contexts_of_every_kind_come_back_as_they_were(tmp_path, change):
    context = change(context_of())
    context.save(tmp_path / "book.beacon")
    loaded = BeaconCache.load(tmp_path / "book.beacon")
    assert_same(loaded, context)
    assert loaded.quantized_bits == context.quantized_bits
    assert loaded.cache_bytes == context.cache_bytes


def test_a_context_loads_without_a_model(saved):
    assert_same(BeaconCache.load(str(saved)), context_of())


def test_a_file_may_be_loaded_and_saved_over(tmp_path, saved):
    path = Path(shutil.copy(saved, tmp_path / "book.beacon"))
    context = BeaconCache.load(path, beacon_model())
    beacon_model().compress(random_ids(40, 5), cache=context)
    context.save(path)
    assert_same(BeaconCache.load(path), context)


def test_a_file_that_goes_away_leaves_what_was_loaded(tmp_path, saved):
    path = Path(shutil.copy(saved, tmp_path / "book.beacon"))
    context = BeaconCache.load(path)
    path.unlink()
    assert_same(context, context_of())


def test_reading_executes_nothing_and_the_file_is_plain_safetensors(saved):
    tensors = load_file(saved)
    assert set(tensors) == {"token_ids", *(f"layers.{i}.{name}" for i in range(3) for name in ("keys", "values"))}
    with saved.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = header["__metadata__"]
    assert metadata["format"] == "activation-beacon context"
    assert len(metadata["sha256"]) == 64
    described = json.loads(metadata["header"])
    assert described["version"] == 1
    assert described["rows"][0]["tokens_seen"] == 38
    assert described["config"]["chunk_size"] == 16


# --- damaged and foreign files -----------------------------------------------------------------------------------------------


def regions(data: bytes) -> dict[str, range]:
    size = struct.unpack("<Q", data[:8])[0]
    return {"length": range(8), "header": range(8, 8 + size), "tensors": range(8 + size, len(data))}


def flips(data: bytes) -> list[tuple[int, int]]:
    """(byte, bit) in every region: all of the length's, and a choice of the others'."""
    chosen = random.Random(0)
    places = regions(data)
    return (
        [(byte, bit) for byte in places["length"] for bit in range(8)]
        + [(byte, chosen.randrange(8)) for byte in chosen.sample(places["header"], 110)]
        + [(byte, chosen.randrange(8)) for byte in chosen.sample(places["tensors"], 60)]
        + [(len(data) - 1, 7), (places["tensors"].start, 0), (places["header"].stop - 1, 0), (8, 1)]
    )


@pytest.mark.parametrize("region", ["length", "header", "tensors"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, saved, region):
    data, path = saved.read_bytes(), tmp_path / "bad.beacon"
    tried = 0
    for byte, bit in flips(data):
        if byte not in regions(data)[region]:
            continue
        path.write_bytes(data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :])
        with pytest.raises(FileFormatError, match=r"bad\.beacon ") as caught:
            BeaconCache.load(path)
        assert "\n" not in str(caught.value), (byte, bit)
        tried += 1
    assert tried >= 60


def test_every_byte_of_the_metadata_is_guarded(tmp_path, saved):
    data, path = saved.read_bytes(), tmp_path / "bad.beacon"
    for key in (
        b'"sha256"',
        b'"header"',
        b'"format"',
        b'"__metadata__"',
        b'"token_ids"',
        b'"dtype"',
        b'"F32"',
        b'"I64"',
    ):
        start = data.index(key)
        for byte in range(start, start + len(key)):
            for bit in (0, 1, 2, 5):
                path.write_bytes(data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :])
                with pytest.raises(FileFormatError):
                    BeaconCache.load(path)


def test_a_truncated_file_is_found_wherever_it_ends(tmp_path, saved):
    data, path = saved.read_bytes(), tmp_path / "bad.beacon"
    start = regions(data)["tensors"].start
    ends = [0, 1, 7, 8, 9, 100, start - 1, start, start + 1, (start + len(data)) // 2, len(data) - 8, len(data) - 1]
    for end in ends:
        path.write_bytes(data[:end])
        with pytest.raises(FileFormatError, match=r"is damaged, cut short, or not a compressed context \(") as caught:
            BeaconCache.load(path)
        assert str(caught.value).endswith("Compress the text again.")
    path.write_bytes(data + b"\0")
    with pytest.raises(FileFormatError):
        BeaconCache.load(path)


@pytest.mark.parametrize(
    "contents",
    [b"", b"Once upon a time there was a text file.\n" * 20, b"\0" * 100, b"\xff" * 100, b"PK\x03\x04" * 50, b"{}"],
)
def test_other_files_are_refused(tmp_path, contents):
    path = tmp_path / "other.beacon"
    path.write_bytes(contents)
    with pytest.raises(FileFormatError, match=r"other\.beacon is damaged, cut short, or not a compressed context"):
        BeaconCache.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"keys": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=metadata)
        with pytest.raises(FileFormatError) as caught:
            BeaconCache.load(tmp_path / "model.safetensors")
        assert str(caught.value) == (
            f"{tmp_path / 'model.safetensors'} is a safetensors file but not a compressed context. Name a *.beacon file."
        )


@pytest.mark.parametrize(("name", "what"), [("", "is a folder"), ("missing.beacon", "does not exist")])
def test_what_is_no_file_is_named(tmp_path, name, what):
    with pytest.raises(StorageError) as caught:
        BeaconCache.load(tmp_path / name)
    assert str(caught.value) == (f"{tmp_path / name} {what}. Name a file that `beacon compress` or context.save wrote.")
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, OSError)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """safetensors opens it twice, by its name: the header of the one file, the data of the other."""
    path, other = tmp_path / "book.beacon", tmp_path / "other.beacon"
    context_of().save(path)
    context_of(70).save(other)
    whole, opened = files.safe_open, []

    def replaced_at_first(name, **options):
        opened.append(name)
        if len(opened) == 1:
            other.replace(path)
            raise RuntimeError("file size is smaller than the required mapping size")
        return whole(name, **options)

    monkeypatch.setattr(files, "safe_open", replaced_at_first)
    assert BeaconCache.load(path).tokens_seen == 70
    assert len(opened) == 2


def test_a_good_file_that_the_system_cannot_open_now_is_not_damaged(saved, monkeypatch):
    def always(name, **options):
        raise RuntimeError("unable to open file <book>: Too many open files (24)")

    monkeypatch.setattr(files, "safe_open", always)
    with pytest.raises(StorageError, match="cannot be read: unable to open file"):
        BeaconCache.load(saved)


@pytest.mark.parametrize("name", ["a" * 248 + ".beacon", "好" * 78 + ".beacon"])
def test_names_as_long_as_a_file_system_allows_are_names_of_contexts(tmp_path, name):
    context_of().save(tmp_path / name)
    assert BeaconCache.load(tmp_path / name).tokens_seen == 38
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_with_a_long_name_is_built_and_what_was_left_of_it_removed(tmp_path, monkeypatch):
    target = tmp_path / ("a" * 250)
    monkeypatch.setattr(files, "_is_running", lambda process: False)
    left = files._aside(target, f"{files._host()}-1.")
    left.mkdir()
    build_folder("that", target, lambda folder: (folder / "file").touch())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_file_that_may_not_be_read_is_named(tmp_path, saved):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = Path(shutil.copy(saved, tmp_path / "book.beacon"))
    path.chmod(0)
    with pytest.raises(StorageError, match=r"book\.beacon cannot be read: "):
        BeaconCache.load(path)


def test_another_format_version_is_refused(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(files, "CONTEXT_VERSION", 2)
    context_of().save(tmp_path / "new.beacon")
    with pytest.raises(FileFormatError, match=r"book\.beacon has format version 1; this release reads 2\. Use the one"):
        BeaconCache.load(saved)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match=r"new\.beacon has format version 2; this release reads 1\. Use the one"):
        BeaconCache.load(tmp_path / "new.beacon")


@pytest.mark.parametrize(("header", "what"), [("[]", "no JSON object"), ("{", "no JSON"), ("[" * 100_000, "no JSON")])
def test_a_header_of_another_form_is_refused(tmp_path, saved, header, what):
    _, tensors = read_context_file(saved)
    metadata = {"format": files.CONTEXT_FORMAT, "header": header, "sha256": files._digest(header, tensors)}
    save_file(tensors, tmp_path / "bad.beacon", metadata=metadata)
    with pytest.raises(FileFormatError) as caught:
        BeaconCache.load(tmp_path / "bad.beacon")
    assert str(caught.value) == f"{tmp_path / 'bad.beacon'} is damaged: its header is {what}. Compress the text again."


HEADER_CHANGES = {
    "no rows": lambda header, tensors: header.pop("rows"),
    "rows of nothing": lambda header, tensors: header.update(rows=[]),
    "rows that are numbers": lambda header, tensors: header.update(rows=[3]),
    "a longer row": lambda header, tensors: header["rows"][0].update(tokens_seen=39),
    "another number of sinks": lambda header, tensors: header["rows"][0].update(num_sinks=7),
    "a row of other chunks": lambda header, tensors: header["rows"][0].update(chunk_size=8),
    "chunks beyond the text": lambda header, tensors: header["rows"][0].update(chunks=[[4, 4, 0]] * 3),
    "a ratio that the adapter does not know": lambda header, tensors: header["policy"].update(ratio=16),
    "a tensor too many": lambda header, tensors: tensors.update({"layers.3.keys": tensors["layers.1.keys"].clone()}),
    "a strange chunk": lambda header, tensors: header["rows"][0].update(chunks=[[4]]),
    "a strange ratio": lambda header, tensors: header["policy"].update(ratio={"a": 1}),
    "an unknown policy": lambda header, tensors: header["policy"].update(speed=1),
    "a bad config": lambda header, tensors: header["config"].update(chunk_size=7),
    "an unknown setting": lambda header, tensors: header["config"].update(window=7),
    "fewer layers": lambda header, tensors: header.update(num_layers=2),
    "more layers": lambda header, tensors: header.update(num_layers=4),
    "layers in words": lambda header, tensors: header.update(num_layers="three"),
    "bits without codes": lambda header, tensors: header.update(quantized_bits=8),
    "no fingerprint": lambda header, tensors: header.pop("adapter_fingerprint"),
    "no ids": lambda header, tensors: tensors.pop("token_ids"),
    "ids of another length": lambda header, tensors: tensors.update(token_ids=torch.zeros(1, 3, dtype=torch.long)),
    "a layer that is missing": lambda header, tensors: tensors.pop("layers.1.keys"),
    "values that are missing": lambda header, tensors: tensors.pop("layers.1.values"),
    "a shorter layer": lambda header, tensors: tensors.update({"layers.1.keys": tensors["layers.1.keys"][:, :, 1:]}),
    "shorter values": lambda header, tensors: tensors.update({"layers.1.values": tensors["layers.1.values"][:, :, 1:]}),
    "flat keys": lambda header, tensors: tensors.update({"layers.1.keys": tensors["layers.1.keys"].flatten()}),
    "ids that are no integers": lambda header, tensors: tensors.update(token_ids=tensors["token_ids"].float()),
    "two batches": lambda header, tensors: tensors.update(
        {name: tensor.repeat(2, 1, 1, 1) for name, tensor in tensors.items() if "layers" in name}
    ),
}


@pytest.mark.parametrize("name", HEADER_CHANGES)
def test_a_header_that_does_not_fit_its_tensors_is_refused(tmp_path, saved, name):
    """Files with a right hash, as a faulty program would write them."""
    header, tensors = read_context_file(saved)
    header.pop("version")
    HEADER_CHANGES[name](header, tensors)
    write_context_file(tmp_path / "bad.beacon", header, tensors)
    with pytest.raises(FileFormatError, match=r"bad\.beacon has a header that does not fit its contents \(") as caught:
        BeaconCache.load(tmp_path / "bad.beacon", beacon_model())
    assert str(caught.value).endswith("). Compress the text again.")


def row_of(header) -> dict:
    return header["rows"][0]


WRONG_VALUES = {
    "a base of no name": (
        lambda h, t: h.update(base_fingerprint=None),
        "base_fingerprint must be a string; got None",
    ),
    "a base that is a number": (
        lambda h, t: h.update(base_fingerprint=1),
        "base_fingerprint must be a string; got 1",
    ),
    "an adapter that is a list": (
        lambda h, t: h.update(adapter_fingerprint=[]),
        "adapter_fingerprint must be a string; got []",
    ),
    "no adapter": (lambda h, t: h.pop("adapter_fingerprint"), "adapter_fingerprint is missing"),
    "settings that are a list": (lambda h, t: h.update(config=[]), "config must be an object; got []"),
    "a ratio in words": (
        lambda h, t: row_of(h).update(chunks=[["4", 4, 0]] * 2),
        "a chunk's ratio must be one of 2, 4, 8; got '4'",
    ),
    "a ratio with a fraction": (
        lambda h, t: row_of(h).update(chunks=[[4.0, 4, 0]] * 2),
        "a chunk's ratio must be one of 2, 4, 8; got 4.0",
    ),
    "no ratio": (
        lambda h, t: row_of(h).update(chunks=[[None, 4, 0]] * 2),
        "a chunk's ratio must be one of 2, 4, 8; got None",
    ),
    "a ratio of others": (
        lambda h, t: row_of(h).update(chunks=[[16, 4, 0]] * 2),
        "a chunk's ratio must be one of 2, 4, 8; got 16",
    ),
    "beacons in words": (
        lambda h, t: row_of(h).update(chunks=[[4, "4", 0]] * 2),
        "a chunk's number of beacons must be an int within 0..4; got '4'",
    ),
    "more beacons than a chunk has": (
        lambda h, t: row_of(h).update(chunks=[[8, 4, 0]] * 2),
        "a chunk's number of beacons must be an int within 0..2; got 4",
    ),
    "fewer raw entries than none": (
        lambda h, t: row_of(h).update(chunks=[[4, 4, -1]] * 2),
        "a chunk's number of raw entries must be an int within 0..16; got -1",
    ),
    "a chunk of one number": (
        lambda h, t: row_of(h).update(chunks=[4, 4]),
        "a chunk must be its ratio, beacons and raw entries; got 4",
    ),
    "chunks by name": (lambda h, t: row_of(h).update(chunks={}), "chunks must be a list; got {}"),
    "tokens in words": (
        lambda h, t: row_of(h).update(tokens_seen="38"),
        "tokens_seen must be an int of at least 0; got '38'",
    ),
    "tokens with a fraction": (
        lambda h, t: row_of(h).update(tokens_seen=38.0),
        "tokens_seen must be an int of at least 0; got 38.0",
    ),
    "tokens that are true": (
        lambda h, t: row_of(h).update(tokens_seen=True),
        "tokens_seen must be an int of at least 0; got True",
    ),
    "sinks of others": (
        lambda h, t: row_of(h).update(num_sinks=2, tokens_seen=37),
        "num_sinks must be an int within 0..1; got 2",
    ),
    "sinks below none": (
        lambda h, t: row_of(h).update(num_sinks=-1),
        "num_sinks must be an int within 0..1; got -1",
    ),
    "an unknown number": (lambda h, t: row_of(h).update(speed=1), "a row has a number 'speed' that is not known"),
    "bits of 0": (lambda h, t: h.update(quantized_bits=0), "quantized_bits must be 8, 4 or null; got 0"),
    "bits below 0": (lambda h, t: h.update(quantized_bits=-1), "quantized_bits must be 8, 4 or null; got -1"),
    "half bits": (lambda h, t: h.update(quantized_bits=3.5), "quantized_bits must be 8, 4 or null; got 3.5"),
    "eight bits and no int": (
        lambda h, t: h.update(quantized_bits=8.0),
        "quantized_bits must be 8, 4 or null; got 8.0",
    ),
    "bits in a list": (lambda h, t: h.update(quantized_bits=[8]), "quantized_bits must be 8, 4 or null; got [8]"),
    "layers without end": (
        lambda h, t: h.update(num_layers=10**12),
        "num_layers must be an int within 1..10000; got 1000000000000",
    ),
    "no layers": (lambda h, t: h.update(num_layers=0), "num_layers must be an int within 1..10000; got 0"),
    "lengths in words": (
        lambda h, t: h.update(context_lengths=["3"]),
        "a length of a context must be an int of at least 0; got '3'",
    ),
    "lengths below none": (
        lambda h, t: h.update(context_lengths=[-3]),
        "a length of a context must be an int of at least 0; got -3",
    ),
    "more lengths than rows": (
        lambda h, t: h.update(context_lengths=[3, 3]),
        "there are not as many policies, or lengths of contexts, as rows",
    ),
    "a policy that is a number": (
        lambda h, t: h.update(policies=[7]),
        "a policy must be of ratio, budget and spans; got 7",
    ),
    "ids below 0": (lambda h, t: t["token_ids"].fill_(-2), "ids must be 0 or more; got -2"),
    "ids beyond the vocabulary": (
        lambda h, t: t["token_ids"].fill_(VOCABULARY),
        f"ids must be within 0..{VOCABULARY - 1}; got {VOCABULARY}",
    ),
    "entries that are integers": (
        lambda h, t: t.update({"layers.1.keys": t["layers.1.keys"].long()}),
        "a layer holds [(1, 2, 15, 8), (1, 2, 15, 8)] where 15 entries a row are due",
    ),
    "other dims": (
        lambda h, t: t.update({name: x.repeat(1, 1, 1, 2) for name, x in t.items() if "layers.1." in name}),
        "layer 1 must have (heads, dims) (2, 8) as the model; got (2, 16)",
    ),
    "other dims of values": (
        lambda h, t: t.update({"layers.2.values": t["layers.2.values"][..., :4]}),
        "layer 2 must have (heads, dims) (2, 8) as the model; got (2, 4)",
    ),
    "other heads": (
        lambda h, t: t.update({name: x[:, :1] for name, x in t.items() if "layers" in name}),
        "layer 0 must have (heads, dims) (2, 8) as the model; got (1, 8)",
    ),
    "fewer layers in all": (
        lambda h, t: (h.update(num_layers=2), t.pop("layers.2.keys"), t.pop("layers.2.values")),
        "num_layers must be the model's 3; got 2",
    ),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_of_a_header_that_can_not_be_are_named_in_one_line(tmp_path, saved, name):
    header, tensors = read_context_file(saved)
    header.pop("version")
    change, why = WRONG_VALUES[name]
    change(header, tensors)
    write_context_file(tmp_path / "bad.beacon", header, tensors)
    with pytest.raises(FileFormatError) as caught:
        BeaconCache.load(tmp_path / "bad.beacon", beacon_model())
    bad = tmp_path / "bad.beacon"
    assert str(caught.value) in (
        f"{bad} has a header that does not fit its contents ({why}). Compress the text again.",
        f"{bad}: The context does not fit the model ({why}). Compress the text again.",
    )


WRONG_CODES = {
    "codes of another type": lambda t: t.update({"layers.1.keys.codes": t["layers.1.keys.codes"].int()}),
    "codes of fewer values": lambda t: t.update({"layers.1.keys.codes": t["layers.1.keys.codes"][..., :2]}),
    "scales of another type": lambda t: t.update({"layers.1.values.scale": t["layers.1.values.scale"].float()}),
    "groups of other sizes": lambda t: t.update(
        {name: t[name].repeat(1, 1, 1, 3) for name in ("layers.1.keys.scale", "layers.1.keys.least")}
    ),
    "no groups": lambda t: t.update(
        {name: t[name][..., :0] for name in ("layers.1.keys.scale", "layers.1.keys.least")}
    ),
    "a least value for each two scales": lambda t: t.update(
        {"layers.1.keys.scale": t["layers.1.keys.scale"].repeat(1, 1, 1, 2)}
    ),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", WRONG_CODES)
def test_codes_that_cannot_be_unpacked_are_refused(tmp_path, name, bits):
    context_of().quantize(bits).save(tmp_path / "book.beacon")
    header, tensors = read_context_file(tmp_path / "book.beacon")
    header.pop("version")
    WRONG_CODES[name](tensors)
    write_context_file(tmp_path / "bad.beacon", header, tensors)
    with pytest.raises(
        FileFormatError, match=r"bad\.beacon has a header that does not fit its contents \(a layer holds"
    ):
        BeaconCache.load(tmp_path / "bad.beacon")


def test_bits_that_are_not_those_of_the_codes_are_refused(tmp_path):
    context_of().quantize(8).save(tmp_path / "book.beacon")
    header, tensors = read_context_file(tmp_path / "book.beacon")
    header.pop("version")
    header["quantized_bits"] = 4
    write_context_file(tmp_path / "bad.beacon", header, tensors)
    with pytest.raises(FileFormatError, match="does not fit its contents"):
        BeaconCache.load(tmp_path / "bad.beacon")


def test_contexts_of_another_maker_are_refused(saved):
    others = {
        "base model": model_of(CONFIG, seed=1),
        "adapter": model_of(BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=2)),
    }
    for what, other in others.items():
        with pytest.raises(MismatchError) as caught:
            BeaconCache.load(saved, other)
        kind = what.split()[0]
        assert str(caught.value) == (
            f"The context was made with another {what} (fingerprint {getattr(beacon_model(), f'{kind}_fingerprint')[:16]}, "
            f"this one has {getattr(other, f'{kind}_fingerprint')[:16]}). "
            "Compress the text again with this model, or load the one that made it."
        )
    trained = model_of(CONFIG)
    with torch.no_grad():
        trained.beacon_embedding.add_(0.1)
    with pytest.raises(MismatchError, match="made with another adapter"):
        BeaconCache.load(saved, trained)


def test_a_context_goes_to_the_dtype_of_its_model(saved):
    half = model_of(CONFIG).to(torch.bfloat16)
    context = BeaconCache.load(saved, half)
    assert {layer.keys.dtype for layer in context.layers} == {torch.bfloat16}
    assert half.generate(random_ids(3), context=context, max_new_tokens=4).shape == (1, 7)


def test_an_empty_cache_comes_back_empty(tmp_path):
    beacon_model().new_cache(ratio=4).save(tmp_path / "empty.beacon")
    loaded = BeaconCache.load(tmp_path / "empty.beacon", beacon_model())
    assert (loaded.tokens_seen, loaded.num_slots) == (0, 0)
    beacon_model().compress(random_ids(38), cache=loaded)
    assert_same(loaded, context_of())


# --- writing -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unchanged(folder: Path):
    """Nothing in a folder changes, and nothing is left behind."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    yield
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(tensors, path, metadata=None):
    Path(path).write_bytes(b"half")
    full_disk()


@pytest.mark.parametrize(
    ("where", "what", "stub"),
    [
        (files, "save_file", full_disk),
        (files, "save_file", half_a_file),
        (os, "fsync", full_disk),
        (Path, "replace", full_disk),
        (os, "open", full_disk),
    ],
)
@pytest.mark.parametrize("is_old", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, saved, monkeypatch, where, what, stub, is_old):
    path = tmp_path / "book.beacon"
    if is_old:
        shutil.copy(saved, path)
    monkeypatch.setattr(where, what, stub)
    with unchanged(tmp_path), pytest.raises(StorageError) as caught:
        context_of(20).save(path)
    assert str(caught.value) == (
        f"{path} cannot be written: No space left on device. Nothing was changed; free space or choose another place."
    )
    monkeypatch.undo()
    context_of(20).save(path)
    assert BeaconCache.load(path).tokens_seen == 20


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_while_writing_leaves_nothing(tmp_path, saved, monkeypatch, stopped):
    shutil.copy(saved, tmp_path / "book.beacon")

    def interrupt(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise stopped

    monkeypatch.setattr(files, "save_file", interrupt)
    with unchanged(tmp_path), pytest.raises(stopped):
        context_of(20).save(tmp_path / "book.beacon")


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can be mounted by root on Linux only")
    if (mounted := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    try:
        context_of(5).save(disk / "book.beacon")
        with unchanged(disk), pytest.raises(StorageError, match=r"book\.beacon cannot be written: .*No space left"):
            BeaconCache.stack([context_of(60)] * 8).save(disk / "book.beacon")
        assert BeaconCache.load(disk / "book.beacon").tokens_seen == 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(StorageError) as caught:
        context_of(5).save(tmp_path / "no" / "book.beacon")
    assert str(caught.value) == (
        f"{tmp_path / 'no' / 'book.beacon'} cannot be written: No such file or directory. "
        "Nothing was changed; free space or choose another place."
    )


def test_a_folder_in_the_files_place_is_left(tmp_path):
    (tmp_path / "book.beacon").mkdir()
    with pytest.raises(StorageError, match="cannot be written: Is a directory"):
        context_of(5).save(tmp_path / "book.beacon")
    assert [path.name for path in tmp_path.iterdir()] == ["book.beacon"]


def test_files_get_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "x")
        context_of(5).save(tmp_path / "book.beacon")
    finally:
        os.umask(before)
    for name in ("text", "book.beacon"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_keeps_its_rights_when_it_is_written_anew(tmp_path, saved, mode):
    path = Path(shutil.copy(saved, tmp_path / "book.beacon"))
    path.chmod(mode)
    context_of(5).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert BeaconCache.load(path).tokens_seen == 5


def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path = tmp_path / "text"
    path.write_text("old")
    path.chmod(0o400)
    with whole_file(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_text("new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o400)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path, is_there):
    real, link = tmp_path / "disk" / "real", tmp_path / "here" / "link"
    real.parent.mkdir()
    link.parent.mkdir()
    if is_there:
        real.write_text("old")
    link.symlink_to("../disk/real")
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert [path.name for folder in (real.parent, link.parent) for path in folder.iterdir()] == ["real", "link"]


@pytest.mark.parametrize("is_linked", [False, True])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, is_linked):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    target = tmp_path / "link" if is_linked else pipe
    if is_linked:
        target.symlink_to(pipe)
    with pytest.raises(StorageError) as caught:
        write_text(target, "new")
    assert str(caught.value) == (
        f"{target} is a device, a pipe or the like, which a file cannot take the place of. Name a file."
    )
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == (["link", "pipe"] if is_linked else ["pipe"])


def test_an_error_names_the_link_that_was_asked_for(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "no" / "real")
    with pytest.raises(StorageError, match=r"^\S+/link cannot be written: No such file or directory\."):
        write_text(tmp_path / "link", "new")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("\n one\ntwo"), "one"),
        (ValueError("  \n"), "ValueError"),
        (OSError(), "OSError"),
        (KeyError(), "KeyError"),
        (OSError(errno.EIO, ""), "[Errno 5]"),
    ],
)
def test_the_reason_is_one_line_even_of_an_error_without_words(error, expected):
    assert reason(error) == expected


def test_errors_of_ours_pass_through_whole_file(tmp_path):
    with unchanged(tmp_path), pytest.raises(FileFormatError, match="ours"), whole_file(tmp_path / "x"):
        raise FileFormatError("ours")


# --- folders ---------------------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "a").write_text("a")
    (folder / "b").mkdir()


def test_a_folder_is_built_whole(tmp_path):
    for target in (tmp_path / "new", tmp_path / "deep" / "er" / "new", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        build_folder("source", target, fill)
        assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "new"]


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_in_use_is_left_as_it_is(tmp_path, is_file):
    target = tmp_path / "target"
    if is_file:
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with pytest.raises(StorageError) as caught:
        build_folder("source", target, fill)
    assert str(caught.value) == (
        f"{target} exists already and is not empty. Choose another folder for what comes of source."
    )
    assert (target if is_file else target / "mine").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    def fail(folder):
        fill(folder)
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError
    with pytest.raises(expected) as caught:
        build_folder("source", tmp_path / "new", fail)
    if expected is StorageError:
        assert str(caught.value) == (
            f"{tmp_path / 'new'} cannot be written: No space left on device. "
            "Nothing was changed; free space or choose another place."
        )
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from activation_beacon.files import build_folder

def die(_):
    os.kill(os.getpid(), signal.SIGKILL)

place = Path(sys.argv[1])
build_folder("source", place / "new", lambda _: build_folder("source", place / "other", die))
"""


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a process left that was killed when it built the folders new and other."""
    place = tmp_path_factory.mktemp("left")
    done = subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    return place


def names_aside(place: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in place.glob(".*.part"))


def test_what_a_killed_process_left_of_a_folder_is_removed_when_it_is_built_again(left, tmp_path):
    place = shutil.copytree(left, tmp_path / "place")
    assert names_aside(place) == ["new", "other"]
    build_folder("source", place / "new", fill)
    assert names_aside(place) == ["other"]


def test_what_another_machine_has_under_way_is_left_alone(left, tmp_path, monkeypatch):
    place = shutil.copytree(left, tmp_path / "place")
    monkeypatch.setattr("platform.node", lambda: "another")
    build_folder("source", place / "new", fill)
    assert names_aside(place) == ["new", "other"]


def test_what_a_live_process_has_under_way_is_left_alone(tmp_path):
    def build_again(folder):
        build_folder("source", tmp_path / "new", fill)
        assert folder.is_dir()

    with pytest.raises(StorageError, match="new cannot be written: Directory not empty"):
        build_folder("source", tmp_path / "new", build_again)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        StorageError, match=r"file/new cannot be written: (File exists|Not a directory)\. Nothing was changed; "
    ):
        build_folder("source", tmp_path / "file" / "new", fill)
