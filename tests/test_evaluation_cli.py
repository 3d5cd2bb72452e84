"""`beacon eval`: from files to a report, and again where it was stopped."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import activation_beacon
from activation_beacon import BeaconConfig, attach, books, detach
from activation_beacon.cli import app
from evaluation_models import STORY, beacon_model
from families import beacon_tensors
from launched import run_together
from saved_models import CHUNK, SPECIAL, TEMPLATE, byte_tokenizer

pytest.importorskip("matplotlib")

SMALL = ("--ratios", "4", "--limit", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with base models, adapters, documents, questions, and a background."""
    root = tmp_path_factory.mktemp("eval")
    save_model(root, "base", "adapter", byte_tokenizer())
    save_model(root, "base-of-words", "adapter-of-words", word_tokenizer())
    rows = [{"id": f"doc{n}", "group": "tale" if n % 2 else "saga", "text": STORY[n:] * 3} for n in range(4)]
    (root / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "story.txt").write_text(STORY, encoding="utf-8")
    asked = [{"context": STORY[n : n + 200], "question": f"Is it {n}?", "answer": "Nobody knew."} for n in range(3)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return root


def save_model(root, base, adapter, tokenizer):
    """A tiny base model with a tokenizer, and an adapter for it."""
    end = tokenizer.eos_token_id
    model = beacon_model(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end)
    tensors = beacon_tensors(model)
    detach(model).save_pretrained(root / base)
    tokenizer.save_pretrained(root / base)
    model, _ = activation_beacon.load_pretrained_base(str(root / base))
    attach(model, BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), base_model=str(root / base)))
    for name, parameter in model.beacon_parameters():
        parameter.data.copy_(tensors[name])
    model.save_pretrained(root / adapter)


def word_tokenizer():
    """One with few tokens a word: RULER's worked example has room for 500 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(books.read_demo_book().splitlines(), trainer)
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE)


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
ALL = ("all", "--model", "{files}/adapter", "-o", "out", *SMALL, "--length", "400", *BACKGROUND)
INPUTS = ("--documents", "{files}/docs.jsonl", "--questions", "{files}/questions.jsonl")


def test_lm_writes_lines_and_a_report(run, tmp_path):
    out = good(run(*LM))
    assert re.search(r"^\| beacons x4 \| \d\.\d{3} \| 2 \|", out, re.M)
    assert "Of fewer than 8 samples no interval is given" in out
    assert "Report: out/report.md, out/report.html" in out
    assert [(r["method"], r["sample"]) for r in lines_of(tmp_path / "out")] == [
        (method, sample) for sample in ("doc0", "doc1") for method in ("full", "alone", "beacons")
    ]
    assert (tmp_path / "out" / "report.html").exists()


def test_lm_tells_kinds_of_documents_apart_where_a_field_names_them(run, tmp_path):
    good(run(*LM, "--limit", "3", "--kind-field", "group"))
    rows = lines_of(tmp_path / "out")
    assert {(row["sample"], row["kind"]) for row in rows} == {("doc0", "saga"), ("doc1", "tale"), ("doc2", "saga")}
    refused = run(*LM, "--kind-field", "shelf")
    assert refused.exit_code == 1
    assert 'docs.jsonl, line 1: there is no field "shelf"' in refused.stderr


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
    args = (*ALL, "--tasks", "needles,reconstruction", "--methods", "beacons", "--length", "600")
    options = [str(each).format(files=files) for each in args]
    alone = json.loads(good(run(*args, "--json")))
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


def test_an_adapter_is_compared_with_another_one(files, run, tmp_path):
    good(run(*NEEDLES))
    other = list(NEEDLES)
    other[other.index("out")] = "other"
    good(run(*other, "--limit", "3", "--methods", "full,beacons", "--seed", "0"))
    found = json.loads(good(run("compare", "out", "other", "--json")))
    assert [(row["method"], row["samples"]) for row in found["rows"]] == [("full", 2), ("beacons", 2)]
    assert found["unshared"] == [{"folders": ["other"], "what": ["1 sample of needles 400"]}]
    assert [each["origin"]["models"] for each in found["folders"]] == [[str(files / "adapter")]] * 2
    result = run("compare", "out", "other")
    assert "**One adapter**" in good(result)
    other[other.index("other")] = "third"
    good(run(*other, "--seed", "1"))
    result = run("compare", "out", "third")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: out and third did not measure the same needles: seed is 0 in out, 1 in third. Run it anew with the same settings, or "
        "name other tasks with --tasks.\n"
    )


def test_the_report_and_run_json_say_which_model_was_asked_for(files, run, tmp_path):
    found = json.loads(good(run(*NEEDLES, "--json")))
    origin = json.loads((tmp_path / "out" / "run.json").read_text())["origin"]
    assert found["origin"] == origin
    assert (origin["models"], origin["versions"]) == ([str(files / "adapter")], [activation_beacon.__version__])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", origin["first"])
    assert f"Model {files / 'adapter'}, activation-beacon " in (tmp_path / "out" / "report.md").read_text()


def test_multi_turn_shows_every_turn(run):
    out = good(run("multi-turn", "--model", "{files}/adapter", "-o", "out", *SMALL, "--length", "900"))
    assert re.search(r"^\| beacons x4 \| 2 \| \d\.\d{3}.* / \d+\.\d\d s \| .* s \| .* s \|$", out, re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*LM, "--length", "many"), "--length must be ints of at least 1, such as 8192 or 2048,4096; got 'many'."),
        ((*LM, "--length", "0"), "--length must be ints of at least 1, such as 8192 or 2048,4096; got '0'."),
        ((*LM, "--ratios", "3"), "ratio (3) must divide chunk_size (32). Use 2, 4, 8."),
        ((*LM, "--methods", "best"), "The task lm has no method 'best'. Use some of full, alone, recent, beacons, shuffled, "),
        ((*LM, "--length", "99999"), "The task lm has no sample of 99,999 tokens. Use a shorter length, or longer texts."),
        ((*LM, "--length", "32"), "A text of 32 tokens has none after its first chunk (32) to measure. Use a longer length."),
        ((*LM, "--methods", "shuffled", "--limit", "1"), 'The method "shuffled" needs samples of two contexts at least. Take'),
        ((*NEEDLES, "--methods", "full,shuffled", "--limit", "1"), 'The method "shuffled" needs samples of two contexts at least.'),
        ((*NEEDLES, "--length", "50"), "The task needles has samples that 50 tokens have no room for: template,"),
        (("qa", "{files}/questions.jsonl", *LM[2:], "--length", "50"), "The task qa has samples that 50 tokens have no room for"),
        ((*LM, "--field", "body"), "docs.jsonl, line 1: there is no field \"body\" (fields: id, group, text). Mend or remove it, or"),
        (("lm", "no.jsonl", "-o", "out"), "There is no file, folder or glob 'no.jsonl'. Name one, or a hub data set"),
        ((*NEEDLES, "--kinds", "hay"), "There is no needle of kind 'hay'. Use some of sentence, number, uuid"),
        ((*NEEDLES, "--at", "0.5,2"), "--at must be depths from 0 to 1 such as 0.5,1; got '0.5,2'."),
        ((*NEEDLES, "--at", "end"), "--at must be depths from 0 to 1 such as 0.5,1; got 'end'."),
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
    assert not Path("out").exists()


def test_a_folder_of_another_setting_is_refused(run):
    good(run(*NEEDLES))
    result = run(*NEEDLES, "--seed", "1")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: out holds results of needles with seed 0; this run has 1. Choose another folder, or the same settings."
    )


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("lm", "{folder}/docs.jsonl"), "docs.jsonl"),
        (("qa", "{folder}/questions.jsonl"), "questions.jsonl"),
        *(((task, "--background", "{folder}/story.txt"), "story.txt") for task in ("needles", "multi-turn", "reconstruction")),
        (("all", "--tasks", "lm", "--documents", "{folder}/docs.jsonl"), "docs.jsonl"),
    ],
)  # fmt: skip
def test_results_of_a_file_are_not_taken_for_those_of_another_one_of_its_name(run, files, tmp_path, args, name):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(files / name, tmp_path / folder / name)
    more = (tmp_path / "b" / name).read_text(encoding="utf-8")
    (tmp_path / "b" / name).write_text(more * 2, encoding="utf-8")
    options = (
        "--model",
        "{files}/adapter",
        "-o",
        "out",
        "--methods",
        "full",
        "--ratios",
        "4",
        "--limit",
        "1",
        "--length",
        "900",
    )
    good(run(*(each.format(folder="a") for each in args), *options))
    before = lines_of(tmp_path / "out")
    good(run(*(each.format(folder="a") for each in args), *options))  # the same file goes on
    result = run(*(each.format(folder="b") for each in args), *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "on files of these names with other contents (SHA-256 " in result.stderr.splitlines()[-1]
    assert lines_of(tmp_path / "out") == before


@pytest.mark.parametrize("command", ["all", "lm", "needles", "multi-turn", "report", "compare"])
def test_every_command_has_an_example(run, command):
    assert re.search(rf"Examples?:\n\n    .*beacon eval {command}\b", good(run(command, "--help")))


DOCS = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.mark.parametrize("line", re.findall(r"^(?:beacon|.* activation_beacon) eval (.*)$", DOCS, re.M))
def test_the_docs_commands_are_understood(run, line):
    assert "Usage: beacon eval" in good(run(*shlex.split(line, comments=True), "--help"))  # options are parsed first


# --- all tasks -------------------------------------------------------------------------------------------------------

EVERYTHING = (
    *("all", "--model", "{files}/adapter-of-words", "-o", "out", *INPUTS, "--length", "1600"),
    *("--ratios", "4", "--limit", "1", "--methods", "alone,recent,beacons"),
)


@pytest.fixture(scope="module")
def everything(files, tmp_path_factory):
    """The folder of all tasks, and what was said."""
    folder = tmp_path_factory.mktemp("everything")
    options = [str(each).format(files=files) for each in EVERYTHING]
    options[options.index("out")] = str(folder)
    result = CliRunner().invoke(app, ["eval", *options])
    return folder, good(result), result.stderr


@pytest.mark.slow
def test_all_tasks_are_in_one_report_with_the_methods_that_each_has(everything):
    folder, out, said = everything
    tasks = ["lm", "needles", "multi-turn", "qa", "reconstruction", "ruler"]
    report = (folder / "report.md").read_text()
    assert re.findall(r"^## (.*)$", report, re.M) == ["Overview", *tasks]
    assert re.findall(r"^### (.*), 1,600 tokens$", out, re.M) == tasks
    assert "| method | " + " | ".join(f"{task} 1,600, n=1" for task in tasks) + " |" in out
    assert (folder / "report.html").exists()
    ways = {task: [(r["method"], r["ratio"]) for r in lines_of(folder) if r["task"] == task] for task in tasks}
    assert ways == {
        "lm": [("alone", None), ("recent", 4), ("beacons", 4)],
        **{task: [("recent", 4), ("beacons", 4)] for task in tasks[1:]},
    }
    assert "Left out" not in said


@pytest.mark.slow
def test_a_killed_run_of_all_tasks_goes_on(everything, run, tmp_path):
    whole = everything[0]
    shutil.copytree(whole, tmp_path / "out")
    lines = tmp_path / "out" / "results.jsonl"
    kept = lines.read_bytes()[: lines.stat().st_size // 2]  # amid a line, amid a task
    lines.write_bytes(kept)
    good(run(*EVERYTHING))
    assert lines.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert [without_seconds(r) for r in lines_of(tmp_path / "out")] == [without_seconds(r) for r in lines_of(whole)]


def without_seconds(record):
    return {name: value for name, value in record.items() if "seconds" not in name}


@pytest.fixture
def no_lm_eval(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )


def test_a_task_without_its_input_is_left_out_and_said_to_be(run, tmp_path, no_lm_eval):
    result = run(*ALL, "--length", "900", "--methods", "full", "--limit", "1")
    assert re.findall(r"^### (.*), 900 tokens$", good(result), re.M) == ["needles", "multi-turn", "reconstruction"]
    assert result.stderr.splitlines()[0] == (
        "Left out: lm (needs --documents FILE); qa (needs --questions FILE); "
        'ruler (needs lm-eval: pip install "activation-beacon[eval]").'
    )


def test_ruler_is_refused_by_name_without_lm_eval(run, no_lm_eval):
    result = run(*ALL, "--tasks", "needles,ruler")
    assert result.exit_code == 1
    assert 'The task ruler needs lm-eval: pip install "activation-beacon[eval]". Add it, or leave' in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "hay"), "There is no task 'hay' in `beacon eval all`. Use some of lm, needles, multi-turn,"),
        (("--tasks", "needles,lm"), "The task lm needs --documents FILE. Add it, or leave the task out of --tasks."),
        (("--tasks", "qa"), "The task qa needs --questions FILE. Add it, or leave the task out of --tasks."),
        ((*INPUTS, "--tasks", "qa"), "--documents is for the task lm, which is not among --tasks. Add it there, or drop"),
        (("--methods", "full,best"), "There is no method 'best'. Use some of full, alone, recent, beacons, shuffled, "),
        (("--tasks", "needles", "--methods", "alone"), "The task needles has none of the methods alone. Leave it out of --tasks, or"),
        (("--documents", "no.jsonl"), "There is no file, folder or glob 'no.jsonl'. Name one, or a hub data set"),
        (("--questions", "no.jsonl"), "There is no file, folder or glob 'no.jsonl'. Name one, or a hub data set"),
        (("--background", "no.txt"), "There is no file, folder or glob 'no.txt'. Name one, or a hub data set"),
        ((*INPUTS, "--field", "body"), 'docs.jsonl, line 1: there is no field "body" (fields: id, group, text).'),
        ((*INPUTS, "--on-error", "cry"), "--on-error must be skip or stop; got 'cry'."),
        (("--methods", "full,knorm"), "and there is no .venv-peers/bin/python. Make it with `make peers`"),
        (("--ratios", "3"), "ratio (3) must divide chunk_size (32). Use 2, 4, 8."),
        (("--length", "many"), "--length must be ints of at least 1, such as 8192 or 2048,4096; got 'many'."),
    ],
)  # fmt: skip
def test_bad_input_of_all_tasks_is_one_line_before_a_model_is_loaded(run, monkeypatch, args, message):
    monkeypatch.setattr("activation_beacon.cli.eval_run.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    result = run(*ALL, *args)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not Path("out").exists()


def test_a_length_that_one_of_the_tasks_has_not_is_refused_before_the_first_begins(run):
    result = run(*ALL, "--tasks", "needles,lm", "--documents", "{files}/story.txt", "--length", "99999")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: The task lm has no sample of 99,999 tokens.")
    assert not Path("out").exists()


def test_settings_of_another_run_are_refused_before_the_first_task_begins(run, tmp_path):
    options = ("--methods", "recent", "--limit", "1", "--length", "600")
    good(run(*ALL, "--tasks", "reconstruction", *options))
    before = lines_of(tmp_path / "out")
    result = run(*ALL, "--tasks", "needles,reconstruction", *options, "--seed", "1")
    assert "Error: out holds results of reconstruction with seed 0; this run has 1." in result.stderr
    assert lines_of(tmp_path / "out") == before
