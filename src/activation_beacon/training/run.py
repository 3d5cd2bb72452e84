"""A whole training run: model, data and trainer from settings; a usable adapter at the end, however it ends."""

import dataclasses
import json
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from activation_beacon.base_models import load_pretrained_base, max_positions
from activation_beacon.config import BeaconConfig, is_same_fingerprint, short_fingerprint
from activation_beacon.default_base import DEFAULT_BASE_REVISION
from activation_beacon.errors import BaseModelError, CapacityError, ConfigError, StorageError
from activation_beacon.exact import digit_ids, with_digits
from activation_beacon.files import make_folder, write_text
from activation_beacon.fingerprint import fingerprint
from activation_beacon.hub import adapter_folder
from activation_beacon.model import attach
from activation_beacon.persistence import fill_parameters, load_adapter_config, load_adapter_tensors, save_adapter
from activation_beacon.plan import Row, TextPlanner
from activation_beacon.processes import Processes, processes
from activation_beacon.ratios import RatioPolicy
from activation_beacon.training.card import training_card
from activation_beacon.training.checkpoints import checkpoints
from activation_beacon.training.metrics import read_metrics, updates
from activation_beacon.training.samplers import DEV, check_sources, dev_samplers, read_sources, stage_samplers
from activation_beacon.training.settings import TrainingSettings
from activation_beacon.training.tracking import open_tracker
from activation_beacon.training.trainer import Notice, Outcome, Report, Trainer, Working

logger = logging.getLogger(__name__)

SETTINGS_FILE = "recipe.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
CURVES_FILE = "curves.png"
DTYPE = torch.float16


def train(
    settings: TrainingSettings,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    report: Report | None = None,
    working: Working | None = None,
    notice: Notice | None = None,
) -> Outcome:
    """Train an adapter, or go on training it.

    SIGTERM and SIGINT save and end the run after the step that is under way. Launched by `torchrun` or
    `accelerate launch`, all processes train together.

    Args:
        settings: the run.
        resume: go on where the output folder stands.
        max_minutes: of this call, loading and tokenising among them; the learning rate falls so that it ends in time.
        device: such as "cuda:0"; by default a GPU if there is one.
        report: is called with the metrics of each update, and before the first with what dev texts have (step 0).
        working: is called with the step under way and what is being done, several times within one.
        notice: is called with what a user should know.

    Returns:
        How it ended. The adapter is in the folder "adapter" of the output.

    Raises:
        ConfigError, InputError, StorageError, MismatchError: before anything is trained.
        TrainingError: if the loss is no number, or runs away.
    """
    start = time.monotonic()
    tell = notice or logger.info
    check_sources(settings, tell)
    folder = Path(settings.output)
    is_new = not folder.exists()
    found = _check_output(folder, resume=resume)
    if resume and not found:
        tell(f"{settings.output} holds no checkpoint to resume: a new run begins there.")
    try:
        with processes(device) as group:
            return _run(
                settings,
                group,
                resume=resume,
                max_minutes=max_minutes,
                since=start,
                device=device,
                report=report,
                working=working,
                tell=tell,
            )
    except BaseException:
        if is_new:
            with suppress(OSError):  # something is in it, or another process was first
                folder.rmdir()
        raise


def _run(
    settings: TrainingSettings,
    group: Processes,
    *,
    resume: bool,
    max_minutes: float | None,
    since: float,
    device: str | None,
    report: Report | None,
    working: Working | None,
    tell: Notice,
) -> Outcome:
    """The run of one process. What holds on to the group is let go of when it returns."""
    folder = Path(settings.output)
    model, tokenizer = _model(settings, group, device)
    data = read_sources(settings, tokenizer, folder / "tokens", group, tell)
    samplers = stage_samplers(settings, data, tokenizer, tell)
    trainer = Trainer(
        model, settings, samplers, dev=dev_samplers(settings, data, tokenizer, tell), group=group,
        digests={**data.digests, **_begun_with(settings, model)}, report=report if group.is_first else None,
        working=working, notice=tell,
    )  # fmt: skip
    tell_of_waiting(settings, group.count, tell)
    if resume and (progress := trainer.resume()).step:
        tell(f"Going on after step {progress.step:,} of {settings.num_steps:,}.")
    if group.is_first:  # a run that is not resumed keeps the recipe that began it
        write_text(folder / SETTINGS_FILE, json.dumps(settings.to_dict(), indent=2) + "\n")
    with _signals(trainer), _tracked(trainer):
        outcome = trainer.run(max_minutes=max_minutes, since=since)
    tensors = trainer.adapter_tensors()
    if group.is_first:
        write_adapter(settings, outcome, model, tensors, num_processes=group.count)
    group.barrier()
    return outcome


def tell_of_waiting(settings: TrainingSettings, num_processes: int, tell: Notice) -> None:
    """Say where micro-batches cannot be dealt evenly to the processes: weights are the same, and some processes wait."""
    for number, stage in enumerate(settings.stages, 1):
        if -(-stage.batch_size // stage.micro_batch_size) % num_processes:
            share = stage.batch_size // num_processes
            size = max(n for n in range(1, min(share, stage.micro_batch_size) + 1) if share % n == 0)
            tell(
                f"Stage {number}: {stage.batch_size} texts by micro_batch_size {stage.micro_batch_size} cannot be dealt evenly "
                f"to {num_processes} processes: some wait. In a new run, micro_batch_size {size} keeps all at work."
            )


def write_adapter(
    settings: TrainingSettings,
    outcome: Outcome,
    model: Any,
    tensors: dict[str, torch.Tensor],
    *,
    num_processes: int = 1,
) -> None:
    """Write the adapter with its card and curves into the run's folder.

    Weights are rounded to half precision: with 10 bits of fraction it is closer to them than bfloat16.
    """
    folder = Path(settings.output)
    target = folder / ADAPTER_FOLDER
    metrics = list(read_metrics(folder / METRICS_FILE))
    summary = {**_summary(settings, outcome, metrics), "hardware": hardware(num_processes)}
    config = dataclasses.replace(model.beacon_config, training=summary)
    rounded = {name: _rounded(tensor) for name, tensor in tensors.items()}
    save_adapter(target, config, rounded)
    write_text(target / "README.md", training_card(config, settings, metrics))
    write_text(target / SETTINGS_FILE, json.dumps(settings.to_dict(), indent=2) + "\n")
    draw_if_possible(folder / METRICS_FILE, target / CURVES_FILE)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.to(DTYPE)
    return half if bool(half.isfinite().all()) else tensor.to(torch.bfloat16)


def draw_if_possible(metrics: Path, target: Path) -> None:
    """Draw the curves where matplotlib is installed."""
    try:
        from activation_beacon.training.curves import draw_curves
    except ImportError:
        logger.info("No curves are drawn: matplotlib is not installed.")
        return
    draw_curves(list(read_metrics(metrics)), target)


def _check_output(folder: Path, *, resume: bool) -> list[Path]:
    """Checkpoints of the run that is to go on, or none; the folder is made.

    Raises:
        StorageError: if there are some and it is not to go on, or the folder cannot be made.
    """
    found = checkpoints(folder / "checkpoints") if folder.exists() else []
    if found and not resume:
        raise StorageError(
            f"{folder} holds a run already, with a checkpoint at {found[-1].name}. Add --resume to go on, or choose "
            "another --output."
        )
    make_folder(folder, "Choose another --output.")
    return found


def _model(settings: TrainingSettings, group: Processes, device: str | None) -> tuple[Any, Any]:
    place = torch.device(device) if device else group.device()
    base, tokenizer = load_pretrained_base(settings.base, dtype=settings.dtype, device=place)
    if tokenizer is None:
        raise BaseModelError(
            f"The base model {settings.base} has no tokenizer, and texts cannot be read without one. "
            "Put its tokenizer.json beside its config.json."
        )
    if base.dtype == torch.float16:
        raise ConfigError(
            "The base's dtype (float16) must be bfloat16 or float32: gradients are too small for it. Add --dtype bfloat16."
        )
    config = settings.config
    if settings.base == "default":
        config = dataclasses.replace(config, base_model="default", base_revision=DEFAULT_BASE_REVISION)
    positions = max_positions(base)
    longest = max(stage.length for stage in settings.stages)
    if (
        positions is not None
        and longest > positions
        and any(s.distillation or s.context_weight for s in settings.stages)
    ):
        raise ConfigError(
            f"length ({longest}) exceeds what the base reads uncompressed ({positions} positions), and distillation and "
            f"context_weight ask it to. Use a length of at most {positions}, or cross_entropy alone."
        )
    if config.exact_ids == "digits" and not digit_ids(tokenizer):
        raise ConfigError(
            f"Numbers cannot be held token by token: the tokenizer of {settings.base} has no token with a digit. Add "
            "--no-exact (in a recipe, leave exact_ids out)."
        )
    model = attach(base, with_digits(config, tokenizer))
    _check_positions(settings, model.max_positions)
    for number, adapter in enumerate(settings.adapters, 1):
        with group.first_before_others():
            folder = adapter_folder(adapter) or adapter
        if group.is_first:
            _tell_differences(adapter, load_adapter_config(folder), model.beacon_config)
        fill_parameters(model.beacon_parameters(), load_adapter_tensors(folder), weight=1 / number)
    return model, tokenizer


def _begun_with(settings: TrainingSettings, model: Any) -> dict[str, str]:
    """Fingerprints of what checkpoints do not hold and a run cannot go on without: its base; below differences, its adapter."""
    is_below = settings.lora_rank is not None and settings.adapters
    return {"base": model.base_fingerprint, **({"adapter": fingerprint(model.beacon_parameters())} if is_below else {})}


def _check_positions(settings: TrainingSettings, positions: int | None) -> None:
    """Refuse now what a draw of the smallest ratio for all chunks would not fit, rather than after hours.

    Raises:
        ConfigError: with the stage, and what it needs.
    """
    for number, stage in enumerate(settings.stages, 1):
        chunk_size = settings.chunk_size_of(stage)
        config = dataclasses.replace(settings.config, chunk_size=chunk_size, local_tokens=0)
        planner = TextPlanner(config, RatioPolicy(config.ratios[0]), positions)
        try:
            planner.plan(Row(config.chunk_size), stage.length)
        except CapacityError as error:
            raise ConfigError(f"Stage {number}: {error} Or train on a smaller length.") from error


def _tell_differences(adapter: str, before: BeaconConfig, config: BeaconConfig) -> None:
    """Say where the recipe's settings are not those of the adapter that it goes on from."""
    for name in ("num_sinks", "anchored", "placement", "exact_ids"):
        old, new = getattr(before, name), getattr(config, name)
        if old != new:
            logger.warning("%s has %s %s; this run goes on with %s.", adapter, name, _brief(old), _brief(new))
    made_for, base = before.base_fingerprint, config.base_fingerprint
    if made_for and base and not is_same_fingerprint(made_for, base):
        logger.warning(
            "%s was made for another base (fingerprint %s; this one has %s): what it learnt there may be of little use.",
            adapter, short_fingerprint(made_for), short_fingerprint(base),
        )  # fmt: skip


def _brief(value: Any) -> str:
    return f"of {len(value)} tokens" if isinstance(value, tuple) else str(value)


@contextmanager
def _tracked(trainer: Trainer) -> Iterator[None]:
    """Metrics go to the tracker that the settings name, too."""
    settings, own = trainer.settings, trainer.report
    if settings.report_to is None or not trainer.group.is_first:
        yield
        return
    track, close = open_tracker(settings.report_to, trainer.folder, settings.to_dict())

    def report(line: dict[str, Any]) -> None:
        track(line)
        if own is not None:
            own(line)

    trainer.report = report
    try:
        yield
    finally:
        trainer.report = own
        close()


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step under way; a second Ctrl-C at once."""

    def handle(number: int, frame: object) -> None:
        del frame
        trainer.stop(f"asked to stop by {signal.Signals(number).name}", is_interrupted=number == signal.SIGINT)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs that may call trainer.stop
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(settings: TrainingSettings, outcome: Outcome, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = updates(metrics)  # what was measured before them is not this adapter's
    last = metrics[-1] if metrics else {}
    summary = {
        "steps": outcome.progress.step,
        "planned_steps": settings.num_steps,
        "tokens": outcome.progress.tokens,
        "minutes": round(outcome.progress.seconds / 60, 1),
        "torch": torch.__version__,
        "recipe": SETTINGS_FILE,
        "seed": settings.seed,
        "ended": outcome.why,
    }
    found = {name: next((line[name] for line in reversed(metrics) if name in line), None) for name in DEV}
    return {
        **summary,
        "last_loss": last.get("loss"),
        **{f"{name}_nats": losses for name, losses in found.items() if losses},
    }


def hardware(num_processes: int) -> str:
    """What a run of so many processes trains on, in words."""
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    threads = num_processes * torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {_processor()} ({os.cpu_count()} cores)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
