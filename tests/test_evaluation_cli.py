"""`beacon eval`: from files to a report, and again where it was stopped."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import activation_beacon
from activation_beacon import BeaconConfig, attach, detach
from activation_beacon.cli import app
from evaluation_models import STORY, beacon_model
from families import beacon_tensors
from launched import run_together
from saved_models import CHUNK, byte_tokenizer

pytest.importorskip("matplotlib")

SMALL = ("--ratios", "4", "--limit", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a base model, an adapter, documents, and a background."""
    root = tmp_path_factory.mktemp("eval")
    model = beacon_model()
    tensors = beacon_tensors(model)
    detach(model).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    model, _ = activation_beacon.load_pretrained_base(str(root / "base"))
    attach(model, BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), base_model=str(root / "base")))
    for name, parameter in model.beacon_parameters():
        parameter.data.copy_(tensors[name])
    model.save_pretrained(root / "adapter")
    rows = [{"id": f"doc{number}", "text": STORY[number:]} for number in range(4)]
    (root / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "story.txt").write_text(STORY, encoding="utf-8")
    return root


@pytest.fixture
def run(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        return CliRunner().invoke(app, ["eval", *(str(arg).format(files=files) for arg in args)])

    return run


def good(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


LM = ("lm", "{files}/docs.jsonl", "--model", "{files}/adapter", "-o", "out", *SMALL, "--length", "100")
BACKGROUND = ("--background", "{files}/story.txt")
NEEDLES = ("needles", "--model", "{files}/adapter", "-o", "out", *SMALL, "--length", "400", *BACKGROUND)


def test_lm_writes_lines_and_a_report(run, tmp_path):
    out = good(run(*LM))
    assert re.search(r"^\| beacons x4 \| \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] \| 2 \|", out, re.M)
    assert "Report: out/report.md, out/report.html" in out
    assert [(r["method"], r["sample"]) for r in lines_of(tmp_path / "out")] == [
        (method, sample) for sample in ("doc0", "doc1") for method in ("full", "alone", "beacons")
    ]
    assert (tmp_path / "out" / "report.html").exists()


def test_what_is_printed_is_what_the_lines_say(run, tmp_path):
    found = json.loads(good(run(*LM, "--json")))
    nats = [r["nats"] for r in lines_of(tmp_path / "out") if r["method"] == "beacons"]
    row = next(row for row in found["rows"] if row["method"] == "beacons")
    assert row["nats"]["value"] == pytest.approx(sum(nats) / 2)
    assert (row["task"], row["ratio"], row["length"], row["refused"]) == ("lm", 4, 100, 0)
    assert found["is_trained"] is False


def test_a_second_run_adds_what_is_new_and_tasks_share_a_report(run, tmp_path):
    good(run(*LM))
    before = lines_of(tmp_path / "out")
    good(run(*LM, "--limit", "3"))
    assert lines_of(tmp_path / "out")[: len(before)] == before
    assert len(lines_of(tmp_path / "out")) == 9
    out = good(run(*NEEDLES))
    assert "lm" not in out.split("Report:")[0]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## lm" in report
    assert "## needles" in report


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(files, run, tmp_path):
    options = [str(each).format(files=files) for each in NEEDLES]
    alone = json.loads(good(run(*NEEDLES, "--json")))
    options[options.index("out")] = "together"
    command = [sys.executable, "-W", "ignore", "-m", "activation_beacon", "eval", *options, "--json"]
    (status, output), other = run_together(2, command, cwd=tmp_path)
    assert (status, other[0]) == (0, 0), output + other[1]
    found = json.loads(output[output.index("{") :])
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in each["rows"]] for each in (alone, found)]
    assert rows[0] == rows[1]
    assert not other[1].strip(), "the first one speaks for all"
    assert len(lines_of(tmp_path / "together")) == len(lines_of(tmp_path / "out")) == 4


def test_a_task_of_lm_eval_is_refused_in_several_processes(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("harness", "arc_easy", "-o", "out")
    assert result.exit_code == 1
    assert (
        "`beacon eval harness` runs in one process; torchrun has started 2. Start it without torchrun." in result.output
    )


def test_report_writes_it_anew(run, tmp_path):
    good(run(*NEEDLES))
    first = (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "report.md").unlink()
    assert "### needles, 400 tokens" in good(run("report", "out"))
    assert (tmp_path / "out" / "report.md").read_text() == first


def test_multi_turn_shows_every_turn(run):
    out = good(run("multi-turn", "--model", "{files}/adapter", "-o", "out", *SMALL, "--length", "900"))
    assert re.search(r"^\| beacons x4 \| \d\.\d{3} / \d+\.\d\d s \| .* s \| .* s \|$", out, re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*LM, "--length", "many"), "--length must be ints of at least 1, such as 8192 or 2048,4096; got 'many'."),
        ((*LM, "--length", "0"), "--length must be ints of at least 1, such as 8192 or 2048,4096; got '0'."),
        ((*LM, "--ratios", "3"), "ratio (3) must divide chunk_size (32). Use 2, 4, 8."),
        ((*LM, "--methods", "best"), "The task lm has no method 'best'. Use some of full, alone, recent, beacons, shuffled."),
        ((*LM, "--length", "99999"), "The task lm has no sample of 99999 tokens. Use a shorter length, or longer texts."),
        ((*LM, "--field", "body"), "docs.jsonl, line 1: there is no field \"body\" (fields: id, text). Mend or remove it, or"),
        (("lm", "no.jsonl", "-o", "out"), "There is no file, folder or glob 'no.jsonl'. Name one, or a hub data set"),
        ((*NEEDLES, "--kinds", "hay"), "There is no needle of kind 'hay'. Use some of sentence, number, uuid."),
        ((*NEEDLES, "--background", "no.txt"), "There is no file, folder or glob 'no.txt'. Name one, or a hub data set"),
        ((*LM, "--on-error", "cry"), "--on-error must be skip or stop; got 'cry'."),
        ((*NEEDLES, "--methods", "full,knorm"), "and there is no .venv-peers/bin/python. Make it with `make peers`, or anywhere"),
        ((*NEEDLES, "--methods", "knorm", "--peers-python", "no/python"), "and there is no no/python. Make it with `make peers`"),
        ((*LM, "--methods", "knorm"), "The task lm has no method 'knorm'. Use some of full, alone"),
            (("report", "nowhere"), "nowhere holds no results (run.json is missing). Name a folder of `beacon eval`."),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(run, args, message):
    result = run(*args)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert "has no method" not in message or not Path("out").exists()


def test_a_folder_of_another_setting_is_refused(run):
    good(run(*NEEDLES))
    result = run(*NEEDLES, "--seed", "1")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: out holds results of needles with seed 0; this run has 1. Choose another folder, or the same settings."
    )


@pytest.mark.parametrize("command", ["lm", "needles", "multi-turn", "report"])
def test_every_command_has_an_example(run, command):
    assert re.search(rf"Examples?:\n\n    .*beacon eval {command}\b", good(run(command, "--help")))
