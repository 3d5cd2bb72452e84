"""The authors' checkpoints: imported, loaded, met to the number, and exported back as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from activation_beacon import BeaconConfig, export_official, import_official, load
from activation_beacon.errors import (
    BeaconError,
    ConfigError,
    FileFormatError,
    MismatchError,
    StorageError,
    UnsupportedModelError,
)
from activation_beacon.persistence import load_adapter_config, load_adapter_tensors
from families import GOLDEN, GOLDEN_CASES, golden, random_ids, tiny, with_beacons

CASE = "llama-interleave-x4"


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of a checkpoint of theirs, to be spoilt."""
    shutil.copytree(GOLDEN / CASE, tmp_path / "source", ignore=shutil.ignore_patterns("golden.safetensors"))
    return tmp_path / "source"


def change_settings(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- in ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_an_imported_checkpoint_meets_its_golden_numbers(tmp_path, name):
    case = golden(name)
    config = import_official(GOLDEN / name, tmp_path / "adapter", with_base=True)
    model, tokenizer = load(tmp_path / "adapter")
    assert tokenizer is None
    assert model.beacon_config == config == load_adapter_config(tmp_path / "adapter")
    assert (config.chunk_size, config.projections) == (case.config.chunk_size, case.config.projections)
    assert (config.num_sinks, config.placement) == (case.config.num_sinks, case.config.placement)
    assert config.is_trained
    options = {"beacon_ratio": case.ratios} if case.ratios else {}
    with torch.no_grad():
        out = model(case.ids, labels=case.ids, **options)
    expected = case.tensors["nll"]
    torch.testing.assert_close(out.nll[0, -len(expected) :], expected, atol=1e-4, rtol=0)
    last = case.tensors["last_logits"]
    torch.testing.assert_close(out.logits[0, -len(last) :], last, atol=1e-4, rtol=0)


def test_every_golden_case_is_there():
    assert len(GOLDEN_CASES) == 7


def test_without_the_base_only_the_adapter_is_written(tmp_path):
    import_official(str(GOLDEN / CASE), str(tmp_path / "adapter"))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "beacon.safetensors",
        "beacon_config.json",
    ]
    golden(CASE).base.save_pretrained(tmp_path / "elsewhere")
    model, _ = load(tmp_path / "adapter", base=str(tmp_path / "elsewhere"))
    assert model.compress(random_ids(40), ratio=4).num_beacons == 8


def test_the_base_is_an_ordinary_model(tmp_path):
    import_official(GOLDEN / CASE, tmp_path / "adapter", with_base=True)
    settings = json.loads((tmp_path / "adapter" / "base" / "config.json").read_text())
    assert settings["model_type"] == "llama"
    assert not [name for name in settings if name.startswith("beacon")]
    assert not [name for name in load_file(tmp_path / "adapter" / "base" / "model.safetensors") if "beacon" in name]


def test_tokenizer_files_come_along(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_llama.py"):
        (source / name).write_text("{}")
    import_official(source, tmp_path / "adapter", with_base=True)
    names = {path.name for path in (tmp_path / "adapter" / "base").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "modeling_llama.py" not in names


def test_a_checkpoint_in_shards_is_read_whole(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        shard = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, source / shard)
        weight_map |= dict.fromkeys(names[number::3], shard)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = import_official(source, tmp_path / "sharded")
    assert sharded == import_official(GOLDEN / CASE, tmp_path / "whole")
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"model-00002-of-00003\.safetensors is damaged: No such file"):
        import_official(source, tmp_path / "again")


def test_other_safetensors_beside_the_model_are_left_alone(source, tmp_path):
    save_file({"model.beacon_something": torch.zeros(1)}, source / "optimizer.safetensors")
    import_official(source, tmp_path / "adapter")


def test_settings_of_one_value_become_ours(source, tmp_path):
    change_settings(source, beacon_ratio=4, beacon_sink_size=..., beacon_param=..., beacon_stride=None)
    config = import_official(source, tmp_path / "adapter")
    assert (config.ratios, config.num_sinks, config.projections) == ((4,), 0, ("q", "k", "v"))


def test_a_ratio_that_leaves_texts_raw_is_not_one_of_ours(source, tmp_path):
    change_settings(source, beacon_ratio=[0, 1, 2, 4])
    assert import_official(source, tmp_path / "adapter").ratios == (2, 4)


# --- out -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_exporting_an_import_gives_back_what_was_there(tmp_path, name):
    import_official(GOLDEN / name, tmp_path / "adapter", with_base=True)
    export_official(tmp_path / "adapter", tmp_path / "adapter" / "base", tmp_path / "back")
    theirs, back = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert theirs.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in theirs.items())
    before = json.loads((GOLDEN / name / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "beacon_ratio_mix"} == {
        key: value for key, value in before.items() if key != "beacon_ratio_mix"
    }
    again = import_official(tmp_path / "back", tmp_path / "again", with_base=True)
    assert again == load_adapter_config(tmp_path / "adapter")


def test_without_the_base_none_is_named(tmp_path):
    config = import_official(GOLDEN / "llama-short", tmp_path / "adapter")
    assert config.base_model is None
    assert config.base_fingerprint is not None
    assert not (tmp_path / "adapter" / "base").exists()


def test_an_adapter_of_ours_goes_out_and_in(tmp_path):
    model = with_beacons("qwen2", BeaconConfig(chunk_size=16, ratios=(2, 8), num_sinks=2))
    model.save_pretrained(tmp_path / "adapter")
    tiny("qwen2").save_pretrained(tmp_path / "base")
    export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (settings["beacon_window"], settings["beacon_stride"], settings["beacon_ratio"]) == (16, 16, [2, 8])
    assert (settings["beacon_sink_size"], settings["beacon_pos"], settings["beacon_attn"]) == (
        2,
        "interleave",
        "full-coverage",
    )
    import_official(tmp_path / "theirs", tmp_path / "back", with_base=True)
    ours, back = load_adapter_tensors(tmp_path / "adapter"), load_adapter_tensors(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.items())
    again, _ = load(tmp_path / "back")
    assert again.adapter_fingerprint == model.adapter_fingerprint
    assert again.base_fingerprint == model.base_fingerprint


def test_a_base_with_tied_embeddings_goes_out_and_in(tmp_path):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2,)), tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "adapter")
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "theirs")
    import_official(tmp_path / "theirs", tmp_path / "back", with_base=True)
    assert load(tmp_path / "back")[0].base_fingerprint == model.base_fingerprint


def test_exporting_with_another_base_is_refused(tmp_path):
    with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2,))).save_pretrained(tmp_path / "adapter")
    tiny("llama", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(
        MismatchError, match=r"^The adapter was made for another base model \(fingerprint [0-9a-f]{16}, "
    ):
        export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_their_code_does_not_have_cannot_go_out(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    config = BeaconConfig(chunk_size=16, ratios=(2,), local_tokens=3)
    with_beacons("llama", config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match=r"does not have what this adapter has: local_tokens\. Adapters"):
        export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "theirs")
    config = BeaconConfig(chunk_size=16, ratios=(2,), anchored=True, local_tokens=3)
    with_beacons("llama", config).save_pretrained(tmp_path / "anchored")
    with pytest.raises(
        UnsupportedModelError, match=r"does not have what this adapter has: anchored, local_tokens\. Adapters"
    ):
        export_official(tmp_path / "anchored", tmp_path / "base", tmp_path / "theirs")
    with_beacons("phi3", BeaconConfig(chunk_size=16, ratios=(2,))).save_pretrained(tmp_path / "phi3")
    tiny("phi3").save_pretrained(tmp_path / "phi3-base")
    with pytest.raises(
        UnsupportedModelError, match=r"^The authors' checkpoints are of llama, mistral, qwen2; this one"
    ):
        export_official(tmp_path / "phi3", tmp_path / "phi3-base", tmp_path / "theirs")


# --- refused -------------------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "another family": (
        {"model_type": "gpt2"},
        UnsupportedModelError,
        "The authors' checkpoints are of llama, mistral, qwen2; this one is of 'gpt2'.",
    ),
    "no family": (
        {"model_type": ...},
        UnsupportedModelError,
        "The authors' checkpoints are of llama, mistral, qwen2; this one is of None.",
    ),
    "another stride": (
        {"beacon_stride": 8},
        UnsupportedModelError,
        "beacon_stride (8) must equal beacon_window (16).",
    ),
    "another attention": (
        {"beacon_attn": "step-expansion"},
        UnsupportedModelError,
        "beacon_attn must be 'full-coverage', as in every released checkpoint; got 'step-expansion'.",
    ),
    "no earlier beacons": (
        {"beacon_attend_prev": False},
        UnsupportedModelError,
        "beacon_attend_prev must be True, as in every released checkpoint; got False.",
    ),
    "parallel windows": (
        {"beacon_parallel_window": 2},
        UnsupportedModelError,
        "beacon_parallel_window must be 1, as in every released checkpoint; got 2.",
    ),
    "an unknown placement": (
        {"beacon_pos": "prepend"},
        UnsupportedModelError,
        "beacon_pos must be one of interleave, append; got 'prepend'.",
    ),
    "no window": (
        {"beacon_window": ...},
        FileFormatError,
        "config.json has no beacon_window: this is not a checkpoint of the authors' beacon code.",
    ),
    "no ratio": (
        {"beacon_ratio": ...},
        FileFormatError,
        "config.json has no beacon_ratio: this is not a checkpoint of the authors' beacon code.",
    ),
    "a projection without weights": (
        {"beacon_param": ["q", "k", "v", "o"]},
        FileFormatError,
        "The checkpoint has no beacon weights for o.",
    ),
    "a ratio that does not divide": (
        {"beacon_ratio": [3]},
        ConfigError,
        "chunk_size (16) must be divisible by every ratio; 3 does not divide it. Use 15 or 18.",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be_met_are_refused_by_name(source, tmp_path, name):
    changes, kind, message = BAD_SETTINGS[name]
    change_settings(source, **changes)
    with pytest.raises(kind) as caught:
        import_official(source, tmp_path / "adapter", with_base=True)
    assert str(caught.value) == message
    assert isinstance(caught.value, BeaconError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_source_without_its_files_is_named(source, tmp_path):
    with pytest.raises(StorageError) as caught:
        import_official(tmp_path / "missing", tmp_path / "adapter")
    assert str(caught.value) == (
        f"{tmp_path / 'missing' / 'config.json'} cannot be read: No such file or directory. "
        "Name a folder with config.json and safetensors."
    )
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(StorageError) as caught:
        import_official(source, tmp_path / "adapter")
    assert str(caught.value) == (
        f"{source} has no model.safetensors. Convert its weights to safetensors first: nothing else is read."
    )


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7"])
def test_a_damaged_config_is_refused(source, tmp_path, text):
    (source / "config.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"config\.json (is damaged: |must hold a JSON object; it holds )"):
        import_official(source, tmp_path / "adapter")


@pytest.mark.parametrize("contents", [b"", b"no weights\n" * 9])
def test_damaged_weights_are_refused(source, tmp_path, contents):
    (source / "model.safetensors").write_bytes(contents)
    with pytest.raises(FileFormatError, match=r"model\.safetensors is damaged: .*\. Fetch it again\.$"):
        import_official(source, tmp_path / "adapter")


def test_weights_that_are_not_theirs_are_refused(source, tmp_path):
    change_tensors(source, lambda tensors: tensors.pop("model.beacon_embed_tokens.weight"))
    with pytest.raises(FileFormatError, match=r"^The checkpoint has no beacon weights for the embedding\.$"):
        import_official(source, tmp_path / "adapter")
    change_tensors(source, lambda tensors: tensors.update({"model.layers.0.beacon_gate": torch.zeros(1)}))
    with pytest.raises(
        FileFormatError,
        match=r"^The tensor model\.layers\.0\.beacon_gate is not part of a beacon checkpoint that is known\.$",
    ):
        import_official(source, tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [{"beacon_ratio": "adapt"}, {"beacon_ratio": [None, 2]}, {"beacon_param": None}, {"num_hidden_layers": None},
     {"beacon_window": "1024"}],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_shown(source, tmp_path, changes):
    change_settings(source, **changes)
    with pytest.raises(BeaconError) as caught:
        import_official(source, tmp_path / "adapter")
    assert str(next(iter(changes.values()))) in str(caught.value)


@pytest.mark.parametrize("places", [["x"], {"a": None}, None])
def test_an_index_that_names_no_files_is_refused(source, tmp_path, places):
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileFormatError, match="weight_map must name a file for each tensor"):
        import_official(source, tmp_path / "adapter")


def test_weights_that_some_layer_lacks_are_refused(source, tmp_path):
    change_tensors(source, lambda tensors: tensors.pop("model.layers.2.self_attn.beacon_k_proj.weight"))
    with pytest.raises(FileFormatError, match=r"^The checkpoint has no beacon weights for k in layer 2\.$"):
        import_official(source, tmp_path / "adapter")


def test_a_target_in_use_is_left_as_it_is(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("mine")
    for write in (
        lambda: import_official(GOLDEN / CASE, tmp_path / "adapter"),
        lambda: export_official(tmp_path / "ours", tmp_path / "ours" / "base", tmp_path / "adapter"),
    ):
        import_official(GOLDEN / CASE, tmp_path / "ours", with_base=True) if not (tmp_path / "ours").exists() else None
        with pytest.raises(StorageError, match=r"adapter exists already and is not empty\. Choose another folder for"):
            write()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["mine"]
