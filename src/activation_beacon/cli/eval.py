"""`beacon eval`: how good compressed contexts are, task by task, into a folder that can be continued."""

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import SECONDS_BETWEEN_LINES, notice, print_json, trained_fields, warn_untrained
from activation_beacon.cli.models import Loaded, check_ratio, load_model
from activation_beacon.errors import InputError

if TYPE_CHECKING:
    from activation_beacon.evaluation.peers import Peers
    from activation_beacon.evaluation.results import Results
    from activation_beacon.evaluation.tasks import Task

RATIOS = "2,4,8,16,32"
BACKGROUND_TOKENS = 300_000  # of a background at most; it is taken up again where a text needs more
LM_METHODS = "full,alone,beacons"
METHODS = "full,beacons"

Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="Folder of the results; an unfinished run there is continued."),
]
Ratios = Annotated[str, typer.Option("--ratios", help="Compression ratios, such as 4,8.")]
Methods = Annotated[
    str, typer.Option("--methods", help="What to compare, such as full,beacons; see docs/evaluation.md.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Samples of each length at most.")]
OnErrorOption = Annotated[str, typer.Option("--on-error", help="skip or stop at a broken record.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of what is drawn.")]
Background = Annotated[
    list[Path] | None,
    typer.Option(
        "--background", metavar="FILE", help="Text to hide needles in: .txt or .jsonl; by default the demo's book."
    ),
]

app = typer.Typer(name="eval", no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class Wanted:
    """What the options ask for, checked."""

    out: Path
    methods: tuple[str, ...]
    ratios: tuple[int, ...]
    lengths: tuple[int, ...]
    limit: int | None
    json: bool
    peers: "Peers | None" = None


def lm(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Documents: files (.txt, .md, .jsonl, .gz, .zst, .parquet), folders, globs, hub data sets.",
        ),
    ],
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a text; several, such as 8192,32768.")] = "8192",
    limit: Limit = 8,
    methods: Methods = LM_METHODS,
    field: Annotated[str, typer.Option("--field", help="Where a record's text stands.")] = "text",
    on_error: OnErrorOption = "stop",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Loss on long documents: nats per token after the first chunk, and the gap closed.

    Each document that is long enough gives its first tokens. They are read in several ways: "full" with all of the text
    before each token, "alone" with nothing before the chunk, "beacons" at each ratio, "recent" with as many tokens
    as the base model has positions, and "shuffled" on another document's beacons. The gap closed
    is (alone - beacons) / (alone - full).
    """
    wanted = _wanted(out, methods, ratios, length, limit, json=json)
    handling = _on_error(on_error)
    _check_files(documents, field, handling)

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import LanguageModelling

        return LanguageModelling(loaded.tokenizer, documents, field=field, on_error=handling)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def needles(
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt.")] = "2048,4096,8192",
    depths: Annotated[int, typer.Option("--depths", min=1, help="Depths to hide needles at.")] = 10,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Samples of each kind and depth.")] = 1,
    kinds: Annotated[str, typer.Option("--kinds", help="Kinds of needles.")] = "sentence,number,uuid",
    limit: Limit = None,
    methods: Methods = METHODS,
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    background: Background = None,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Needle in a haystack: a sentence, a number or a UUID, asked for after compression.

    The compressor never sees the question. Recall is the share of greedy answers that contain what was hidden.
    """
    wanted = _wanted(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import needles

        ids, source = _background(loaded, background)
        chosen = tuple(kinds.split(","))
        return needles(loaded.prompt, ids, kinds=chosen, depths=depths, repeats=repeats, seed=seed, source=source)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def multi_turn(
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt with its three turns.")] = "8192",
    limit: Limit = 10,
    methods: Methods = METHODS,
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    background: Background = None,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Three questions in turn on one context, which is read once: score and seconds of each turn."""
    wanted = _wanted(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import multi_turn

        ids, source = _background(loaded, background)
        return multi_turn(loaded.prompt, ids, count=limit or 10, seed=seed, source=source)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def qa(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Records with context, question, and answer or answers; files as for lm.",
        ),
    ],
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt.")] = "4096",
    limit: Limit = 20,
    methods: Methods = METHODS,
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    seed: Seed = 0,
    on_error: OnErrorOption = "stop",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Questions on long contexts: the passage that answers stands among others.

    Short answers are scored by the words that they share with the reference, long ones by ROUGE-L. Up to three questions
    are asked on each context, which is read once.
    """
    wanted = _wanted(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    from activation_beacon.evaluation.packed_qa import read_passages

    handling = _on_error(on_error)
    read_passages(files, on_error=handling)  # says now what is wrong with them

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import packed_qa

        return packed_qa(loaded.prompt, files, seed=seed, on_error=handling)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def reconstruction(
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt.")] = "4096",
    limit: Limit = 10,
    methods: Methods = METHODS,
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    background: Background = None,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Reading back: the words that follow a place of the context, asked for after compression (ROUGE-L)."""
    wanted = _wanted(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    _check_files(background or [])

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import reconstruction

        ids, source = _background(loaded, background)
        return reconstruction(loaded.prompt, ids, count=limit or 10, seed=seed, source=source)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def ruler(
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Annotated[str, typer.Option("--ratios", help="Compression ratios, such as 4,8.")] = "2,4,8,16",
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt.")] = "4096,8192",
    tasks: Annotated[
        str, typer.Option("--tasks", help="RULER tasks, such as ruler_vt,ruler_cwe; by default all six.")
    ] = "",
    samples: Annotated[int, typer.Option("--limit", min=1, help="Samples of each task and length.")] = 2,
    methods: Methods = "full,beacons,recent,head-tail,streaming-llm",
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """RULER, as lm-eval generates it offline, with the question kept from the compressor.

    The column "full" is lm-eval's own run of the base model on the same prompts. Scores are the share of what was asked
    for that the answer contains. The other methods hold as many cache entries as beacons do at the same ratio.
    """
    names = tuple(name for name in tasks.split(",") if name)
    wanted = _wanted(out, methods, ratios, length, None, json=json, peers_python=peers_python)

    def make(loaded: Loaded) -> "Task":
        from activation_beacon.evaluation.tasks import ruler

        return ruler(loaded.prompt, names=names, count=samples, seed=seed)

    _evaluate(make, wanted, model=model, base=base, device=device, dtype=dtype)


def harness(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK", help="Tasks or groups of lm-eval, such as arc_easy.")],
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Annotated[str, typer.Option("--ratios", help="Ratios, and none for the base model.")] = "none,4,8",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Samples of each task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before a question.")] = None,
    include: Annotated[Path | None, typer.Option("--include", metavar="DIR", help="Further tasks (YAML).")] = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Any of lm-eval's tasks: short contexts (arc_easy, hellaswag, mmlu, gsm8k), longbench, longbench2, infinitebench.

    Their data come from the hub. Prompts of up to a chunk are the base model's own business, so that their scores are
    equal at every ratio; longer ones are compressed on the way in. Here the question is part of the prompt.
    """
    from activation_beacon.processes import num_launched

    if (count := num_launched()) > 1:
        raise InputError(
            f"`beacon eval harness` runs in one process; torchrun has started {count}. Start it without torchrun."
        )
    _check_plots()
    if include is not None and not include.is_dir():
        raise InputError(f"--include ({include}) is no folder. Name one that holds tasks as YAML files.")
    chosen = [part.strip() for part in ratios.split(",")]
    for ratio in options.parse_ratios(",".join(each for each in chosen if each.isdecimal()) or "2"):
        check_ratio(model, ratio)
    if wrong := [each for each in chosen if not each.isdecimal() and each not in ("none", "auto")]:
        raise InputError(f'--ratios must be ints, "auto" or "none", such as none,4,8; got {wrong[0]!r}.')
    from activation_beacon.evaluation.harness_tasks import HarnessResults, find_tasks, run_tasks
    from activation_beacon.evaluation.results import Results

    manager = find_tasks(tasks, include)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    warn_untrained(loaded.config)
    results = Results(out, _facts(loaded))
    settings = {"limit": limit, "num_fewshot": num_fewshot, "lm_eval": importlib.metadata.version("lm-eval")}
    lines = HarnessResults(out, settings)
    with _progress() as progress:
        run_tasks(
            loaded.model, loaded.tokenizer, tasks, chosen, lines, manager=manager, limit=limit,
            num_fewshot=num_fewshot, progress=progress,
        )  # fmt: skip
    _finish(results, as_json=json, task="harness", facts={"harness": lines.lines, **trained_fields(loaded.config)})


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results.")],
    json: options.Json = False,
) -> None:
    """Write the report of a folder of results: report.md, report.html and plots."""
    _check_plots()
    from activation_beacon.evaluation.results import Results

    _finish(Results(folder), as_json=json)


# --- a run -----------------------------------------------------------------------------------------------------------


def _wanted(
    out: Path,
    methods: str,
    ratios: str,
    length: str,
    limit: int | None,
    *,
    json: bool,
    peers_python: Path | None = None,
) -> Wanted:
    _check_plots()
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    numbers = options.parse_ratios(ratios), _lengths(length)
    return Wanted(out, names, *numbers, limit, json, _peers(names, peers_python))


def _peers(methods: Sequence[str], python: Path | None) -> "Peers | None":
    """Where kvpress is, if one of its methods is asked for; None too for a task that has none of them."""
    if python is None:
        return None
    from activation_beacon.evaluation.peers import PEERS, Peers

    return Peers(python) if PEERS.keys() & set(methods) else None


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 1:
        raise InputError(f"--length must be ints of at least 1, such as 8192 or 2048,4096; got {text!r}.")
    return lengths


def _on_error(text: str) -> Any:
    if text not in ("skip", "stop"):
        raise InputError(f"--on-error must be skip or stop; got {text!r}.")
    return text


def _check_files(paths: Sequence[str | Path], field: str = "text", on_error: Any = "stop") -> None:
    """Refuse now a file that could not be read once the model is there."""
    from activation_beacon.evaluation.documents import read_documents

    for path in paths:
        next(read_documents([path], field=field, on_error=on_error), None)


def _check_plots() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('`beacon eval` draws plots with matplotlib: pip install "activation-beacon[eval]".')


def _evaluate(
    make: Callable[[Loaded], "Task"],
    wanted: Wanted,
    *,
    model: str,
    base: str | None,
    device: str | None,
    dtype: options.Dtype | None,
) -> None:
    for ratio in wanted.ratios:
        check_ratio(model, ratio)
    from activation_beacon.evaluation.results import Results
    from activation_beacon.evaluation.runner import Plan, planned_ways, run_task
    from activation_beacon.processes import processes

    with processes(device) as group:
        device = device or (str(group.device()) if group.count > 1 else None)
        loaded = load_model(model, base=base, device=device, dtype=dtype)
        task = make(loaded)
        plan = Plan(wanted.methods, wanted.ratios, wanted.lengths, wanted.limit)
        list(planned_ways(task, plan))  # what is not known is refused before a folder is made
        if group.is_first:
            warn_untrained(loaded.config)
        with group.first_before_others():
            results = Results(wanted.out, _facts(loaded), rank=group.rank)
        with _progress(is_shown=group.is_first) as progress:
            run_task(loaded.model, task, plan, results, peers=wanted.peers, progress=progress, group=group)
        group.barrier()
        if group.is_first:
            results.gather()
            _finish(results, as_json=wanted.json, task=task.name, facts=trained_fields(loaded.config))


def _facts(loaded: Loaded) -> dict[str, Any]:
    """What results may not be mixed with those of another."""
    model, config = loaded.model, loaded.config
    return {
        "base_model": config.base_model,
        "base_fingerprint": model.base_fingerprint,
        "adapter_fingerprint": model.adapter_fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chunk_size": config.chunk_size,
        "is_trained": config.is_trained,
    }


def _finish(results: "Results", *, as_json: bool, task: str | None = None, facts: dict[str, Any] | None = None) -> None:
    """Write the report; print the tables of a task, or of all."""
    from activation_beacon.evaluation.blocks import markdown_of
    from activation_beacon.evaluation.report import rows_as_json, tables, write_report

    markdown, page = write_report(results.folder)
    if as_json:
        files = {"results": str(results.path), "report": str(markdown), "page": str(page)}
        print_json({**files, "rows": rows_as_json(results, task), **(facts or {})})
        return
    typer.echo(markdown_of(tables(results, task)))
    typer.echo(f"Report: {markdown}, {page}")


def _background(loaded: Loaded, files: list[Path] | None) -> tuple[list[int], str]:
    """Ids of the background text, and what it is called."""
    from activation_beacon import books
    from activation_beacon.evaluation.documents import first_documents

    if not files:
        text, source = books.read_demo_book(), books.DEMO_BOOK_TITLE
    else:
        text, source = first_documents(files, num_tokens=BACKGROUND_TOKENS), ", ".join(path.name for path in files)
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:BACKGROUND_TOKENS], source


@contextmanager
def _progress(*, is_shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, and elsewhere a line every ten seconds; of several processes the first one shows its own."""
    if not is_shown:
        yield lambda *_: None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(unit="sample") as bar:
            yield lambda done, total, text: _move(bar, done, total, text)
        return
    last = time.perf_counter()

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            last = time.perf_counter()
            notice(f"{done} of {total}: {text}")

    yield report


def _move(bar: Any, done: int, total: int, text: str) -> None:
    bar.total = total
    bar.set_description(text, refresh=False)
    bar.update(done - bar.n)


for command, lines in (
    (
        lm,
        (
            "beacon eval lm docs.jsonl.zst -o out",
            "beacon eval lm docs.jsonl --model my-adapter --length 8192,32768 --methods full,alone,recent,beacons -o out",
        ),
    ),
    (needles, ("beacon eval needles -o out", "beacon eval needles --length 2048 --ratios 4,8 --depths 5 -o out")),
    (multi_turn, ("beacon eval multi-turn --ratios 4 --length 4096 -o out",)),
    (qa, ("beacon eval qa questions.jsonl.zst --length 4096,8192 -o out",)),
    (
        ruler,
        (
            "beacon eval ruler -o out",
            "beacon eval ruler --length 4096 --tasks niah_single_1,ruler_vt --limit 5 -o out",
            "beacon eval ruler --limit 1 --methods full,beacons,snapkv,kvzip -o out",
            "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m activation_beacon eval ruler -o out",
        ),
    ),
    (
        harness,
        (
            "beacon eval harness arc_easy hellaswag --ratios none,8 --limit 100 -o out",
            "beacon eval harness longbench2 --ratios 4,8,16 -o out",
        ),
    ),
    (reconstruction, ("beacon eval reconstruction --ratios 2,4,8 -o out",)),
    (report, ("beacon eval report out",)),
):
    app.command(name=command.__name__.replace("_", "-"), epilog=options.examples(*lines))(command)


@app.callback(epilog=options.examples("beacon eval lm docs.jsonl -o out", "beacon eval report out"))
def evaluate() -> None:
    """Measure what compression loses: at which ratio, on which task, against what else.

    Every finished sample is a line of results.jsonl in the output folder. A run that was stopped goes on when it is
    started again; several tasks may share a folder, and so one report. Under torchrun, processes share the samples.
    """
