"""The environment of kvpress, whose methods stand beside ours: it needs an older transformers than this package."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activation_beacon.base_models import DEFAULT_BASE_NAME
from activation_beacon.default_base import prepare_default_base
from activation_beacon.errors import PeerError

PYTHON = Path(".venv-peers/bin/python")
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # kvpress's process is none of torchrun's


def require_python(python: Path, methods: Sequence[str]) -> None:
    """Refuse to go on without the environment's python.

    Raises:
        PeerError: if there is no such file.
    """
    if not python.is_file():
        raise PeerError(
            f"The methods {', '.join(methods)} are run by kvpress in an environment of its own, and there is no {python}. "
            "Make it with `make peers`, or anywhere with `python -m venv DIR` and `DIR/bin/pip install torch kvpress==0.5.5`, "
            "and name DIR/bin/python with --peers-python."
        )


def environment() -> dict[str, str]:
    """Variables of a process of kvpress."""
    return {**{name: value for name, value in os.environ.items() if name not in LAUNCHED}, **QUIET}


def model_options(model: Any, folder: Path | None = None) -> list[str]:
    """Options of a worker that make it load the same base model.

    Args:
        model: with beacons attached.
        folder: where the configuration is written of a model that was loaded from nowhere: the worker's is then of the
            same shape, with weights of its own.
    """
    kind = ["--dtype", str(model.dtype).removeprefix("torch."), "--device", str(model.device)]
    name = model.name_or_path
    if not name and folder is not None:
        model.config.save_pretrained(folder)
        return ["--config", str(folder), *kind]
    base = str(prepare_default_base() if name == DEFAULT_BASE_NAME else name)
    known = model.beacon_config
    revision = known.base_revision if known.base_model == name and base == name else None
    return ["--base", base, *kind, *([] if revision is None else ["--revision", revision])]


def last_line(text: str) -> str:
    """The last line that a process said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
