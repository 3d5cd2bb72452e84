"""What a training run is: its model, its stages and when it saves. Plain values, from YAML or from flags; no torch."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from activation_beacon.config import BeaconConfig, check_int
from activation_beacon.errors import ConfigError, reason
from activation_beacon.training.needle_words import KINDS

Optimizer = Literal["adamw", "muon"]
RatioDraw = Literal["chunk", "text"]
SHARES = ("documents", "questions", "needles", "reconstruction", "chats")  # what a stage is a mix of
Wrapper = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Stage:
    """One stretch of training on one kind of texts, with a learning rate that rises, stays and falls.

    Attributes:
        steps: updates of the weights.
        length: tokens of a text at most; texts are cut from documents, never joined.
        chunk_size: chunks to train on; None for the adapter's own. Short chunks learn faster, and serve long ones.
        local_tokens: of documents, tokens at the beginning of a chunk whose predictions do not count: contexts with so many local
            tokens have the chunk before raw while they read them.
        batch_size: texts of one update, over all processes.
        micro_batch_size: texts that one process reads at once.
        documents: share of texts that are cut from documents.
        questions: share of packed questions, with the loss on the answers only.
        chats: share of whole conversations, likewise.
        needles: share of hidden needles, likewise.
        needle_kinds: kinds of needles, as `needles.make_needle` knows them; one that is named twice is drawn twice as often.
        reconstruction: share of texts of which a passage is to be repeated, likewise.
        cross_entropy, distillation, context_weight: see `objective.Objective`.
        ratio_draw: a ratio for each chunk (the paper's best), or one for each text (its ablation).
        learning_rate: at its height.
        warmup: share of the steps in which it rises.
        decay: share of the steps in which it falls, to a hundredth.
        max_grad_norm: gradients are scaled down to this norm.

    Raises:
        ConfigError: if a value is out of range.
    """

    steps: int = 1000
    length: int = 4096
    chunk_size: int | None = None
    local_tokens: int = 0
    batch_size: int = 8
    micro_batch_size: int = 1
    documents: float = 1.0
    questions: float = 0.0
    needles: float = 0.0
    needle_kinds: tuple[str, ...] = KINDS
    reconstruction: float = 0.0
    chats: float = 0.0
    cross_entropy: float = 1.0
    distillation: float = 0.0
    context_weight: float = 0.0
    ratio_draw: RatioDraw = "chunk"
    learning_rate: float = 1e-3
    warmup: float = 0.02
    decay: float = 0.5
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size"):
            check_int(name, getattr(self, name), least=1)
        check_int("length", self.length, least=4)
        if self.chunk_size is not None:
            check_int("chunk_size", self.chunk_size, least=2)
        check_int("local_tokens", self.local_tokens, least=0)
        for name in ("learning_rate", "max_grad_norm"):
            _check_number(name, getattr(self, name), above=0.0)
        for name in ("warmup", "decay", *self.shares):
            _check_number(name, getattr(self, name), least=0.0)
        if not sum(self.shares.values()) > 0:
            raise ConfigError(f"{', '.join(SHARES[:-1])} and {SHARES[-1]} are all 0: no text is left. Raise one.")
        if self.warmup + self.decay > 1:
            raise ConfigError(f"warmup ({self.warmup}) and decay ({self.decay}) must not exceed 1 together.")
        _check_choice("ratio_draw", self.ratio_draw, get_args(RatioDraw))
        self._check_kinds()
        for name in ("cross_entropy", "distillation", "context_weight"):
            _check_number(name, getattr(self, name), least=0.0)

    def _check_kinds(self) -> None:
        kinds = (self.needle_kinds,) if isinstance(self.needle_kinds, str) else tuple(self.needle_kinds or ())
        object.__setattr__(self, "needle_kinds", kinds)
        if not kinds:
            raise ConfigError(f"needle_kinds names none. Use some of {', '.join(KINDS)}, or needles: 0.")
        for kind in kinds:
            _check_choice("needle_kinds", kind, KINDS)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each kind of texts."""
        return {name: getattr(self, name) for name in SHARES}

    def rate(self, progress: float) -> float:
        """Learning rate when `progress` (0 to 1) of the stage is done: up, level, down to a hundredth."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.01)
        left = (1 - progress) / self.decay if self.decay else 1.0
        return self.learning_rate * min(1.0, max(left, 0.01))


@dataclass(frozen=True)
class TrainingSettings:
    """A whole run.

    Attributes:
        output: folder for checkpoints, metrics, curves and the adapter.
        base: base model: "default", a folder, or a hub id.
        adapter: adapter to start from: "default", a folder, or a hub id; of several the mean; None for untrained beacons.
        dtype: of the base's weights; beacon weights are trained in float32.
        config: settings of the adapter (`BeaconConfig` without what is filled in by itself).
        lora_rank: train the difference to the base's projections as a product of this rank; None trains it in full.
        documents: files, folders or hub data sets of long texts.
        questions: the same of questions with their contexts.
        chats: the same of conversations.
        dev: texts nobody trains on, for the curves.
        dev_questions: questions nobody trains on, with their contexts: nats per token of their answers.
        exclude: ids of records to leave out.
        text_field: field of a record that holds the text.
        max_tokens: of `documents`: the one that reaches so many is the last (a data set on the hub may have no end); None for all.
        on_error: whether a broken record is skipped or stops the run.
        stages: one after the other.
        optimizer: "adamw", or "muon" for the matrices.
        average_decay: the adapter is an exponential moving average of the weights of all steps, of which a step leaves this
            share; 0 for the weights of the last step.
        seed: of texts, ratios and new weights.
        save_every: updates between checkpoints.
        dev_every: updates between losses on `dev` and `dev_questions`.
        dev_texts: how many texts these are of, of each kind.
        dev_length: tokens of such a text, in whole chunks of the adapter; None for four chunks.
        keep_checkpoints: how many are kept.
        gradient_checkpointing: trade time for memory.
        wrapper: what distributes the model over processes.
        report_to: "tensorboard" or "trackio", besides metrics.jsonl.
        workers: processes that tokenise.

    Raises:
        ConfigError: if a value is out of range.
    """

    output: str
    base: str = "default"
    adapter: str | tuple[str, ...] | None = None
    dtype: str | None = None
    config: BeaconConfig = dataclasses.field(default_factory=BeaconConfig)
    lora_rank: int | None = None
    documents: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    chats: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    dev_questions: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    max_tokens: int | None = None
    on_error: Literal["skip", "stop"] = "skip"
    stages: tuple[Stage, ...] = dataclasses.field(default_factory=lambda: (Stage(),))
    optimizer: Optimizer = "adamw"
    average_decay: float = 0.0
    seed: int = 0
    save_every: int = 100
    dev_every: int = 100
    dev_texts: int = 4
    dev_length: int | None = None
    keep_checkpoints: int = 2
    gradient_checkpointing: bool = False
    wrapper: Wrapper = "ddp"
    report_to: str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("documents", "questions", "chats", "dev", "dev_questions"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        excluded = self.exclude
        object.__setattr__(self, "exclude", (excluded,) if isinstance(excluded, str) else tuple(excluded or ()))
        object.__setattr__(self, "stages", tuple(self.stages))
        names = adapter_names(self.adapter)
        object.__setattr__(self, "adapter", names if len(names) > 1 else names[0] if names else None)
        if not self.stages:
            raise ConfigError("stages is empty. Name at least one.")
        if self.lora_rank is not None:
            check_int("lora_rank", self.lora_rank, least=1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, least=1)
        for name in ("save_every", "dev_every", "dev_texts", "keep_checkpoints"):
            check_int(name, getattr(self, name), least=1)
        for name in ("seed", "workers"):
            check_int(name, getattr(self, name), least=0)
        _check_choice("dtype", self.dtype, (None, *DTYPES))
        _check_number("average_decay", self.average_decay, least=0.0)
        if self.average_decay >= 1:
            raise ConfigError(f"average_decay must be less than 1; got {self.average_decay!r}.")
        _check_choice("on_error", self.on_error, ("skip", "stop"))
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("wrapper", self.wrapper, get_args(Wrapper))
        _check_choice("report_to", self.report_to, (None, "tensorboard", "trackio"))
        if self.wrapper == "fsdp" and (self.optimizer == "muon" or self.lora_rank is not None):
            raise ConfigError("muon and lora_rank need whole matrices, and fsdp shards them. Use wrapper ddp.")
        for number, stage in enumerate(self.stages, 1):
            self._check_stage(number, stage)

    def _check_stage(self, number: int, stage: Stage) -> None:
        chunk_size = self.chunk_size_of(stage)
        if wrong := [ratio for ratio in self.config.ratios if chunk_size % ratio]:
            raise ConfigError(
                f"Stage {number}: chunk_size ({chunk_size}) must be divisible by every ratio; {wrong[0]} does not divide it."
            )
        if stage.length <= chunk_size:
            raise ConfigError(
                f"Stage {number}: length ({stage.length}) must exceed chunk_size ({chunk_size}): beacons learn from what "
                "follows their chunk."
            )
        if stage.local_tokens >= chunk_size:
            raise ConfigError(
                f"Stage {number}: local_tokens ({stage.local_tokens}) must be fewer than chunk_size ({chunk_size}): "
                "of documents nothing would count."
            )
        for kind, share in stage.shares.items():
            source = kind if kind in ("questions", "chats") else "documents"
            if share and not getattr(self, source):
                raise ConfigError(f"Stage {number}: {kind} ({share}) needs {source}, and none are named.")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters whose mean the run begins with; none for untrained beacons."""
        return adapter_names(self.adapter)

    def chunk_size_of(self, stage: Stage) -> int:
        """Tokens of the chunks that a stage trains on."""
        return stage.chunk_size or self.config.chunk_size

    @property
    def length_of_dev_texts(self) -> int:
        """Tokens of each."""
        return self.dev_length or DEV_CHUNKS * self.config.chunk_size

    @property
    def num_steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, Stage, int]:
        """Number of the stage that `step` (from 0) falls into, the stage, and the step within it."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1], self.stages[-1].steps - 1

    def stages_after(self, step: int) -> list[int]:
        """Numbers (from 1) of the stages that are not begun when so many updates are made."""
        begins = itertools.accumulate((stage.steps for stage in self.stages), initial=0)
        return [number for number, (_, begin) in enumerate(zip(self.stages, begins, strict=False), 1) if begin >= step]

    @property
    def fingerprint(self) -> str:
        """Of all that decides what weights come out: a run is continued under the same one only."""
        values = {name: value for name, value in self.to_dict().items() if name not in NOT_DECISIVE}
        for name in ("average_decay", "max_tokens", "chats"):
            if not values[name]:
                del values[name]  # runs from before there was one go on
        if not values["config"]["exact_ids"]:
            del values["config"]["exact_ids"]
        values["config"]["local_tokens"] = 0  # nothing that is trained depends on them
        for stage in values["stages"]:
            if not stage["needles"]:
                del stage["needle_kinds"]
            for name in ("chats", "local_tokens"):
                if not stage[name]:
                    del stage[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON hold them; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        values["config"] = {name: values["config"][name] for name in CONFIG_FIELDS}
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingSettings":
        """Settings of plain values.

        Raises:
            ConfigError: for a name that is not known, or a value that makes no sense.
        """
        values = _with_numbers(cls, values)
        _check_names("The recipe", values, [field.name for field in dataclasses.fields(cls)])
        config, stages = values.pop("config", {}), values.pop("stages", [{}])
        _check_parts(stages, config)
        made = [_with_numbers(Stage, stage) for stage in stages]
        try:
            return cls(**values, config=BeaconConfig(**config), stages=tuple(Stage(**stage) for stage in made))
        except TypeError as error:
            raise ConfigError(f"The recipe cannot be read: {error}.") from error


DEV_CHUNKS = 4
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
CONFIG_FIELDS = (
    "chunk_size",
    "ratios",
    "projections",
    "num_sinks",
    "local_tokens",
    "anchored",
    "placement",
    "exact_ids",
)
# A run may be continued elsewhere, saved more often, or on more processes.
NOT_DECISIVE = (
    "output", "save_every", "dev_every", "dev", "dev_questions", "dev_texts", "dev_length", "keep_checkpoints", "report_to", "workers",
    "wrapper", "gradient_checkpointing",
)  # fmt: skip


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The values of a YAML recipe.

    Raises:
        ConfigError: if it cannot be read as one.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}. Name a YAML recipe.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold names and values; got {type(values).__name__}.")
    _check_parts(values.get("stages") or [], values.get("config") or {})
    return values


def adapter_names(adapter: Any) -> tuple[str, ...]:
    """The names in a recipe's `adapter`: one, a list of them, or none.

    Raises:
        ConfigError: if it is anything else.
    """
    return _names("adapter", adapter)


def _names(what: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{what} must be a name, or a list of names; got {given!r}.")
    return tuple(names)


def _with_numbers(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass whose numbers are numbers: 1e-4, which has no point, is a text in YAML."""
    floats = {field.name for field in dataclasses.fields(kind) if field.type is float}
    return {
        name: float(value) if name in floats and isinstance(value, str) and NUMBER.fullmatch(value) else value
        for name, value in values.items()
    }


def _check_parts(stages: object, config: object) -> None:
    _check_mapping("config", config, CONFIG_FIELDS)
    if not isinstance(stages, list | tuple):
        raise ConfigError(f"stages must be a list; got {stages!r}. Begin each stage with a dash.")
    names = [field.name for field in dataclasses.fields(Stage)]
    for number, stage in enumerate(stages, 1):
        _check_mapping(f"Stage {number}", stage, names)


def _check_mapping(what: str, values: object, known: Any) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} must hold names and values; got {values!r}.")
    _check_names(what, values, known)


def _check_names(what: str, values: Mapping[str, Any], known: Any) -> None:
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise ConfigError(f"{what} names {', '.join(unknown)}, which is not known. Known: {', '.join(sorted(known))}.")


def _check_number(name: str, value: object, *, least: float | None = None, above: float | None = None) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (least is not None and not value >= least) or (above is not None and not value > above):  # type: ignore[operator]
        bound = f"at least {least:g}" if least is not None else f"more than {above:g}"
        raise ConfigError(f"{name} must be a number of {bound}; got {value!r}.")


def _check_choice(name: str, value: object, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}.")
