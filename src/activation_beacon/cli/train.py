"""`beacon train`: texts in, an adapter out."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import INTERRUPTED, SECONDS_BETWEEN_LINES, notice, print_json, seconds_text
from activation_beacon.cli.models import quiet_libraries
from activation_beacon.config import DEFAULT_KIND, PAPER_KIND
from activation_beacon.errors import ConfigError
from activation_beacon.sizes import bytes_text

if TYPE_CHECKING:
    from activation_beacon.training.settings import TrainingSettings

RECIPE_SUFFIXES = (".yaml", ".yml")
RECIPE_OF_RUN = "recipe.json"
STOPPED = 1
SECONDS_OF_SILENCE = 20.0  # in a long step or measurement
Sources = list[str] | None


def train(
    sources: Annotated[
        Sources,
        typer.Argument(
            metavar="RECIPE|TEXT",
            help="A YAML or JSON recipe; or texts: .txt, .md, .jsonl (.zst, .gz), .parquet, folders, or data sets on the hub.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="Base model: default, a folder, or a hub id. [default: default]"),
    ] = None,
    adapter: Annotated[
        Sources,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Adapter to go on from: default, a folder, or a hub id; repeated, the mean of them.",
        ),
    ] = None,
    questions: Annotated[
        Sources,
        typer.Option(
            "--questions", metavar="SOURCE", help="Questions with contexts, for a second stage; may be repeated."
        ),
    ] = None,
    chats: Annotated[
        Sources,
        typer.Option(
            "--chats",
            metavar="SOURCE",
            help="Conversations (messages, ShareGPT, Alpaca, ...), for a second stage; may be repeated.",
        ),
    ] = None,
    dev: Annotated[
        Sources, typer.Option("--dev", metavar="SOURCE", help="Held-out texts to measure on; may be repeated.")
    ] = None,
    dev_questions: Annotated[
        Sources,
        typer.Option(
            "--dev-questions", metavar="SOURCE", help="Held-out questions with contexts to measure on; may be repeated."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Tokens of the texts at most; a data set on the hub may have no end."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Updates of each stage. [default: 1000]")] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens of a text, in whole chunks. [default: 4096]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Texts of one update. [default: 8]")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", help="Texts read at once. [default: 1]")
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option("--chunk-size", help="Tokens that the adapter compresses together. [default: 1024]"),
    ] = None,
    train_chunk_size: Annotated[
        int | None,
        typer.Option(
            "--train-chunk-size",
            help="Tokens of chunks in training alone: short ones learn faster, and serve long ones. [default: the adapter's]",
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option("--ratios", metavar="LIST", help="Compression ratios to train. [default: 2,4,8,16,32]"),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Beacons of the paper's kind: interleaved, not anchored, not exact, without sinks or local tokens.",
        ),
    ] = False,
    sinks: Annotated[int | None, typer.Option("--sinks", help="First tokens that are kept raw. [default: 4]")] = None,
    local_tokens: Annotated[
        int | None,
        typer.Option(
            "--local-tokens",
            help="Last tokens of a text that the adapter's contexts keep raw at least; training does not depend on them. "
            "[default: 128]",
        ),
    ] = None,
    anchored: Annotated[
        bool | None,
        typer.Option(
            "--anchored/--not-anchored",
            help="Whether beacons start from the last token that they stand for. [default: anchored]",
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            "--placement",
            metavar="append|interleave",
            help="Beacons at the end of their chunk, or each after its unit. [default: append]",
        ),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Whether numbers, dates and codes are held token by token, which needs anchored beacons that are appended: "
            "--exact sets both. [default: exact]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate. [default: 0.001]")
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option("--distillation", help="Weight of the uncompressed model's predictions in the loss. [default: 0]"),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Train differences of this rank. [default: of full rank]")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", metavar="adamw|muon", help="What updates weights. [default: adamw]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = None,
    wrapper: Annotated[
        str | None,
        typer.Option(
            "--wrapper", metavar="ddp|fsdp", help="What several processes share by, under torchrun. [default: ddp]"
        ),
    ] = None,
    on_error: Annotated[
        str | None,
        typer.Option("--on-error", metavar="skip|stop", help="What to do at a broken record. [default: skip]"),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", metavar="tensorboard|trackio", help="Where metrics go, besides metrics.jsonl."),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", help="Updates between checkpoints. [default: 100]")
    ] = None,
    others: Annotated[
        Sources,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of a recipe, as often as needed: text_field=body, stage.context_weight=1 (all stages), "
            "config.projections=[q,k,v,o].",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of texts, ratios and new weights. [default: 0]")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes",
            min=0.1,
            help="Stop after this many minutes, loading included, and leave a usable adapter.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where the run in --output stands, by its own recipe if nothing else is named."
        ),
    ] = False,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Train an adapter.

    Beacons learn to stand for the text before them; the base model stays as it is.

    A recipe says everything in one file (see recipes/), and options override what it says for all of its stages. Without
    a recipe, one stage on the given texts; with --questions or --chats, a second one on packed questions, conversations,
    or both. A run that goes on from an adapter takes its base and its settings from it, where nothing else is said.
    Defaults below are those of a run with neither: its beacons are of the default adapter's kind.

    The run's folder gets checkpoints, metrics.jsonl, and the adapter. Ctrl-C, SIGTERM and --max-minutes save and end it;
    --resume goes on, after Ctrl-C and SIGTERM to the same weights as an unbroken run (--max-minutes lowers the learning
    rate before its end).
    """
    flags = {
        "base": base, "adapter": adapter, "questions": questions, "chats": chats, "dev": dev, "dev_questions": dev_questions,
        "max_tokens": max_tokens, "lora_rank": lora_rank,
        "optimizer": optimizer, "gradient_checkpointing": gradient_checkpointing, "wrapper": wrapper,
        "on_error": on_error, "report_to": report_to, "save_every": save_every, "seed": seed,
        "dtype": None if dtype is None else str(dtype), "output": None if output is None else str(output),
    }  # fmt: skip
    config = {
        "chunk_size": chunk_size,
        "ratios": None if ratios is None else list(options.parse_ratios(ratios)),
        "num_sinks": sinks,
        "local_tokens": local_tokens,
        "anchored": True if exact and anchored is None else anchored,
        "placement": "append" if exact and placement is None else placement,
        "exact_ids": None if exact is None else "digits" if exact else [],
    }
    stage = {
        "steps": steps, "length": length, "batch_size": batch_size, "micro_batch_size": micro_batch_size,
        "chunk_size": train_chunk_size, "learning_rate": learning_rate, "distillation": distillation,
    }  # fmt: skip
    set_others(others or [], {"": flags, "config": config, "stage": stage})
    settings = _settings(sources or [], _given(flags), _given(config), _given(stage), paper=paper, resume=resume)
    from activation_beacon.training.run import train as run

    with quiet_libraries(), _Bar(settings.num_steps, max_minutes) as bar:
        outcome = run(
            settings, resume=resume, max_minutes=max_minutes, device=device, report=bar, working=bar.working,
            notice=bar.notice,
        )  # fmt: skip
    if not _is_first():
        return
    folder = Path(settings.output)
    if json:
        print_json(_result(folder, outcome))
    else:
        typer.echo(_summary(folder, outcome, settings))
    if not outcome.is_finished:
        raise typer.Exit(INTERRUPTED if outcome.is_interrupted else STOPPED)


def _is_first() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` began."""
    return not int(os.environ.get("RANK", "0"))


def set_others(pairs: list[str], groups: dict[str, dict[str, Any]]) -> None:
    """Put values of `--set` to those of the options.

    Args:
        pairs: such as "stage.decay=0.3"; values are YAML.
        groups: values by name, for each group that a name may begin with; "" for names without one.

    Raises:
        ConfigError: for what is no name and value, for a group that there is not, or for a whole one.
    """
    import yaml

    for pair in pairs:
        path, equals, text = pair.partition("=")
        group, _, name = path.strip().rpartition(".")
        is_whole = not group and name in ("config", "stage", "stages")
        if not equals or not name or group not in groups or is_whole:
            raise ConfigError(
                f"--set {pair} is no NAME=VALUE. Write text_field=body, or stage.NAME=VALUE, or config.NAME=VALUE."
            )
        try:
            groups[group][name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {pair}: the value is not valid YAML: {getattr(error, 'problem', error)}."
            ) from error


def _on_from(adapter: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a run that goes on from an adapter: what they do not say, its base and settings, they have from it.

    Args:
        adapter: of several, the first.
        values: of the run.

    Raises:
        StorageError, FileFormatError: if there is no such adapter, or it cannot be read.
    """
    from activation_beacon.hub import adapter_folder, base_name
    from activation_beacon.persistence import load_adapter_config
    from activation_beacon.training.settings import CONFIG_FIELDS

    folder = adapter_folder(adapter)
    config = load_adapter_config(folder or adapter)
    known = {name: getattr(config, name) for name in CONFIG_FIELDS}
    base = values.get("base") or base_name(config, folder)
    _tell_chunk_size(config.chunk_size, values["config"].get("chunk_size"))
    return {**values, "base": base, "config": {**known, **values["config"]}}


def _tell_chunk_size(known: int, given: Any) -> None:
    if isinstance(given, int) and given != known and _is_first():
        notice(
            f"This changes the adapter's chunk size from {known:,} to {given:,}; to train on chunks of {given:,} only, use "
            f"--train-chunk-size {given}."
        )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settings(
    sources: list[str],
    flags: dict[str, Any],
    config: dict[str, Any],
    stage: dict[str, Any],
    *,
    paper: bool = False,
    resume: bool = False,
) -> "TrainingSettings":
    """The recipe's values, or those of a run without one, under the options that were given."""
    from activation_beacon.training.settings import TrainingSettings, adapter_names, read_recipe

    recipe = _recipe(sources, flags, resume=resume)
    if recipe is not None:
        values = read_recipe(recipe)
        stages = [{**each, **stage} for each in values.get("stages") or [{}]]
    else:
        values = {"documents": sources}
        stages = [{**stage, **shares} for shares in _mixes(sources, flags)]
    config = _of_kind(config, is_paper=paper, is_default=recipe is None and "adapter" not in flags)
    values = {**values, **flags, "stages": stages, "config": {**(values.get("config") or {}), **config}}
    if names := adapter_names(values.get("adapter")):
        values = _on_from(names[0], values)
    if not values.get("output"):
        raise ConfigError("The run needs a folder for what comes of it. Add --output FOLDER.")
    return TrainingSettings.from_dict(values)


def _mixes(sources: list[str], flags: dict[str, Any]) -> list[dict[str, float]]:
    """What the stages of a run without a recipe read: texts, then questions and conversations, with some texts among them."""
    asked = [name for name in ("questions", "chats") if name in flags]
    if not sources:
        return [{"documents": 0.0, **dict.fromkeys(asked, 1.0)}]
    if not asked:
        return [{}]
    beside = {"needles": 0.1, "reconstruction": 0.1} if "questions" in asked else {}
    share = round((0.8 - sum(beside.values())) / len(asked), 2)
    return [{}, {"documents": 0.2, **dict.fromkeys(asked, share), **beside}]


def _recipe(sources: list[str], flags: dict[str, Any], *, resume: bool) -> str | None:
    """The file that says what the run is: the one that is named, or that of the run that goes on; None for texts.

    Raises:
        ConfigError: if there is neither a recipe nor a text.
    """
    if len(sources) == 1 and (sources[0].endswith(RECIPE_SUFFIXES) or Path(sources[0]).name == RECIPE_OF_RUN):
        return sources[0]
    if sources or (flags.keys() & {"questions", "chats"} and not resume):
        return None
    way_out = "Name texts, or a recipe such as recipes/default-cpu.yaml."
    if not (resume and flags.get("output")):
        raise ConfigError(f"There is nothing to train on. {way_out}")
    begun = Path(flags["output"]) / RECIPE_OF_RUN
    if not begun.is_file():
        raise ConfigError(f"There is no run in {flags['output']} to go on with: {begun} is missing. {way_out}")
    return str(begun)


def _of_kind(config: dict[str, Any], *, is_paper: bool, is_default: bool) -> dict[str, Any]:
    """What was said of the beacons' kind, over the kind that it is said of: the paper's, or the default adapter's."""
    if is_paper:
        return {**PAPER_KIND, "exact_ids": [], **config}
    if not is_default:
        return config
    can_be_exact = config.get("anchored", True) and config.get("placement", "append") == "append"
    return {**DEFAULT_KIND, "exact_ids": "digits" if can_be_exact else [], **config}


def _result(folder: Path, outcome: Any) -> dict[str, Any]:
    return {
        "adapter": str(folder / "adapter"),
        "checkpoint": str(outcome.checkpoint),
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "seconds": round(outcome.progress.seconds, 1),
        "is_finished": outcome.is_finished,
        "why": outcome.why,
    }


def _summary(folder: Path, outcome: Any, settings: "TrainingSettings") -> str:
    progress = outcome.progress
    lines = [
        f"{folder / 'adapter'}",
        f"  steps   {progress.step:,} of {settings.num_steps:,} ({outcome.why})",
        f"  tokens  {progress.tokens:,} in {seconds_text(progress.seconds)}",
    ]
    if progress.step < settings.num_steps:
        lines.append(f"  go on   beacon train --output {folder} --resume")
    return "\n".join(lines)


class _Bar:
    """Progress: a bar on a terminal, elsewhere a line every ten seconds, and every twenty within a long step."""

    def __init__(self, num_steps: int, max_minutes: float | None) -> None:
        self._is_first = _is_first()
        self._num_steps = num_steps
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._last_line = time.monotonic()
        self._is_begun = False
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def notice(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.clear()
        if self._is_first:
            notice(text)

    def working(self, step: int, text: str) -> None:
        """Show what is being done in a step."""
        if not self._is_first:
            return
        if sys.stderr.isatty():
            self._shown(max(step - 1, 0)).set_description_str(text)
        elif self._silence > SECONDS_OF_SILENCE:
            self._line(f"step {step:,} of {self._num_steps:,}: {text}")

    def __call__(self, line: dict[str, Any]) -> None:
        """Show the metrics of one update; those of step 0 are of dev texts alone."""
        if line["step"]:
            self._show_update(line)
        for name, what in (("dev", "dev"), ("dev_answers", "answers'")):
            if name in line:
                losses = ", ".join(f"x{ratio} {loss:.3f}" for ratio, loss in line[name].items())
                self.notice(f"step {line['step']:,}: {what} nats {losses}")

    def _show_update(self, line: dict[str, Any]) -> None:
        by_ratio = " ".join(f"x{ratio} {loss:.2f}" for ratio, loss in line["loss_by_ratio"].items())
        text = (
            f"loss {line['loss']:.3f} ({by_ratio}), {line['tokens_per_second']:,.0f} tokens/s, "
            f"{bytes_text(line['memory_bytes'])}"
        )
        if self._end is not None:
            text += f", {seconds_text(max(0.0, self._end - time.monotonic()))} left"
        if sys.stderr.isatty():
            bar = self._shown(line["step"] - 1)
            bar.set_postfix_str(text)
            bar.update(line["step"] - bar.n)
        elif not self._is_begun or line["step"] == self._num_steps or self._silence > SECONDS_BETWEEN_LINES:
            self._is_begun = True
            self._line(f"step {line['step']:,} of {self._num_steps:,}: {text}")

    @property
    def _silence(self) -> float:
        return time.monotonic() - self._last_line

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.notice(text)

    def _shown(self, step: int) -> Any:
        """The bar, begun after so many updates."""
        if self._bar is None:
            from tqdm import tqdm

            left = "" if self._end is not None else "<{remaining}"  # the time that is given is shown with the loss
            self._bar = tqdm(
                total=self._num_steps, initial=step, desc="training", unit="step", mininterval=1.0, dynamic_ncols=True,
                bar_format=f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}{left}{{postfix}}]",
            )  # fmt: skip
        return self._bar
