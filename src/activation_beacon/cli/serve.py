"""`beacon serve`: contexts and answers over HTTP."""

import importlib
import math
import os
import re
from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, warn_untrained
from activation_beacon.cli.models import check_ratio, load_model
from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.ratios import parse_ratio

UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    folder: Annotated[
        str, typer.Option("--folder", help="Where contexts are kept: a path, or an address that fsspec knows.")
    ] = "contexts",
    model: options.Model = "default",
    base: options.Base = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; by default as --model.")
    ] = None,
    ratio: Annotated[
        str, typer.Option("--ratio", help='Tokens per beacon where a request names no ratio: "auto" or an int.')
    ] = "auto",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="BEACON_API_KEY", help="Bearer key that clients must send.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", metavar="BYTES", help="Contexts and conversations kept in memory, such as 8GiB.")
    ] = "4GiB",
    disk: Annotated[
        str | None,
        typer.Option("--disk", metavar="BYTES", help="Files in the folder at most; then creating is refused."),
    ] = None,
    max_body: Annotated[
        str, typer.Option("--max-body", metavar="BYTES", help="Size of a request, a file included.")
    ] = "32MiB",
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Answers written, and texts read, at a time.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests that may wait; further ones get 429.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of a chat answer where a request names no number.")
    ] = 512,
    answer_seconds: Annotated[
        float, typer.Option("--answer-seconds", min=1, help="Time that an answer may take, waiting included.")
    ] = 600.0,
    shutdown_seconds: Annotated[
        float, typer.Option("--shutdown-seconds", min=0, help="Time that requests get to finish at the end.")
    ] = 20.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="A page of another origin that may call, or * for all; repeat for more."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="A name that clients may call the server by, or * for any; repeat for more. "
            "By default any, and on this machine's own address without a key only its own names.",
        ),
    ] = None,
    local_tokens: options.LocalTokens = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
) -> None:
    """Serve a model over HTTP.

    OpenAI's API, contexts by handle, and a web page.

    A context is compressed once (POST /v1/contexts) and asked many times (`context` in a chat request). Contexts are
    files in one folder; a restart finds them again. Needs the extra "serve". Logs are JSON lines on stderr, without
    texts. Ctrl-C or SIGTERM finishes or cancels requests and ends.
    """
    wanted = parse_ratio(ratio, "--ratio")
    if isinstance(wanted, tuple):
        raise InputError(
            f'--ratio must be "auto" or one int here; got {ratio!r}. Requests may name one for each chunk.'
        )
    if not math.isfinite(shutdown_seconds):
        raise InputError(f"--shutdown-seconds must be a number of seconds such as 20; got {shutdown_seconds}.")
    sizes = {"memory_bytes": parse_bytes("--memory", memory), "max_body_bytes": parse_bytes("--max-body", max_body)}
    disk_bytes = None if disk is None else parse_bytes("--disk", disk)
    _check_installed()
    check_ratio(model, wanted)
    from activation_beacon.server.app import create_app
    from activation_beacon.server.http import HttpServer, bound_socket
    from activation_beacon.server.logs import log_to_stderr
    from activation_beacon.server.settings import API_KEY, Settings

    if api_key is None:
        api_key = os.environ.get(API_KEY)  # typer takes an empty variable for none
    settings = Settings(
        folder=folder,
        model_name=name or model,
        ratio=wanted,
        api_key=api_key,
        allowed_hosts=_allowed_hosts(host, api_key, allowed_host or []),
        disk_bytes=disk_bytes,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        answer_s=answer_seconds,
        shutdown_s=shutdown_seconds,
        cors_origins=tuple(cors_origin or ()),
        **sizes,
    )
    with bound_socket(host, port) as bound:
        loaded = load_model(model, base=base, device=device, dtype=dtype, local_tokens=local_tokens)
        warn_untrained(loaded.config)
        app = create_app(loaded.model, loaded.tokenizer, settings)
        if host not in LOOPBACK and settings.api_key is None:
            notice(
                f"Listening on {host} without a key: whoever reaches the port can use and delete contexts (--api-key)."
            )
        log_to_stderr()
        notice(f"{_url(host, port)} serves {settings.model_name}; contexts in {folder}")
        server = HttpServer(app, log_config=None, access_log=False, server_header=False)
        server.run(sockets=[bound])
    if not server.started:
        raise typer.Exit(1)  # the log says why


def _url(host: str, port: int) -> str:
    """Where a server is; addresses of IPv6 stand in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allowed_hosts(host: str, api_key: str | None, named: list[str]) -> tuple[str, ...]:
    """Names that requests may call the server by: without a key, a page could have its own name lead to this machine."""
    if "*" in named:
        return ()
    is_open = host in LOOPBACK and api_key is None
    return (*LOOPBACK, *named) if is_open or named else ()


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a text such as 4GiB, 500MiB or 1000000.

    Raises:
        InputError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B?|)", text.strip().upper())
    if match is None:
        raise InputError(f"{option} must be a number of bytes such as 500MiB or 4GiB; got {text!r}.")
    unit = match[2][:1] + "IB" if match[2] else ""
    return int(float(match[1]) * UNITS[unit])


def _check_installed() -> None:
    try:
        for package in ("fastapi", "python_multipart", "prometheus_client", "uvicorn"):
            importlib.import_module(package)
    except ImportError as error:
        raise UnsupportedError(
            f'beacon serve needs packages that are not installed ({error.name}). Run: pip install "activation-beacon[serve]"'
        ) from None
