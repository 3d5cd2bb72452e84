"""Folders of results beside one another: paired over what all have, refused where they did not measure the same."""

import importlib.util
import json
import re

import pytest
from typer.testing import CliRunner

from activation_beacon.cli import app
from activation_beacon.errors import InputError, MismatchError, StorageError
from activation_beacon.evaluation.blocks import Paragraph, Table, markdown_of
from activation_beacon.evaluation.comparison import compare, labels_of
from activation_beacon.evaluation.comparison_report import HARNESS_TEXT, as_json, blocks_of, write_comparison
from activation_beacon.evaluation.metrics import FEW, mean, mean_difference
from activation_beacon.evaluation.results import HARNESS, RUN, Key, Results
from activation_beacon.evaluation.summary import Way

MODEL = {
    "base_model": "tiny",
    "base_fingerprint": "b0",
    "adapter_fingerprint": "a0",
    "dtype": "float32",
    "chunk_size": 32,
    "is_trained": True,
}
SETTINGS = {"seed": 0}
SCORES = {f"s{number}": float(number % 2) for number in range(8)}
BETTER = SCORES | {"s0": 1.0, "s2": 1.0}
WAYS = (("full", None), ("beacons", 4), ("beacons", 8))


def folder_of(path, scores, *, ways=WAYS, task="needles", settings=SETTINGS, length=64, quality="score", **model):
    """A folder in which every way has these scores."""
    name = model.pop("name", None)
    results = Results(path, {**MODEL, **model}, name=name)
    results.open_task(task, settings, quality)
    for method, ratio in ways:
        for sample, value in scores.items():
            results.add(Key(task, method, ratio, length, sample), {quality: value, "cache_length": 1, "cache_bytes": 1})
    return path


@pytest.fixture
def two(tmp_path):
    first = folder_of(tmp_path / "first", SCORES, name="default")
    return first, folder_of(tmp_path / "second", BETTER, name="mine", adapter_fingerprint="a1")


def lines_of(found):
    return {(line.task, line.length, line.way.label): line for line in found.lines}


def table_of(found, task="needles"):
    blocks = blocks_of(found)
    place = next(n for n, block in enumerate(blocks) if getattr(block, "text", "").startswith(f"{task}, "))
    return blocks[place + 1]


# --- what is compared ------------------------------------------------------------------------------------------------


def test_each_way_has_the_mean_of_each_folder_and_the_paired_difference(two):
    found = compare(two)
    assert [line.way for line in found.lines] == [Way("full", None), Way("beacons", 4), Way("beacons", 8)]
    for line in found.lines:
        assert line.means == [mean(list(SCORES.values())), mean(list(BETTER.values()))]
        assert line.differences == [mean_difference(list(BETTER.values()), list(SCORES.values()))]
        assert (line.differences[0].value, line.differences[0].count) == (0.25, 8)
        assert line.differences[0].low is not None
    assert found.unshared == {}


def test_samples_are_paired_by_name_whatever_their_order(tmp_path):
    first = folder_of(tmp_path / "a", SCORES)
    second = folder_of(tmp_path / "b", dict(reversed(BETTER.items())))
    expected = mean_difference(list(BETTER.values()), list(SCORES.values()))
    assert {line.differences[0] for line in compare([first, second]).lines} == {expected}


def test_means_are_over_shared_samples_only(tmp_path):
    first = folder_of(tmp_path / "a", SCORES | {"more": 100.0})
    found = compare([first, folder_of(tmp_path / "b", BETTER)])
    assert {line.means[0] for line in found.lines} == {mean(list(SCORES.values()))}
    assert found.unshared_text() == "Only in a: 1 sample of needles 64."


@pytest.mark.parametrize("count", [7, 8])
def test_few_shared_samples_have_no_interval(tmp_path, count):
    few = dict(list(SCORES.items())[:count])
    found = compare([folder_of(tmp_path / "a", few), folder_of(tmp_path / "b", BETTER)])
    has_interval = {each.low is not None for line in found.lines for each in (*line.means, *line.differences)}
    assert has_interval == {count == 8}
    assert (Paragraph(FEW) in blocks_of(found)) == (count == 7)


def test_differences_of_several_folders_are_to_the_first(two, tmp_path):
    third = folder_of(tmp_path / "third", dict.fromkeys(SCORES, 1.0))
    found = compare([*two, third])
    assert {tuple(each.value for each in line.differences) for line in found.lines} == {(0.25, 0.5)}
    assert table_of(found).header[-2:] == ["second less first", "third less first"]


def test_what_only_some_have_is_one_line(two, tmp_path):
    first, second = two
    third = folder_of(tmp_path / "third", dict(list(SCORES.items())[:5]), ways=WAYS[:2])
    folder_of(first, SCORES, length=128)
    folder_of(first, {"a": 2.0}, task="lm", quality="nats")
    folder_of(second, {"a": 2.0}, task="lm", quality="nats", adapter_fingerprint="a1")
    found = compare([first, second, third])
    assert found.unshared_text() == (
        "Only in first: needles 128. "
        "Only in first and second: needles 64 beacons x8; 3 samples of needles 64 full, beacons x4; lm."
    )
    assert list(lines_of(found)) == [("needles", 64, "full"), ("needles", 64, "beacons x4")]
    assert Paragraph(found.unshared_text()) in blocks_of(found)


def test_a_refused_sample_is_not_a_shared_one(two):
    first, second = two
    results = Results(second)
    key = Key("needles", "full", None, 64, "s0")
    results.add(key, {"refused": "Too long."})
    found = compare([first, second])
    assert lines_of(found)["needles", 64, "full"].means[0].count == 7
    assert found.unshared_text() == "Only in first: 1 sample of needles 64 full."


def test_tasks_are_chosen(two):
    for path, adapter in zip(two, ("a0", "a1"), strict=True):
        folder_of(path, SCORES, task="multi-turn", adapter_fingerprint=adapter)
    assert {line.task for line in compare(two).lines} == {"needles", "multi-turn"}
    assert {line.task for line in compare(two, tasks=["multi-turn"]).lines} == {"multi-turn"}


def test_a_base_read_in_half_precision_is_the_same_base(tmp_path):
    first = folder_of(tmp_path / "a", SCORES, base_fingerprint="b0-b1")
    second = folder_of(tmp_path / "b", SCORES, base_fingerprint="b1", dtype="float16")
    found = compare([first, second])
    assert Paragraph("**Not the adapter alone**: the folders differ in dtype too.") in blocks_of(found)


@pytest.mark.parametrize(("number", "is_told"), [(0, False), (64, True)])
def test_local_tokens_are_named_too(tmp_path, number, is_told):
    found = compare([folder_of(tmp_path / "a", SCORES), folder_of(tmp_path / "b", SCORES, local_tokens=number)])
    told = Paragraph("**Not the adapter alone**: the folders differ in local tokens too.") in blocks_of(found)
    assert told == is_told


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"base_fingerprint": "b9", "base_model": "other"},
            (
                "a and b are of different base models (tiny, fingerprint b0, other, fingerprint b9), and what they score says "
                "nothing of their adapters. Compare folders of one base model."
            ),
        ),
        (
            {"settings": {"seed": 1}},
            (
                "a and b did not measure the same needles: seed is 0 in a, 1 in b. Run it anew with the same settings, or name other "
                "tasks with --tasks."
            ),
        ),
        (
            {"settings": {"seed": 0, "score": "contains"}},
            "a and b did not measure the same needles: score is not noted in a, 'contains' in b. Run it anew",
        ),
        (
            {"settings": {"seed": 0, "sha256": ["01"]}},
            (
                "a and b did not measure the same needles: sha256 is not noted in a, ['01'] in b. If you know that the files are the "
                'same, add "sha256": ["01"] to its settings in the run.json that lacks them, or name other tasks with --tasks.'
            ),
        ),
    ],
)
def test_folders_that_did_not_measure_the_same_are_refused_with_what_differs(tmp_path, changed, message):
    first = folder_of(tmp_path / "a", SCORES)
    with pytest.raises(MismatchError) as error:
        compare([first, folder_of(tmp_path / "b", SCORES, **changed)])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_files_of_one_name_with_other_contents_are_refused(tmp_path):
    folders = [folder_of(tmp_path / name, SCORES, settings={"sha256": [name]}) for name in "ab"]
    with pytest.raises(
        MismatchError, match=r"sha256 is \['a'\] in a, \['b'\] in b\. Files of one name have other contents: run"
    ):
        compare(folders)


def test_losses_of_another_chunk_size_are_refused_and_scores_are_not(tmp_path):
    for name, size in (("a", 32), ("b", 64)):
        folder_of(tmp_path / name, {"d": 2.0}, task="lm", quality="nats", chunk_size=size)
        folder_of(tmp_path / name, SCORES, chunk_size=size)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(
        MismatchError, match=r"the same lm: chunk_size is 32 in a, 64 in b\. Its loss is taken after the"
    ):
        compare(folders)
    found = compare(folders, tasks=["needles"])
    assert Paragraph("**Not the adapter alone**: the folders differ in chunk size too.") in blocks_of(found)


def test_a_third_folder_is_checked_too(two, tmp_path):
    third = folder_of(tmp_path / "third", SCORES, settings={"seed": 7})
    with pytest.raises(
        MismatchError, match="first and third did not measure the same needles: seed is 0 in first, 7 in"
    ):
        compare([*two, third])


def test_folders_that_share_nothing_are_refused(tmp_path):
    first = folder_of(tmp_path / "a", SCORES)
    with pytest.raises(InputError) as error:
        compare([first, folder_of(tmp_path / "b", SCORES, length=128)])
    assert str(error.value) == (
        "a and b share no finished sample. Only in a: needles 64. Only in b: needles 128. "
        "Run the same tasks, lengths, methods and ratios into each."
    )


def test_what_is_no_comparison_is_refused(two, tmp_path):
    first, second = two
    with pytest.raises(InputError, match=r"takes two folders of results or more; got 1\. Name another one\."):
        compare([first])
    with pytest.raises(InputError, match=r"first is given twice\. Name each folder once\."):
        compare([second, first, tmp_path / "second" / ".." / "first"])
    with pytest.raises(InputError, match=r"No folder has a task 'hay'\. Use some of needles\."):
        compare(two, tasks=["hay"])
    with pytest.raises(StorageError, match=r"nowhere holds no results"):
        compare([first, tmp_path / "nowhere"])


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_column_is_named_by_folder_and_adapter(tmp_path):
    named = folder_of(tmp_path / "a", SCORES, name="runs/mine")
    untrained = folder_of(tmp_path / "b", SCORES, name="new", is_trained=False)
    old = folder_of(tmp_path / "c", SCORES, adapter_fingerprint="0123456789abcdef-0123")
    forget_origin(old)
    labels = labels_of([Results(path) for path in (named, untrained, old)])
    assert labels == ["a (runs/mine)", "b (new, untrained)", "c (0123456789abcdef)"]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [folder_of(tmp_path / parent / "out", SCORES, name=parent) for parent in ("x", "y")]
    assert labels_of([Results(path) for path in paths]) == [f"{tmp_path}/x/out (x)", f"{tmp_path}/y/out (y)"]


def forget_origin(folder):
    """Make it a folder from before that was noted."""
    run = json.loads((folder / RUN).read_text())
    del run["origin"]
    (folder / RUN).write_text(json.dumps(run))


def test_the_first_table_says_what_each_folder_is_of(two):
    forget_origin(two[1])
    [table] = [block for block in blocks_of(compare(two)) if isinstance(block, Table) and block.header[0] == "folder"]
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert (rows[0]["model"], rows[0]["adapter"], rows[0]["version"] != "-") == ("default", "a0", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d.*", rows[0]["samples of"])
    assert [rows[1][name] for name in ("model", "adapter", "base", "version", "samples of")] == [
        "-",
        "a1",
        "tiny",
        "-",
        "-",
    ]


def test_folders_of_one_adapter_are_said_to_be(two, tmp_path):
    note = Paragraph("**One adapter**: all folders are of the same one.")
    assert note not in blocks_of(compare(two))
    assert note in blocks_of(compare([two[0], folder_of(tmp_path / "again", BETTER)]))


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_each_folder_and_difference(two):
    table = table_of(compare(two))
    assert table.header == ["method, score", "first (default)", "second (mine)", "n", "second less first"]
    row = next(row for row in table.rows if row[0] == "beacons x4")
    assert row[1:] == ["0.500 [0.215, 0.785]", "0.750 [0.409, 0.929]", "8", "0.250 [0.000, 0.500]"]


def test_json_has_what_the_tables_have(two):
    found = json.loads(json.dumps(as_json(compare(two))))
    assert [(each["name"], each["adapter_fingerprint"]) for each in found["folders"]] == [
        ("first", "a0"),
        ("second", "a1"),
    ]
    row = found["rows"][1]
    assert {name: row[name] for name in ("task", "length", "method", "ratio", "samples")} == {
        "task": "needles", "length": 64, "method": "beacons", "ratio": 4, "samples": 8
    }  # fmt: skip
    assert [(each["folder"], each["value"]) for each in row["score"]] == [("first", 0.5), ("second", 0.75)]
    [difference] = row["differences"]
    assert (difference["folder"], difference["less"], difference["value"], difference["count"]) == (
        "second",
        "first",
        0.25,
        8,
    )
    assert found["unshared"] == []


def test_tasks_of_lm_eval_are_said_not_to_be_compared(two):
    assert Paragraph(HARNESS_TEXT) not in blocks_of(compare(two))
    (two[1] / HARNESS).write_text('{"facts": {}}\n')
    assert Paragraph(HARNESS_TEXT) in blocks_of(compare(two))


def test_a_line_of_a_picture_is_a_folder_and_the_base_is_a_level(two, tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, path, format: drawn.append(self) or path.touch())
    [picture] = write_comparison(compare(two), tmp_path / "both.md")
    assert picture == tmp_path / "plots" / "both-needles.png"
    [axis] = drawn[0].axes
    assert axis.get_title() == "64 tokens"
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["full", "first (default)", "second (mine)"]
    assert [list(handle.lines[0].get_ydata()) for handle in handles[1:]] == [[0.5, 0.5], [0.75, 0.75]]


def test_one_ratio_is_no_line(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [folder_of(tmp_path / name, SCORES, ways=WAYS[:2]) for name in "ab"]
    assert write_comparison(compare(folders), tmp_path / "both.md") == []
    assert not (tmp_path / "plots").exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["eval", "compare", *args])


def test_the_command_prints_the_tables(two, run, tmp_path):
    result = run("first", "second")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == markdown_of(blocks_of(compare(two))).strip()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_the_command_writes_a_file_and_pictures(two, run, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("first", "second", "-o", "both.md")
    assert result.stdout.splitlines()[-1] == "Report: both.md, plots/both-needles.png"
    text = (tmp_path / "both.md").read_text()
    assert text.startswith(markdown_of(blocks_of(compare(two))).strip())
    assert "](plots/both-needles.png)" in text
    assert (tmp_path / "plots" / "both-needles.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("first", "second", "-o", "both.md", "--force", "--json").stdout)
    assert (found["report"], found["pictures"]) == ("both.md", ["plots/both-needles.png"])


def test_without_matplotlib_there_are_tables_and_no_picture(two, run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name))
    result = run("first", "second", "-o", "both.md")
    assert result.exit_code == 0, result.output
    assert result.stderr == 'No picture: matplotlib is not installed (pip install "activation-beacon[eval]").\n'
    assert "| beacons x4 |" in (tmp_path / "both.md").read_text()
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("first",), "Error: A comparison takes two folders of results or more; got 1. Name another one."),
        (("first", "nowhere"), "Error: nowhere holds no results (run.json is missing). Name a folder of `beacon eval`."),
        (("first", "first"), "Error: first is given twice. Name each folder once."),
        (("first", "second", "--tasks", "qa"), "Error: No folder has a task 'qa'. Use some of needles."),
        (("first", "second", "-o", "no/both.md"), "Error: no/both.md cannot be written: there is no folder no."),
        (("first", "second", "-o", "first/run.json"), "Error: first/run.json exists already. Choose another name, or"),
        (("first", "second", "-o", "first"), "Error: first is a folder. Name a file, such as first/comparison.md."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line(two, run, args, message):
    pytest.importorskip("matplotlib")
    result = run(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith(message)
    assert len(result.stderr.splitlines()) == 1
