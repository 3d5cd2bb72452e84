"""kvpress timed beside us: with a stand-in for its process, and itself where its environment is there (`make peers`)."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from activation_beacon.bench.cost import ModelShape
from activation_beacon.bench.measure import Cell, run
from activation_beacon.bench.peers import PRESSES, timed_peers
from activation_beacon.cli import app
from activation_beacon.errors import PeerError
from activation_beacon.peers_environment import PYTHON
from evaluation_models import beacon_model
from saved_models import save_adapter, save_base

KVPRESS = Path(__file__).parents[1] / PYTHON
needs_kvpress = pytest.mark.skipif(not KVPRESS.is_file(), reason="there is no .venv-peers (make peers)")

# Answers with the sizes that it was asked for; ends at texts of 99 tokens.
STAND_IN = """
import json, sys
print(json.dumps({"versions": " ".join(sys.argv[1:])}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["length"] == 99:
        print("a warning", file=sys.stderr)
        sys.exit("out of memory")
    times = dict.fromkeys(("first_token_s", "step_s", "slowest_step_s", "total_s"), 1.0)
    print(json.dumps({"run": {**times, "cache_bytes": job["entries"], "peak_bytes": job["num_new"]}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(STAND_IN)
    return lambda model, presses=("knorm",): timed_peers(model, presses, (4,), Path(sys.executable), worker=path)


@pytest.mark.parametrize("tail", [0, 3])
def test_a_press_is_asked_for_what_beacons_hold(stand_in, tail):
    model = beacon_model()
    num_sinks, chunk = model.beacon_config.num_sinks, model.beacon_config.chunk_size
    with stand_in(model) as peers:
        found = peers.run(Cell(5 * chunk + tail, 1, 4, 0, "knorm"), 7)
        assert f"--threads {torch.get_num_threads()}" in peers.versions
    per_entry = ModelShape.of(model.config).cache_bytes(1, 4)
    beacons = run(model, Cell(5 * chunk + tail, 1, 4, 0), 7)
    assert found.cache_bytes == 5 * chunk // 4 + tail + num_sinks == beacons.cache_bytes // per_entry - 7
    assert found.peak_bytes == 7


def test_a_model_from_nowhere_is_named_by_its_configuration(stand_in):
    model = beacon_model()
    model.name_or_path = ""
    with stand_in(model) as peers:
        options = peers.versions.split()
        config = Path(options[options.index("--config") + 1])
        assert json.loads((config / "config.json").read_text())["hidden_size"] == model.config.hidden_size
    assert not config.exists()


def test_a_process_that_ends_says_why(stand_in):
    with stand_in(beacon_model()) as peers, pytest.raises(PeerError, match=r"ended with status 1: out of memory\.$"):
        peers.run(Cell(99, 1, 4, 0, "knorm"), 1)


def test_an_environment_that_is_not_there_is_refused():
    message = re.escape("there is no nowhere/python. Make it with `make peers`, or anywhere")
    with pytest.raises(PeerError, match=message), timed_peers(beacon_model(), ["knorm"], [4], Path("nowhere/python")):
        pass


# --- kvpress itself ------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@needs_kvpress
def test_kvpress_holds_what_beacons_hold(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, seed=1)
    args = [
        "bench",
        "speed",
        "--model",
        adapter,
        "--device",
        "cpu",
        "--lengths",
        "397",
        "--ratios",
        "4",
        "--repeats",
        "1",
    ]
    args += ["--new-tokens", "3", "--peers", ",".join(PRESSES), "--peers-python", KVPRESS, "--json"]
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["peers"].startswith("kvpress 0.5")
    full, beacons, *others = values["rows"]
    assert [row["press"] for row in others] == sorted(PRESSES)
    assert full["cache_bytes"] > 2 * beacons["cache_bytes"]
    for row in others:
        assert row["cache_bytes"] == pytest.approx(beacons["cache_bytes"], rel=0.02)
        assert row["total_speedup"] > 0
