"""The loop: texts in, beacon weights out, and nothing lost on the way.

It holds the weights, the optimizers and how far the run has come; what a step reads is a function of the step. Only
beacon weights are trained; the base is frozen, and drops nothing.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from activation_beacon.at_once import chunks_at_once
from activation_beacon.constants import sent
from activation_beacon.errors import ConfigError, TrainingError
from activation_beacon.matmul import training_products
from activation_beacon.persistence import load_adapter_tensors
from activation_beacon.processes import Processes
from activation_beacon.training import checkpoints
from activation_beacon.training.averaging import Average
from activation_beacon.training.batches import Batch, step_batches
from activation_beacon.training.checkpoints import Progress
from activation_beacon.training.frozen import without_dropout
from activation_beacon.training.low_rank import LowRank
from activation_beacon.training.metrics import MetricsLog, StepTotals, peak_memory
from activation_beacon.training.objective import Losses, Objective, check_at_once, check_head, losses
from activation_beacon.training.optimizers import make_optimizers
from activation_beacon.training.sampling import Sampler
from activation_beacon.training.settings import Stage, TrainingSettings
from activation_beacon.training.sharding import fill, regather, whole, wrap

logger = logging.getLogger(__name__)

RUNAWAY_NATS = 2.0  # by which the smoothed loss may exceed the best it was in its stage
SMOOTHING = 0.95
LAST_SHARE = 0.02  # of the time that is left for saving
FALL_SHARE = 0.3  # of the time in which the learning rate falls
FORETOLD_AFTER = 3  # updates, from which it is told what will not be reached
MEASURING_SHARE = 0.15  # of the time that is given, for measuring once on dev texts

Report = Callable[[dict[str, Any]], None]
Working = Callable[[int, str], None]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class _Ending:
    why: str
    is_finished: bool
    is_interrupted: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` ended.

    Attributes:
        progress: of the whole run.
        is_finished: all steps were made, or the time that was given is used up.
        checkpoint: the last one.
        why: one line.
        is_interrupted: by Ctrl-C.
    """

    progress: Progress
    is_finished: bool
    checkpoint: Path
    why: str
    is_interrupted: bool = False


class TrainingStep(nn.Module):
    """What is wrapped for several processes: a batch in, its losses out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, objective: Objective) -> Losses:
        """Losses of a batch."""
        return losses(
            self.model, batch.ids, batch.is_target, batch.ratios, objective=objective, chunk_size=batch.chunk_size
        )


class Trainer:
    """Trains the beacons of one model.

    Args:
        model: with beacons attached, on the device where it is to be trained.
        settings: the run.
        samplers: one for each stage: what it reads.
        dev: samplers of texts nobody trains on, by what their losses are called in the metrics.
        group: the processes that train together.
        digests: of what the samplers read and what the model was before, by name: a run is continued on the same only.
        report: is called with each line of the metrics.
        working: is called with the step under way (the last one, when dev texts are measured after it) and what is being
            done, several times within one.
        notice: is called with what a user should know.

    Raises:
        UnsupportedError: if the model cannot be trained this way, by name.
        ConfigError: if its processes do not share the texts of a step evenly.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        samplers: list[Sampler],
        *,
        dev: Mapping[str, Sampler] | None = None,
        group: Processes | None = None,
        digests: Mapping[str, str] | None = None,
        report: Report | None = None,
        working: Working | None = None,
        notice: Notice | None = None,
    ) -> None:
        self.model, self.settings, self.samplers, self.dev = model, settings, samplers, dev or {}
        self.group = group or Processes()
        self.report, self.working, self.notice = report, working, notice or logger.info
        self.folder = Path(settings.output)
        self.device, self.dtype = (getattr(model.get_input_embeddings().weight, name) for name in ("device", "dtype"))
        _check_shares(settings, self.group)
        with without_dropout(model):
            check_head(model)
            check_at_once(model)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for _, parameter in model.beacon_parameters():
            parameter.data = parameter.data.float()
        self.low_rank = None if settings.lora_rank is None else LowRank(model, settings.lora_rank, seed=settings.seed)
        self.module = TrainingStep(model)
        self.wrapped = wrap(self.module, settings.wrapper, self.group, list(model.get_decoder().layers))
        self.parameters = dict(self.low_rank.parameters() if self.low_rank else model.beacon_parameters())
        self.optimizers = make_optimizers(settings.optimizer, self.parameters)
        self.average = Average(self.parameters, settings.average_decay) if settings.average_decay else None
        self.progress = Progress(fingerprint=settings.fingerprint, digests=dict(digests or {}))
        self.stopping: str | None = None
        self.is_interrupted = False
        self.smoothed = self.best = math.inf
        self.measured_at: int | None = None  # the step after which dev texts were measured last

    # --- running ---

    def stop(self, why: str, *, is_interrupted: bool = False) -> None:
        """Ask the loop to save and end after the step that is under way."""
        self.stopping, self.is_interrupted = why, is_interrupted

    def resume(self) -> Progress:
        """Go on from the last checkpoint of the run, if there is one.

        Raises:
            MismatchError: if it was made under other settings, has read something else, or began with another model.
            FileFormatError: if it is damaged.
        """
        found = checkpoints.checkpoints(self.folder / "checkpoints")
        if found:
            began = self.progress
            self.progress = checkpoints.read_progress(found[-1], began.fingerprint, began.digests)
            own = checkpoints.read_tensors(found[-1], checkpoints.WEIGHTS_FILE)
            tensors = own or load_adapter_tensors(found[-1])
            for name, parameter in self.parameters.items():
                fill(parameter, tensors[name])
            if self.average is not None:
                self.average.restore(checkpoints.read_tensors(found[-1], checkpoints.AVERAGE_FILE, is_needed=True))
            state = checkpoints.read_tensors(found[-1], checkpoints.OPTIMIZER_FILE)
            checkpoints.restore_optimizers(self.optimizers, self._names, state)
        return self.progress

    @property
    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.parameters.items()}

    def run(self, *, max_minutes: float | None = None, since: float | None = None) -> Outcome:
        """Train until all steps are made, `stop` was called, or the time is over.

        Dev texts are measured before the first step, every `dev_every`, after the last, and when the time is over, for which
        as much of it is kept as measuring took before.

        Args:
            max_minutes: The learning rate falls in time: the run is over when the time is. One step is made at least.
            since: when these minutes began, on the monotonic clock; None for now.

        Raises:
            TrainingError: if the loss is no number, or runs away; the last good checkpoint is named.
        """
        clock = _Clock(max_minutes, since)
        log = MetricsLog(self.folder / "metrics.jsonl", self.progress.step) if self.group.is_first else None
        ending = _Ending("all steps are made", is_finished=True)
        begun = self.progress.step
        with (
            without_dropout(self.model),
            chunks_at_once(self.model),
            training_products(self.model.cpu_matmul, device=self.device, dtype=self.dtype),
            _Ahead(self._batches, self.settings.num_steps) as ahead,
        ):
            if self.dev and not self.progress.step:
                self._measure_first(clock, log)
            while not self._is_through:
                line = self._step(clock, ahead)
                if self.progress.step == begun + FORETOLD_AFTER:
                    self._foretell(clock)
                if self.dev and self._is_to_be_measured(clock):
                    line |= self._measured(clock)
                self._tell(line, log)
                if self._is_due(self.settings.save_every):
                    self.save()
                if not self._is_through and (early := self._ending(clock)) is not None:
                    ending = early
                    break
            checkpoint = self.save()
        if self.dev and self.measured_at != self.progress.step > begun:
            self.notice("Dev texts were not measured at the end: there was no time left, or the run was stopped.")
        if ending.is_finished and (missed := self.settings.stages_after(self.progress.step)):
            self.notice(
                f"{_stages(missed)} not reached in {_minutes(max_minutes)}. Go on with --resume, "
                "or give the stages before fewer steps."
            )
        return Outcome(self.progress, ending.is_finished, checkpoint, ending.why, ending.is_interrupted)

    def _foretell(self, clock: "_Clock") -> None:
        """Say early which stages the time will not reach, if any."""
        if clock.minutes is None:
            return
        stages, fitting = self.settings.stages, self.progress.step + clock.steps_left
        if missed := self.settings.stages_after(fitting):
            names = ", ".join(map(str, missed))
            self.notice(
                f"About {fitting:,} of {self.settings.num_steps:,} updates fit into {_minutes(clock.minutes)}: stage {names} will "
                f"not be reached. --steps {max(1, fitting // len(stages)):,} gives each stage an equal part."
            )

    @property
    def _is_through(self) -> bool:
        return self.progress.step >= self.settings.num_steps

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self._is_through

    def _ending(self, clock: "_Clock") -> "_Ending | None":
        """Why to end now, if there is a reason; the same in all processes."""
        if self._is_over(clock):
            return _Ending(clock.why, is_finished=True)
        if self.group.any(self.stopping is not None, device=self.device):
            why = self.stopping or "another process was asked to stop"
            return _Ending(why, is_finished=False, is_interrupted=self.is_interrupted)
        return None

    def _is_over(self, clock: "_Clock") -> bool:
        return self.group.any(clock.is_over, device=self.device)

    def _tell(self, line: dict[str, Any], log: MetricsLog | None) -> None:
        if log is not None:
            log.add(line)
        if self.report is not None:
            self.report(line)

    # --- dev texts on the way ---

    def _is_to_be_measured(self, clock: "_Clock") -> bool:
        return self._is_due(self.settings.dev_every) or (clock.can_measure and self._is_over(clock))

    def _measured(self, clock: "_Clock", *, within: float | None = None) -> dict[str, dict[str, float]]:
        found = self.dev_losses(within=within)
        self.measured_at = self.progress.step if found else self.measured_at
        clock.tick_measured(is_whole=bool(found))
        return found

    def _measure_first(self, clock: "_Clock", log: MetricsLog | None) -> None:
        """What the untrained beacons, or those of the adapter that the run goes on from, have on dev texts."""
        within = None if clock.minutes is None else 60 * clock.minutes * MEASURING_SHARE
        if found := self._measured(clock, within=within):
            self._tell({"step": 0, "stage": 0, "tokens": 0, "seconds": 0.0, **found}, log)
        else:
            self.notice(
                f"Dev texts are not measured before the first step: that would take more than {MEASURING_SHARE:.0%} of "
                f"{_minutes(clock.minutes)}. Lower dev_texts ({self.settings.dev_texts}) or dev_length "
                f"({self.settings.length_of_dev_texts:,}) by --set."
            )

    def _doing(self, step: int, text: str) -> None:
        if self.working is not None:
            self.working(step, text)

    # --- one update ---

    def _step(self, clock: "_Clock", ahead: "_Ahead") -> dict[str, Any]:
        start = time.perf_counter()
        number, stage, step = self.settings.stage_at(self.progress.step)
        if not step:  # the losses of another stage's texts are no measure for this one's
            self.smoothed = self.best = math.inf
        batches = ahead.get(self.progress.step)
        num_targets, num_tokens = self.group.sum(
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            device=self.device,
        )
        totals = StepTotals(self.settings.config.ratios)
        for place, batch in enumerate(self._synchronised(batches), 1):
            self._doing(self.progress.step + 1, f"reading {place:,} of {len(batches):,}")
            self._accumulate(batch, stage, num_targets, totals)
        rate = min(stage.rate((step + 1) / stage.steps), stage.learning_rate * self._fall(clock))
        norm = self._update(rate, stage.max_grad_norm)
        line = totals.line(self.group, self.device)
        self._check(line["loss"], norm)
        if self.average is not None:
            self.average.add(self.progress.step + 1)
        seconds = time.perf_counter() - start
        clock.tick()
        self.progress = dataclasses.replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + int(num_tokens),
            targets=self.progress.targets + int(num_targets),
            seconds=self.progress.seconds + seconds,
        )
        return {
            "step": self.progress.step,
            "stage": number,
            **line,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": self.progress.tokens,
            "tokens_per_second": num_tokens / seconds,
            "seconds": self.progress.seconds,
            "memory_bytes": peak_memory(self.device),
        }

    def _fall(self, clock: "_Clock") -> float:
        """What the first process's clock leaves of the learning rate: weights must not drift apart."""
        if clock.minutes is None:
            return 1.0
        return self.group.sum(clock.fall if self.group.is_first else 0.0, device=self.device)[0]

    def _batches(self, step: int) -> list[Batch]:
        """What this process reads for one update: a function of the run's step, made ahead in a thread."""
        number, stage, step_of_stage = self.settings.stage_at(step)
        return step_batches(
            stage,
            self.samplers[number],
            step_of_stage,
            chunk_size=self.settings.chunk_size_of(stage),
            ratios=self.settings.config.ratios,
            seed=self.settings.seed + 1_000_003 * number,
            **self._shared,
        )

    @property
    def _shared(self) -> dict[str, Any]:
        """How an update is shared. With fsdp every process reads as many batches: shards are gathered by all or by none."""
        is_even = self.settings.wrapper == "fsdp"
        return {"rank": self.group.rank, "num_processes": self.group.count, "is_even": is_even}

    def _synchronised(self, batches: list[Batch]) -> Iterator[Batch]:
        """Batches one by one; gradients are averaged over processes with the last."""
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else _without_sync(self.wrapped):
                yield batch

    def _accumulate(self, batch: Batch, stage: Stage, num_targets: float, totals: StepTotals) -> None:
        objective = Objective(stage.cross_entropy, stage.distillation, stage.context_weight)
        result = self.wrapped(_on(batch, self.device), objective)
        # The wrapper averages over processes what is a sum over all of their targets.
        (result.total * (self.group.count / max(num_targets, 1))).backward()
        totals.add(result, batch)

    def _update(self, rate: float, max_norm: float) -> float:
        norm = whole(nn.utils.clip_grad_norm_(list(self.parameters.values()), max_norm))
        if bool(norm.isfinite()):
            for optimizer in self.optimizers:
                for param_group in optimizer.param_groups:
                    param_group["lr"] = rate
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _check(self, loss: float, norm: float) -> None:
        """Stop a run that has gone wrong. A step without a finite loss and gradient has changed no weights: they are saved first.

        Raises:
            TrainingError: with the step, the values and the last good checkpoint.
        """
        step = self.progress.step + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if self.progress.step and self._has_finite_weights():
                self.save()
            raise TrainingError(f"The loss of step {step} is {loss}, its gradient norm {norm}. {self._way_out()}")
        self.smoothed = loss if math.isinf(self.smoothed) else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.best = min(self.best, self.smoothed)
        if self.smoothed > self.best + RUNAWAY_NATS:
            raise TrainingError(
                f"The loss runs away: {self.smoothed:.2f} at step {step}, after {self.best:.2f} at best. {self._way_out()}"
            )

    def _has_finite_weights(self) -> bool:
        is_broken = any(not bool(parameter.isfinite().all()) for parameter in self.parameters.values())
        return not self.group.any(is_broken, device=self.device)

    def _way_out(self) -> str:
        found = checkpoints.checkpoints(self.folder / "checkpoints")
        last = f"The last good checkpoint is {found[-1]}" if found else "There is no checkpoint yet"
        return f"{last}. Start anew from it (--adapter) with a lower learning_rate."

    # --- results ---

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors in float32, by their names in its file. All processes must ask for them."""
        with self._averaged():
            named: Mapping[str, Any] = (
                self.low_rank.adapter_tensors() if self.low_rank else dict(self.model.beacon_parameters())
            )
            return {name: whole(tensor.detach()).clone() for name, tensor in named.items()}

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the weights are those of the adapter that the run is for."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            regather(self.wrapped)
            yield
        regather(self.wrapped)

    def save(self) -> Path:
        """Write a checkpoint; the other processes wait."""
        adapter = self.adapter_tensors()
        is_apart = self.low_rank is not None or self.average is not None
        own = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()} if is_apart else {}
        average = {} if self.average is None else self.average.tensors()
        tensors = checkpoints.optimizer_tensors(self.optimizers, self._names)
        state = {name: whole(value) for name, value in tensors.items()}
        folder = self.folder / "checkpoints"
        path = folder / f"step-{self.progress.step:07d}"
        if self.group.is_first:
            config = dataclasses.replace(self.model.beacon_config, training={"step": self.progress.step})
            path = checkpoints.save_checkpoint(
                folder, self.progress, config=config, adapter=adapter, trained=own, average=average,
                optimizer=state, keep=self.settings.keep_checkpoints,
            )  # fmt: skip
        self.group.barrier()
        return path

    @torch.no_grad()
    def dev_losses(self, *, within: float | None = None) -> dict[str, dict[str, float]]:
        """Nats per token to be predicted, on texts nobody trains on, at each ratio: the adapter's.

        Args:
            within: seconds; where it would take more, nothing is returned.
        """
        parts = [(name, ratio) for name in self.dev for ratio in self.settings.config.ratios]
        found: dict[str, dict[str, float]] = {name: {} for name in self.dev}
        start = time.perf_counter()
        with self._averaged(), without_dropout(self.model):
            for done, (name, ratio) in enumerate(parts, 1):
                self._doing(
                    self.progress.step, f"measuring {name.replace('_', ' ')} at ratio {ratio}, {done} of {len(parts)}"
                )
                found[name][str(ratio)] = self._dev_loss(self.dev[name], ratio)
                needed = (time.perf_counter() - start) / done * len(parts)
                if within is not None and self.group.any(needed > within, device=self.device):
                    return {}
        return found

    def _dev_loss(self, sampler: Sampler, ratio: int) -> float:
        stage = Stage(steps=1, batch_size=self.settings.dev_texts, micro_batch_size=1)
        chunk_size, totals = self.settings.config.chunk_size, StepTotals((ratio,))
        for batch in step_batches(stage, sampler, 0, chunk_size=chunk_size, ratios=(ratio,), seed=0, **self._shared):
            totals.add(self.module(_on(batch, self.device), Objective()), batch)
        return totals.line(self.group, self.device)["loss"]


class _Ahead:
    """Makes what the next step reads while this one runs: conversations take a while to be put together."""

    def __init__(self, make: Callable[[int], list[Batch]], num_steps: int) -> None:
        self._make, self._num_steps = make, num_steps
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._waiting: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, step: int) -> list[Batch]:
        """What a step reads."""
        known = self._waiting is not None and self._waiting[0] == step
        made = self._waiting[1].result() if known and self._waiting else self._make(step)
        if step + 1 < self._num_steps:
            self._waiting = (step + 1, self._pool.submit(self._make, step + 1))
        return made


class _Clock:
    """How much of the time is used up, if there is a limit."""

    def __init__(self, minutes: float | None, since: float | None = None) -> None:
        self.minutes = minutes
        self.last = time.monotonic()
        self.start = self.last if since is None else since
        self.longest_step = self.longest_measuring = self._stepping = 0.0
        self._steps = 0

    def tick(self) -> None:
        """A step was made."""
        now = time.monotonic()
        took = now - self.last
        self.longest_step, self.last = max(self.longest_step, took), now
        self._steps, self._stepping = self._steps + 1, self._stepping + took

    def tick_measured(self, *, is_whole: bool) -> None:
        """Dev texts were measured, or (not `is_whole`) given up."""
        now = time.monotonic()
        if is_whole:
            self.longest_measuring = max(self.longest_measuring, now - self.last)
        self.last = now

    @property
    def can_measure(self) -> bool:
        """Whether time is kept for measuring once more."""
        return self.longest_measuring > 0

    @property
    def why(self) -> str:
        """The end, in words."""
        return f"{_minutes(self.minutes)} {'is' if self.minutes == 1 else 'are'} over"

    def _seconds(self, minutes: float) -> float:
        """For steps: some are left for saving, and for measuring once more."""
        return max(60 * minutes * (1 - LAST_SHARE) - self.longest_measuring, 1e-9)

    @property
    def steps_left(self) -> int:
        """How many more end in time if they take as long as those so far did in the mean."""
        assert self.minutes is not None
        left = self._seconds(self.minutes) - (time.monotonic() - self.start)
        return max(0, int(left * self._steps / max(self._stepping, 1e-9)))

    @property
    def fall(self) -> float:
        """What is left of the learning rate: it falls in the last part of the time that was given."""
        if self.minutes is None:
            return 1.0
        used = (time.monotonic() - self.start) / self._seconds(self.minutes)
        return min(1.0, max((1 - used) / FALL_SHARE, 0.01))

    @property
    def is_over(self) -> bool:
        """Whether another step would not end in time."""
        if self.minutes is None:
            return False
        left = self._seconds(self.minutes) - (time.monotonic() - self.start)
        return left < self.longest_step


def _stages(numbers: Sequence[int]) -> str:
    return f"Stage {numbers[0]} is" if len(numbers) == 1 else f"Stages {numbers[0]} to {numbers[-1]} are"


def _minutes(number: float | None) -> str:
    return f"{number:g} {'minute' if number == 1 else 'minutes'}"


def _check_shares(settings: TrainingSettings, group: Processes) -> None:
    for number, stage in enumerate(settings.stages, 1):
        if stage.batch_size % group.count:
            raise ConfigError(
                f"Stage {number}: batch_size ({stage.batch_size}) must be divisible by the number of processes ({group.count}). "
                f"Use {stage.batch_size + -stage.batch_size % group.count}."
            )


def _on(batch: Batch, device: torch.device) -> Batch:
    return dataclasses.replace(batch, ids=sent(batch.ids, device))  # what counts is asked for on the host


def _without_sync(module: nn.Module) -> Any:
    """Gradients stay where they are within the block."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        return _fsdp_without_sync(module)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _fsdp_without_sync(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
