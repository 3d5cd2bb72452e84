"""The shell lines of docs/serving.md run as they stand, against a tiny server; so does the example; so does fuzzing."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server_live import BOOK, live, live_model

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS, SCRIPTS = (re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.DOTALL) for kind in ("sh", "python"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("docs") / "contexts", model=live_model(), model_name="default") as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_of_the_docs_run(server, tmp_path):
    lines = "".join(block for block in BLOCKS if "$URL" in block)
    assert lines.count("curl") > 10
    script = "set -euo pipefail\n" + lines.replace("http://127.0.0.1:8000", server.url)
    script = script.replace("beacon bench", f"{sys.executable} -m activation_beacon bench")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for expected in (
        '"name":"cat"',
        "event: progress",
        "event: context",
        '"chat.completion"',
        "a copy",
        '"deleted":true',
    ):
        assert expected in done.stdout
    for expected in ('"status":"ok"', "beacon_tokens_read_total", "mixed up"):
        assert expected in done.stdout


def test_the_python_of_the_docs_runs(server, capsys):
    script = "\n".join(SCRIPTS)
    for written, meant in (("http://127.0.0.1:8000", server.url), ("ctx_...", server.create()["id"])):
        assert written in script
        script = script.replace(written, meant)
    names = {}
    exec(script, names)
    assert names["reply"].choices[0].message.content
    assert names["second"].previous_response_id == names["first"].id
    assert capsys.readouterr().out.strip()


def test_the_example_runs(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    monkeypatch.setenv("BEACON_URL", server.url)
    monkeypatch.setattr(sys, "argv", ["ask_over_http.py", str(tmp_path / "book.txt"), "Who?"])
    runpy.run_path(str(ROOT / "examples" / "ask_over_http.py"), run_name="__main__")
    told = capsys.readouterr()
    assert "17 of 17 chunks" in told.err
    assert told.out.strip()


def test_every_option_of_the_docs_exists():
    from typer.testing import CliRunner

    from activation_beacon.cli import app

    known = " ".join(
        CliRunner().invoke(app, [*command, "--help"]).stdout for command in (["serve"], ["bench", "serving"])
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert len(named) > 8
    assert {option for option in named if option not in known} == set()
