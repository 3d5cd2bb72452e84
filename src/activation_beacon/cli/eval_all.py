"""`beacon eval all`: every task whose inputs are at hand, one after another, into one folder and one report."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from activation_beacon.cli import eval_tasks, options
from activation_beacon.cli.eval_run import Job, Methods, Out, Ratios, run_jobs, want
from activation_beacon.cli.eval_tasks import Background, Field, OnError, Seed
from activation_beacon.errors import InputError

TASKS = ("lm", "needles", "multi-turn", "qa", "reconstruction", "ruler")
KINDS, DEPTHS = "sentence,number,uuid", 10  # of needles, as `beacon eval needles` has them
RULER_TASKS = 6  # its samples go round them

EXAMPLES = (
    "beacon eval all -o out",
    "beacon eval all --model my-adapter --documents docs.jsonl --questions questions.jsonl -o out",
    "beacon eval all --tasks needles,qa --questions qa.jsonl --length 4096,8192 --ratios 8 --limit 10 -o out",
    "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m activation_beacon eval all -o out",
)

Documents = Annotated[
    list[str] | None,
    typer.Option("--documents", metavar="SOURCE", help="Documents for lm: a file, folder or glob; may be repeated."),
]
Questions = Annotated[
    list[str] | None,
    typer.Option("--questions", metavar="SOURCE", help="Records for qa: a file, folder or glob; may be repeated."),
]
Tasks = Annotated[
    str,
    typer.Option("--tasks", help=f"Some of {','.join(TASKS)}; by default all whose inputs are at hand."),
]


def all_tasks(
    out: Out,
    documents: Documents = None,
    questions: Questions = None,
    tasks: Tasks = "",
    model: options.Model = "default",
    base: options.Base = None,
    ratios: Ratios = "4,8,16",
    length: Annotated[
        str, typer.Option("--length", help="Tokens of a prompt or text; several, such as 4096,8192.")
    ] = "4096",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Samples of each task and length at most.")] = 3,
    methods: Methods = "full,alone,beacons,recent",
    peers_python: options.PeersPython = options.PEERS_PYTHON,
    background: Background = None,
    field: Field = "text",
    seed: Seed = 0,
    on_error: OnError = "stop",
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """What a model loses: all tasks one after another, into one report.

    By default every task whose inputs are at hand: needles, multi-turn and reconstruction always, lm with --documents,
    qa with --questions, ruler where lm-eval is installed. Each takes those of the methods that it has. RULER's samples
    are one of each of its six tasks in turn: --limit 6 takes one of each.
    """
    wanted = want(out, methods, ratios, length, limit, json=json, peers_python=peers_python)
    missing = _missing_inputs(documents, questions)
    chosen = _chosen_tasks(tasks, missing)
    _check_all_is_used(chosen, documents, questions)
    methods_of = _methods_of(chosen, wanted.methods)
    makes = {
        "lm": lambda: eval_tasks.lm(documents or [], field=field, on_error=on_error),
        "needles": lambda: eval_tasks.needles(background, kinds=KINDS, depths=DEPTHS, repeats=1, seed=seed),
        "multi-turn": lambda: eval_tasks.multi_turn(background, limit=limit, seed=seed),
        "qa": lambda: eval_tasks.qa(questions or [], seed=seed, on_error=on_error),
        "reconstruction": lambda: eval_tasks.reconstruction(background, limit=limit, seed=seed),
        "ruler": lambda: eval_tasks.ruler((), count=-(-limit // RULER_TASKS), seed=seed),
    }
    jobs = [Job(makes[name](), methods_of[name]) for name in chosen]
    left_out = None if tasks else _left_out(missing)
    run_jobs(jobs, wanted, model=model, base=base, device=device, dtype=dtype, note=left_out)


def _missing_inputs(documents: Sequence[str] | None, questions: Sequence[str] | None) -> dict[str, str]:
    """Tasks that cannot be run as things are, and what each needs."""
    needs = {}
    if not documents:
        needs["lm"] = "--documents FILE"
    if not questions:
        needs["qa"] = "--questions FILE"
    if importlib.util.find_spec("lm_eval") is None:
        needs["ruler"] = 'lm-eval: pip install "activation-beacon[eval]"'
    return needs


def _left_out(missing: Mapping[str, str]) -> str | None:
    """One line that says which tasks are not run, and why."""
    return f"Left out: {'; '.join(f'{task} (needs {what})' for task, what in missing.items())}." if missing else None


def _chosen_tasks(text: str, missing: Mapping[str, str]) -> list[str]:
    """The tasks that were named, or all that can be run.

    Raises:
        InputError: for an unknown task, or one that lacks its input.
    """
    if not text:
        return [task for task in TASKS if task not in missing]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TASKS:
            raise InputError(f"There is no task {name!r} in `beacon eval all`. Use some of {', '.join(TASKS)}.")
        if name in missing:
            raise InputError(f"The task {name} needs {missing[name]}. Add it, or leave the task out of --tasks.")
    return names


def _check_all_is_used(chosen: Sequence[str], documents: Sequence[str] | None, questions: Sequence[str] | None) -> None:
    """Refuse files that no task would read.

    Raises:
        InputError: naming the task that would.
    """
    for task, option, given in (("lm", "--documents", documents), ("qa", "--questions", questions)):
        if given and task not in chosen:
            raise InputError(
                f"{option} is for the task {task}, which is not among --tasks. Add it there, or drop {option}."
            )


def _methods_of(tasks: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Those of the methods that each task has.

    Raises:
        InputError: for a method that no task has, or a task that has none of the methods.
    """
    from activation_beacon.evaluation.tasks import Answering, LanguageModelling

    every = list({**LanguageModelling.methods, **Answering.methods})
    for method in methods:
        if method not in every:
            raise InputError(f"There is no method {method!r}. Use some of {', '.join(every)}.")
    methods_of = {}
    for task in tasks:
        known = LanguageModelling.methods if task == "lm" else Answering.methods
        methods_of[task] = tuple(method for method in methods if method in known)
        if not methods_of[task]:
            raise InputError(
                f"The task {task} has none of the methods {', '.join(methods)}. Leave it out of --tasks, or add some of "
                f"{', '.join(known)}."
            )
    return methods_of
