"""Adapters on disk: `beacon_config.json`, `beacon.safetensors` (or shards of it) and a model card."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import BeaconError, ConfigError, FileFormatError, MismatchError, StorageError, reason
from activation_beacon.files import flush, make_folder, whole_file

CONFIG_FILE = "beacon_config.json"
WEIGHTS_FILE = "beacon.safetensors"
INDEX_FILE = "beacon.safetensors.index.json"
SHARD_FILES = "beacon-?????-of-?????.safetensors"
CARD_FILE = "README.md"


def save_adapter(
    folder: str | Path, config: BeaconConfig, tensors: Mapping[str, torch.Tensor], *, max_shard_size: str | int = "5GB"
) -> None:
    """Write an adapter: config last, so that a folder with a config is complete.

    What is to replace an older adapter is on the disk before anything of that one goes. Its card goes with it, unless it is
    another than was written here.

    Args:
        folder: made if missing.
        config: its settings.
        tensors: by the names of `BeaconModel.beacon_parameters`.
        max_shard_size: bytes from which the weights are split, as transformers counts ("5GB").

    Raises:
        StorageError: if it cannot be written.
    """
    folder = Path(folder)
    make_folder(folder, "Choose another place.")
    outdated = [folder / CONFIG_FILE, *([folder / CARD_FILE] if _has_card_of_its_own_config(folder) else [])]
    with contextlib.ExitStack() as stack:  # files take their places in the opposite order: the config last
        _write_aside(stack, folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
        if folder / CARD_FILE in outdated or not (folder / CARD_FILE).exists():
            _write_aside(stack, folder / CARD_FILE, model_card(config))
        written = _write_weights_aside(stack, folder, tensors, max_shard_size)
        for path in outdated:
            path.resolve().unlink(missing_ok=True)  # a link stays: the new file goes where it leads to
        for path in _older_weights(folder, written):
            path.unlink(missing_ok=True)


def _write_aside(stack: contextlib.ExitStack, path: Path, text: str) -> None:
    temporary = stack.enter_context(whole_file(path))
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)


def _write_weights_aside(
    stack: contextlib.ExitStack, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: str | int
) -> set[str]:
    """Write weights into files that take their places when the stack is left; returns the names of these."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size, filename_pattern="beacon{suffix}.safetensors"
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_aside(stack, folder / INDEX_FILE, json.dumps(index, indent=2))
    for filename, names in split.filename_to_tensors.items():
        temporary = stack.enter_context(whole_file(folder / filename))
        save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
        flush(temporary)
    return {*split.filename_to_tensors, *([INDEX_FILE] if split.is_sharded else [])}


def _older_weights(folder: Path, written: set[str]) -> list[Path]:
    """Weights of an earlier adapter in the folder, which would be read instead of, or beside, those just written."""
    paths = (folder / INDEX_FILE, folder / WEIGHTS_FILE, *folder.glob(SHARD_FILES))
    return [path for path in paths if path.name not in written]


def _has_card_of_its_own_config(folder: Path) -> bool:
    """Whether a folder's card is what was written beside its config, and nobody's own."""
    try:
        return (folder / CARD_FILE).read_text(encoding="utf-8") == model_card(load_adapter_config(folder))
    except (BeaconError, OSError, UnicodeDecodeError):
        return False


def model_card(config: BeaconConfig) -> str:
    """A model card with what the configuration knows."""
    training = json.dumps(config.training, indent=2) if config.training else "**Untrained**: of no use before training."
    return f"{card_front(config)}\n## Training\n\n{training}\n"


def card_front(config: BeaconConfig) -> str:
    """The first part of a model card: what the adapter is, and how it is used."""
    base = config.base_model or "unknown"
    hub_base = f"base_model: {base}\n" if "/" in base and not base.startswith((".", "/")) else ""
    return (
        f"---\nlibrary_name: activation-beacon\n{hub_base}tags:\n- activation-beacon\n- long-context\n---\n\n"
        f"# Activation Beacon adapter\n\nBase model: `{base}`. Chunks of {config.chunk_size} tokens, compression ratios "
        f"{', '.join(map(str, config.ratios))}, {config.num_sinks} sinks, {config.local_tokens} local tokens, "
        f"projections {', '.join(config.projections)}"
        f"{', anchored' if config.anchored else ''}"
        f"{', numbers and codes token by token' if config.exact_ids else ''}.\n\n"
        f'```python\nfrom activation_beacon import load\n\nmodel, tokenizer = load("path-or-hub-id")\n```\n'
    )


def load_adapter_config(folder: str | Path) -> BeaconConfig:
    """Read `beacon_config.json`.

    Raises:
        StorageError: if the folder has none.
        FileFormatError: if it cannot be read as one.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return BeaconConfig.from_dict(values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(
            f"{folder} holds no adapter: {CONFIG_FILE} is missing. Name a folder that save_pretrained wrote."
        ) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}.") from error
    except ConfigError as error:
        raise FileFormatError(f"{path} is not a valid adapter configuration: {error}") from error
    except (UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged: {reason(error)}. Fetch or save the adapter again.") from error


def load_adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read an adapter's weights, from one file or several.

    Raises:
        StorageError: if a file is missing.
        FileFormatError: if one is damaged.
    """
    folder = Path(folder)
    try:
        files = {WEIGHTS_FILE}
        if (folder / INDEX_FILE).exists():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            files = {_shard_name(name) for name in dict(index["weight_map"]).values()}
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(files):
            if not (folder / name).is_file():
                raise StorageError(f"{folder} holds no complete adapter: {name} is missing. Fetch or save it again.")
            tensors |= load_file(folder / name)
        return tensors
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"The weights in {folder} are damaged: {reason(error)}. Fetch or save the adapter again."
        ) from error


def _shard_name(name: str) -> str:
    if not Path(name).match(SHARD_FILES) or Path(name).name != name:
        raise ValueError(f"{INDEX_FILE} names {name!r}, which is no file of an adapter")
    return name


@torch.no_grad()
def fill_parameters(
    parameters: Iterable[tuple[str, torch.Tensor]], tensors: Mapping[str, torch.Tensor], *, weight: float = 1.0
) -> None:
    """Copy an adapter's tensors into a model's beacon parameters, in whatever dtype these are.

    Args:
        parameters: by name.
        tensors: by the same names.
        weight: the share that the tensors have in what the parameters become; the rest is what they were.

    Raises:
        MismatchError: if names or shapes differ; nothing is copied then.
    """
    wanted = dict(parameters)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        named = ", ".join([*(f"-{name}" for name in missing), *(f"+{name}" for name in extra)][:4])
        raise MismatchError(f"The adapter's tensors are not those of this base model and configuration ({named}, ...).")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise MismatchError(
                f"{name} must have the shape {tuple(parameter.shape)}; the adapter's has {tuple(tensors[name].shape)}."
            )
    for name, parameter in wanted.items():
        if weight == 1:
            parameter.copy_(tensors[name])
        else:
            parameter.lerp_(tensors[name].to(parameter), weight)
