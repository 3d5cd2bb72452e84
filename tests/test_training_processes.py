import json
import sys
from pathlib import Path

import pytest
import torch

from activation_beacon.persistence import load_adapter_tensors
from activation_beacon.training.checkpoints import checkpoints
from launched import run_together

BY_TWO = {"micro_batch_size": 2, "context_weight": 1.0}

# What each process runs: three updates of texts of unlike lengths, or as many as are left.
SCRIPT = """
import sys
from pathlib import Path
from test_training_trainer import settings, Texts
from activation_beacon import attach
from activation_beacon.processes import processes
from activation_beacon.training.trainer import Trainer, _Clock as Clock
from families import tiny

folder, steps, changes = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
changes_of_clock = changes.pop("unlike_clocks", False)

class OfOneLength(Texts):
    def sample(self, index):
        return super().sample(3 * index + 2)

def main(group):  # what holds on to the group is let go of when it returns
    stage = {"steps": 3, "batch_size": 4, "micro_batch_size": 1} | changes.pop("stage", {})
    texts = OfOneLength() if changes.pop("of_one_length", False) else Texts()
    run = settings(Path(folder), stage=stage, average_decay=0.6, dev_every=1, dev_texts=3, **changes)
    trainer = Trainer(attach(tiny("llama"), run.config), run, [texts], dev={"dev": Texts()}, group=group)
    trainer.resume()
    trainer.report = lambda line: trainer.stop("enough") if line["step"] == steps else None
    if changes_of_clock:
        Clock.fall = property(lambda clock: 0.9 / (1 + group.rank))
    trainer.run(max_minutes=60 if changes_of_clock else None)
    total = sum(float(tensor.double().sum()) for tensor in trainer.adapter_tensors().values())
    Path(folder, f"sum-{group.rank}").write_text(repr(total))

with processes() as group:
    main(group)
"""


def run(count: int, folder: Path, steps: int = 3, **changes):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(steps), repr(changes)]
    ended = run_together(count, command)
    assert [status for status, _ in ended] == [0] * count, "\n".join(output for _, output in ended)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_adapter_tensors(checkpoints(folder / "checkpoints")[-1]), lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone_by_two(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("alone"), stage=BY_TWO)


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(alone, tmp_path):
    """By DDP, text by text; those that read texts by two, and by FSDP2, are resumed below."""
    assert_same(run(2, tmp_path, wrapper="ddp"), alone)


WAITING = {"stage": {"micro_batch_size": 4}, "of_one_length": True}


@pytest.fixture(scope="module")
def alone_where_others_would_wait(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("waiting"), **WAITING)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_process_that_waits_through_whole_updates_changes_nothing(alone_where_others_would_wait, tmp_path, wrapper):
    assert_same(run(2, tmp_path, wrapper=wrapper, **WAITING), alone_where_others_would_wait)


def assert_same(got, expected):
    (tensors, ours), (expected, lines) = got, expected
    for key in ("loss", "gradient_norm", "tokens"):
        values, expected_values = ([line[key] for line in each if line["step"]] for each in (ours, lines))
        assert values == pytest.approx(expected_values, rel=1e-4)
    for ours_of_step, of_step in zip(ours, lines, strict=True):
        assert ours_of_step["dev"] == pytest.approx(of_step["dev"], rel=1e-4)
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "steps", "then", "stage", "unbroken"),
    [("ddp", 2, 1, BY_TWO, "alone_by_two"), ("fsdp", 1, 2, {}, "alone"), ("fsdp", 1, 1, BY_TWO, "alone_by_two")],
)
def test_a_run_of_two_processes_is_resumed_and_may_be_finished_by_one(
    request, tmp_path, wrapper, steps, then, stage, unbroken
):
    run(2, tmp_path, steps=steps, wrapper=wrapper, stage=stage)
    got = run(then, tmp_path, **({"wrapper": wrapper} if then > 1 else {}), stage=stage)
    assert [line["step"] for line in got[1]] == [0, 1, 2, 3]
    assert_same(got, request.getfixturevalue(unbroken))


@pytest.mark.slow
def test_processes_whose_clocks_differ_keep_the_same_weights(tmp_path):
    run(2, tmp_path, unlike_clocks=True)
    sums = [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)]
    assert sums[0] == sums[1]
