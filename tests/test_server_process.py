"""`beacon serve` as a process: started, ended by a signal, killed in the middle of its work, started again."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from typer.testing import CliRunner

from activation_beacon.cli import app
from activation_beacon.cli.serve import _url, parse_bytes
from activation_beacon.errors import InputError
from test_cli import TEXT, save_adapter, save_base

BEACON = [sys.executable, "-m", "activation_beacon"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    return save_adapter(root / "adapter", save_base(root / "base", seed=0), seed=2)


@contextlib.contextmanager
def serving(adapter, folder, *options):
    """A server process, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*BEACON, "serve", "--model", str(adapter), "--name", "tiny", "--ratio", "4", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--folder", str(folder), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        end = time.monotonic() + 600
        while not is_up(client):
            assert process.poll() is None, "".join(lines)
            assert time.monotonic() < end, "".join(lines)
            time.sleep(0.1)
        yield process, client, lines
    finally:
        client.close()
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(10)
        process.stderr.close()


def is_up(client):
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def ask(client, context_id):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "context": context_id}
    reply = client.post("/v1/chat/completions", json={**body, "max_tokens": 4, "temperature": 0})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_a_signal_ends_it_and_a_restart_finds_its_contexts(adapter, tmp_path):
    with serving(adapter, tmp_path / "contexts") as (process, client, lines):
        context = client.post("/v1/contexts", json={"text": TEXT}).json()
        answer = ask(client, context["id"])
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert any('"route": "/v1/chat/completions"' in line for line in lines)
    assert not any("lion" in line for line in lines)
    with serving(adapter, tmp_path / "contexts") as (_, client, _lines):
        assert ask(client, context["id"]) == answer


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_no_finished_context(adapter, tmp_path):
    """Several clients make contexts without pause; whatever was answered with 201 must answer after each restart."""
    folder, finished = tmp_path / "contexts", {}
    moments = random.Random(0)
    for _ in range(3):
        with serving(adapter, folder) as (process, client, _lines):
            for context_id, answer in finished.items():
                assert ask(client, context_id) == answer
            listed = client.get("/v1/contexts").json()["data"]
            assert {each["status"] for each in listed} <= {"ready"}
            assert finished.keys() <= {each["id"] for each in listed}
            made: list[str] = []
            makers = [threading.Thread(target=make_contexts, args=(client, made)) for _ in range(3)]
            for maker in makers:
                maker.start()
            while not made:
                time.sleep(0.01)
            finished = {context_id: ask(client, context_id) for context_id in made[:3]}
            time.sleep(moments.random() / 2)
            process.kill()
            for maker in makers:
                maker.join(30)


def make_contexts(client, made):
    with contextlib.suppress(httpx.TransportError):
        while True:
            reply = client.post("/v1/contexts", json={"text": TEXT * 2})
            if reply.status_code == 201:
                made.append(reply.json()["id"])


@pytest.mark.parametrize(
    ("text", "number"), [("17", 17), ("4GiB", 4 * 2**30), ("1.5 mib", 3 * 2**19), ("2K", 2048), ("1TB", 2**40)]
)
def test_numbers_of_bytes(text, number):
    assert parse_bytes("--memory", text) == number


@pytest.mark.parametrize("text", ["", "many", "4PB", "-1", "4 GiB of it"])
def test_numbers_of_bytes_that_are_none(text):
    with pytest.raises(InputError, match="--memory must be a number of bytes such as"):
        parse_bytes("--memory", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "2,4"], "--ratio must be"),
        (["--ratio", "3"], "ratio (3)"),
        (["--memory", "much"], "--memory must be a number of bytes"),
        (["--shutdown-seconds", "inf"], "--shutdown-seconds must be a number of seconds such as 20; got inf."),
        (["--cors-origin", "beacon.example"], "An origin is scheme://host or scheme://host:port"),
        (["--model", "nowhere/at/all/really"], "Error:"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(options, message, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "--model", str(adapter), *options])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000"), ("box", "http://box:8000")]
)
def test_the_address_that_is_printed_can_be_opened(host, url):
    assert _url(host, 8000) == url
    assert urlsplit(url).hostname == host


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--model", "never/loaded", "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: 127.0.0.1:{port} cannot be listened on: Address already in use. Choose another --port.\n"
    )


def test_an_address_that_is_none_is_told_in_one_line():
    result = CliRunner().invoke(app, ["serve", "--model", "never/loaded", "--host", "no.such.host.invalid"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --host no.such.host.invalid is no address of this machine: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("options", "variable"), [([], ""), (["--api-key", ""], None)])
def test_an_empty_key_lets_nobody_in(options, variable):
    result = CliRunner().invoke(app, ["serve", "--model", "never/loaded", *options], env={"BEACON_API_KEY": variable})
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The API key is empty")


def test_without_the_extra_the_way_out_is_told(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(app, ["serve", "--model", str(adapter)])
    assert result.exit_code == 1
    assert 'pip install "activation-beacon[serve]"' in result.stderr
