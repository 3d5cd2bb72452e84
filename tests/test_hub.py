"""`load` and `push_to_hub`: where adapters and their base models come from."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from activation_beacon import BeaconConfig, BeaconModel, hub, load
from activation_beacon.errors import BaseModelError, BeaconError, InputError, MismatchError, StorageError
from activation_beacon.persistence import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from families import beacon_tensors, random_ids, tiny, with_beacons


def adapter_of(folder: Path, **settings) -> Path:
    config = BeaconConfig(**{"chunk_size": 16, "ratios": (2, 4), **settings})
    with_beacons("llama", config).save_pretrained(folder)
    return folder


def base_in(folder: Path, seed: int = 0) -> Path:
    tiny("llama", seed).save_pretrained(folder)
    return folder


# --- where the base comes from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "model", "deep/er"])
def test_a_base_beside_the_adapter_is_found(tmp_path, name):
    folder = adapter_of(tmp_path / "adapter", base_model=name)
    base_in(folder / name)
    model, tokenizer = load(str(folder))
    assert isinstance(model, BeaconModel)
    assert tokenizer is None
    assert model.compress(random_ids(40), ratio=4).num_beacons == 8


def test_a_base_elsewhere_is_found(tmp_path, monkeypatch):
    base_in(tmp_path / "models" / "base")
    for name in (str(tmp_path / "models" / "base"), "../models/base"):
        folder = adapter_of(tmp_path / "adapter", base_model=name)
        assert load(folder)[0].beacon_config.base_model == name


def test_the_folder_may_be_named_in_any_way(tmp_path, monkeypatch):
    folder = adapter_of(tmp_path / "adapter", base_model="base")
    base_in(folder / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("adapter", "./adapter", "~/adapter", Path("adapter"), folder):
        assert isinstance(load(name)[0], BeaconModel)


def test_a_base_of_the_callers_goes_first(tmp_path):
    folder = adapter_of(tmp_path / "adapter", base_model="gone")
    model, _ = load(folder, base=str(base_in(tmp_path / "mine")))
    assert model.beacon_config.base_model == "gone"
    with pytest.raises(MismatchError, match=r"^The adapter was made for another base model"):
        load(folder, base=str(base_in(tmp_path / "other", seed=1)))


def test_an_adapter_goes_on_a_model_in_memory(tmp_path):
    folder, base = adapter_of(tmp_path / "adapter"), tiny("llama")
    model, tokenizer = load(folder, base=base)
    assert model is base
    assert tokenizer is None
    assert (
        model.adapter_fingerprint
        == with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4))).adapter_fingerprint
    )


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device": "cpu"}, {"dtype": "auto", "device": "cpu"}])
def test_a_model_in_memory_keeps_its_own_dtype_and_device(tmp_path, options):
    base = tiny("llama")
    with pytest.raises(InputError) as caught:
        load(adapter_of(tmp_path / "adapter"), base=base, **options)
    assert str(caught.value) == (
        "A model given as base keeps its own dtype and device (torch.float32, cpu); "
        f"got dtype={options.get('dtype')}, device={options.get('device')}. Leave them out, and give base.to(...)."
    )
    assert not isinstance(base, BeaconModel)


def test_options_of_the_base_are_for_loading_it(tmp_path):
    folder = adapter_of(tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "base")
    model, _ = load(folder, base=str(tmp_path / "base"), base_options={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"
    with pytest.raises(
        InputError, match=r"^base_options \(attn_implementation\) are for loading the base model, and one was given"
    ):
        load(folder, base=tiny("llama"), base_options={"attn_implementation": "eager"})


def test_an_adapter_that_names_no_base_needs_one(tmp_path):
    folder = adapter_of(tmp_path / "adapter")
    with pytest.raises(StorageError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"The adapter in {folder} names no base model. Name it: load(..., base=...), or --base."
    )
    assert isinstance(load(folder, base=str(base_in(tmp_path / "base")))[0], BeaconModel)


def test_a_base_that_is_gone_is_named(tmp_path):
    folder = adapter_of(tmp_path / "adapter", base_model="/no/such/base")
    with pytest.raises(BaseModelError, match="/no/such/base"):
        load(folder)


def test_the_dtype_is_that_of_the_base_or_of_the_caller(tmp_path):
    folder = adapter_of(tmp_path / "adapter", base_model="base")
    tiny("llama").to(torch.bfloat16).save_pretrained(folder / "base")
    for asked, expected in ((None, torch.bfloat16), ("float32", torch.float32), (torch.float32, torch.float32)):
        model, _ = load(folder, dtype=asked, device="cpu")
        assert model.dtype == expected
        assert {tensor.dtype for tensor in beacon_tensors(model).values()} == {expected}


def test_an_unused_device_is_named(tmp_path):
    folder = adapter_of(tmp_path / "adapter", base_model="base")
    base_in(folder / "base")
    with pytest.raises(BaseModelError, match="abacus"):
        load(folder, device="abacus")


# --- where the adapter comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "./missing", "/no/such/folder", "a/b/c", "~/missing"])
def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"holds no adapter: beacon_config\.json is missing\. Name a folder that"):
        load(name)


def test_an_adapter_that_the_hub_does_not_give_is_named():
    with pytest.raises(StorageError) as caught:
        load("nobody/no-such-adapter")
    text = str(caught.value)
    assert text.startswith("The adapter nobody/no-such-adapter is neither a folder here nor to be had from the hub (")
    assert text.endswith("). Check the name, or the network.")
    assert "\n" not in text
    assert isinstance(caught.value, BeaconError)


def test_an_error_of_the_hub_without_words_is_reported_too(monkeypatch):
    def fail(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match=r"to be had from the hub \(TimeoutError\)\. Check the name"):
        load("me/adapter")


def test_an_adapter_from_the_hub_is_fetched_without_anything_else(tmp_path, monkeypatch):
    folder = adapter_of(tmp_path / "snapshot", base_model="base")
    base_in(folder / "base")
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load("me/adapter", revision="v2")
    assert isinstance(model, BeaconModel)
    assert asked == [("me/adapter", {"revision": "v2", "allow_patterns": ["beacon*", "base/*"]})]


@pytest.mark.parametrize(
    ("base", "revision", "asked"),
    [("me/base", "abc", "abc"), ("me/base", None, None), ("default", "package==1", None)],
)
def test_a_revision_is_asked_of_the_hub_only(tmp_path, monkeypatch, base, revision, asked):
    folder = adapter_of(tmp_path / "adapter", base_model=base, base_revision=revision)
    calls = []

    def load_pretrained_base(name, **options):
        calls.append((name, options["revision"]))
        return tiny("llama"), "tokenizer"

    monkeypatch.setattr(hub, "load_pretrained_base", load_pretrained_base)
    assert load(folder)[1] == "tokenizer"
    load(folder, base="other/base")
    assert calls == [(base, asked), ("other/base", None)]


def test_default_is_the_embedded_model(tmp_path, monkeypatch):
    names = []

    def load_pretrained_base(name, **options):
        names.append(name)
        return tiny("llama", max_position_embeddings=8192), "tokenizer"

    monkeypatch.setattr(hub, "load_pretrained_base", load_pretrained_base)
    monkeypatch.setattr(hub, "default_adapter_folder", lambda: None)
    model, tokenizer = load()
    assert (names, tokenizer) == (["default"], "tokenizer")
    assert not model.beacon_config.is_trained
    assert model.beacon_config.base_model == "default"
    folder = adapter_of(tmp_path / "adapter", base_model="default", training={"steps": 1})
    monkeypatch.setattr(hub, "default_adapter_folder", lambda: folder)
    monkeypatch.setattr(hub, "load_pretrained_base", lambda name, **options: (tiny("llama"), None))
    assert load("default")[0].beacon_config.is_trained


def test_the_adapter_of_the_default_model_is_looked_for_in_the_package():
    folder = hub.default_adapter_folder()
    assert folder is None or (folder / CONFIG_FILE).is_file()


# --- to the hub --------------------------------------------------------------------------------------------------------------


class StubApi:
    """Writes down what it is asked to do."""

    calls: list

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, files, options))
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def calls(monkeypatch) -> list:
    monkeypatch.setattr(StubApi, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", StubApi)
    return StubApi.calls


def test_pushing_uploads_the_adapter_alone(calls):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4)))
    address = model.push_to_hub("me/adapter", private=True, token="secret", commit_message="new")
    assert address == "https://hub/me/adapter/commit/1"
    token, create, (_, repo_id, files, options) = calls
    assert token == ("token", "secret")
    assert create == ("create", "me/adapter", {"private": True, "exist_ok": True})
    assert (repo_id, options) == ("me/adapter", {"commit_message": "new"})
    assert sorted(files) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert json.loads(files[CONFIG_FILE])["base_fingerprint"] == model.base_fingerprint
    assert files[CARD_FILE].startswith(b"---\nlibrary_name: activation-beacon\n")
