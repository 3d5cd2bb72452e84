"""`beacon eval harness`: tasks of lm-eval on the base and at ratios, kept task by task."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from activation_beacon.cli import app
from activation_beacon.errors import FileFormatError, MismatchError
from activation_beacon.evaluation.harness_tasks import HarnessResults, include_facts
from activation_beacon.evaluation.results import HARNESS
from saved_models import CHUNK, save_adapter, save_base

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # lm-eval's and its dependencies' own

LINE = {"asked": "a", "task": "a", "metric": "acc", "value": 0.5, "stderr": None, "samples": 4}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" lion", " tiger"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base, an adapter, and two tasks: one shorter and one longer than a chunk."""
    root = tmp_path_factory.mktemp("harness")
    save_adapter(root / "adapter", save_base(root / "base"), seed=1)
    (root / "tasks").mkdir()
    for name, size in (("short_zoo", CHUNK // 2), ("long_zoo", 3 * CHUNK)):
        rows = [{"question": f"{number}. Who roars? " * 20, "label": number % 2} for number in range(4)]
        rows = [{**row, "question": row["question"][:size]} for row in rows]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=root / f"{name}.jsonl"))
    return root


@pytest.fixture
def run(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import tasks

    # lm-eval reads its own fifteen thousand task files each time, and none of them is needed here.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    options = ["--model", str(files / "adapter"), "--base", str(files / "base"), "--include", str(files / "tasks")]
    return lambda *args: CliRunner().invoke(app, ["eval", "harness", *options, *args])  # the last --include counts


def test_short_prompts_are_the_base_s_own_and_long_ones_are_compressed(run, tmp_path):
    result = run("short_zoo", "long_zoo", "--ratios", "none,2,8", "-o", "out")
    assert result.exit_code == 0, result.output
    lines = HarnessResults(tmp_path / "out").lines
    assert [(line["task"], line["ratio"]) for line in lines] == [
        (name, ratio) for ratio in ("none", "2", "8") for name in ("short_zoo", "long_zoo")
    ]
    assert {(line["metric"], line["samples"]) for line in lines} == {("acc", 4)}
    short = {line["value"] for line in lines if line["task"] == "short_zoo"}
    assert len(short) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| task | n | base | x2 | x8 |" in report
    assert "| long_zoo, acc | 4 | 0." in report


def test_what_is_finished_is_not_run_again(run, tmp_path):
    first = run("short_zoo", "--ratios", "none", "-o", "out", "--json")
    assert first.exit_code == 0, first.output
    path = tmp_path / "out" / HARNESS
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"asked": "lo')  # cut short by a crash
    again = run("short_zoo", "--ratios", "none,4", "-o", "out", "--json")
    assert again.exit_code == 0, again.output
    assert path.read_bytes().startswith(kept)
    assert [line["ratio"] for line in json.loads(again.stdout)["harness"]] == ["none", "4"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("short_zo",), "Error: lm-eval has no task 'short_zo'. Is it short_zoo"),
        (("short_zoo", "--ratios", "none,3"), "Error: ratio (3) must divide chunk_size (32). Use 2, 4, 8."),
        (("short_zoo", "--ratios", "all"), 'Error: --ratios must be ints, "auto" or "none", such as none,4,8; got \'all\'.'),
        (("short_zoo", "--include", "nowhere"), "Error: --include (nowhere) is no folder."),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(run, files, args, text):
    result = (
        run(*args, "-o", "out")
        if "--include" not in args
        else CliRunner().invoke(app, ["eval", "harness", *args, "-o", "out"])
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(text)
    assert not Path("out").exists()


def test_lines_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    HarnessResults(tmp_path, {"limit": 5}).add([{**LINE, "ratio": "4"}])
    with pytest.raises(MismatchError, match=r"holds results with limit 5; this run has 6\."):
        HarnessResults(tmp_path, {"limit": 6})
    path = tmp_path / HARNESS
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(FileFormatError, match=r"line 1 is not JSON"):
        HarnessResults(tmp_path)


def test_results_of_a_folder_of_tasks_are_not_taken_for_those_of_another_one_of_its_name(run, files, tmp_path):
    for parent in ("one", "other"):
        shutil.copytree(files / "tasks", tmp_path / parent / "tasks")
    args = ("short_zoo", "--ratios", "none", "-o", "out", "--include")
    assert run(*args, "one/tasks").exit_code == 0
    kept = (tmp_path / "out" / HARNESS).read_bytes()
    assert run(*args, "other/tasks").exit_code == 0  # the same tasks, elsewhere
    with (tmp_path / "other" / "tasks" / "short_zoo.yaml").open("a") as file:
        file.write("num_fewshot: 1\n")
    result = run(*args, "other/tasks")
    assert result.exit_code == 1
    assert re.search(
        r"^Error: out/harness.jsonl holds results of an --include folder of this name with other contents \(SHA-256 \w{16}; this one "
        r"has \w{16}\)\. Choose another folder of results, or the tasks that it was begun with\.$",
        result.stderr,
        re.M,
    )
    assert (tmp_path / "out" / HARNESS).read_bytes() == kept
    assert "include tasks, sha256" in (tmp_path / "out" / "report.md").read_text()
    run_json = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_json["origin"]["models"] == [str(files / "adapter")]


def test_lines_from_before_the_contents_of_a_folder_were_noted_are_refused_with_what_to_add(tmp_path):
    (tmp_path / "tasks").mkdir()
    HarnessResults(tmp_path, {"limit": 5}).add([{**LINE, "ratio": "4"}])
    with pytest.raises(MismatchError) as error:
        HarnessResults(tmp_path, {"limit": 5, **include_facts(tmp_path / "tasks")})
    digest = include_facts(tmp_path / "tasks")["sha256"]
    assert f'add "include": "tasks", "sha256": "{digest}" to the "facts" of each of its lines.' in str(error.value)


def test_without_include_old_lines_go_on(tmp_path):
    HarnessResults(tmp_path, {"limit": 5}).add([{**LINE, "ratio": "4"}])
    assert len(HarnessResults(tmp_path, {"limit": 5, **include_facts(None)}).lines) == 1


def test_the_table_has_a_row_for_each_metric_and_a_column_for_each_ratio(tmp_path):
    results = HarnessResults(tmp_path, {})
    results.add([{**LINE, "ratio": "16"}, {**LINE, "ratio": "none", "stderr": 0.25}])
    results.add([{**LINE, "ratio": "4", "metric": "f1"}, {**LINE, "ratio": "4", "task": "group", "samples": None}])
    results.add([{**LINE, "ratio": "4", "samples": 3}])
    assert results.table().header == ["task", "n", "base", "x4", "x16"]
    assert results.table().rows == [
        ["a, acc", "4", "0.500 ± 0.250", "-", "0.500"],
        ["a, f1", "4", "-", "0.500", "-"],
        ["group, acc", "-", "-", "0.500", "-"],
        ["a, acc", "3", "-", "0.500", "-"],
    ]
