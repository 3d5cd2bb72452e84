"""The command line: `beacon`. One file a command; what is heavy is imported when a command runs."""

import _thread
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from activation_beacon import __version__
from activation_beacon.cli import (
    ask,
    bench,
    bench_serving,
    bench_speed,
    chat,
    compress,
    demo,
    export_official,
    import_official,
    inspect,
    make_questions,
    serve,
    train,
)
from activation_beacon.cli import eval as evaluation
from activation_beacon.cli.console import INTERRUPTED, notice, one_line
from activation_beacon.cli.options import examples
from activation_beacon.errors import BeaconError

PASSED_OVER_S = 0.05  # until an object's end is over
UNPRINTABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})

# How often a thread of torch's (libgomp) looks whether it may go on before it sleeps; by its own default 300,000 times. Where
# other work keeps a processor busy, threads look in vain for as long as the scheduler lets them. docs/performance.md has seconds.
SPINS = "10000"


class BeaconGroup(TyperGroup):
    """The commands; every error that a user can act on becomes one line and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            notice("Interrupted: nothing was left half-written.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if not _tell(error):
                raise
            raise typer.Exit(1) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; help is printed before any command is run."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _tell(error):
                raise
            sys.exit(1)


def _tell(error: Exception) -> bool:
    """Tell an error in one line; False for one that is our own mistake."""
    message = _message(error)
    if message is None:
        return False
    notice(f"Error: {one_line(message)}")
    if _is_of_output(error):
        _drop_output()
    return True


def _is_of_output(error: Exception) -> bool:
    """Whether something could not be printed, rather than written to any other file."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    is_printing = place is not None and place.tb_frame.f_code is typer.echo.__code__
    return is_printing and isinstance(error, OSError) and error.errno in UNPRINTABLE


def _drop_output() -> None:
    """What has not been printed never will be: at its end Python would try once more, and fail once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is our own mistake."""
    if isinstance(error, BeaconError):
        return str(error)
    if _is_of_output(error):
        return f"The output cannot be written: {error.strerror}. Let it go somewhere else."  # type: ignore[attr-defined]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "There is not enough memory. Use a larger --ratio, --dtype bfloat16, or a smaller model."
    return None


app = typer.Typer(
    cls=BeaconGroup,
    name="beacon",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command, lines in (
    (demo.demo, ("beacon demo", "beacon demo --quick", "beacon demo --ratios 4,16 --out demo-files")),
    (
        compress.compress,
        (
            "beacon compress book.txt -o book.beacon",
            "beacon compress book.txt --ratio 8 --quantize 8 -o book.beacon",
            "cat *.md | beacon compress - --budget 4096 -o notes.beacon --json",
        ),
    ),
    (
        ask.ask,
        (
            'beacon ask book.beacon "Who lives in the Emerald City?"',
            'beacon ask book.beacon "Tell it as a poem." --temperature 0.8 --seed 1',
            'beacon ask orders.beacon "The last order\'s number and total?" --schema order.json',
        ),
    ),
    (chat.chat, ("beacon chat book.beacon", "beacon chat --model my-adapter --temperature 0.7")),
    (inspect.inspect, ("beacon inspect book.beacon", "beacon inspect my-adapter --json")),
    (
        serve.serve,
        (
            "beacon serve",
            "beacon serve --model my-adapter --folder contexts --port 8000 --memory 8GiB",
            "BEACON_API_KEY=... beacon serve --host 0.0.0.0 --folder s3://bucket/contexts",
        ),
    ),
    (
        train.train,
        (
            "beacon train my-texts/ -o my-run --base my/decoder --max-minutes 60",
            "beacon train my-texts/ --chats my-chats.jsonl --adapter default -o my-run",
            "beacon train recipes/default-gpu.yaml -o my-run",
            "beacon train -o my-run --resume",
            "torchrun --nproc-per-node 8 -m activation_beacon train recipes/7b-8-gpus.yaml -o my-run",
        ),
    ),
    (
        make_questions.make_questions,
        (
            "beacon make-questions my-texts/ -o own-words.jsonl",
            "beacon make-questions my-texts/ --questions squad.json --limit 200 --base my/decoder -o own-words.jsonl",
        ),
    ),
    (import_official.import_official, ("beacon import-official beacon-qwen-2-7b-instruct my-adapter --with-base",)),
    (export_official.export_official, ("beacon export-official my-adapter qwen-2-7b-instruct for-their-code",)),
):
    app.command(name=command.__name__.replace("_", "-"), epilog=examples(*lines))(command)
bench_speed.add_to(bench.bench)
bench.bench.command("serving", epilog=bench_serving.EPILOG)(bench_serving.serving)
app.add_typer(bench.bench, name="bench")

app.add_typer(evaluation.app)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"beacon {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "beacon demo",
        "beacon compress book.txt --ratio 8 -o book.beacon",
        'beacon ask book.beacon "Who lives in the Emerald City?"',
        "beacon chat book.beacon",
    )
)
def beacon(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress long texts into small contexts, keep them on disk, and ask a model about them.

    Results go to stdout, progress and notices to stderr. The exit status is 0 when all went well, 1 when something
    could not be done (one line says why), 2 when the command was not understood, and 130 after Ctrl-C.
    """


def interrupt_again(unraisable: Any) -> None:
    """Stands for Python's hook: a Ctrl-C that fell into some object's `__del__`, where it is passed over, is given once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        again = threading.Timer(PASSED_OVER_S, _interrupt)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):  # wakes a main thread that waits, too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def main() -> None:
    """Run the command line and exit."""
    sys.unraisablehook = interrupt_again
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a "?" for what the terminal's encoding lacks, rather than no answer
    app()
