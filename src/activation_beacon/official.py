"""The paper authors' checkpoints: import into an adapter, and export back.

Theirs are whole models (Llama, Mistral, Qwen2) in one folder: `config.json` with `beacon_*` fields, and safetensors with
`beacon_{q,k,v,o}_proj` and `beacon_embed_tokens` among the base's weights. Only tensors are read; no code of theirs.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from activation_beacon.config import PLACEMENTS, BeaconConfig, is_same_fingerprint, short_fingerprint
from activation_beacon.errors import (
    BeaconError,
    FileFormatError,
    MismatchError,
    StorageError,
    UnsupportedModelError,
    reason,
)
from activation_beacon.files import build_folder, write_text
from activation_beacon.fingerprint import fingerprint
from activation_beacon.persistence import load_adapter_config, load_adapter_tensors, save_adapter

FAMILIES = ("llama", "mistral", "qwen2")
EMBEDDING = "model.beacon_embed_tokens.weight"
PROJECTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.beacon_([qkvo])_proj\.(weight|bias)")
BASE_FOLDER = "base"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
READ_SETTINGS = ("beacon_window", "beacon_ratio", "beacon_param", "beacon_sink_size", "num_hidden_layers")
SAME_EVERYWHERE = {  # settings of theirs that have one value in all released checkpoints
    "beacon_attn": "full-coverage",
    "beacon_attend_prev": True,
    "beacon_parallel_window": 1,
}


def import_official(source: str | Path, target: str | Path, *, with_base: bool = False) -> BeaconConfig:
    """Make an adapter of a checkpoint of the authors'.

    Args:
        source: their folder.
        target: a new folder for the adapter.
        with_base: also write the base model under `target/base`, where `load(target)` finds it.

    Returns:
        The adapter's configuration.

    Raises:
        StorageError: if a folder or file is missing, or the target is in use.
        FileFormatError: if a file is damaged or not what it should be.
        UnsupportedModelError: for settings that no released checkpoint has, by name.
    """
    source = Path(source)
    settings = _read_json(source / "config.json")
    tensors = _read_tensors(source)
    adapter = dict(_adapter_tensors(tensors))
    base = {name: tensor for name, tensor in tensors.items() if "beacon" not in name and "rotary_emb" not in name}
    try:
        config = _config_of(settings, adapter, base)
    except BeaconError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        read = {name: settings[name] for name in READ_SETTINGS if name in settings}
        raise FileFormatError(
            f"config.json of {source} has a value of the wrong kind ({reason(error)}): {read}."
        ) from error
    if not with_base:
        config = dataclasses.replace(config, base_model=None)

    def write(folder: Path) -> None:
        if with_base:
            _write_base(folder / BASE_FOLDER, source, settings, base)
        save_adapter(folder, config, adapter)

    build_folder(source, target, write)
    return config


def export_official(adapter_folder: str | Path, base_folder: str | Path, target: str | Path) -> None:
    """Write an adapter and its base model as one folder in the authors' layout.

    Args:
        adapter_folder: our adapter.
        base_folder: the base model's folder, with `config.json` and safetensors.
        target: a new folder.

    Raises:
        StorageError, FileFormatError: as in `import_official`.
        UnsupportedModelError: if the authors' code has no such family or setting.
        MismatchError: if the base is not the one that the adapter was made for.
    """
    config, adapter = load_adapter_config(adapter_folder), load_adapter_tensors(adapter_folder)
    settings = _read_json(Path(base_folder) / "config.json")
    _check_family(settings)
    if ours := [name for name in ("anchored", "exact_ids", "local_tokens") if getattr(config, name)]:
        raise UnsupportedModelError(
            f"The authors' code does not have what this adapter has: {', '.join(ours)}. Adapters that were trained with "
            "`beacon train --paper` can go out."
        )
    base = _read_tensors(Path(base_folder))
    expected, found = config.base_fingerprint, _base_fingerprint(settings, base)
    if expected is not None and not is_same_fingerprint(expected, found):
        raise MismatchError(
            f"The adapter was made for another base model (fingerprint {short_fingerprint(expected)}, {base_folder} has "
            f"{short_fingerprint(found)}). Name the folder of the base that beacon_config.json names: {config.base_model}."
        )
    settings |= _settings_of(config)
    tensors = base | {_official_name(name): tensor for name, tensor in adapter.items()}
    tensors[EMBEDDING] = adapter["embedding"][None].clone()

    def write(folder: Path) -> None:
        write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
        _copy_tokenizer(Path(base_folder), folder)
        _write_tensors(folder, tensors)

    build_folder(adapter_folder, target, write)


def _config_of(
    settings: Mapping[str, Any], adapter: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> BeaconConfig:
    _check_family(settings)
    for name, expected in SAME_EVERYWHERE.items():
        if settings.get(name, expected) != expected:
            raise UnsupportedModelError(
                f"{name} must be {expected!r}, as in every released checkpoint; got {settings[name]!r}."
            )
    window, stride = settings.get("beacon_window"), settings.get("beacon_stride")
    if window is None:
        raise FileFormatError("config.json has no beacon_window: this is not a checkpoint of the authors' beacon code.")
    if stride not in (None, window):
        raise UnsupportedModelError(f"beacon_stride ({stride}) must equal beacon_window ({window}).")
    if settings.get("beacon_ratio") is None:
        raise FileFormatError("config.json has no beacon_ratio: this is not a checkpoint of the authors' beacon code.")
    if (placement := settings.get("beacon_pos", "interleave")) not in PLACEMENTS:
        raise UnsupportedModelError(f"beacon_pos must be one of {', '.join(PLACEMENTS)}; got {placement!r}.")
    projections = tuple(settings.get("beacon_param", ("q", "k", "v")))
    _check_complete(adapter, projections, settings.get("num_hidden_layers", 1))
    return BeaconConfig(
        chunk_size=window,
        ratios=tuple(ratio for ratio in _as_list(settings.get("beacon_ratio")) if ratio > 1),
        projections=projections,
        num_sinks=settings.get("beacon_sink_size", 0),
        placement=placement,
        base_model=BASE_FOLDER,
        base_fingerprint=_base_fingerprint(settings, base),
        training={"origin": "imported from a checkpoint in the layout of the paper's authors"},
    )


def _check_complete(adapter: Mapping[str, torch.Tensor], projections: Iterable[str], num_layers: int) -> None:
    if "embedding" not in adapter:
        raise FileFormatError("The checkpoint has no beacon weights for the embedding.")
    for letter in projections:
        lacking = [layer for layer in range(num_layers) if f"layers.{layer}.{letter}.weight" not in adapter]
        if lacking:
            where = f" in layer {lacking[0]}" if len(lacking) < num_layers else ""
            raise FileFormatError(f"The checkpoint has no beacon weights for {letter}{where}.")


def _base_fingerprint(settings: Mapping[str, Any], base: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint that the model made of these tensors will have."""
    is_tied = settings.get("tie_word_embeddings", False)
    no_parameters = ("rotary_emb", *(["lm_head.weight"] if is_tied else []))
    return fingerprint(pair for pair in base.items() if not any(name in pair[0] for name in no_parameters))


def _as_list(ratio: Any) -> list[int]:
    return list(ratio) if isinstance(ratio, (list, tuple)) else [ratio]


def _settings_of(config: BeaconConfig) -> dict[str, Any]:
    return SAME_EVERYWHERE | {
        "beacon_window": config.chunk_size,
        "beacon_stride": config.chunk_size,
        "beacon_ratio": list(config.ratios),
        "beacon_ratio_mix": "step-random",
        "beacon_param": list(config.projections),
        "beacon_embed_init": "eos",
        "beacon_sink_size": config.num_sinks,
        "beacon_pos": config.placement,
    }


def _check_family(settings: Mapping[str, Any]) -> None:
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"The authors' checkpoints are of {', '.join(FAMILIES)}; this one is of {family!r}."
        )


def _adapter_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if name == EMBEDDING:
            yield "embedding", tensor[0].clone()
        elif match := PROJECTION.fullmatch(name):
            yield f"layers.{match[1]}.{match[2]}.{match[3]}", tensor
        elif "beacon" in name:
            raise FileFormatError(f"The tensor {name} is not part of a beacon checkpoint that is known.")


def _official_name(name: str) -> str:
    if name == "embedding":
        return EMBEDDING
    _, layer, letter, kind = name.split(".")
    if len(letter) > 1:
        raise UnsupportedModelError(f"The authors' code has no fused projection ({letter}).")
    return f"model.layers.{layer}.self_attn.beacon_{letter}_proj.{kind}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {reason(error)}. Name a folder with config.json and safetensors."
        ) from error
    except ValueError as error:
        raise FileFormatError(f"{path} is damaged: {reason(error)}.") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} must hold a JSON object; it holds {type(values).__name__}.")
    return values


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = _weight_files(folder)
    if not files:
        raise StorageError(
            f"{folder} has no model.safetensors. Convert its weights to safetensors first: nothing else is read."
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path} is damaged: {reason(error)}. Fetch it again.") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The model's weights as transformers finds them; other safetensors in the folder are none of ours."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise FileFormatError(f"{index} is damaged: weight_map must name a file for each tensor. Fetch it again.")
        return [folder / name for name in sorted(set(places.values()))]
    return [path for path in (folder / "model.safetensors",) if path.exists()]


def _write_base(folder: Path, source: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir()
    own = {name: value for name, value in settings.items() if not name.startswith("beacon_") and name != "auto_map"}
    write_text(folder / "config.json", json.dumps(own, indent=1) + "\n")
    _copy_tokenizer(source, folder)
    _write_tensors(folder, tensors)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    split = split_torch_state_dict_into_shards(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, filename_pattern="model{suffix}.safetensors"
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
