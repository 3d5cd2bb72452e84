"""Adapters on disk: there and back, in any dtype and any number of files; nothing damaged is read."""

import contextlib
import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from activation_beacon import BeaconConfig, attach, detach, load, persistence
from activation_beacon.errors import BeaconError, FileFormatError, MismatchError, StorageError, UnsupportedError
from activation_beacon.persistence import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    load_adapter_config,
    load_adapter_tensors,
    model_card,
)
from families import beacon_tensors, random_ids, tiny, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=1, training={"steps": 3}, base_model="base")


@pytest.fixture
def model():
    return with_beacons("llama", CONFIG)


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """An adapter with its base beside it."""
    model.save_pretrained(tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "adapter" / "base")
    return tmp_path / "adapter"


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# --- there and back ------------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was(folder, model):
    assert files_of(folder) == [CARD_FILE, WEIGHTS_FILE, CONFIG_FILE]
    assert load_adapter_config(folder) == model.beacon_config
    loaded, tokenizer = load(folder)
    assert tokenizer is None
    assert not loaded.training
    assert loaded.beacon_config == model.beacon_config
    for (name, mine), (other, theirs) in zip(loaded.beacon_parameters(), model.beacon_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    assert loaded.adapter_fingerprint == model.adapter_fingerprint
    contexts = [m.compress(random_ids(40), ratio=4) for m in (loaded, model)]
    first, second = (
        m.generate(random_ids(3), context=c, max_new_tokens=8) for m, c in ((loaded, contexts[1]), (model, contexts[0]))
    )
    assert torch.equal(first, second)


def test_only_beacon_tensors_are_written(folder, model):
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors.keys() == dict(model.beacon_parameters()).keys()
    assert tensors["embedding"].shape == (32,)


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "qwen2"])
@pytest.mark.parametrize("projections", [("q", "k", "v"), ("q", "k", "v", "o")])
def test_fused_projections_and_biases_come_back(tmp_path, family, projections):
    config = BeaconConfig(chunk_size=16, ratios=(4,), projections=projections, base_model="base")
    model = with_beacons(family, config)
    model.save_pretrained(tmp_path)
    tiny(family).save_pretrained(tmp_path / "base")
    loaded, _ = load(tmp_path)
    before = beacon_tensors(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in beacon_tensors(loaded).items())


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_an_adapter_of_any_dtype_loads_into_any(tmp_path, saved, wanted):
    model = with_beacons("llama", CONFIG)
    tiny("llama").save_pretrained(tmp_path / "base")
    expected = {name: tensor.to(saved).to(wanted) for name, tensor in beacon_tensors(model).items()}
    for _, parameter in model.beacon_parameters():
        parameter.data = parameter.data.to(saved)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_FILE).values()} == {saved}
    loaded, _ = load(tmp_path, dtype=wanted)
    for name, tensor in beacon_tensors(loaded).items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, expected[name])
    assert loaded.compress(random_ids(40), ratio=4).num_beacons == 8


def test_a_large_adapter_is_written_in_shards(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    names = files_of(tmp_path)
    shards = [name for name in names if name.startswith("beacon-")]
    assert len(shards) > 2
    assert shards[0] == f"beacon-00001-of-{len(shards):05d}.safetensors"
    assert set(names) == {*shards, INDEX_FILE, CONFIG_FILE, CARD_FILE}
    assert all((tmp_path / name).stat().st_size < 10_000 for name in shards)
    tensors, before = load_adapter_tensors(tmp_path), beacon_tensors(model)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    tiny("llama").save_pretrained(tmp_path / "base")
    assert load(tmp_path)[0].adapter_fingerprint == model.adapter_fingerprint


@pytest.mark.parametrize("sizes", [("8KB", "5GB"), ("5GB", "8KB"), ("8KB", "16KB")])
def test_saving_over_an_adapter_leaves_the_new_one_only(tmp_path, sizes):
    old, new = with_beacons("llama", CONFIG), with_beacons("llama", CONFIG, seed=1)
    old.save_pretrained(tmp_path, max_shard_size=sizes[0])
    new.save_pretrained(tmp_path, max_shard_size=sizes[1])
    tensors, expected = load_adapter_tensors(tmp_path), beacon_tensors(new)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert load_adapter_config(tmp_path) == new.beacon_config
    new.save_pretrained(tmp_path / "fresh", max_shard_size=sizes[1])
    assert files_of(tmp_path) == files_of(tmp_path / "fresh")


def test_an_adapter_of_links_is_written_where_they_lead_to(tmp_path, model):
    here, there = tmp_path / "here", tmp_path / "there"
    with_beacons("llama", replace(CONFIG, training=None), seed=1).save_pretrained(there)
    here.mkdir()
    for name in files_of(there):
        (here / name).symlink_to(there / name)
    model.save_pretrained(here)
    assert all(path.is_symlink() for path in here.iterdir())
    for folder in (here, there):
        assert load_adapter_config(folder) == model.beacon_config
        assert (folder / CARD_FILE).read_text() == model_card(model.beacon_config)
    (there / "kept").write_text("another's")
    (here / INDEX_FILE).symlink_to(there / "kept")
    model.save_pretrained(here)
    assert not (here / INDEX_FILE).exists()
    assert (there / "kept").exists()


def test_a_model_card_of_ones_own_is_kept(tmp_path, model):
    (tmp_path / CARD_FILE).write_text("mine")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / CARD_FILE).read_text() == "mine"


def test_a_card_that_was_changed_is_ones_own(tmp_path, model):
    untrained = replace(CONFIG, training=None)
    with_beacons("llama", untrained).save_pretrained(tmp_path)
    changed = (tmp_path / CARD_FILE).read_text() + "\nMy own words.\n"
    for card in (changed.encode(), b"\xff no text"):
        (tmp_path / CARD_FILE).write_bytes(card)
        model.save_pretrained(tmp_path)
        assert (tmp_path / CARD_FILE).read_bytes() == card


def test_the_card_of_an_untrained_adapter_goes_once_it_is_trained(tmp_path, model):
    with_beacons("llama", replace(CONFIG, training=None)).save_pretrained(tmp_path)
    assert "**Untrained**" in (tmp_path / CARD_FILE).read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == model_card(model.beacon_config)
    assert "**Untrained**" not in (tmp_path / CARD_FILE).read_text()


def test_the_options_of_transformers_own_saving_do_no_harm(tmp_path, model):
    model.save_pretrained(str(tmp_path / "deep" / "er"), safe_serialization=True, push_to_hub=False)
    assert WEIGHTS_FILE in files_of(tmp_path / "deep" / "er")


def test_saving_does_not_push_without_a_word(tmp_path, model):
    with pytest.raises(
        UnsupportedError, match=r"^save_pretrained writes a folder only\. Use model\.push_to_hub\(repo_id\)\.$"
    ):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


# --- model cards -----------------------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_adapter_is():
    card = model_card(
        BeaconConfig(chunk_size=64, ratios=(2, 8), num_sinks=4, base_model="me/base", training={"steps": 7})
    )
    assert card.startswith("---\nlibrary_name: activation-beacon\nbase_model: me/base\ntags:\n")
    for part in ("Base model: `me/base`", "Chunks of 64 tokens", "ratios 2, 8", "4 sinks", "projections q, k, v"):
        assert part in card
    assert '"steps": 7' in card
    assert "Untrained" not in card


@pytest.mark.parametrize("base", [None, "default", "../base", "/models/base"])
def test_a_base_that_is_not_on_the_hub_is_no_metadata(base):
    card = model_card(BeaconConfig(base_model=base))
    assert "base_model:" not in card
    assert f"Base model: `{base or 'unknown'}`" in card
    assert "**Untrained**" in card


# --- damaged -----------------------------------------------------------------------------------------------------------------------


def test_a_folder_without_an_adapter_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StorageError) as caught:
            load_adapter_config(folder)
        assert str(caught.value) == (
            f"{folder} holds no adapter: beacon_config.json is missing. Name a folder that save_pretrained wrote."
        )
        assert isinstance(caught.value, BeaconError)
        assert isinstance(caught.value, OSError)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file holds no adapter: beacon_config\.json is missing\."):
        load_adapter_config(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"beacon_config\.json is damaged: Expecting value"),
        ("{", r"beacon_config\.json is damaged: Expecting property name"),
        ('{"format_version": 1,', r"beacon_config\.json is damaged: "),
        ("\xff\xfe", r"beacon_config\.json is damaged: 'utf-8' codec can't decode"),
        ("7", r"beacon_config\.json is damaged: "),
        ("null", r"beacon_config\.json is damaged: "),
        ("[]", r"beacon_config\.json is not a valid adapter configuration: format_version must be 1; got None\."),
        ("{}", r"beacon_config\.json is not a valid adapter configuration: format_version must be 1; got None\."),
        ('{"format_version": 2}', r"is not a valid adapter configuration: format_version must be 1; got 2\. Use the"),
        (
            '{"format_version": 1, "gist": 3}',
            r"is not a valid adapter configuration: Unknown settings: gist\. Known ones: anchored, base_fingerprint, base_model,",
        ),
        (
            '{"format_version": 1, "chunk_size": 1000}',
            r"is not a valid adapter configuration: chunk_size \(1000\) must be divisible by every ratio; 16 does not",
        ),
        ('{"format_version": 1, "ratios": 2.5}', r"is not a valid adapter configuration: A compression ratio must be"),
        (
            '{"format_version": 1, "base_model": 5}',
            r"is not a valid adapter configuration: base_model must be a string",
        ),
    ],
)
def test_a_damaged_config_is_refused(folder, text, message):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    for read in (load_adapter_config, load):
        with pytest.raises(FileFormatError, match=message) as caught:
            read(folder)
        assert str(folder / CONFIG_FILE) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped header", "missing", "folder"])
def test_damaged_weights_are_refused_and_the_base_is_left_bare(folder, damage):
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        contents = {
            "empty": b"",
            "text": b"no weights here\n" * 9,
            "cut": data[:-9],
            "flipped header": b"\xff" + data[1:],
        }
        path.write_bytes(contents[damage])
    kind = StorageError if damage in ("missing", "folder") else FileFormatError
    with pytest.raises(kind) as caught:
        load_adapter_tensors(folder)
    text = str(caught.value)
    assert "\n" not in text
    if kind is StorageError:
        assert text == f"{folder} holds no complete adapter: beacon.safetensors is missing. Fetch or save it again."
    else:
        assert text.startswith(f"The weights in {folder} are damaged: ")
        assert text.endswith(". Fetch or save the adapter again.")
    with pytest.raises(kind):
        load(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"embedding": 3}}'])
def test_a_damaged_index_is_refused(folder, index):
    (folder / INDEX_FILE).write_text(index)
    with pytest.raises(FileFormatError, match=rf"^The weights in {folder} are damaged: "):
        load_adapter_tensors(folder)


@pytest.mark.parametrize(
    "name", ["../beacon-00001-of-00002.safetensors", "/tmp/x.safetensors", "weights.bin", "beacon.safetensors", ""]
)
def test_an_index_that_names_other_files_is_refused(folder, name):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"embedding": name}}))
    with pytest.raises(FileFormatError) as caught:
        load_adapter_tensors(folder)
    assert str(caught.value) == (
        f"The weights in {folder} are damaged: {INDEX_FILE} names {name!r}, which is no file of an adapter. "
        "Fetch or save the adapter again."
    )


def test_a_missing_shard_is_named(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shard = next(tmp_path.glob("beacon-00002-*"))
    shard.unlink()
    with pytest.raises(StorageError) as caught:
        load_adapter_tensors(tmp_path)
    assert (
        str(caught.value) == f"{tmp_path} holds no complete adapter: {shard.name} is missing. Fetch or save it again."
    )


def test_tensors_of_other_names_or_shapes_are_refused(folder):
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    without = {name: tensor for name, tensor in tensors.items() if name != "layers.1.k.weight"}
    save_file(without, path)
    with pytest.raises(MismatchError) as caught:
        load(folder)
    assert str(caught.value) == (
        "The adapter's tensors are not those of this base model and configuration (-layers.1.k.weight, ...)."
    )
    save_file(tensors | {"layers.9.k.weight": torch.zeros(3)}, path)
    with pytest.raises(MismatchError, match=r"\(\+layers\.9\.k\.weight, \.\.\.\)\.$"):
        load(folder)
    save_file(tensors | {"layers.1.k.weight": torch.zeros(3, 5)}, path)
    with pytest.raises(MismatchError) as caught:
        load(folder)
    assert str(caught.value) == "layers.1.k.weight must have the shape (16, 32); the adapter's has (3, 5)."


def test_nothing_is_copied_where_one_tensor_does_not_fit(model):
    before = beacon_tensors(model)
    changed = {name: tensor + 1 for name, tensor in before.items()} | {"layers.2.v.weight": torch.zeros(1)}
    with pytest.raises(MismatchError):
        persistence.fill_parameters(model.beacon_parameters(), changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in beacon_tensors(model).items())


def test_an_adapter_of_another_base_is_refused(folder, tmp_path):
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError) as caught:
        load(folder, base=str(tmp_path / "other"))
    assert str(caught.value).startswith("The adapter was made for another base model (fingerprint ")
    assert str(caught.value).endswith("). Load the base that beacon_config.json names: base.")


# --- writing -----------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_reported_and_leaves_no_half_file(tmp_path, model, monkeypatch):
    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(persistence, "save_file", full_disk)
    with pytest.raises(StorageError, match=r"beacon\.safetensors cannot be written: No space left on device\."):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def failing_at(monkeypatch, owner: object, name: str, call: int, error: BaseException):
    """The `call`-th use of a function raises instead."""
    left, real = [call], getattr(owner, name)

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("size", ["5GB", "16KB"])
@pytest.mark.parametrize(("owner", "name"), [(persistence, "save_file"), (persistence, "flush"), (Path, "write_text")])
def test_an_adapter_that_cannot_be_written_leaves_the_old_one_whole(
    tmp_path, model, monkeypatch, owner, name, size, error
):
    model.save_pretrained(tmp_path, max_shard_size=size)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = with_beacons("llama", CONFIG, seed=1)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    for call in (1, 2) if size == "16KB" or name != "save_file" else (1,):
        with failing_at(monkeypatch, owner, name, call, error), pytest.raises(expected):
            new.save_pretrained(tmp_path, max_shard_size=size)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sizes", [("5GB", "5GB"), ("8KB", "5GB"), ("5GB", "8KB"), ("8KB", "16KB")])
def test_a_folder_with_a_config_is_one_adapter_wherever_writing_ends(tmp_path, monkeypatch, sizes):
    old, new = with_beacons("llama", CONFIG), with_beacons("llama", replace(CONFIG, num_sinks=2), seed=1)
    is_whole = []
    for call in range(1, 40):
        folder = tmp_path / str(call)
        old.save_pretrained(folder, max_shard_size=sizes[0])
        with (
            contextlib.suppress(KeyboardInterrupt),
            failing_at(monkeypatch, os, "replace", call, KeyboardInterrupt()),
        ):
            new.save_pretrained(folder, max_shard_size=sizes[1])
        is_whole.append((folder / CONFIG_FILE).exists())
        if is_whole[-1]:
            tensors, expected = load_adapter_tensors(folder), beacon_tensors(new)
            assert load_adapter_config(folder) == new.beacon_config
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
            break
        with pytest.raises(StorageError, match=r"holds no adapter: beacon_config\.json is missing"):
            load_adapter_config(folder)
        new.save_pretrained(folder, max_shard_size=sizes[1])
        assert (folder / CARD_FILE).read_text() == model_card(new.beacon_config)
    assert is_whole[-1]
    assert len(is_whole) >= 4  # weights, card and config each had their turn


def test_a_folder_that_cannot_be_made_is_named(tmp_path, model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file cannot be made: File exists\. Choose another place\.$"):
        model.save_pretrained(tmp_path / "file")


def test_a_saved_config_is_plain_json(folder, model):
    values = json.loads((folder / CONFIG_FILE).read_text())
    assert values["format_version"] == 1
    assert values["base_fingerprint"] == model.base_fingerprint
    assert values["ratios"] == [2, 4, 8]


def test_tensors_can_be_put_on_by_hand(folder, model):
    other = attach(tiny("llama"), load_adapter_config(folder))
    persistence.fill_parameters(other.beacon_parameters(), load_adapter_tensors(folder))
    assert other.adapter_fingerprint == model.adapter_fingerprint
    assert not hasattr(detach(other), "beacon_embedding")
