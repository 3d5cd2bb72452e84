"""Models and contexts as the commands need them: loaded quietly, checked in the cheapest order."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_beacon.cli.console import notice, working
from activation_beacon.cli.options import Dtype, RatioOption
from activation_beacon.cli.texts import check_is_no_text
from activation_beacon.errors import BaseModelError, InputError, MismatchError

if TYPE_CHECKING:
    import torch

    from activation_beacon.cache import BeaconCache
    from activation_beacon.config import BeaconConfig
    from activation_beacon.prompts import ChatPrompt


@dataclass(frozen=True)
class Loaded:
    """A model with beacons, its tokenizer, and the prompts of its chat template."""

    name: str
    model: Any
    tokenizer: Any
    prompt: "ChatPrompt"

    @property
    def config(self) -> "BeaconConfig":
        """Settings of the adapter."""
        return self.model.beacon_config

    @property
    def max_positions(self) -> int | None:
        """Tokens that the base model reads at once; None where its config does not say."""
        from activation_beacon.base_models import max_positions

        return max_positions(self.model)


def load_model(
    name: str, *, base: str | None, device: str | None, dtype: Dtype | None, local_tokens: int | None = None
) -> Loaded:
    """Load an adapter with its base model and tokenizer.

    Raises:
        BeaconError: as `hub.load` does, or if the base model has no tokenizer, or not the positions for that many local tokens.
    """
    with working(f"loading {name}"), quiet_libraries():
        from activation_beacon.hub import load
        from activation_beacon.prompts import ChatPrompt

        model, tokenizer = load(
            name, base=base, dtype=None if dtype is None else str(dtype), device=device or best_device()
        )
        if tokenizer is None:
            raise BaseModelError(
                f"The base model of {name} has no tokenizer, and text cannot be read without one. "
                "Put its tokenizer.json beside the base model's config.json."
            )
        if local_tokens is not None:
            model.local_tokens = local_tokens
        return Loaded(name, model, tokenizer, ChatPrompt(tokenizer))


def check_ratio(name: str, ratio: RatioOption, *, budget: int | None = None) -> None:
    """Refuse a ratio that the adapter does not know, before its base model is loaded if the adapter is at hand.

    Raises:
        RatioError: as `compress` would.
        StorageError, FileFormatError: if the folder holds no adapter.
    """
    from activation_beacon.ratios import as_policy

    config = adapter_config(name)
    if config is not None:
        as_policy(config, ratio, budget=budget)  # type: ignore[arg-type] # a text other than "auto" has been refused


def adapter_config(name: str) -> "BeaconConfig | None":
    """Settings of an adapter that is at hand; None for one that the hub may have.

    Raises:
        StorageError, FileFormatError: if the folder holds no adapter.
    """
    from activation_beacon.config import BeaconConfig

    folder = adapter_at_hand(name)
    if folder is not None:
        from activation_beacon.persistence import load_adapter_config

        return load_adapter_config(folder)
    return BeaconConfig(base_model=name) if name == "default" else None


def adapter_at_hand(name: str) -> Path | None:
    """The folder of an adapter that is at hand."""
    if name == "default":
        from activation_beacon.hub import default_adapter_folder

        return default_adapter_folder()
    path = Path(name).expanduser()
    return path if path.exists() else None


def read_context(path: Path) -> "BeaconCache":
    """Read a context file without any model.

    Raises:
        StorageError, FileFormatError: as `BeaconCache.load` does, or if the file is a text.
    """
    check_is_no_text(path)
    from activation_beacon.cache import BeaconCache

    return BeaconCache.load(path)


def place_context(loaded: Loaded, context: "BeaconCache") -> "BeaconCache":
    """The context on the model's device and in its dtype.

    Raises:
        MismatchError: if another base model or adapter made it.
        FileFormatError: if no context of this model can be so.
        InputError: if it holds a batch.
    """
    try:
        placed: BeaconCache = loaded.model.placed(context)
    except MismatchError as error:
        raise MismatchError(f"{error} (--model {loaded.name})") from None
    if context.batch_size != 1:
        raise InputError(f"The file holds a batch of {context.batch_size} contexts. Save one of them: context.row(0).")
    return placed


def best_device() -> str:
    """A CUDA device if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str | None) -> "torch.device":
    """The device of that name, or the best one.

    Raises:
        BaseModelError: if it cannot be used.
    """
    import torch

    from activation_beacon.errors import reason

    chosen = name or best_device()
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(
            f'Device "{chosen}" cannot be used: {reason(error)}. Use "cpu", or fix the device.'
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide transformers' progress bars and warnings; show this package's own log, such as a download's start."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger, handler = logging.getLogger("activation_beacon"), _NoticeHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _NoticeHandler(logging.Handler):
    """Prints log records as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        notice(record.getMessage())
