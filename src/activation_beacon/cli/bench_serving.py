"""`beacon bench serving`: a running server under load."""

import os
from typing import Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, print_json

EPILOG = options.examples(
    "beacon bench serving http://127.0.0.1:8000",
    "beacon bench serving http://127.0.0.1:8000 --clients 16 --seconds 300 --first-token-characters 64000 --json",
)


def serving(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000.")],
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients at once.")] = 16,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Seconds of load; 0 for none.")] = 60.0,
    characters: Annotated[
        int,
        typer.Option(
            "--characters", min=1, help="Of the longest client's text, before its secret; the shortest has half."
        ),
    ] = 12_000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")] = 16,
    first_token_characters: Annotated[
        int | None, typer.Option("--first-token-characters", min=1, help="Time first tokens on a text of so many.")
    ] = None,
    ratio: Annotated[
        int | None, typer.Option("--ratio", min=2, help="Tokens per beacon; the server's by default.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="BEACON_API_KEY", help="The server's key.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """Load a running server: each client has a context that holds a secret, and asks for it without pause.

    Counts errors, answers with another client's secret (there must be none), answers that differ from what the client
    got alone, and follows the memory of the server's process. The exit status is 1 if there was an error other than
    429, or a mixed-up answer.
    """
    from activation_beacon.bench.serving import Connection, run, time_first_tokens

    connection = Connection(url, key=api_key)
    found: dict[str, Any] = {"clients": clients, "cores": os.cpu_count()}
    if first_token_characters is not None:
        notice(f"timing first tokens on a text of {first_token_characters:,} characters")
        found["first_token"] = time_first_tokens(connection, _text(first_token_characters), ratio=ratio)
    load = None
    if seconds:
        notice(f"making {clients} contexts, then {seconds:g} s of load")
        load = run(
            connection, _text(characters), num_clients=clients, seconds=seconds, max_tokens=max_tokens, ratio=ratio
        )
        found |= load.numbers()
    if json:
        print_json(found)
    else:
        for name, value in found.items():
            typer.echo(f"{name.replace('_', ' '):<24}{value}")
    if load is not None and (load.num_errors or load.num_mixed_up):
        raise typer.Exit(1)


def _text(num_characters: int) -> str:
    """The beginning of the book that comes with the package, over again where it is too short."""
    from activation_beacon.books import read_demo_book

    book = read_demo_book()
    return (book * (num_characters // len(book) + 1))[:num_characters]
