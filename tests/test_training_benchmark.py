import json

import pytest
from typer.testing import CliRunner

from activation_beacon import BeaconConfig
from activation_beacon.cli import app
from activation_beacon.training.benchmark import WAYS, measure
from families import with_beacons
from saved_models import save_adapter, save_base


def test_every_way_is_measured_at_every_length_and_leaves_the_model_as_it_was():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4)))
    found = list(measure(model, [33, 64], repeats=2))
    assert [(speed.length, speed.way) for speed in found] == [(length, way) for length in (33, 64) for way in WAYS]
    for speed in found:
        assert len(speed.seconds) == 2
        assert speed.tokens_per_second == pytest.approx(speed.length / (sum(speed.seconds) / 2))
        assert speed.share_of_peak > 0
        assert speed.memory_bytes > 0
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert all(parameter.grad is None for _, parameter in model.beacon_parameters())


def test_steps_are_measured_without_the_local_tokens_that_the_model_keeps():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4), local_tokens=5))
    numbers = []
    model.register_forward_hook(lambda *_: numbers.append(model.local_tokens))
    speeds = measure(model, [33], repeats=1, ways=["loop"])
    next(speeds)
    assert set(numbers) == {0}
    speeds.close()
    assert model.local_tokens == 5


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """The command for a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    base = save_base(folder / "base")
    return ["bench", "training", "--model", str(save_adapter(folder / "adapter", base, seed=1)), "--base", str(base)]


def test_the_command_prints_a_table_or_one_json_object(options):
    table = CliRunner().invoke(app, [*options, "--lengths", "96,64", "--repeats", "1"])
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["tokens", "way", "tokens/s", "of", "the", "loop", "share", "of", "peak", "memory"]
    assert [line.split()[0] for line in lines[1:]] == ["64"] * 3 + ["96"] * 3
    result = CliRunner().invoke(app, [*options, "--lengths", "96,64", "--repeats", "1", "--json"])
    assert len(json.loads(result.stdout)["measured"]) == 6


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ("x", "Error: --lengths must be ints of at least 1, such as 8192 or 2048,4096; got 'x'."),
        ("32,64", "Error: --lengths (32) must exceed the chunk (32): there is nothing to train on before."),
    ],
)
def test_lengths_that_make_no_sense_are_refused(options, lengths, text):
    result = CliRunner().invoke(app, [*options, "--lengths", lengths])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == text
