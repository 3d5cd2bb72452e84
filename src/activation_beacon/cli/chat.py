"""`beacon chat`: a conversation that never reads anything twice."""

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, one_line, trained_mark, warn_untrained
from activation_beacon.cli.models import load_model, place_context, read_context
from activation_beacon.cli.sampling import Sampling
from activation_beacon.cli.texts import check_output, check_stdin_open
from activation_beacon.errors import BeaconError, InputError, StorageError

if TYPE_CHECKING:
    from activation_beacon.conversation import Conversation, ShouldStop

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
    local_tokens: options.LocalTokens = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
) -> None:
    """Talk with a model about a compressed text.

    Without a file it is a chat about anything. One context grows with the conversation: nothing is read twice, and
    what no longer fits a chunk and the local tokens is compressed. Type /info, /save FILE, /reset or /quit; Ctrl-C stops
    an answer, Ctrl-D ends. Lines may also come through a pipe.
    """
    check_stdin_open()
    context = None if file is None else read_context(file)
    if context is not None and local_tokens is not None:
        raise InputError(
            f"--local-tokens is for a chat without a file: the context in {file} keeps its own number "
            f"({context.config.local_tokens}). Leave it out, or give it to beacon compress."
        )
    loaded = load_model(model, base=base, device=device, dtype=dtype, local_tokens=local_tokens)
    from activation_beacon.conversation import Conversation

    start = None if context is None else place_context(loaded, context)
    conversation = Conversation(loaded.model, loaded.tokenizer, start, prompt=loaded.prompt)
    warn_untrained(loaded.config)
    Terminal(conversation, Sampling(max_new_tokens, temperature, seed), trained_mark(loaded.config)).run()


def save(conversation: "Conversation", path: Path, *, force: bool = False) -> int:
    """Write the context with all that has been said; bytes written.

    Raises:
        InputError: if nothing has been said or read.
        StorageError: if the file exists or cannot be written.
    """
    if path.exists() and not force:
        raise StorageError(f"{path} exists already. Choose another name, or replace it: /save! {path}")
    check_output(path, force=force)
    if not conversation.context.token_ids.numel():
        raise InputError("There is nothing to save yet: no text was read, and nothing was said.")
    return conversation.whole_context().save(path)


class Terminal:
    """Reads lines, prints answers, and knows the commands that begin with a slash."""

    def __init__(self, conversation: "Conversation", sampling: Sampling, mark: str) -> None:
        self.conversation = conversation
        self.sampling = sampling
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused in its turn
        self.is_interactive = sys.stdin.isatty()
        self.label = f"model{mark}: "

    def run(self) -> None:
        """Go on until /quit or the end of the input."""
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its editing keys
            notice(f"{HELP}\n")
            if num_tokens := self.conversation.context.token_ids.shape[1]:
                notice(f"The context holds {num_tokens:,} tokens. Ask about it.")
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
        options.check_text_given("The message", line)
        with _first_interrupt_stops() as should_stop:
            typer.echo(self.label, nl=not self.is_interactive, err=True)
            try:
                reply = self.conversation.ask(
                    line,
                    write=lambda piece: typer.echo(piece, nl=False),
                    should_stop=should_stop,
                    **self.sampling.begin(),
                )
            finally:
                typer.echo()
            if should_stop():
                notice("(stopped)")
            elif reply.is_repeating:
                notice("(ended, since it repeats itself)")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/info":
            turns = self.conversation.num_turns
            typer.echo(f"{self.conversation.context}\n{turns} {'turn' if turns == 1 else 'turns'} since the chat began")
        elif name == "/reset":
            self.conversation.reset()
            notice("Back at the start.")
        elif name in ("/save", "/save!") and not argument.strip():
            notice(f"{name} needs the name of a file.")
        elif name in ("/save", "/save!"):
            path = Path(argument.strip()).expanduser()
            notice(f"{path}: {save(self.conversation, path, force=name == '/save!'):,} bytes")
        else:
            notice(f"{line} is not a command. Commands are:\n{HELP}")


@contextlib.contextmanager
def _first_interrupt_stops() -> "Iterator[ShouldStop]":
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
