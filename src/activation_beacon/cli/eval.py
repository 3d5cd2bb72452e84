"""`beacon eval`: how good compressed contexts are, task by task, into a folder that can be continued."""

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from activation_beacon.cli import eval_all, eval_compare, eval_tasks, options
from activation_beacon.cli.console import trained_fields, warn_untrained
from activation_beacon.cli.eval_run import (
    Job,
    Methods,
    Out,
    Ratios,
    check_plots,
    finish,
    model_facts,
    progress_shown,
    run_jobs,
    want,
)
from activation_beacon.cli.eval_tasks import Background, Field, KindField, OnError, Seed
from activation_beacon.cli.models import check_ratio, load_model
from activation_beacon.errors import InputError

RATIOS = "2,4,8,16,32"
LM_METHODS = "full,alone,beacons"
METHODS = "full,beacons"

Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Samples of each length at most.")]

app = typer.Typer(name="eval", no_args_is_help=True, rich_markup_mode=None)


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
    field: Field = "text",
    kind_field: KindField = None,
    on_error: OnError = "stop",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Loss on long documents: nats per token after the first chunk, and the gap closed.

    Each document that is long enough gives its first tokens. They are read in several ways: "full" with all of the text
    before each token, "alone" with nothing before the chunk, "beacons" at each ratio, "recent" with as many of
    the tokens before the chunk as beacons have entries, and "shuffled" on another document's beacons. The gap closed
    is (alone - beacons) / (alone - full).
    """
    wanted = want(out, methods, ratios, length, limit, json=json)
    task = eval_tasks.lm(documents, field=field, kind_field=kind_field, on_error=on_error)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


def needles(
    out: Out,
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = RATIOS,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt.")] = "2048,4096,8192",
    depths: Annotated[int, typer.Option("--depths", min=1, help="Depths to hide needles at, evenly spread.")] = 10,
    at: Annotated[
        str | None,
        typer.Option("--at", help="These depths instead, from 0 (the text's beginning) to 1, such as 0.5,1."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Samples of each kind and depth.")] = 1,
    kinds: Annotated[
        str, typer.Option("--kinds", help="Kinds of needles: sentence, number, uuid, passkey, fact.")
    ] = "sentence,number,uuid",
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
    wanted = want(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    places = depths if at is None else _depths(at)
    task = eval_tasks.needles(background, kinds=kinds, depths=places, repeats=repeats, seed=seed)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


def _depths(text: str) -> tuple[float, ...]:
    try:
        depths = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        depths = ()
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"--at must be depths from 0 to 1 such as 0.5,1; got {text!r}.")
    return depths


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
    wanted = want(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    task = eval_tasks.multi_turn(background, limit=limit, seed=seed)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


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
    on_error: OnError = "stop",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Questions on long contexts: the passage that answers stands among others.

    Short answers are scored by the words that they share with the reference, long ones by ROUGE-L. Up to three questions
    are asked on each context, which is read once.
    """
    wanted = want(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    task = eval_tasks.qa(files, seed=seed, on_error=on_error)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


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
    wanted = want(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    task = eval_tasks.reconstruction(background, limit=limit, seed=seed)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


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
    wanted = want(out, methods, ratios, length, None, json=json, peers_python=peers_python)
    names = tuple(name for name in tasks.split(",") if name)
    task = eval_tasks.ruler(names, count=samples, seed=seed)
    run_jobs([Job(task, wanted.methods)], wanted, model=model, base=base, device=device, dtype=dtype)


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

    Their data come from the hub. Prompts of up to a chunk and the local tokens are the base model's own business, so that
    their scores are equal at every ratio; longer ones are compressed on the way in. Here the question is part of the prompt.
    """
    from activation_beacon.processes import num_launched

    if (count := num_launched()) > 1:
        raise InputError(
            f"`beacon eval harness` runs in one process; torchrun has started {count}. Start it without torchrun."
        )
    check_plots()
    if include is not None and not include.is_dir():
        raise InputError(f"--include ({include}) is no folder. Name one that holds tasks as YAML files.")
    chosen = [part.strip() for part in ratios.split(",")]
    for ratio in options.parse_ratios(",".join(each for each in chosen if each.isdecimal()) or "2"):
        check_ratio(model, ratio)
    if wrong := [each for each in chosen if not each.isdecimal() and each not in ("none", "auto")]:
        raise InputError(f'--ratios must be ints, "auto" or "none", such as none,4,8; got {wrong[0]!r}.')
    from activation_beacon.evaluation.harness_tasks import HarnessResults, find_tasks, include_facts, run_tasks
    from activation_beacon.evaluation.results import Results

    manager = find_tasks(tasks, include)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    warn_untrained(loaded.config)
    results = Results(out, model_facts(loaded), name=loaded.name)
    settings = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "lm_eval": importlib.metadata.version("lm-eval"),
        **include_facts(include),
    }
    lines = HarnessResults(out, settings, note=results.note_run)
    with progress_shown() as progress:
        run_tasks(
            loaded.model, loaded.tokenizer, tasks, chosen, lines, manager=manager, limit=limit,
            num_fewshot=num_fewshot, progress=progress,
        )  # fmt: skip
    finish(results, as_json=json, task="harness", facts={"harness": lines.lines, **trained_fields(loaded.config)})


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results.")],
    json: options.Json = False,
) -> None:
    """Write the report of a folder of results: report.md, report.html and plots."""
    check_plots()
    from activation_beacon.evaluation.results import Results

    finish(Results(folder), as_json=json)


app.command(name="all", epilog=options.examples(*eval_all.EXAMPLES))(eval_all.all_tasks)
for command, lines in (
    (
        lm,
        (
            "beacon eval lm docs.jsonl.zst -o out",
            "beacon eval lm docs.jsonl --model my-adapter --length 8192,32768 --methods full,alone,recent,beacons -o out",
            "beacon eval lm docs.jsonl --kind-field group -o out",
        ),
    ),
    (
        needles,
        (
            "beacon eval needles -o out",
            "beacon eval needles --length 2048 --ratios 4,8 --depths 5 -o out",
            "beacon eval needles --length 2304,2560,2816,3072 --ratios 4,8 --at 1 -o out   # at the end, in raw tails of any length",
        ),
    ),
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
    (eval_compare.compare, eval_compare.EXAMPLES),
):
    app.command(name=command.__name__.replace("_", "-"), epilog=options.examples(*lines))(command)


@app.callback(
    epilog=options.examples(
        "beacon eval all -o out",
        "beacon eval lm docs.jsonl -o out",
        "beacon eval report out",
        "beacon eval compare out-default out-mine",
    )
)
def evaluate() -> None:
    """Measure what compression loses.

    At which ratio, on which task, against what else.

    "all" runs every task whose inputs are at hand; the other commands run one task with options of its own.
    Every finished sample is a line of results.jsonl in the output folder. A run that was stopped goes on when it is
    started again; several tasks may share a folder, and so one report. Under torchrun, processes share the samples.
    """
