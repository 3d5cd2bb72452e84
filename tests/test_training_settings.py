import re
from pathlib import Path

import pytest

from activation_beacon import BeaconConfig
from activation_beacon.errors import ConfigError
from activation_beacon.training.settings import Stage, TrainingSettings, read_recipe

RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(RECIPES_FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_named_in_the_list(path):
    settings = TrainingSettings.from_dict({**read_recipe(path), "output": "run"})
    assert settings.num_steps > 30
    text = (RECIPES_FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"]({path.name})" in text or path.stem in re.search(r"for name in (.*?); do", text, re.DOTALL)[1].split()


def test_settings_survive_their_plain_values():
    settings = TrainingSettings(
        output="run", documents=("a", "b"), config=BeaconConfig(chunk_size=64, num_sinks=2), lora_rank=3,
        stages=(Stage(steps=3, length=256), Stage(steps=4, length=128, chunk_size=32, ratio_draw="text")),
    )  # fmt: skip
    again = TrainingSettings.from_dict(settings.to_dict())
    assert again == settings
    assert again.fingerprint == settings.fingerprint


def test_a_run_is_the_same_wherever_it_is_written_and_another_with_another_seed():
    one = TrainingSettings(output="a", documents=("t",), save_every=5)
    assert TrainingSettings(output="b", documents=("t",), save_every=7).fingerprint == one.fingerprint
    assert TrainingSettings(output="a", documents=("t",), seed=1).fingerprint != one.fingerprint


def test_a_run_goes_on_with_other_local_tokens():
    def run(number):
        config = BeaconConfig(local_tokens=number)
        return TrainingSettings(output="a", documents=("t",), config=config)

    assert run(128).fingerprint == run(0).fingerprint
    assert run(128).to_dict()["config"]["local_tokens"] == 128


def test_a_run_that_was_begun_before_there_were_exact_ids_goes_on():
    assert TrainingSettings(output="a", documents=("t",)).fingerprint == "c55cf1cc7789a03d"


def test_one_adapter_in_a_list_is_one_adapter():
    def run(adapter):
        return TrainingSettings(output="a", documents=("t",), adapter=adapter)

    assert (run(["a"]).adapters, run("a").adapters, run([]).adapters, run(None).adapters) == (("a",), ("a",), (), ())
    assert run(["a"]).fingerprint == run("a").fingerprint != run(["a", "b"]).fingerprint
    assert TrainingSettings.from_dict(run(["a", "b"]).to_dict()).adapters == ("a", "b")


def test_kinds_of_needles_decide_where_there_are_needles():
    def run(**stage):
        return TrainingSettings(output="a", documents=("t",), stages=(Stage(**stage),)).fingerprint

    assert run(needle_kinds=("fact",)) == run()
    assert run(needles=1.0, needle_kinds=("fact",)) != run(needles=1.0)
    assert Stage(needle_kinds="fact").needle_kinds == ("fact",)


def test_local_tokens_of_a_stage_decide_and_a_run_from_before_them_goes_on():
    def run(**stage):
        return TrainingSettings(output="a", documents=("t",), stages=(Stage(**stage),))

    before = run().to_dict()
    del before["stages"][0]["local_tokens"]
    assert TrainingSettings.from_dict(before).fingerprint == run().fingerprint != run(local_tokens=8).fingerprint


def test_each_step_falls_into_its_stage():
    settings = TrainingSettings(output="a", documents=("t",), stages=(Stage(steps=2), Stage(steps=3)))
    assert [settings.stage_at(step)[::2] for step in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_a_stage_is_not_reached_until_its_first_step_is_made():
    settings = TrainingSettings(output="a", documents=("t",), stages=(Stage(steps=2), Stage(steps=3), Stage(steps=1)))
    assert [settings.stages_after(step) for step in range(1, 7)] == [[2, 3], [2, 3], [3], [3], [3], []]


def test_the_learning_rate_rises_stays_and_falls():
    stage = Stage(learning_rate=1.0, warmup=0.1, decay=0.5)
    rates = [stage.rate(progress) for progress in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 0.01])
    assert Stage(learning_rate=1.0, warmup=0.0, decay=0.0).rate(1.0) == 1.0


BAD_STAGES = [
    ({"steps": 0}, "steps must be an int of at least 1; got 0."),
    ({"steps": True}, "steps must be an int of at least 1; got True."),
    ({"length": 1}, "length must be an int of at least 4; got 1."),
    ({"chunk_size": 1}, "chunk_size must be an int of at least 2; got 1."),
    ({"local_tokens": -1}, "local_tokens must be an int of at least 0; got -1."),
    ({"learning_rate": 0}, "learning_rate must be a number of more than 0; got 0."),
    ({"learning_rate": "1e-3"}, "learning_rate must be a number of more than 0; got '1e-3'."),
    (
        {"documents": 0.0},
        "documents, questions, needles, reconstruction and chats are all 0: no text is left. Raise one.",
    ),
    ({"needles": -1}, "needles must be a number of at least 0; got -1."),
    (
        {"needle_kinds": ("word", "pin")},
        "needle_kinds must be one of word, number, uuid, sentence, multi, fact; got 'pin'.",
    ),
    (
        {"needle_kinds": ()},
        "needle_kinds names none. Use some of word, number, uuid, sentence, multi, fact, or needles: 0.",
    ),
    ({"warmup": 0.6, "decay": 0.6}, "warmup (0.6) and decay (0.6) must not exceed 1 together."),
    ({"ratio_draw": "step"}, "ratio_draw must be one of chunk, text; got 'step'."),
    ({"cross_entropy": -1.0}, "cross_entropy must be a number of at least 0; got -1.0."),
]


@pytest.mark.parametrize(("values", "text"), BAD_STAGES, ids=[text[:40] for _, text in BAD_STAGES])
def test_a_stage_that_makes_no_sense_is_refused(values, text):
    with pytest.raises(ConfigError) as caught:
        Stage(**values)
    assert str(caught.value) == text


BAD_RUNS = [
    ({"stages": []}, "stages is empty. Name at least one."),
    ({"stages": 3}, "stages must be a list; got 3. Begin each stage with a dash."),
    ({"stages": [{"learning_rate": "1e-4x"}]}, "learning_rate must be a number of more than 0; got '1e-4x'."),
    ({"stages": [{"learning_rate": "inf"}]}, "learning_rate must be a number of more than 0; got 'inf'."),
    ({"stages": [{"steps": "1e3"}]}, "steps must be an int of at least 1; got '1e3'."),
    ({"dtype": "float33"}, "dtype must be one of None, auto, float32, bfloat16, float16, float64; got 'float33'."),
    ({"seed": "abc"}, "seed must be an int of at least 0; got 'abc'."),
    ({"seed": -1}, "seed must be an int of at least 0; got -1."),
    ({"workers": "two"}, "workers must be an int of at least 0; got 'two'."),
    ({"stages": [3]}, "Stage 1 must hold names and values; got 3."),
    ({"stages": [{"step": 3}]}, "Stage 1 names step, which is not known. Known: batch_size, chats, chunk_size,"),
    ({"config": {"chunk": 3}}, "config names chunk, which is not known. Known: anchored, chunk_size,"),
    ({"adapter": 3}, "adapter must be a name, or a list of names; got 3."),
    ({"adapter": ["a", 3]}, "adapter must be a name, or a list of names; got ['a', 3]."),
    ({"adapter": ""}, "adapter must be a name, or a list of names; got ''."),
    ({"documents": 5}, "documents must be a name, or a list of names; got 5."),
    ({"dev": ["a", 5]}, "dev must be a name, or a list of names; got ['a', 5]."),
    ({"wrapper": "zero"}, "wrapper must be one of ddp, fsdp; got 'zero'."),
    (
        {"wrapper": "fsdp", "optimizer": "muon"},
        "muon and lora_rank need whole matrices, and fsdp shards them. Use wrapper ddp.",
    ),
    ({"report_to": "wandb"}, "report_to must be one of None, tensorboard, trackio; got 'wandb'."),
    ({"lora_rank": 0}, "lora_rank must be an int of at least 1; got 0."),
    ({"average_decay": -0.1}, "average_decay must be a number of at least 0; got -0.1."),
    ({"average_decay": 1}, "average_decay must be less than 1; got 1."),
    (
        {"stages": [{"chunk_size": 48}]},
        "Stage 1: chunk_size (48) must be divisible by every ratio; 32 does not divide it.",
    ),
    ({"stages": [{"length": 1024}]}, "Stage 1: length (1024) must exceed chunk_size (1024): beacons learn from"),
    (
        {"stages": [{"chunk_size": 64, "local_tokens": 64}]},
        "Stage 1: local_tokens (64) must be fewer than chunk_size (64): of documents nothing would count.",
    ),
    ({"stages": [{"questions": 0.5}]}, "Stage 1: questions (0.5) needs questions, and none are named."),
    ({"stages": [{"chats": 0.5}]}, "Stage 1: chats (0.5) needs chats, and none are named."),
    ({"documents": []}, "Stage 1: documents (1.0) needs documents, and none are named."),
]


@pytest.mark.parametrize(("values", "text"), BAD_RUNS, ids=[text[:40] for _, text in BAD_RUNS])
def test_a_run_that_makes_no_sense_is_refused(values, text):
    with pytest.raises(ConfigError) as caught:
        TrainingSettings.from_dict({"output": "run", "documents": ["texts"], **values})
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "0.0001", ".1e-3", "1.e-4"])
def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(
        f"documents: [texts]\naverage_decay: '0.5'\nstages: [{{steps: 3, learning_rate: {text}, warmup: {text}}}]\n"
    )
    settings = TrainingSettings.from_dict({**read_recipe(tmp_path / "recipe.yaml"), "output": "run"})
    [stage] = settings.stages
    assert (stage.learning_rate, stage.warmup, settings.average_decay) == (1e-4, 1e-4, 0.5)
    assert TrainingSettings.from_dict(settings.to_dict()).fingerprint == settings.fingerprint
