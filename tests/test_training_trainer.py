import dataclasses
import itertools
import json
import math
import re
import time
import types

import numpy as np
import pytest
import torch

from activation_beacon import BeaconConfig, attach
from activation_beacon.at_once import chunks_at_once
from activation_beacon.errors import ConfigError, MismatchError, TrainingError
from activation_beacon.persistence import load_adapter_tensors
from activation_beacon.processes import Processes
from activation_beacon.training.checkpoints import checkpoints
from activation_beacon.training.sampling import Sample
from activation_beacon.training.settings import Stage, TrainingSettings
from activation_beacon.training.trainer import RUNAWAY_NATS, Trainer
from families import VOCABULARY, beacon_tensors, tiny

CHUNK = 8
DROPPING = {"residual_dropout": 0.2, "embedding_dropout": 0.2, "attention_dropout": 0.2}


class Texts:
    """Texts of three lengths, a pure function of the index."""

    def sample(self, index):
        generator = np.random.default_rng(index)
        length = CHUNK * (2 + index % 3)
        ids = torch.from_numpy(generator.integers(3, VOCABULARY, length))
        return Sample(ids, torch.arange(length) >= CHUNK)


def settings(folder, **changes):
    stage = {"steps": 6, "length": 4 * CHUNK, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3}
    stage |= changes.pop("stage", {})
    values = {
        "documents": ("texts",),
        "save_every": 100,
        "config": BeaconConfig(chunk_size=CHUNK, ratios=(2, 4), num_sinks=1, anchored=True),
    }
    return TrainingSettings(output=str(folder), stages=(Stage(**stage),), **{**values, **changes})


def trainer(folder, family="llama", **changes):
    run = settings(folder, **changes)
    rates = DROPPING if family == "starcoder2" else {}
    return Trainer(attach(tiny(family, **rates), run.config), run, [Texts()] * len(run.stages))


def trained(folder, **changes):
    run = trainer(folder, **changes)
    outcome = run.run()
    return outcome, run.adapter_tensors()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path, optimizer):
    base = tiny("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    run = settings(tmp_path, optimizer=optimizer, stage={"steps": 40, "batch_size": 2})

    class OneText(Texts):
        def sample(self, index):
            return super().sample(2)

    model = attach(base, run.config)
    outcome = Trainer(model, run, [OneText()]).run()
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert outcome.is_finished
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon"},
        {"lora_rank": 2},
        {"stage": {"distillation": 1.0}},
        {"average_decay": 0.6},
        {"average_decay": 0.6, "lora_rank": 2},
        {"family": "starcoder2"},  # made with dropout
    ],
    ids=str,
)
def test_a_run_that_is_cut_and_resumed_ends_at_the_weights_of_an_unbroken_one(tmp_path, changes):
    _, unbroken = trained(tmp_path / "unbroken", **changes)
    first = trainer(tmp_path / "cut", **changes)
    first.report = lambda line: first.stop("enough") if line["step"] == 3 else None
    outcome = first.run()
    assert not outcome.is_finished
    assert outcome.why == "enough"
    assert outcome.progress.step == 3
    second = trainer(tmp_path / "cut", **changes)
    assert second.resume().step == 3
    assert second.run().is_finished
    assert_same(second.adapter_tensors(), unbroken)
    lines = [metrics(tmp_path / name) for name in ("unbroken", "cut")]
    assert [line["loss"] for line in lines[1]] == [line["loss"] for line in lines[0]]


def test_a_kill_loses_no_more_than_the_steps_after_the_last_checkpoint(tmp_path):
    _, unbroken = trained(tmp_path / "unbroken")
    first = trainer(tmp_path / "cut", save_every=2)

    def crash(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    first.report = crash
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = trainer(tmp_path / "cut", save_every=2)
    assert second.resume().step == 4
    second.run()
    assert_same(second.adapter_tensors(), unbroken)
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_texts_read_one_by_one_or_together_give_the_same_gradients_when_their_ratios_agree(tmp_path):
    changes = {"config": BeaconConfig(chunk_size=CHUNK, ratios=(4,))}
    _, together = trained(tmp_path / "a", **changes, stage={"micro_batch_size": 4})
    _, one_by_one = trained(tmp_path / "b", **changes, stage={"micro_batch_size": 1})
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, one_by_one[name], rtol=1e-3, atol=2e-4, msg=name)


def test_gradient_checkpointing_changes_nothing_and_reads_each_layer_once_more(tmp_path):
    passes = {}

    def trained_in(name, **changes):
        run = trainer(tmp_path / name, **changes)
        read = passes.setdefault(name, [])
        run.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: read.append(1))
        run.run()
        return run.adapter_tensors()

    plain, checkpointed = trained_in("plain"), trained_in("checkpointed", gradient_checkpointing=True)
    assert len(passes["checkpointed"]) == 2 * len(passes["plain"])
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, checkpointed[name], rtol=1e-5, atol=1e-6, msg=name)


def test_low_rank_training_moves_projections_by_no_more_than_its_rank(tmp_path):
    run = trainer(tmp_path, lora_rank=2)
    before = beacon_tensors_of(run)
    run.run()
    after = run.adapter_tensors()
    moved = 0
    for name, tensor in after.items():
        difference = tensor - before[name]
        if difference.dim() == 2:
            values = torch.linalg.svdvals(difference)
            moved += float(values[0]) > 1e-6
            assert float(values[2:].max()) < 1e-5 * max(1.0, float(values[0])), name
    assert moved


def test_the_adapter_is_the_average_of_all_steps_and_training_does_not_see_it(tmp_path):
    seen = []

    def keep(folder, **changes):
        run = trainer(folder, **changes)
        run.report = lambda _: seen.append(beacon_tensors(run.model))
        run.run()
        return run

    keep(tmp_path / "last")
    steps, seen = seen, []
    averaged = keep(tmp_path / "averaged", average_decay=0.7)
    for step, other in zip(steps, seen, strict=True):
        assert_same(step, other)
    adapter = load_adapter_tensors(checkpoints(tmp_path / "averaged" / "checkpoints")[-1])
    assert_same(adapter, averaged.adapter_tensors())
    for name, tensor in adapter.items():
        mean = torch.zeros_like(tensor)
        for number, step in enumerate(steps, 1):  # the plain mean of three steps, then a share of 0.3 for each
            mean += max(0.3, 1 / number) * (step[name] - mean)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(adapter[name], steps[-1][name]) for name in adapter)


def beacon_tensors_of(run):
    return {name: tensor.clone() for name, tensor in run.adapter_tensors().items()}


def test_a_checkpoint_is_an_adapter_and_only_the_latest_are_kept(tmp_path):
    from activation_beacon import load

    run = trainer(tmp_path, save_every=1, keep_checkpoints=2)
    run.run()
    found = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-0000005", "step-0000006"]
    model, _ = load(found[-1], base=tiny("llama"))
    assert_same(beacon_tensors(model), run.adapter_tensors())


def test_a_run_is_not_continued_under_other_settings(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(MismatchError, match="was made under other settings"):
        trainer(tmp_path, seed=1).resume()


def test_a_run_is_not_continued_on_something_else_to_read(tmp_path):
    run = settings(tmp_path)

    def resumed(**digests):
        return Trainer(attach(tiny("llama"), run.config), run, [Texts()], digests=digests).resume().digests

    Trainer(attach(tiny("llama"), run.config), run, [Texts()], digests={"documents": "a1"}).run()
    assert resumed(documents="a1") == {"documents": "a1"}
    assert resumed() == {"documents": "a1"}
    assert resumed(documents="a1", questions="b1") == {"documents": "a1", "questions": "b1"}
    with pytest.raises(MismatchError) as caught:
        resumed(documents="a2", questions="b1")
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step-0000006 has read other documents (a1; these are a2). Put back what the run began with, "
        "or start a new one in another folder from --adapter."
    )


@pytest.mark.parametrize(
    ("poison", "text"),
    [(math.nan, r"The loss of step 4 is nan"), (math.inf, r"The loss of step 4 is (inf|nan)")],
)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, poison, text):
    run = trainer(tmp_path, save_every=2)

    def spoil(line):
        if line["step"] == 3:
            run.model.beacon_embedding.data[0] = poison

    run.report = spoil
    with pytest.raises(TrainingError, match=text) as caught:
        run.run()
    assert str(tmp_path / "checkpoints" / "step-0000002") in str(caught.value)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-0000002"]


def test_what_was_learned_before_a_step_that_is_no_number_is_kept(tmp_path):
    run, weights = trainer(tmp_path, save_every=100, average_decay=0.5), []

    def spoil(line):
        if line["step"] == 3:
            weights.append(run.adapter_tensors())

    original = run._accumulate

    def accumulate(batch, stage, num_targets, totals):
        original(batch, stage, math.nan if weights else num_targets, totals)

    run.report, run._accumulate = spoil, accumulate
    with pytest.raises(
        TrainingError, match=r"The last good checkpoint is .*step-0000003\. Start anew from it"
    ) as caught:
        run.run()
    assert "The loss of step 4 is" in str(caught.value)
    [path] = checkpoints(tmp_path / "checkpoints")
    saved = load_adapter_tensors(path)
    for name, tensor in weights[0].items():
        assert torch.equal(saved[name], tensor), name


def test_a_loss_that_runs_away_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("activation_beacon.training.trainer.SMOOTHING", 0.5)
    monkeypatch.setattr("activation_beacon.training.trainer.RUNAWAY_NATS", 0.1)
    with pytest.raises(
        TrainingError, match=r"The loss runs away: .* There is no checkpoint yet\. .* lower learning_rate\."
    ):
        trainer(tmp_path, stage={"steps": 200, "learning_rate": 100.0, "max_grad_norm": 1e9}).run()


def test_a_stage_of_harder_texts_is_no_loss_that_runs_away(tmp_path, monkeypatch):
    monkeypatch.setattr("activation_beacon.training.trainer.SMOOTHING", 0.5)
    base = tiny("llama")

    class Foreseen(Texts):
        """The base's own words: what it says after the first token is what it expects most."""

        def sample(self, index):
            ids = torch.full((1, 1), 3 + index % 5)
            with torch.no_grad():
                while ids.shape[1] < 2 * CHUNK:
                    ids = torch.cat((ids, base(ids).logits[:, -1:].argmax(-1)), 1)
            return Sample(ids[0], torch.arange(2 * CHUNK) >= CHUNK)

    easy = Stage(steps=4, length=4 * CHUNK, batch_size=2, learning_rate=1e-6)
    run = dataclasses.replace(settings(tmp_path), stages=(easy, easy))
    model = attach(base, run.config)
    samples = [Foreseen().sample(index) for index in range(8)]
    foreseen = types.SimpleNamespace(sample=lambda index: samples[index])
    assert Trainer(model, run, [foreseen, Texts()]).run().is_finished
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert min(losses[4:]) > max(losses[:4]) + RUNAWAY_NATS


def test_time_that_is_over_ends_the_run_with_a_low_learning_rate(tmp_path, monkeypatch):
    calls = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(calls) / 10, perf_counter=time.perf_counter)
    monkeypatch.setattr("activation_beacon.training.trainer.time", clock)
    run = trainer(tmp_path, stage={"steps": 10**6, "warmup": 0.0})
    outcome = run.run(max_minutes=0.25)
    assert outcome.is_finished
    assert outcome.why == "0.25 minutes are over"
    assert next(calls) / 10 < 15
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    assert rates[0] == max(rates)
    assert rates[-1] < 0.15 * max(rates)
    assert outcome.checkpoint.is_dir()


def test_minutes_count_from_when_the_call_began_and_one_step_is_made_at_least(tmp_path):
    outcome = trainer(tmp_path, stage={"steps": 50}).run(max_minutes=5, since=time.monotonic() - 6 * 60)
    assert (outcome.progress.step, outcome.why, outcome.is_finished) == (1, "5 minutes are over", True)


@pytest.mark.parametrize(
    ("steps", "minutes", "told"),
    [
        (
            (1, 1, 1),
            5,
            "Stages 2 to 3 are not reached in 5 minutes. Go on with --resume, or give the stages before fewer steps.",
        ),
        ((2, 1), 1, "Stage 2 is not reached in 1 minute. Go on with --resume, or give the stages before fewer steps."),
        ((2,), 5, None),
        ((1,), 5, None),
    ],
)
def test_stages_that_the_time_did_not_reach_are_named(tmp_path, steps, minutes, told):
    stages = tuple(Stage(steps=each, length=4 * CHUNK, batch_size=1) for each in steps)
    run = dataclasses.replace(settings(tmp_path), stages=stages)
    said = []
    made = Trainer(attach(tiny("llama"), run.config), run, [Texts()] * len(steps), notice=said.append)
    made.run(max_minutes=minutes, since=time.monotonic() - 60 * minutes)
    assert said == ([told] if told else [])


@pytest.mark.parametrize(
    ("steps", "is_told"), [((1000, 1000), True), ((4, 100, 1000), True), ((4, 5), False), ((1000,), False)]
)
def test_stages_that_the_time_will_not_reach_are_told_early(tmp_path, monkeypatch, steps, is_told):
    calls = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(calls) / 10, perf_counter=time.perf_counter)
    monkeypatch.setattr("activation_beacon.training.trainer.time", clock)
    stages = tuple(Stage(steps=each, length=4 * CHUNK, batch_size=1) for each in steps)
    run = dataclasses.replace(settings(tmp_path), stages=stages)
    said = []
    made = Trainer(attach(tiny("llama"), run.config), run, [Texts()] * len(steps))
    made.notice = lambda text: said.append((made.progress.step, text))
    made.run(max_minutes=0.25)
    early = [text for step, text in said if step == 3]
    assert len(early) == is_told
    if is_told:
        found = re.fullmatch(
            rf"About (\d+) of {sum(steps):,} updates fit into 0\.25 minutes: stage {len(steps)} will not be reached\. "
            r"--steps (\d+) gives each stage an equal part\.",
            early[0],
        )
        assert 3 < int(found[1]) <= 2 * made.progress.step
        assert int(found[2]) == int(found[1]) // len(steps)


def test_a_run_that_was_asked_to_stop_is_not_finished_though_its_time_ends_meanwhile(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.report = lambda line: run.stop("asked to")
    minutes = iter([False, True])  # over only while the checkpoint is written
    monkeypatch.setattr("activation_beacon.training.trainer._Clock.is_over", property(lambda clock: next(minutes)))
    outcome = run.run(max_minutes=1)
    assert (outcome.is_finished, outcome.why) == (False, "asked to")


def test_a_run_whose_steps_are_all_made_is_finished_though_it_was_asked_to_stop_or_its_time_ended_meanwhile(tmp_path):
    def measured_at_last(step, what):
        if step == 6 and what.startswith("measuring"):
            run.stop("asked to")

    run_settings = settings(tmp_path / "asked")
    run = Trainer(
        attach(tiny("llama"), run_settings.config),
        run_settings,
        [Texts()],
        dev={"dev": Texts()},
        working=measured_at_last,
    )
    outcome = run.run()
    assert run.stopping == "asked to"
    assert (outcome.progress.step, outcome.is_finished, outcome.why) == (6, True, "all steps are made")
    outcome = trainer(tmp_path / "over", stage={"steps": 1}).run(max_minutes=1, since=time.monotonic() - 90)
    assert (outcome.progress.step, outcome.is_finished, outcome.why) == (1, True, "all steps are made")


def test_an_outcome_says_whether_ctrl_c_ended_the_run(tmp_path):
    for name, is_interrupted in (("ctrl-c", True), ("other", False)):
        run = trainer(tmp_path / name)
        run.report = lambda line, run=run, why=is_interrupted: run.stop("asked to", is_interrupted=why)
        outcome = run.run()
        assert (outcome.progress.step, outcome.is_finished, outcome.is_interrupted) == (1, False, is_interrupted)


@pytest.mark.parametrize(("minutes", "why"), [(1, "1 minute is over"), (2, "2 minutes are over")])
def test_the_time_that_is_over_is_named(tmp_path, minutes, why):
    outcome = trainer(tmp_path, stage={"steps": 50}).run(max_minutes=minutes, since=time.monotonic() - 60 * minutes)
    assert outcome.why == why


def test_texts_of_an_update_are_shared_evenly_by_the_processes(tmp_path):
    run = settings(tmp_path, stage={"batch_size": 3})
    with pytest.raises(ConfigError, match=r"Stage 1: batch_size \(3\) .* number of processes \(2\)\. Use 4\."):
        Trainer(attach(tiny("llama"), run.config), run, [Texts()], group=Processes(rank=0, count=2))


def test_stages_follow_one_another_each_with_its_own_texts_and_chunks(tmp_path):
    stages = (
        Stage(steps=2, length=4 * CHUNK, chunk_size=CHUNK, batch_size=1),
        Stage(steps=3, length=4 * CHUNK, chunk_size=2 * CHUNK, batch_size=1, ratio_draw="text"),
    )
    run = settings(tmp_path, config=BeaconConfig(chunk_size=2 * CHUNK, ratios=(2, 4)))
    run = TrainingSettings.from_dict({**run.to_dict(), "stages": [vars(stage) for stage in stages]})

    class Longest(Texts):
        def sample(self, index):
            return super().sample(3 * index + 2)

    outcome = Trainer(attach(tiny("llama"), run.config), run, [Longest(), Longest()]).run()
    assert outcome.progress.step == 5
    assert [line["stage"] for line in metrics(tmp_path)] == [0, 0, 1, 1, 1]
    assert all(len(line["loss_by_ratio"]) == 1 for line in metrics(tmp_path)[2:])


def test_losses_on_dev_texts_are_those_of_the_model_at_each_ratio(tmp_path):
    run = settings(tmp_path, dev_every=6, dev_texts=3)
    model = attach(tiny("llama"), run.config)
    Trainer(model, run, [Texts()], dev={"dev": Texts(), "dev_answers": Texts()}).run()
    dev = metrics(tmp_path)[-1]["dev"]
    assert metrics(tmp_path)[-1]["dev_answers"] == dev
    assert dev.keys() == {"2", "4"}
    for ratio in (2, 4):
        losses = []
        for index in range(3):
            ids = Texts().sample(index).ids[None]
            losses.append(model(ids, labels=ids, beacon_ratio=ratio).nll[0, CHUNK - 1 :].detach())
        assert dev[str(ratio)] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def dropping():
    """A base that was made with dropout, as those of some families are."""
    return tiny("starcoder2", **DROPPING)


def with_dev(folder, *, base=None, dev=True, **changes):
    """A trainer that measures dev texts, or (for comparison) has none."""
    run = settings(folder, dev_texts=2, **changes)
    samplers = {"dev": Texts(), "dev_answers": Texts()} if dev else {}
    return Trainer(attach(base or tiny("llama"), run.config), run, [Texts()], dev=samplers)


def test_dev_texts_are_measured_before_the_first_step_and_weights_stay_what_they_would_have_been(tmp_path):
    with_some = with_dev(tmp_path / "some", base=dropping(), dev_every=2)
    seen = []
    with_some.report = seen.append
    with_some.run()
    without = with_dev(tmp_path / "none", base=dropping(), dev=False)
    without.run()
    assert_same(with_some.adapter_tensors(), without.adapter_tensors())
    lines = metrics(tmp_path / "some")
    assert [line["step"] for line in lines if "dev" in line] == [0, 2, 4, 6]
    assert seen == lines
    assert lines[0].keys() == {"step", "stage", "tokens", "seconds", "dev", "dev_answers"}
    assert lines[0]["dev"].keys() == {"2", "4"}
    assert [line["step"] for line in metrics(tmp_path / "none")] == [1, 2, 3, 4, 5, 6]
    losses = [[line["loss"] for line in metrics(tmp_path / name) if line["step"]] for name in ("some", "none")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"stage": {"distillation": 1.0}}], ids=str)
def test_a_base_that_was_made_with_dropout_is_trained_on_and_measured_without(tmp_path, changes):
    def run(name, **rates):
        trained = with_dev(tmp_path / name, base=tiny("starcoder2", **rates), **changes)
        trained.run()
        return trained.adapter_tensors(), [line["dev"] for line in metrics(tmp_path / name) if "dev" in line]

    (weights, dev), (others, same) = run("some", **DROPPING), run("none", **dict.fromkeys(DROPPING, 0.0))
    assert_same(weights, others)
    assert dev == same


def test_a_model_that_was_trained_is_in_the_mode_that_it_was_in_before(tmp_path):
    run = settings(tmp_path, stage={"steps": 1}, gradient_checkpointing=True)
    model = attach(dropping(), run.config)
    before = [module.training for module in model.modules()]
    Trainer(model, run, [Texts()], dev={"dev": Texts()}).run()
    assert [module.training for module in model.modules()] == before


def test_what_is_measured_before_the_first_step_is_what_the_beacons_are_before_it(tmp_path):
    run = with_dev(tmp_path, stage={"steps": 1})
    with chunks_at_once(run.model):
        untrained = run.dev_losses()
    run.run()
    lines = metrics(tmp_path)
    for name, losses in untrained.items():
        assert lines[0][name] == pytest.approx(losses, rel=1e-5)
    assert lines[1]["dev"] != untrained["dev"]


def test_a_run_that_goes_on_is_not_measured_before_its_first_step_again_and_one_without_a_checkpoint_once(tmp_path):
    first = with_dev(tmp_path)

    def crash(line):
        if line["step"] == 2:
            raise KeyboardInterrupt

    first.report = crash
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = with_dev(tmp_path)
    assert again.resume().step == 0
    again.report = lambda line: again.stop("enough") if line["step"] == 3 else None
    again.run()
    last = with_dev(tmp_path)
    assert last.resume().step == 3
    last.run()
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_whose_time_is_over_is_measured_at_its_end_within_that_time(tmp_path, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("activation_beacon.training.trainer.time", clock)

    def pass_time(_, text):
        now[0] += 0.5 if text.startswith("measuring") else 1.0  # three of a step, four of measuring

    run = with_dev(tmp_path, stage={"steps": 1000, "warmup": 0.0})
    run.working = pass_time
    outcome = run.run(max_minutes=0.5)
    assert (outcome.is_finished, outcome.why) == (True, "0.5 minutes are over")
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "dev" in line] == [0, lines[-1]["step"]]
    assert 25 < now[0] <= 30
    assert lines[-1]["learning_rate"] < lines[-2]["learning_rate"] < lines[3]["learning_rate"]


def test_dev_texts_that_take_too_much_of_the_time_are_not_measured_first_and_that_is_said(tmp_path, monkeypatch):
    now, told = [0.0], []
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("activation_beacon.training.trainer.time", clock)
    run = with_dev(tmp_path, stage={"steps": 1000})
    run.notice = told.append

    def pass_time(_, text):
        now[0] += 3.0 if text.startswith("measuring") else 1.0

    run.working = pass_time
    run.run(max_minutes=0.5)
    first, last = told
    assert re.fullmatch(
        r"Dev texts are not measured before the first step: that would take more than 15% of 0\.5 minutes\. "
        r"Lower dev_texts \(\d+\) or dev_length \(\d+\) by --set\.",
        first,
    )
    assert last == "Dev texts were not measured at the end: there was no time left, or the run was stopped."
    assert not [line for line in metrics(tmp_path) if "dev" in line]
    assert 25 < now[0] <= 30


def test_what_is_being_done_is_said_for_every_part_of_a_step_and_of_a_measurement(tmp_path):
    said = []
    run = with_dev(tmp_path, stage={"steps": 1})
    run.working = lambda step, text: said.append((step, text))
    run.run()
    measuring = [f"measuring {name} at ratio {ratio}" for name in ("dev", "dev answers") for ratio in (2, 4)]
    measuring = [f"{text}, {number} of 4" for number, text in enumerate(measuring, 1)]
    reading = [f"reading {number} of 3" for number in (1, 2, 3)]
    assert said == [*((0, text) for text in measuring), *((1, text) for text in reading + measuring)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_beacons_of_a_base_in_bfloat16_are_trained_in_float32(tmp_path, gradient_checkpointing):
    def losses_of(dtype, folder):
        run = settings(folder, gradient_checkpointing=gradient_checkpointing)
        model = attach(tiny("llama").to(dtype), run.config)
        Trainer(model, run, [Texts()]).run()
        assert all(parameter.dtype == torch.float32 for _, parameter in model.beacon_parameters())
        assert model.get_input_embeddings().weight.dtype == dtype
        return [line["loss"] for line in metrics(folder)]

    half = losses_of(torch.bfloat16, tmp_path / "half")
    assert half == pytest.approx(losses_of(torch.float32, tmp_path / "full"), abs=0.05)
