"""Where adapters come from: a folder, the hub, or this package; with the base model that they were made for."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from activation_beacon.base_models import load_pretrained_base
from activation_beacon.config import BeaconConfig
from activation_beacon.default_base import DEFAULT_BASE_REVISION
from activation_beacon.errors import InputError, StorageError, reason
from activation_beacon.exact import with_digits
from activation_beacon.model import attach, detach
from activation_beacon.persistence import CONFIG_FILE, fill_parameters, load_adapter_config, load_adapter_tensors

DEFAULT = "default"


def load(
    name: str | Path = DEFAULT,
    *,
    base: str | PreTrainedModel | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    base_options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load an adapter with its base model and tokenizer.

    Args:
        name: a folder that `save_pretrained` wrote, a hub id, or "default" for the model that comes with the package.
        base: another place for the base model than the adapter names: "default", a folder or a hub id; or the model
            itself, on which the adapter is then put (no tokenizer is returned with it).
        dtype, device: of model and adapter, as in transformers; by default float32 for the default model. A model given as
            `base` keeps its own.
        revision: of the adapter on the hub.
        base_options: further ones of transformers' `from_pretrained` for the base model, such as `attn_implementation`,
            `quantization_config`, `device_map` or `trust_remote_code`.

    Returns:
        The model with beacons attached, in eval mode, and its tokenizer, which pads on the left (None where the base's
        folder has none).

    Raises:
        StorageError: if there is no adapter of that name.
        FileFormatError: if the adapter is damaged.
        BaseModelError: if the base model cannot be found.
        MismatchError: if the base model is not the one that the adapter was made for.
        InputError: for a dtype, device or options besides a base model that has its own.
    """
    if isinstance(base, PreTrainedModel):
        _refuse_options_of_loading(base, dtype=dtype, device=device, base_options=base_options)
    folder = adapter_folder(name, revision)
    config = _untrained_default() if folder is None else load_adapter_config(folder)
    if isinstance(base, PreTrainedModel):
        model, tokenizer = base, None
    else:
        source, base_revision = (base, None) if base else (base_name(config, folder), _hub_revision(config))
        model, tokenizer = load_pretrained_base(
            source, dtype=dtype, device=device, revision=base_revision, options=base_options
        )
    model = attach(model, config if tokenizer is None else with_digits(config, tokenizer))
    if folder is not None:
        try:
            fill_parameters(model.beacon_parameters(), load_adapter_tensors(folder))
        except BaseException:
            detach(model)
            raise
    return model.eval(), tokenizer


def _refuse_options_of_loading(
    base: PreTrainedModel, *, dtype: Any, device: Any, base_options: Mapping[str, Any] | None
) -> None:
    if dtype is not None or device is not None:
        raise InputError(
            f"A model given as base keeps its own dtype and device ({base.dtype}, {base.device}); got dtype={dtype}, "
            f"device={device}. Leave them out, and give base.to(...)."
        )
    if base_options:
        raise InputError(
            f"base_options ({', '.join(base_options)}) are for loading the base model, and one was given as base. Load it with "
            "them, or leave them out."
        )


def default_adapter_folder() -> Path | None:
    """The trained adapter of the default model in this package; None if it ships without one."""
    folder = resources.files("activation_beacon") / "adapters" / DEFAULT
    return Path(str(folder)) if (folder / CONFIG_FILE).is_file() else None


def _untrained_default() -> BeaconConfig:
    return BeaconConfig(base_model=DEFAULT, base_revision=DEFAULT_BASE_REVISION)


def adapter_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder of an adapter by its name, as `load` takes it; fetched from the hub if need be.

    Returns:
        None for "default" where the package ships without an adapter.

    Raises:
        StorageError: if it is neither a folder nor to be had from the hub.
    """
    if str(name) == DEFAULT:
        return default_adapter_folder()
    path = Path(name)
    if path.exists() or isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        return path.expanduser()
    return _download_adapter(str(name), revision)


def _download_adapter(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=["beacon*", "base/*"]))
    except Exception as error:
        raise StorageError(
            f"The adapter {repo_id} is neither a folder here nor to be had from the hub ({reason(error)}). "
            "Check the name, or the network."
        ) from error


def base_name(config: BeaconConfig, folder: Path | None) -> str:
    """The base model that an adapter names: "default", a hub id, or a folder, which may lie beside the adapter's files.

    Raises:
        StorageError: if it names none.
    """
    if config.base_model is None:
        raise StorageError(f"The adapter in {folder} names no base model. Name it: load(..., base=...), or --base.")
    beside = None if folder is None else folder / config.base_model
    return str(beside) if beside is not None and beside.is_dir() else config.base_model


def _hub_revision(config: BeaconConfig) -> str | None:
    is_hub_id = config.base_model is not None and config.base_model.count("/") == 1
    return config.base_revision if is_hub_id else None
