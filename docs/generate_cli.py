"""Writes docs/cli.md, the command reference, from the program itself.

`python docs/generate_cli.py` writes the file; with `--check` it writes nothing and exits 1 when the file is stale.
"""

import argparse
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.markup import render
from typer.main import get_command

TARGET = Path(__file__).with_name("cli.md")
PROGRAM = "beacon"
HEADER = "<!-- Written by docs/generate_cli.py (`make docs`); do not edit. -->\n\n# Command line\n"

# Recent versions of typer carry a copy of click of their own, which is private: a command and a context are Any here.


def main() -> int:
    """Writes or checks the file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the command line program.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when docs/cli.md is stale")
    check = parser.parse_args().check

    from activation_beacon.cli import app

    text = reference(get_command(app))
    if not check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"docs/{TARGET.name} is stale: run `make docs`.", file=sys.stderr)
    return 1


def reference(program: Any) -> str:
    """The whole page for a click command, its subcommands included."""
    return "\n".join([HEADER, *sections(program, new_context(program, PROGRAM, parent=None))])


def new_context(command: Any, name: str, parent: Any) -> Any:
    """A context of the command's own kind, which says nothing of the terminal."""
    return command.context_class(command, info_name=name, parent=parent)


def sections(command: Any, context: Any) -> list[str]:
    """The blocks of Markdown for a command, then for its subcommands in the order of its --help."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    blocks = [f"## `{context.command_path}`\n", *prose(command, command.help), fence(usage)]
    blocks += parameters(command, context)
    blocks += prose(command, command.epilog)
    children = [] if not hasattr(command, "list_commands") else command.list_commands(context)
    for name in children:
        child = command.get_command(context, name)
        if not child.hidden:
            blocks += sections(child, new_context(child, name, parent=context))
    return blocks


def parameters(command: Any, context: Any) -> list[str]:
    """One list for the arguments and one for the options, hidden ones left out."""
    blocks = []
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        params = [param for param in command.get_params(context) if param.param_type_name == kind]
        lines = [line for line in (parameter(command, param, context) for param in params) if line]
        if lines:
            blocks.append(f"**{title}**\n\n" + "\n".join(lines) + "\n")
    return blocks


def parameter(command: Any, param: Any, context: Any) -> str:
    """Name, type, help, then default and environment variable; nothing for a hidden one."""
    record = param.get_help_record(context)
    if not record:
        return ""
    name, text = record
    written = getattr(param, "help", None) or ""
    # What follows the written help, "[default: 8]", is not markup.
    words = [*plain(command, written).split(), *text.removeprefix(written).split()]
    return f"- `{name.strip()}`" + (f": {' '.join(words)}" if words else "")


def prose(command: Any, text: str | None) -> list[str]:
    r"""Help text as Markdown: paragraphs on one line each; what is indented, or marked by \b, as a code block."""
    blocks = []
    for paragraph in inspect.cleandoc(text or "").partition("\f")[0].split("\n\n"):
        is_code = paragraph.lstrip("\n").startswith((" ", "\b"))
        lines = plain(command, paragraph.replace("\b", "")).strip("\n").splitlines()
        if not lines:
            continue
        # "Examples:" and then commands, in one paragraph.
        if not is_code and len(lines) > 1 and lines[0].endswith(":") and all(is_command(line) for line in lines[1:]):
            blocks.append(lines.pop(0) + "\n")
            is_code = True
        if is_code:
            blocks.append(fence(textwrap.dedent("\n".join(lines))))
        else:
            blocks.append(" ".join(line.strip() for line in lines) + "\n")
    return blocks


def is_command(line: str) -> bool:
    """Whether a line of help is something to type, or the continuation of it."""
    return line.startswith((" ", "$ ", f"{PROGRAM} "))


def plain(command: Any, text: str) -> str:
    """The text without rich's markup, where the command uses it."""
    return render(text).plain if getattr(command, "rich_markup_mode", None) == "rich" else text


def fence(text: str) -> str:
    """A block of code."""
    return f"```console\n{text}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
