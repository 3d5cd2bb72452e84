"""Where base models come from: the embedded default model, a local folder, or a hub id. Knows nothing of beacons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import has_file

from activation_beacon.default_base import check_default_revision, prepare_default_base
from activation_beacon.errors import BaseModelError, InputError, reason

DEFAULT_BASE_NAME = "default"
ARGUMENTS = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "revision"}  # what options of transformers are here
OWN_OPTIONS = ("use_safetensors", "output_loading_info")
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "proxies")
CONFIG_OPTIONS = ("subfolder", "code_revision")
SHARED_OPTIONS = (*HUB_OPTIONS, "trust_remote_code", "force_download")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_pretrained_base(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a base model and its tokenizer.

    Args:
        name: `"default"` for the embedded model (fetched on first use), a local folder, or a hub id.
        dtype: Of the weights; None keeps what the files hold (float32 for the default model).
        device: Where the model goes; None leaves it on the CPU.
        revision: Branch, tag or commit of a hub id; `DEFAULT_BASE_REVISION` or None for the default model.
        options: Further ones of transformers' `from_pretrained`, such as `attn_implementation`, `quantization_config`,
            `device_map` or `trust_remote_code`.

    Returns:
        The model in eval mode, and its tokenizer or None where the folder holds none.

    Raises:
        BaseModelError: If the model cannot be found, fetched, built or placed on the device.
        InputError: For an option that has an argument here, or that is not the caller's to set; for a dtype that torch does
            not have.
    """
    options = dict(options or {})
    _check_options(options, device)
    _check_dtype(dtype)
    if name == DEFAULT_BASE_NAME:
        check_default_revision(revision)
        source, revision = str(prepare_default_base()), None
    else:
        source = _resolve_name(name)
    # A foreign folder can be wrong in any way, and transformers raises a dozen kinds of errors for it.
    try:
        model = _load_model(source, dtype=dtype, revision=revision, options=options)
        tokenizer = _load_tokenizer(source, revision=revision, options=options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BaseModelError(_explain_failed_load(name, source, error)) from error
    if name == DEFAULT_BASE_NAME:
        model.name_or_path = name  # an adapter made on it names it, not this machine's cache folder
    return _place(model, device), tokenizer


def max_positions(model: Any) -> int | None:
    """Tokens that a model reads at once; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _resolve_name(name: str) -> str:
    """Tell folders from hub ids, and refuse early what can be neither."""
    path = Path(name).expanduser()
    ways = f'Give "{DEFAULT_BASE_NAME}", a folder with config.json and safetensors, or a hub id such as "owner/model".'
    if not name.strip():
        raise BaseModelError(f"The name of a base model must not be empty. {ways}")
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        raise BaseModelError(f"A base model is a folder; {name!r} is a file. {ways}")
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise BaseModelError(f"There is no folder {name!r}. {ways}")
    return name


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "beacon_config.json").is_file():
        raise BaseModelError(
            f"{str(folder)!r} holds an adapter, not a base model. Load it with activation_beacon.load()."
        )
    raise BaseModelError(
        f"A base model's folder must hold config.json; {str(folder)!r} has none. "
        "Write one with the model's and the tokenizer's save_pretrained()."
    )


def _check_options(options: Mapping[str, Any], device: torch.device | str | None) -> None:
    for name in options:
        if name in ARGUMENTS:
            raise InputError(f"{name} is no option of the base here but an argument. Give {ARGUMENTS[name]}=.")
        if name in OWN_OPTIONS:
            raise InputError(
                f"{name} cannot be set: base models are read from safetensors, and what is missing is refused."
            )
    if device is not None and options.get("device_map") is not None:
        raise InputError(f"device ({device}) and device_map ({options['device_map']}) both place the model. Give one.")


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"There is no dtype {dtype!r}. Use float32, bfloat16 or float16.")


def _load_model(
    source: str, *, dtype: torch.dtype | str | None, revision: str | None, options: Mapping[str, Any]
) -> PreTrainedModel:
    # Safetensors only: weights in pickle files can run code when they are read.
    model, report = _auto_class(source, revision, options).from_pretrained(
        source,
        dtype=dtype or "auto",
        revision=revision or "main",
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    return model


def _auto_class(source: str, revision: str | None, options: Mapping[str, Any]) -> Any:
    """The class of transformers that knows the model: some that take pictures too are not among its causal language models."""
    shared = {name: options[name] for name in (*SHARED_OPTIONS, *CONFIG_OPTIONS) if name in options}
    kind = type(options.get("config") or AutoConfig.from_pretrained(source, revision=revision or "main", **shared))
    is_only_there = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForMultimodalLM if is_only_there else AutoModelForCausalLM


def _load_tokenizer(source: str, *, revision: str | None, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    # Without this look AutoTokenizer may build an empty tokenizer from the model's type alone.
    where = {name: options[name] for name in HUB_OPTIONS if name in options}
    has_vocabulary = any(has_file(source, file, revision=revision, **where) for file in TOKENIZER_FILES)
    if not has_vocabulary and not _needs_no_vocabulary(get_tokenizer_config(source, revision=revision, **where)):
        return None
    # Prompts of a batch are padded on the left.
    shared = {name: options[name] for name in SHARED_OPTIONS if name in options}
    return AutoTokenizer.from_pretrained(source, revision=revision or "main", padding_side="left", **shared)


def _needs_no_vocabulary(config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer has none of the usual files: one of bytes, or of code that comes with the model."""
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        return True
    kind = tokenizer_class_from_name(config.get("tokenizer_class") or "")
    return kind is not None and not kind.vocab_files_names


def _explain_failed_load(name: str, source: str, error: Exception) -> str:
    told = f"Base model {name!r} cannot be loaded: {reason(error)}"
    if name == DEFAULT_BASE_NAME:
        return f"{told}. Its files seem damaged: delete {source} and try again."
    if Path(source).is_dir():
        return f"{told}. Check {source}: it needs config.json and complete *.safetensors of a causal language model."
    return f"{told}. Check the hub id, the revision and the network, or give a local folder."


def _place(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(
            f'Device "{device}" cannot be used: {reason(error)}. Use "cpu", or fix the device.'
        ) from error
