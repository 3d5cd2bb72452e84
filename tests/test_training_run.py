import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from activation_beacon import digit_ids, load
from activation_beacon.cli import app
from activation_beacon.cli.train import _Bar
from activation_beacon.errors import ConfigError
from activation_beacon.hub import default_adapter_folder
from activation_beacon.persistence import load_adapter_config, load_adapter_tensors
from activation_beacon.training.checkpoints import checkpoints
from activation_beacon.training.run import tell_of_waiting
from activation_beacon.training.settings import CONFIG_FIELDS, Stage, TrainingSettings
from saved_models import CHUNK, save_adapter, save_base

BEACON = [sys.executable, "-m", "activation_beacon"]
TEXT = "The lion said nothing at all to the tiger, and went to sleep under a tree. " * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("training")
    save_base(root / "base")
    lines = [{"id": f"d{number}", "text": f"{number}. {TEXT}"} for number in range(12)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "dev.jsonl").write_text("".join(json.dumps({"text": f"Dev {n}. {TEXT}"}) + "\n" for n in range(2)))
    (root / "broken.jsonl").write_text(
        json.dumps(lines[0]) + '\n{"text": \n{"id": "x"}\n' + json.dumps(lines[1]) + "\n"
    )
    asked = {"id": "q", "context": 3 * "The lion spoke to the moon. ", "question": "Who spoke?", "answer": "The lion"}
    (root / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    (root / "recipe.yaml").write_text(
        f"base: {root / 'base'}\ndocuments: [{root / 'texts.jsonl'}]\ndev: [{root / 'dev.jsonl'}]\nworkers: 0\n"
        f"dev_questions: [{root / 'questions.jsonl'}]\ndev_texts: 1\ndev_length: 320\n"
        f"config: {{chunk_size: {CHUNK}, ratios: [2, 4]}}\n"
        "stages:\n- {steps: 4, length: 128, batch_size: 2}\n- {steps: 2, length: 128, chunk_size: 16, batch_size: 2}\n"
    )
    return root


def run(*args: str, cwd: Path):
    before = Path.cwd()
    os.chdir(cwd)
    try:
        return CliRunner().invoke(app, ["train", *args])
    finally:
        os.chdir(before)


def arguments(files: Path) -> list[str]:
    return [str(files / "texts.jsonl"), "--base", str(files / "base"), "--chunk-size", str(CHUNK), "--ratios", "2,4",
            "--length", "128", "--batch-size", "2"]  # fmt: skip


def test_a_recipe_makes_an_adapter_with_its_card_curves_and_recipe(files, tmp_path):
    pytest.importorskip("matplotlib")
    result = run(str(files / "recipe.yaml"), "-o", "run", "--json", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["steps"] == 6
    assert values["is_finished"] is True
    assert result.stderr.count("step 0: dev nats x2 ") == result.stderr.count("step 0: answers' nats x2 ") == 1
    assert "step 6: dev nats x2 " in result.stderr
    assert "step 6: answers' nats x2 " in result.stderr
    folder = tmp_path / "run" / "adapter"
    model, tokenizer = load(folder)
    assert model.beacon_config.is_trained
    assert model.beacon_config.training["steps"] == 6
    assert tokenizer is not None
    card = (folder / "README.md").read_text()
    assert "6 of 6 updates" in card
    assert (
        "Nats per token of answers, to questions that nobody trained on:\n\n| after step | x2 | x4 |\n|--:|--:|--:|\n| 0 |"
        in card
    )
    assert model.beacon_config.training["dev_answers_nats"].keys() == {"2", "4"}
    assert "| 2 | 2 | 2 | 128 | 16 | documents 1 | cross_entropy 1 | 0.001 |" in card
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = run(str(folder / "recipe.json"), "-o", "again", "--json", cwd=tmp_path)
    assert again.exit_code == 0, again.output
    weights = [path / "beacon.safetensors" for path in (tmp_path / "again" / "adapter", folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_flags_alone_make_a_run_and_the_summary_says_how_to_go_on(files, tmp_path):
    result = run(*arguments(files), "-o", "run", "--steps", "3", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "run/adapter\n  steps   3 of 3 (all steps are made)\n  tokens  768 in " in result.stdout
    assert "Documents: 12 texts, " in result.stderr
    assert "step 3 of 3: loss " in result.stderr


def test_exact_finds_the_tokenizers_digits_and_a_run_goes_on_with_them(files, tmp_path, caplog):
    options = [*arguments(files), "--exact", "--sinks", "2", "-o", "run", "--json"]
    assert run(*options, "--steps", "1", cwd=tmp_path).exit_code == 0
    model, tokenizer = load(tmp_path / "run" / "adapter")
    config = model.beacon_config
    assert (config.anchored, config.placement, config.exact_ids) == (True, "append", digit_ids(tokenizer))
    assert config.exact_ids
    assert json.loads((tmp_path / "run" / "adapter" / "recipe.json").read_text())["config"]["exact_ids"] == "digits"
    result = run(*options[:-3], "--adapter", "run/adapter", "--steps", "1", "-o", "more", "--json", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "more" / "adapter")[0].beacon_config.exact_ids == config.exact_ids
    plain = run(
        *arguments(files), "--no-exact", "--set", "config.placement=interleave", "--adapter", "run/adapter",
        "--steps", "1", "-o", "plain", cwd=tmp_path,
    )  # fmt: skip
    assert plain.exit_code == 0, plain.output
    told = [record.getMessage() for record in caplog.records if "this run goes on with" in record.getMessage()]
    assert "run/adapter has placement append; this run goes on with interleave." in told
    refused = run(*arguments(files), "--exact", "--not-anchored", "-o", "refused", cwd=tmp_path)
    assert refused.exit_code == 1
    assert "exact_ids needs beacons that begin as a token" in refused.output


def test_a_run_that_goes_on_from_an_adapter_has_its_base_and_settings_from_it(files, tmp_path, monkeypatch, caplog):
    begun = run(*arguments(files), "--exact", "--sinks", "2", "--steps", "1", "-o", "run", cwd=tmp_path)
    assert begun.exit_code == 0, begun.output
    before, _ = load(tmp_path / "run" / "adapter")
    texts = [str(files / "texts.jsonl"), "--length", "128", "--batch-size", "2", "--steps", "1"]
    monkeypatch.setattr("activation_beacon.hub.default_adapter_folder", lambda: tmp_path / "run" / "adapter")
    for number, name in enumerate(("run/adapter", str(tmp_path / "run" / "adapter"), "default")):
        result = run(*texts, "--adapter", name, "-o", f"more-{number}", cwd=tmp_path)
        assert result.exit_code == 0, result.output
        after = load(tmp_path / f"more-{number}" / "adapter")[0].beacon_config
        for field in (*CONFIG_FIELDS, "base_model", "base_fingerprint"):
            assert getattr(after, field) == getattr(before.beacon_config, field)
    assert "this run goes on with" not in caplog.text
    recipe = json.loads((tmp_path / "more-2" / "adapter" / "recipe.json").read_text())
    assert (recipe["adapter"], recipe["base"]) == ("default", str(files / "base"))
    [weights, *same] = [load_adapter_tensors(tmp_path / f"more-{number}" / "adapter") for number in range(3)]
    begin = load_adapter_tensors(tmp_path / "run" / "adapter")
    assert all(torch.equal(tensor, other[key]) for other in same for key, tensor in weights.items())
    assert any(not torch.equal(tensor, begin[key]) for key, tensor in weights.items())
    other = run(*texts, "--adapter", "run/adapter", "--sinks", "1", "-o", "other", cwd=tmp_path)
    assert other.exit_code == 0, other.output
    assert load(tmp_path / "other" / "adapter")[0].beacon_config.num_sinks == 1
    assert "was made for another base" not in caplog.text
    save_base(tmp_path / "base", seed=1)
    moved = run(*texts, "--adapter", "run/adapter", "--base", "base", "-o", "moved", cwd=tmp_path)
    assert moved.exit_code == 0, moved.output
    assert "run/adapter was made for another base (fingerprint " in caplog.text
    missing = run(*texts, "--adapter", str(tmp_path / "none"), "-o", "missing", cwd=tmp_path)
    assert missing.exit_code == 1
    assert "none holds no adapter: beacon_config.json is missing." in missing.output


def test_a_run_begins_with_the_mean_of_several_adapters(files, tmp_path):
    for seed in range(3):
        save_adapter(tmp_path / f"adapter-{seed}", files / "base", seed=seed)
    mean, _ = load(tmp_path / "adapter-0")
    others = [dict(load(tmp_path / f"adapter-{seed}")[0].beacon_parameters()) for seed in (1, 2)]
    for name, parameter in mean.beacon_parameters():
        parameter.data = (parameter.data + others[0][name].data + others[1][name].data) / 3
    mean.save_pretrained(tmp_path / "mean")
    texts = [str(files / "texts.jsonl"), "--length", "128", "--batch-size", "2", "--steps", "1"]
    several = [word for seed in range(3) for word in ("--adapter", f"adapter-{seed}")]
    for name, begin in (("several", several), ("one", ["--adapter", "mean"]), ("first", ["--adapter", "adapter-0"])):
        result = run(*texts, *begin, "-o", name, cwd=tmp_path)
        assert result.exit_code == 0, result.output
    got, wanted, first = (load_adapter_tensors(tmp_path / name / "adapter") for name in ("several", "one", "first"))
    assert all(torch.allclose(tensor, wanted[name], atol=1e-3) for name, tensor in got.items())
    assert any(not torch.allclose(tensor, first[name], atol=1e-2) for name, tensor in got.items())
    recipe = json.loads((tmp_path / "several" / "recipe.json").read_text())
    assert recipe["adapter"] == ["adapter-0", "adapter-1", "adapter-2"]
    again = run(*several, "--resume", "-o", "several", cwd=tmp_path)
    assert again.exit_code == 0, again.output
    card = (tmp_path / "several" / "adapter" / "README.md").read_text()
    assert '"adapter-1"' in card
    missing = run(*texts, "--adapter", "adapter-0", "--adapter", "none", "-o", "missing", cwd=tmp_path)
    assert missing.exit_code == 1
    assert "none holds no adapter: beacon_config.json is missing." in missing.output


def test_adapters_of_other_kinds_have_no_mean(files, tmp_path):
    save_adapter(tmp_path / "paper", files / "base", seed=1)
    save_adapter(tmp_path / "anchored", files / "base", seed=1, anchored=True)
    begin = ["--adapter", "paper", "--adapter", "anchored", "--length", "128", "--steps", "1"]
    result = run(str(files / "texts.jsonl"), *begin, "-o", "run", cwd=tmp_path)
    assert result.exit_code == 1
    assert "The adapter's tensors are not those of this base model and configuration (" in result.output


def test_what_has_no_option_of_its_own_is_set_by_name(files, tmp_path):
    lines = (files / "texts.jsonl").read_text().replace('"text"', '"body"')
    (tmp_path / "bodies.jsonl").write_text(lines)
    others = [
        "text_field=body",
        "stage.decay=0.25",
        "stage.ratio_draw=text",
        "config.placement=append",
        "exclude=[d1, d2]",
    ]
    flags = [*(part for pair in others for part in ("--set", pair)), "--max-tokens", "100000"]
    result = run("bodies.jsonl", *arguments(files)[1:], "-o", "run", "--steps", "2", *flags, cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "Documents: 10 texts, " in result.stderr
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["text_field"], recipe["config"]["placement"]) == ("body", "append")
    assert (recipe["stages"][0]["decay"], recipe["stages"][0]["ratio_draw"]) == (0.25, "text")


def test_broken_questions_and_those_that_do_not_fit_are_counted_or_stop_the_run(files, tmp_path):
    asked = [json.loads((files / "questions.jsonl").read_text()) | {"question": f"Who spoke {n}?"} for n in range(3)]
    asked.append(asked[0] | {"context": 60 * asked[0]["context"]})
    lines = [json.dumps(line) for line in asked]
    (tmp_path / "questions.jsonl").write_text("\n".join([lines[0], '{"question": ', *lines[1:]]) + "\n")
    flags = ["--questions", "questions.jsonl", "--steps", "1", "--length", "320"]
    result = run(*arguments(files), *flags, "-o", "run", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert (
        result.stderr.count(
            "Questions: 4 on 2 contexts. 4 records read, 1 skipped: 1 broken JSON (questions.jsonl, line 2)."
        )
        == 1
    )
    assert "Questions: 1 are left out: with their contexts they exceed 320 tokens." in result.stderr
    stopped = run(*arguments(files), *flags, "-o", "other", "--on-error", "stop", cwd=tmp_path)
    assert stopped.exit_code == 1
    assert "questions.jsonl, line 2: the line is not JSON" in stopped.stderr


def chats_file(folder: Path) -> str:
    said = "The lion spoke to the moon. " * 4
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{number}. {said * size}"},
                {"role": "assistant", "content": "Why?"},
            ]
        }
        for number, size in enumerate((0, 1, 1, 9))
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "no chat"}]))
    return "chats.jsonl"


@pytest.mark.parametrize("has_texts", [True, False])
def test_conversations_are_trained_on_after_texts_or_alone(files, tmp_path, has_texts):
    texts = arguments(files) if has_texts else arguments(files)[1:]
    flags = [*texts, "--chats", chats_file(tmp_path), "--steps", "2", "--length", "320", "-o", "run"]
    result = run(*flags, cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert (
        "Conversations: 4 with 4 answers. 4 records read, 1 skipped: 1 no conversation (chats.jsonl, line 5)."
        in result.stderr
    )
    assert "Conversations: 2 are read, 1 are longer than 320 tokens, 1 are no longer than a chunk." in result.stderr
    stages = json.loads((tmp_path / "run" / "recipe.json").read_text())["stages"]
    mixes = [(stage["documents"], stage["chats"], stage["questions"]) for stage in stages]
    assert mixes == ([(1.0, 0.0, 0.0), (0.2, 0.8, 0.0)] if has_texts else [(0.0, 1.0, 0.0)])
    [*_, last] = checkpoints(tmp_path / "run" / "checkpoints")
    digests = json.loads((last / "state.json").read_text())["digests"]
    assert digests.keys() == ({"documents", "chats", "base"} if has_texts else {"chats", "base"})
    again = run("-o", "run", "--resume", cwd=tmp_path)
    assert again.exit_code == 0, again.output


def test_questions_and_conversations_share_the_second_stage(files, tmp_path):
    asked = ["--questions", str(files / "questions.jsonl"), "--chats", chats_file(tmp_path)]
    result = run(*arguments(files), *asked, "--steps", "1", "--length", "320", "-o", "run", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    _, stage = json.loads((tmp_path / "run" / "recipe.json").read_text())["stages"]
    shares = {name: stage[name] for name in ("documents", "questions", "chats", "needles", "reconstruction")}
    assert shares == {"documents": 0.2, "questions": 0.3, "chats": 0.3, "needles": 0.1, "reconstruction": 0.1}


def test_a_broken_record_is_skipped_and_counted_or_stops_the_run(files, tmp_path):
    broken = [str(files / "broken.jsonl"), *arguments(files)[1:], "--steps", "1"]
    result = run(*broken, "-o", "run", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "broken.jsonl, line 2" in result.stderr
    assert "2 skipped" in result.stderr
    stopped = run(*broken, "-o", "other", "--on-error", "stop", cwd=tmp_path)
    assert stopped.exit_code == 1
    assert "broken.jsonl" in stopped.stderr
    assert "line 2" in stopped.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run_and_resume_finishes_it(files, tmp_path, number, status):
    command = [*BEACON, "train", *arguments(files), "-o", "run", "--steps", "400", "--save-every", "1000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"asked to stop by {signal.Signals(number).name}" in out
    assert "  go on   beacon train --output run --resume" in out
    assert "%|" not in err  # bars are for terminals
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1
    load(tmp_path / "run" / "adapter")
    step = metrics.read_text().count("\n")
    again = run("-o", "run", "--resume", "--max-minutes", "0.1", cwd=tmp_path)
    assert again.exit_code == 0, again.output
    assert f"Going on after step {step} of 400." in again.stderr


def texts_of_ones_own(files, tmp_path) -> list[str]:
    """Options of a run of four updates on copies of the texts and questions, which may be changed."""
    for name in ("texts.jsonl", "questions.jsonl", "dev.jsonl"):
        shutil.copy(files / name, tmp_path)
    return ["texts.jsonl", *arguments(files)[1:], "--questions", "questions.jsonl", "--dev", "dev.jsonl", "--length", "320",
            "--set", "dev_length=128", "--steps", "2", "--save-every", "1", "--set", "keep_checkpoints=9", "-o", "run"]  # fmt: skip


def cut(run_folder: Path, step: int) -> Path:
    """Leave the run as it was after a step: its last checkpoint."""
    found = checkpoints(run_folder / "checkpoints")
    for path in found[step:]:
        shutil.rmtree(path)
    return found[step - 1]


@pytest.mark.parametrize("name", ["texts.jsonl", "questions.jsonl"])
def test_a_run_is_not_resumed_on_texts_or_questions_that_have_changed(files, tmp_path, name):
    flags = texts_of_ones_own(files, tmp_path)
    assert run(*flags, cwd=tmp_path).exit_code == 0
    last = cut(tmp_path / "run", 2)
    recipe, own = (tmp_path / "run" / "recipe.json").read_text(), (tmp_path / name).read_text()
    known = json.loads((last / "state.json").read_text())["digests"]
    (tmp_path / name).write_text(own.replace("lion", "boar"))
    refused = run(*flags, "--resume", cwd=tmp_path)
    assert refused.exit_code == 1
    what = {"texts.jsonl": "documents", "questions.jsonl": "questions"}[name]
    *_, line = refused.stderr.splitlines()
    assert line.startswith(f"Error: run/checkpoints/step-0000002 has read other {what} ({known[what]}; these are ")
    assert line.endswith("). Put back what the run began with, or start a new one in another folder from --adapter.")
    assert (tmp_path / "run" / "recipe.json").read_text() == recipe
    (tmp_path / name).write_text(own)
    (tmp_path / "dev.jsonl").write_text((files / "texts.jsonl").read_text().replace("lion", "boar"))
    resumed = run(*flags, "--resume", cwd=tmp_path)
    assert resumed.exit_code == 0, resumed.output
    assert "Going on after step 2 of 4." in resumed.stderr


def test_a_checkpoint_without_digests_is_resumed_and_the_next_one_has_them(files, tmp_path):
    flags = texts_of_ones_own(files, tmp_path)
    assert run(*flags, cwd=tmp_path).exit_code == 0
    weights = load_adapter_tensors(tmp_path / "run" / "adapter")
    state = cut(tmp_path / "run", 3) / "state.json"
    values = json.loads(state.read_text())
    digests = values.pop("digests")
    assert digests.keys() == {"documents", "questions", "base"}
    state.write_text(json.dumps(values))
    assert run(*flags, "--resume", cwd=tmp_path).exit_code == 0
    [*_, last] = checkpoints(tmp_path / "run" / "checkpoints")
    values = json.loads((last / "state.json").read_text())
    assert (values["step"], values["digests"]) == (4, digests)
    after = load_adapter_tensors(tmp_path / "run" / "adapter")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_run_is_not_resumed_on_another_base_or_with_differences_to_another_adapter(files, tmp_path, name):
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", seed=1)
    flags = [*arguments(files), "--base", "base", "--adapter", "adapter", "--lora-rank", "2", "--steps", "2",
             "--save-every", "1", "-o", "run"]  # fmt: skip
    assert run(*flags, cwd=tmp_path).exit_code == 0
    known = json.loads((cut(tmp_path / "run", 1) / "state.json").read_text())["digests"][name]
    shutil.copytree(tmp_path / name, tmp_path / "own")
    if name == "base":
        save_base(tmp_path / "base", seed=1)
    else:
        shutil.rmtree(tmp_path / "adapter")
        save_adapter(tmp_path / "adapter", tmp_path / "base", seed=2)
    refused = run("--resume", "-o", "run", cwd=tmp_path)
    assert refused.exit_code == 1
    what = {"base": "base model", "adapter": "adapter"}[name]
    *_, line = refused.stderr.splitlines()
    assert line.startswith(f"Error: run/checkpoints/step-0000001 began with another {what} ({known}; this is ")
    shutil.rmtree(tmp_path / name)
    (tmp_path / "own").rename(tmp_path / name)
    assert run("--resume", "-o", "run", cwd=tmp_path).exit_code == 0


def test_a_run_of_whole_weights_goes_on_though_the_adapter_that_it_began_with_has_changed(files, tmp_path):
    save_adapter(tmp_path / "adapter", files / "base", seed=1)
    flags = [*arguments(files), "--adapter", "adapter", "--steps", "2", "--save-every", "1", "-o", "run"]
    assert run(*flags, cwd=tmp_path).exit_code == 0
    weights = load_adapter_tensors(tmp_path / "run" / "adapter")
    cut(tmp_path / "run", 1)
    shutil.rmtree(tmp_path / "adapter")
    save_adapter(tmp_path / "adapter", files / "base", seed=2)
    assert run("--resume", "-o", "run", cwd=tmp_path).exit_code == 0
    after = load_adapter_tensors(tmp_path / "run" / "adapter")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_a_run_that_is_resumed_under_another_recipe_is_refused_and_its_own_recipe_stays(files, tmp_path):
    flags = [*arguments(files), "-o", "run", "--steps", "1"]
    assert run(*flags, cwd=tmp_path).exit_code == 0
    recipe = (tmp_path / "run" / "recipe.json").read_text()
    refused = run(*flags, "--seed", "1", "--resume", cwd=tmp_path)
    assert refused.exit_code == 1
    assert "was made under other settings" in refused.stderr
    assert (tmp_path / "run" / "recipe.json").read_text() == recipe


def test_a_run_without_a_checkpoint_to_resume_begins_and_says_so(files, tmp_path):
    flags = [*arguments(files), "-o", "run", "--steps", "1"]
    told = "run holds no checkpoint to resume: a new run begins there."
    first = run(*flags, "--resume", cwd=tmp_path)
    assert first.exit_code == 0, first.output
    assert first.stderr.splitlines()[0] == told
    again = run(*flags, "--resume", cwd=tmp_path)
    assert again.exit_code == 0, again.output
    assert "Going on after step 1 of 1." in again.stderr
    assert told not in again.stderr
    assert told not in run(*flags[:-4], "-o", "other", "--steps", "1", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "count", "way_out"),
    [(16, 4, 4, None), (8, 1, 8, None), (6, 4, 2, None), (16, 16, 8, 2), (12, 4, 2, 3), (10, 4, 2, 1)],
)
def test_processes_that_must_wait_are_told_of_with_the_way_out(batch_size, micro_batch_size, count, way_out):
    stages = (Stage(), Stage(batch_size=batch_size, micro_batch_size=micro_batch_size))
    notices = []
    tell_of_waiting(TrainingSettings(output="run", documents=("t",), stages=stages), count, notices.append)
    told = (
        f"Stage 2: {batch_size} texts by micro_batch_size {micro_batch_size} cannot be dealt evenly to {count} processes: "
        f"some wait. In a new run, micro_batch_size {way_out} keeps all at work."
    )
    assert notices == ([] if way_out is None else [told])


PAPERS = {"anchored": False, "placement": "interleave", "exact_ids": [], "num_sinks": 0, "local_tokens": 0}
DEFAULTS = {"anchored": True, "placement": "append", "exact_ids": "digits", "num_sinks": 4, "local_tokens": 128}
KINDS = [
    ([], DEFAULTS),
    (["--paper"], PAPERS),
    (["--no-exact"], DEFAULTS | {"exact_ids": []}),
    (["--not-anchored"], DEFAULTS | {"exact_ids": [], "anchored": False}),
    (["--placement", "interleave"], DEFAULTS | {"exact_ids": [], "placement": "interleave"}),
    (["--set", "config.placement=interleave"], DEFAULTS | {"exact_ids": [], "placement": "interleave"}),
    (["--sinks", "0"], DEFAULTS | {"num_sinks": 0}),
    (["--local-tokens", "0"], DEFAULTS | {"local_tokens": 0}),
    (["--anchored"], DEFAULTS),
    (["--exact", "--sinks", "2"], DEFAULTS | {"num_sinks": 2}),
    (["--paper", "--anchored", "--sinks", "1"], PAPERS | {"anchored": True, "num_sinks": 1}),
    (["--paper", "--placement", "append"], PAPERS | {"placement": "append"}),
    (["--paper", "--exact"], DEFAULTS | {"num_sinks": 0, "local_tokens": 0}),
]


@pytest.fixture
def begun(monkeypatch):
    """Runs as far as to their settings, which are kept."""
    found = []

    def train(settings, **_):
        found.append(settings)
        raise ConfigError("begun")

    monkeypatch.setattr("activation_beacon.training.run.train", train)

    def settings_of(*args, cwd):
        result = run(*args, cwd=cwd)
        assert result.stderr.splitlines()[-1] == "Error: begun", result.output
        return found[-1], result

    return settings_of


def kind_of(settings) -> dict:
    return {name: settings.to_dict()["config"][name] for name in DEFAULTS}


@pytest.mark.parametrize(("options", "kind"), KINDS, ids=[" ".join(options) for options, _ in KINDS])
def test_without_a_recipe_beacons_are_of_the_default_adapters_kind_unless_said(files, tmp_path, begun, options, kind):
    assert kind_of(begun(str(files / "texts.jsonl"), "-o", "run", *options, cwd=tmp_path)[0]) == kind


def test_the_kind_without_a_recipe_is_that_of_the_adapter_that_ships():
    config = load_adapter_config(default_adapter_folder())
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, "exact_ids": config.exact_ids}
    assert config.exact_ids


def test_recipes_and_adapters_keep_their_kind_and_paper_changes_it(files, tmp_path, begun):
    assert kind_of(begun(str(files / "recipe.yaml"), "-o", "run", cwd=tmp_path)[0]) == PAPERS
    save_adapter(tmp_path / "adapter", files / "base", seed=1, anchored=True)
    going_on = [str(files / "texts.jsonl"), "--adapter", "adapter", "-o", "run", "--length", "128"]
    assert kind_of(begun(*going_on, cwd=tmp_path)[0]) == PAPERS | {"anchored": True}
    assert kind_of(begun(*going_on, "--paper", cwd=tmp_path)[0]) == PAPERS


def test_a_tokenizer_without_digits_is_refused_with_the_way_out(files, tmp_path, monkeypatch):
    monkeypatch.setattr("activation_beacon.training.run.digit_ids", lambda tokenizer: ())
    refused = run(*arguments(files), "-o", "run", "--steps", "1", cwd=tmp_path)
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        f"Error: Numbers cannot be held token by token: the tokenizer of {files / 'base'} has no token with a digit. "
        "Add --no-exact (in a recipe, leave exact_ids out)."
    )
    assert run(*arguments(files), "-o", "run", "--steps", "1", "--no-exact", cwd=tmp_path).exit_code == 0


def test_an_adapters_chunk_size_is_not_changed_without_a_word(files, tmp_path, begun):
    save_adapter(tmp_path / "adapter", files / "base", seed=1)
    going_on = [str(files / "texts.jsonl"), "--adapter", "adapter", "-o", "run", "--length", "128"]
    settings, result = begun(*going_on, "--chunk-size", "16", cwd=tmp_path)
    assert settings.config.chunk_size == 16
    assert result.stderr.splitlines()[0] == (
        "This changes the adapter's chunk size from 32 to 16; to train on chunks of 16 only, use --train-chunk-size 16."
    )
    for options, chunk_size in ((["--train-chunk-size", "16"], 16), (["--chunk-size", "32"], None), ([], None)):
        settings, result = begun(*going_on, *options, cwd=tmp_path)
        assert (settings.config.chunk_size, settings.stages[0].chunk_size) == (32, chunk_size)
        assert len(result.stderr.splitlines()) == 1


def test_a_run_is_trained_on_shorter_chunks_than_its_adapter_has(files, tmp_path):
    result = run(*arguments(files), "--train-chunk-size", "16", "-o", "run", "--steps", "1", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run" / "adapter")[0].beacon_config.chunk_size == CHUNK
    assert "| 1 | 1 | 2 | 128 | 16 |" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_markdown_is_read_and_what_is_left_out_of_a_folder_is_named(files, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "handbook.md", "notes.docx"):
        (tmp_path / "texts" / name).write_text(TEXT)
    result = run("texts", *arguments(files)[1:], "-o", "run", "--steps", "1", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "texts: 1 left out (notes.docx). Read are .txt, .md, .jsonl, .parquet; name a .json file" in result.stderr
    assert "Documents: 2 texts, " in result.stderr


@pytest.mark.parametrize(
    ("length", "text", "way_out"),
    [
        (
            100,
            "dev.md has 100 bytes.",
            "Name texts of at least 128 tokens, or measure on shorter ones: --set dev_length=64.",
        ),
        (
            127 + len("ä") * 2,
            "1 records read, 1 skipped: 1 shorter than 130 tokens (dev.md:1).",
            "Name texts of at least 130 tokens, or measure on shorter ones: --set dev_length=64.",
        ),
    ],
)
def test_dev_texts_that_are_too_short_are_refused_by_name(files, tmp_path, monkeypatch, length, text, way_out):
    (tmp_path / "dev.md").write_bytes(b"a" * length)
    options = ["--set", "dev_length=130"] if "130" in way_out else []
    if not options:
        monkeypatch.setattr("activation_beacon.training.run.load_pretrained_base", None)  # is not come to
    else:
        monkeypatch.setattr("activation_beacon.training.samplers.PLAIN", ())
    refused = run(*arguments(files), "--dev", "dev.md", "-o", "run", *options, cwd=tmp_path)
    assert refused.exit_code == 1
    line = refused.stderr.splitlines()[-1]
    assert line == f"Error: No document is left of those that --dev names to measure on: {text} {way_out}"
    assert "Documents: " not in refused.stderr
    assert (tmp_path / "run").exists() == bool(options)  # an empty folder is not left


def test_dev_texts_that_lie_among_the_texts_are_not_trained_on(files, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(files / "texts.jsonl", texts)
    shutil.copy(files / "dev.jsonl", texts)
    options = [*arguments(files)[1:], "--set", "dev_length=128", "--steps", "3"]
    apart = run(str(files / "texts.jsonl"), *options, "--dev", str(files / "dev.jsonl"), "-o", "apart", cwd=tmp_path)
    assert apart.exit_code == 0, apart.output
    assert "not trained on" not in apart.stderr
    within = run("texts", *options, "--dev", "texts/dev.jsonl", "-o", "within", cwd=tmp_path)
    assert within.exit_code == 0, within.output
    assert "Documents: 2 of 14 are not trained on: --dev names them to measure on." in within.stderr
    one, other = (load_adapter_tensors(tmp_path / name / "adapter") for name in ("apart", "within"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert run("-o", "within", "--resume", cwd=tmp_path).exit_code == 0
    refused = run("texts/dev.jsonl", *options, "--dev", "texts", "-o", "refused", cwd=tmp_path)
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        "Error: No document is left to train on: all 2 are of those that --dev names to measure on. Name others."
    )


def test_dev_questions_that_lie_among_the_questions_are_not_trained_on(files, tmp_path):
    own = [*texts_of_ones_own(files, tmp_path), "--dev-questions", "dev-questions.jsonl", "--set", "dev_length=320"]
    [first] = map(json.loads, (tmp_path / "questions.jsonl").read_text().splitlines())
    asked = [first, {**first, "question": "To whom?"}, {**first, "context": f"{first['context']} It slept."}]
    lines = [json.dumps(record) + "\n" for record in asked]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "dev-questions.jsonl").write_text(lines[0])
    result = run(*own, cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "Questions: 1 of 3 are not trained on: --dev-questions names them to measure on." in result.stderr
    (tmp_path / "questions.jsonl").write_text("".join(lines[1:]))
    assert run(*own, "-o", "apart", cwd=tmp_path).exit_code == 0
    one, other = (load_adapter_tensors(tmp_path / name / "adapter") for name in ("apart", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_goes_on_by_its_own_recipe_if_nothing_else_is_named(files, tmp_path):
    flags = [*arguments(files), "-o", "run", "--steps", "3", "--save-every", "1", "--set", "keep_checkpoints=9"]
    assert run(*flags, cwd=tmp_path).exit_code == 0
    weights = load_adapter_tensors(tmp_path / "run" / "adapter")
    cut(tmp_path / "run", 1)
    again = run("-o", "run", "--resume", cwd=tmp_path)
    assert again.exit_code == 0, again.output
    assert "Going on after step 1 of 3." in again.stderr
    after = load_adapter_tensors(tmp_path / "run" / "adapter")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_a_long_step_is_not_silent(files, tmp_path, monkeypatch):
    monkeypatch.setattr("activation_beacon.cli.train.SECONDS_OF_SILENCE", 0.0)
    result = run(*arguments(files), "--dev", str(files / "dev.jsonl"), "-o", "run", "--steps", "2", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    for line in (
        "step 0 of 2: measuring dev at ratio 2, 1 of 2",
        "step 1 of 2: reading 2 of 2",
        "step 2 of 2: reading 1 of 2",
        "step 2 of 2: measuring dev at ratio 4, 2 of 2",
    ):
        assert result.stderr.count(line) == 1
    monkeypatch.setattr("activation_beacon.cli.train.SECONDS_OF_SILENCE", 600.0)
    monkeypatch.setattr("activation_beacon.cli.train.SECONDS_BETWEEN_LINES", 600.0)
    result = run(*arguments(files), "-o", "other", "--steps", "3", cwd=tmp_path)
    lines = re.findall(r"^step .*?: \w+", result.stderr, re.MULTILINE)
    assert lines == ["step 1 of 3: loss", "step 3 of 3: loss"]


def test_losses_come_before_what_is_being_done_where_steps_are_short(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("activation_beacon.cli.train.time", SimpleNamespace(monotonic=lambda: now[0]))
    told = {"loss": 3.0, "loss_by_ratio": {"2": 3.0}, "tokens_per_second": 100.0, "memory_bytes": 1}

    def lines_of(seconds: float, steps: int) -> list[str]:
        bar = _Bar(steps, None)
        for step in range(1, steps + 1):
            for part in range(4):
                bar.working(step, f"reading {part + 1} of 4")
                now[0] += seconds / 4
            bar({"step": step, **told})
        return re.findall(r"^step (\d+) of \d+: (\w+)", capsys.readouterr().err, re.MULTILINE)

    assert lines_of(3.0, 13) == [("1", "loss"), ("5", "loss"), ("9", "loss"), ("13", "loss")]
    assert lines_of(12.0, 3) == [("1", "loss"), ("2", "loss"), ("3", "loss")]
    assert lines_of(40.0, 2) == [("1", "reading"), ("1", "loss"), ("2", "reading"), ("2", "loss")]


def test_help_says_the_defaults_of_a_run_without_a_recipe(tmp_path):
    text = " ".join(run("--help", cwd=tmp_path).stdout.split())
    stage, settings = Stage(), TrainingSettings(output="run", documents=("t",))
    for option, value in (
        ("steps", stage.steps),
        ("length", stage.length),
        ("batch-size", stage.batch_size),
        ("micro-batch-size", stage.micro_batch_size),
        ("learning-rate", stage.learning_rate),
        ("distillation", f"{stage.distillation:g}"),
        ("chunk-size", settings.config.chunk_size),
        ("ratios", ",".join(map(str, settings.config.ratios))),
        ("sinks", DEFAULTS["num_sinks"]),
        ("placement", DEFAULTS["placement"]),
        ("base", settings.base),
        ("optimizer", settings.optimizer),
        ("wrapper", settings.wrapper),
        ("on-error", settings.on_error),
        ("save-every", settings.save_every),
        ("seed", settings.seed),
    ):
        assert re.search(rf" --{option} [^\[]*\[default: {re.escape(str(value))}\]", text), option
    assert text.count("Example") == 1


BAD = [
    ([], "There is nothing to train on. Name texts, or a recipe such as recipes/default-cpu.yaml."),
    (["{files}/texts.jsonl"], "The run needs a folder for what comes of it. Add --output FOLDER."),
    (["--resume"], "There is nothing to train on. Name texts, or a recipe such as recipes/default-cpu.yaml."),
    (
        ["--resume", "-o", "run"],
        "There is no run in run to go on with: run/recipe.json is missing. Name texts, or a recipe such as recipes/default-cpu.yaml.",
    ),
    (["{files}/none.jsonl", "-o", "run", "--base", "{files}/base"], "none.jsonl"),
    (["none.yaml", "-o", "run"], "none.yaml cannot be read: No such file or directory. Name a YAML recipe."),
    (["{files}/bad.yaml", "-o", "run"], "bad.yaml, line 2 is not valid YAML"),
    (["{files}/list.yaml", "-o", "run"], "list.yaml must hold names and values; got list."),
    (["{files}/unknown.yaml", "-o", "run"], "The recipe names learning_rat, which is not known. Known: adapter, average_decay, base"),
    (["{files}/mapping.yaml", "-o", "run"], "stages must be a list; got {'steps': 5}. Begin each stage with a dash."),
    (["{files}/number.yaml", "-o", "run"], "Stage 1 must hold names and values; got 5."),
    (["{files}/text.yaml", "-o", "run"], "config must hold names and values; got 'append'."),
    (["{files}/texts.jsonl", "-o", "run", "--base", "{files}/none"], "There is no folder"),
    (["{files}/texts.jsonl", "-o", "run", "--length", "100"], "length (100) must exceed chunk_size (1024)"),
    (["{files}/texts.jsonl", "-o", "run", "--steps", "0"], "steps must be an int of at least 1; got 0."),
    (
        ["{files}/texts.jsonl", "-o", "run", "--base", "{files}/base", "--chunk-size", "32", "--length", "128",
         "--dtype", "float16"],
        "The base's dtype (float16) must be bfloat16 or float32: gradients are too small for it. Add --dtype bfloat16.",
    ),
    (["{files}/texts.jsonl", "-o", "run", "--optimizer", "sgd"], "optimizer must be one of adamw, muon; got 'sgd'."),
    (["{files}/texts.jsonl", "-o", "run", "--set", "decay"], "--set decay is no NAME=VALUE. Write text_field=body, or stage."),
    (["{files}/texts.jsonl", "-o", "run", "--set", "stages.decay=1"], "--set stages.decay=1 is no NAME=VALUE."),
    (["{files}/texts.jsonl", "-o", "run", "--set", "stages=[{{steps: 5}}]"], "--set stages=[{steps: 5}] is no NAME=VALUE."),
    (["{files}/texts.jsonl", "-o", "run", "--set", "config={{num_sinks: 2}}"], "--set config={num_sinks: 2} is no NAME=VALUE."),
    (["{files}/texts.jsonl", "-o", "run", "--set", "exclude=[a"], "--set exclude=[a: the value is not valid YAML"),
    (["{files}/texts.jsonl", "-o", "run", "--set", "stage.decoy=1"], "Stage 1 names decoy, which is not known. Known: "),
    (["{files}/texts.jsonl", "-o", "run", "--set", "stage.decay=often"], "decay must be a number of at least 0; got 'often'."),
    (["{files}/texts.jsonl", "-o", "run", "--ratios", "2,x"], "--ratios must be ints such as 2,8,32; got '2,x'."),
    (["{files}/texts.jsonl", "-o", "run", "--chunk-size", "1000"], "chunk_size (1000) must be divisible by every ratio"),
    (["{files}/texts.jsonl", "-o", "{files}/texts.jsonl/run", "--base", "{files}/base"], "cannot be made"),
    (
        ["{files}/texts.jsonl", "-o", "run", "--base", "{files}/base", "--chunk-size", "32", "--length", "1024",
         "--distillation", "1"],
        "length (1024) exceeds what the base reads uncompressed (640 positions)",
    ),
    (
        ["{files}/texts.jsonl", "-o", "run", "--base", "{files}/base", "--chunk-size", "32", "--length", "2048"],
        "Stage 1: A text of 2,048 tokens needs 1,044 positions at ratio 2; the base model has 640. Use ratio 4. Or train on a smaller",
    ),
    (
        ["{files}/texts.jsonl", "-o", "run", "--base", "{files}/base", "--chunk-size", "32", "--length", "120"],
        "must be a multiple of chunk_size (32)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("args", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_bad_input_is_one_line_and_exit_status_1(files, tmp_path, args, text):
    (files / "bad.yaml").write_text("base: default\nstages: [}\n")
    (files / "list.yaml").write_text("- 1\n")
    (files / "unknown.yaml").write_text("learning_rat: 1\n")
    (files / "mapping.yaml").write_text("stages: {steps: 5}\n")
    (files / "number.yaml").write_text("stages: [5]\n")
    (files / "text.yaml").write_text("config: append\n")
    result = run(*[arg.format(files=files) for arg in args], cwd=tmp_path)
    assert result.exit_code == 1, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert text in last


def test_a_folder_that_holds_a_run_is_not_overwritten(files, tmp_path):
    assert run(*arguments(files), "-o", "run", "--steps", "1", cwd=tmp_path).exit_code == 0
    result = run(*arguments(files), "-o", "run", "--steps", "1", cwd=tmp_path)
    assert result.exit_code == 1
    assert "run holds a run already, with a checkpoint at step-0000001. Add --resume to go on" in result.stderr
