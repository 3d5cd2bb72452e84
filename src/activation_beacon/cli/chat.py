"""`beacon chat`: a conversation that never reads anything twice."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.answering import Answer, Sampling, ShouldStop, answer
from activation_beacon.cli.console import notice, one_line, trained_mark, warn_untrained
from activation_beacon.cli.models import (
    Loaded,
    check_question_fits,
    load_model,
    place_context,
    question_ids,
    read_context,
)
from activation_beacon.cli.texts import check_output
from activation_beacon.errors import BeaconError, InputError, StorageError

if TYPE_CHECKING:
    from activation_beacon.cache import BeaconCache

COMMANDS = {
    "/info": "what the context holds now",
    "/save FILE": "write the context, this conversation included; `beacon chat FILE` goes on with it",
    "/save! FILE": "the same, in place of an older file",
    "/reset": "back to where the conversation began",
    "/quit": "end (as Ctrl-D does)",
}
HELP = "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())


def chat(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A context that `beacon compress` or /save wrote.", show_default=False),
    ] = None,
    model: options.Model = "default",
    base: options.Base = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
) -> None:
    """Talk with a model about a compressed text.

    Without a file it is a chat about anything. One context grows with the conversation: nothing is read twice, and
    what no longer fits a chunk is compressed. Type /info, /save FILE, /reset or /quit; Ctrl-C stops an answer,
    Ctrl-D ends. Lines may also come through a pipe.
    """
    context = None if file is None else read_context(file)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    start = loaded.model.new_cache() if context is None else place_context(loaded, context)
    conversation = Conversation(loaded, start, Sampling(max_new_tokens, temperature, seed))
    conversation.check_can_begin()
    warn_untrained(loaded.config)
    Terminal(conversation).run()


class Conversation:
    """A context that grows turn by turn.

    Attributes:
        start: the context that it began with.
        context: what has been read so far.
        unread: ids at the end of the last answer that the context has not seen.
        num_turns: questions answered.
    """

    def __init__(self, loaded: Loaded, start: "BeaconCache", sampling: Sampling) -> None:
        self.loaded = loaded
        self.sampling = sampling
        self.start = start
        self.reset()

    def reset(self) -> None:
        """Back to the start."""
        self.context = self.start.fork()
        self.unread: list[int] = []
        self.num_turns = 0

    def check_can_begin(self) -> None:
        """Refuse a context that cannot be talked about.

        Raises:
            InputError: if it does not open with the chat template.
        """
        question_ids(self.loaded, self.context, "")

    def say(self, text: str, write: Callable[[str], None], should_stop: ShouldStop) -> Answer:
        """Answer the next message; if that fails, the conversation stays as it was."""
        ids = [*self.unread, *self.loaded.prompt.follow_up(text)] if self.num_turns else self._first(text)
        check_question_fits(self.loaded, ids)
        reply = answer(self.loaded, self.context, ids, self.sampling, write=write, should_stop=should_stop)
        self.context, self.unread = reply.context, reply.unread
        self.num_turns += 1
        return reply

    def _first(self, text: str) -> list[int]:
        return question_ids(self.loaded, self.context, text)

    def save(self, path: Path, *, force: bool = False) -> int:
        """Write the context with all that has been said; bytes written.

        Raises:
            InputError: if nothing has been said or read.
            StorageError: if the file exists or cannot be written.
        """
        if path.exists() and not force:
            raise StorageError(f"{path} exists already. Choose another name, or replace it: /save! {path}")
        check_output(path, force=force)
        if not self.context.token_ids.numel():
            raise InputError("There is nothing to save yet: no text was read, and nothing was said.")
        context = self.context.fork()
        if self.unread:
            self.loaded.model.compress([self.unread], cache=context)
        return context.save(path)


class Terminal:
    """Reads lines, prints answers, and knows the commands that begin with a slash."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.is_interactive = sys.stdin.isatty()
        self.label = f"model{trained_mark(conversation.loaded.config)}: "

    def run(self) -> None:
        """Go on until /quit or the end of the input."""
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its editing keys
            notice(f"{HELP}\n")
        for line in self._lines():
            if line.startswith("/"):
                if line == "/quit":
                    return
                self._guarded(self._command, line)
            elif line:
                self._guarded(self._say, line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input("you: ") if self.is_interactive else sys.stdin.readline()
            except EOFError:
                notice("")
                return
            except KeyboardInterrupt:
                notice("\n(/quit or Ctrl-D ends)")
                continue
            if not line and not self.is_interactive:
                return
            yield line.strip()

    def _guarded(self, act: Callable[[str], None], line: str) -> None:
        """What goes wrong in a turn ends the turn, not the chat."""
        try:
            act(line)
        except BeaconError as error:
            notice(f"Error: {one_line(str(error))}")
        except KeyboardInterrupt:
            notice("\n(this message was dropped)")

    def _say(self, line: str) -> None:
        with _first_interrupt_stops() as should_stop:
            typer.echo(self.label, nl=not self.is_interactive, err=True)
            try:
                reply = self.conversation.say(line, lambda piece: typer.echo(piece, nl=False), should_stop)
            finally:
                typer.echo()
            if should_stop():
                notice("(stopped)")
            elif reply.is_repeating:
                notice("(ended, since it repeats itself)")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/info":
            typer.echo(f"{self.conversation.context}\n{self.conversation.num_turns} turns")
        elif name == "/reset":
            self.conversation.reset()
            notice("Back at the start.")
        elif name in ("/save", "/save!") and argument.strip():
            path = Path(argument.strip()).expanduser()
            notice(f"{path}: {self.conversation.save(path, force=name == '/save!'):,} bytes")
        else:
            notice(f"{line} is not a command. Commands are:\n{HELP}")


@contextlib.contextmanager
def _first_interrupt_stops() -> Iterator[ShouldStop]:
    """Within the block a first Ctrl-C only makes the yielded function true; a second one interrupts as ever."""
    interrupts: list[int] = []

    def note(number: int, _frame: Any) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    def should_stop() -> bool:
        return bool(interrupts)

    if threading.current_thread() is not threading.main_thread():
        yield should_stop
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield should_stop
    finally:
        signal.signal(signal.SIGINT, before)
