"""kvpress timed beside us: with a stand-in for its process, and itself where its environment is there (`make peers`)."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from activation_beacon import BeaconConfig
from activation_beacon.bench import peers
from activation_beacon.bench.cost import ModelShape
from activation_beacon.bench.measure import Cell, run
from activation_beacon.cli import app
from activation_beacon.errors import PeerError
from activation_beacon.peers_environment import PYTHON
from evaluation_models import beacon_model
from families import with_beacons
from saved_models import save_adapter, save_base

CHUNK = 16
KNORM = Cell(50, 1, 4, 0, "knorm")
KVPRESS = Path(__file__).parents[1] / PYTHON
needs_kvpress = pytest.mark.skipif(not KVPRESS.is_file(), reason="there is no .venv-peers (make peers)")

# Answers with the sizes that it was asked for; ends at texts of 99 tokens, and after those of 97; 98 do not fit.
STAND_IN = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["length"] == 99:
        print("a warning", file=sys.stderr)
        sys.exit("the disk is full")
    found = dict.fromkeys(("first_token_s", "step_s", "slowest_step_s", "total_s"), 1.0)
    found |= {"cache_bytes": job["entries"], "peak_bytes": job["num_new"], "by": " ".join(sys.argv[1:])}
    print(json.dumps({"run": None if job["length"] == 98 else found}), flush=True)
    if job["length"] == 97:
        sys.exit("killed")
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(peers, "WORKER", path)


@contextlib.contextmanager
def started(model):
    with peers.timed_peers(model, ["knorm"], (4,), Path(sys.executable)) as found:
        yield found


def timed(folder, *options):
    adapter = save_adapter(folder / "adapter", save_base(folder / "base"), seed=1)
    args = ["--model", adapter, "--device", "cpu", "--ratios", "4", "--repeats", "1", "--json", *options]
    return CliRunner().invoke(app, ["bench", "speed", *map(str, args)])


@pytest.mark.parametrize("settings", [{}, {"num_sinks": 3}, {"num_sinks": 2, "local_tokens": 5}])
@pytest.mark.parametrize("tail", [0, 3])
def test_a_press_is_asked_for_what_beacons_hold(worker, settings, tail):
    model = with_beacons("llama", BeaconConfig(chunk_size=CHUNK, ratios=(2, 4), **settings))
    cell = Cell(5 * CHUNK + tail, 1, 4, 0)
    with started(model) as kvpress:
        found = kvpress.run(cell._replace(press="knorm"), 7)
    # Beacons are asked after one token more, when a whole chunk is closed; seven tokens more close none.
    beacons = run(model, cell, 1).cache_bytes // ModelShape.of(model.config, {}).cache_bytes(1, 4)
    assert found.cache_bytes == beacons - 1
    assert found.peak_bytes == 7
    assert f"--threads {torch.get_num_threads()}" in found.by


def test_a_model_from_nowhere_is_named_by_its_configuration(worker):
    model = with_beacons("llama", BeaconConfig(chunk_size=CHUNK, ratios=(4,)))
    model.name_or_path = ""
    with started(model) as kvpress:
        options = kvpress.run(KNORM, 1).by.split()
        config = Path(options[options.index("--config") + 1])
        assert json.loads((config / "config.json").read_text())["hidden_size"] == model.config.hidden_size
    assert not config.exists()


def test_a_text_that_does_not_fit_is_no_end(worker):
    with started(beacon_model()) as kvpress:
        with pytest.raises(torch.OutOfMemoryError):
            kvpress.run(KNORM._replace(length=98), 1)
        assert kvpress.run(KNORM, 1).peak_bytes == 1


@pytest.mark.parametrize(
    ("length", "why"), [(99, "the disk is full"), (97, "killed")], ids=["at work", "while it waits"]
)
def test_a_process_that_ends_says_why(worker, length, why):
    told = pytest.raises(
        PeerError, match=rf"ended with status 1: {why}\. Leave --peers out, or go on with the same --output"
    )
    with told, started(beacon_model()) as kvpress:
        if why == "killed":
            kvpress.run(KNORM._replace(length=length), 1)
            kvpress._process.wait()
        kvpress.run(KNORM._replace(length=length), 1)


def test_the_command_times_kvpress_where_full_attention_is_timed(worker, tmp_path):
    options = [
        "--lengths",
        "64,98,120",
        "--new-tokens",
        "1",
        "--full-up-to",
        "98",
        "--no-full-tuned",
        "--peers",
        "knorm",
    ]
    result = timed(tmp_path, *options, "--peers-python", sys.executable)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["length"], row["press"]) for row in rows] == [
        (64, None),
        (64, None),
        (64, "knorm"),
        (98, None),
        (98, None),
        (120, None),
    ]
    assert [bool(row["by"]) for row in rows] == [False, False, True, False, False, False]
    assert "98 tokens, knorm at ratio 4: does not fit the GPU's memory" in result.stderr


def test_an_environment_that_is_not_there_is_refused():
    message = re.escape("there is no nowhere/python. Make it with `make peers`, or anywhere")
    with (
        pytest.raises(PeerError, match=message),
        peers.timed_peers(beacon_model(), ["knorm"], [4], Path("nowhere/python")),
    ):
        pass


# --- kvpress itself ------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@needs_kvpress
def test_kvpress_holds_what_beacons_hold(tmp_path):
    options = ["--lengths", "397", "--new-tokens", "3", "--peers", ",".join(peers.PRESSES)]
    result = timed(tmp_path, *options, "--peers-python", KVPRESS)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    full, beacons, *others = (row for row in values["rows"] if not row["is_tuned"])
    assert [row["press"] for row in others] == sorted(peers.PRESSES)
    assert all(row["by"].startswith("kvpress 0.5") for row in others)
    assert full["cache_bytes"] > 2 * beacons["cache_bytes"]
    for row in others:
        assert row["cache_bytes"] == pytest.approx(beacons["cache_bytes"], rel=0.02)
        assert row["total_speedup"] > 0
