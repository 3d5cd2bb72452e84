"""Checkpoints: folders that are whole or not there, from which a run goes on to the same weights as an unbroken one.

A checkpoint is an adapter in float32 (so that it can be used as one), the optimizer's state, and a few numbers.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import FileFormatError, MismatchError, reason
from activation_beacon.files import build_folder
from activation_beacon.persistence import save_adapter
from activation_beacon.training.sharding import like

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "trained.safetensors"
AVERAGE_FILE = "average.safetensors"
PATTERN = "step-*"
MODELS = {"base": "base model", "adapter": "adapter"}  # what a run begins with, by the name of its digest


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: updates made.
        tokens: raw tokens read.
        targets: tokens whose prediction counted.
        seconds: spent training, over all calls.
        fingerprint: of the settings.
        digests: of what the run reads and of what it began with, by name; a checkpoint from before one was kept has none.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    progress: Progress,
    *,
    config: BeaconConfig,
    adapter: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    average: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint under `folder`, then remove all but the `keep` latest.

    Args:
        folder: of all checkpoints of a run.
        progress: so far.
        config: of the adapter.
        adapter: its tensors, as they would be used.
        trained: what is being trained, where that is not the adapter itself (LoRA, an average); may be empty.
        average: of what is being trained; may be empty.
        optimizer: its state, by name.
        keep: how many to keep.

    Raises:
        StorageError: if it cannot be written; earlier checkpoints are left.
    """
    target = folder / f"step-{progress.step:07d}"
    if target.exists():
        return target

    def write(aside: Path) -> None:
        save_adapter(aside, config, adapter)
        for name, tensors in ((OPTIMIZER_FILE, optimizer), (WEIGHTS_FILE, trained), (AVERAGE_FILE, average)):
            if tensors:
                save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, aside / name)
        (aside / STATE_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")

    build_folder("the training run", target, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """All whole checkpoints under a folder, oldest first."""
    return sorted(path for path in folder.glob(PATTERN) if (path / STATE_FILE).is_file())


def read_progress(checkpoint: Path, fingerprint: str, digests: Mapping[str, str]) -> Progress:
    """How far a checkpoint has come.

    Args:
        checkpoint: its folder.
        fingerprint: of the settings under which the run is to go on.
        digests: of what it is to read and begins with, by name. What the checkpoint has no digest of is not compared.

    Raises:
        FileFormatError: if it is damaged.
        MismatchError: if it was made under other settings, has read something else, or began with another model.
    """
    try:
        progress = Progress(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(
            f"{checkpoint} is damaged: {reason(error)}. Remove it to go on from an earlier one."
        ) from error
    if progress.fingerprint != fingerprint:
        raise MismatchError(
            f"{checkpoint} was made under other settings ({progress.fingerprint}; these are {fingerprint}). "
            "Resume with the recipe that began the run, or start a new one in another folder from --adapter."
        )
    for name, digest in digests.items():
        if (known := progress.digests.get(name, digest)) != digest:
            what = f"began with another {MODELS[name]}" if name in MODELS else f"has read other {name}"
            now = "this is" if name in MODELS else "these are"
            raise MismatchError(
                f"{checkpoint} {what} ({known}; {now} {digest}). Put back what the run began with, or start a new one in "
                "another folder from --adapter."
            )
    return replace(progress, digests={**progress.digests, **digests})


def read_tensors(checkpoint: Path, name: str, *, is_needed: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of one of a checkpoint's files; none where it has no such file and needs none.

    Raises:
        FileFormatError: if it is damaged, or missing where it is needed.
    """
    if not is_needed and not (checkpoint / name).exists():
        return {}
    try:
        return load_file(checkpoint / name)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{checkpoint / name} is damaged: {reason(error)}. Remove {checkpoint} to go on from an earlier one."
        ) from error


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], names: Mapping[Any, str]) -> dict[str, torch.Tensor]:
    """State of optimizers as named tensors; `names` names each parameter."""
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{names[parameter]}:{key}"] = torch.as_tensor(value)
    return tensors


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], names: Mapping[Any, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` took.

    Raises:
        MismatchError: if the tensors are of other parameters.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for entry, tensor in tensors.items():
        name, _, key = entry.rpartition(":")
        if name not in by_name:
            raise MismatchError(
                f"The checkpoint's optimizer knows {name}, which is not trained here. Use its own recipe."
            )
        parameter = by_name[name]
        is_count = tensor.dim() == 0
        owner[parameter].state[parameter][key] = tensor.clone() if is_count else like(parameter, tensor).clone()
