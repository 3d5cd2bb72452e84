"""Runs: complete, resumable, and never mixed up."""

import itertools
import json
import os
import re
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest

from activation_beacon import __version__
from activation_beacon.errors import FileFormatError, InputError, MismatchError, StorageError
from activation_beacon.evaluation import contexts, language_modelling, methods, samples
from activation_beacon.evaluation.results import Key, Results
from activation_beacon.evaluation.runner import Plan, draw_samples, run_task
from activation_beacon.evaluation.tasks import (
    Answering,
    LanguageModelling,
    Origin,
    multi_turn,
    needles,
    other_value,
    packed_qa,
    reconstruction,
)
from activation_beacon.processes import Processes
from evaluation_models import STORY, beacon_model, byte_prompt, ids_of
from saved_models import CHUNK, byte_tokenizer

MODEL = {"base": "a", "adapter": "b"}


@pytest.fixture(scope="module")
def model():
    return beacon_model()


@pytest.fixture(scope="module", autouse=True)
def _still_clock():
    """Seconds are all that two runs may differ in."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (contexts, language_modelling, methods, samples):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        yield


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "docs.jsonl"
    rows = [{"id": f"doc{number}", "text": STORY[number : number + 50 * (number + 2)]} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lm_task(documents):
    return LanguageModelling(byte_tokenizer(), [documents])


def needle_task(**settings):
    return needles(byte_prompt(), ids_of(STORY), depths=2, **settings)


LM = Plan(("full", "alone", "beacons"), (2, 4), (3 * CHUNK, 5 * CHUNK), limit=3)
NEEDLES = Plan(("full", "shuffled", "beacons", "recent"), (4,), (400,), limit=3)


def run_both(model, documents, folder, **options):
    results = Results(folder, MODEL)
    run_task(model, lm_task(documents), LM, results, **options)
    run_task(model, needle_task(), NEEDLES, results, **options)
    return Results(folder)


@pytest.fixture(scope="module")
def whole(model, documents, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    run_both(model, documents, folder)
    return folder


def test_a_run_has_a_line_for_every_task_method_ratio_length_and_sample(whole):
    results = Results(whole)
    ways = [("full", None), ("alone", None), ("beacons", 2), ("beacons", 4)]
    expected = {
        Key("lm", method, ratio, length, f"doc{number}")
        for (method, ratio), (length, first) in itertools.product(ways, [(3 * CHUNK, 0), (5 * CHUNK, 2)])
        for number in range(first, first + 3)
    }
    ways = [("full", None), ("shuffled", None), ("beacons", 4), ("recent", 4)]
    ids = ("sentence-0-0", "number-0-0", "uuid-0-0")
    expected |= {Key("needles", *way, 400, name) for way, name in itertools.product(ways, ids)}
    assert set(results.records) == expected
    assert len((whole / "results.jsonl").read_text().splitlines()) == len(expected)


@pytest.mark.parametrize("kept_bytes", [1, 0.5, -1])
def test_a_run_killed_anywhere_continues_to_the_same_results(model, documents, whole, tmp_path, kept_bytes):
    shutil.copytree(whole, tmp_path / "cut")
    lines = tmp_path / "cut" / "results.jsonl"
    content = lines.read_bytes()
    kept = int(len(content) * kept_bytes) if isinstance(kept_bytes, float) else kept_bytes
    lines.write_bytes(content[:kept])
    continued = run_both(model, documents, tmp_path / "cut")
    assert continued.records == Results(whole).records
    assert sorted(lines.read_bytes().splitlines()) == sorted(content.splitlines())


def test_processes_share_the_samples_and_the_first_takes_in_what_the_others_did(model, documents, whole, tmp_path):
    folder = tmp_path / "out"
    first, second = (Results(folder, MODEL, rank=rank) for rank in range(2))
    for results in (first, second):
        group = Processes(results.rank, 2)
        run_task(model, lm_task(documents), LM, results, group=group)
        run_task(model, needle_task(), NEEDLES, results, group=group)
    assert not first.records.keys() & second.records.keys()
    assert {len(first.records), len(second.records)} == {
        len(Results(whole).records) // 2 - 2,
        len(Results(whole).records) // 2 + 2,
    }
    assert Results(folder).records == Results(whole).records  # reading only
    assert (folder / "results-1.jsonl").exists()
    first.gather()
    assert first.records == Results(whole).records
    assert [path.name for path in folder.glob("*.jsonl")] == ["results.jsonl"]
    assert sorted((folder / "results.jsonl").read_text().splitlines()) == sorted(
        (whole / "results.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize("reader", [{}, {"model": MODEL, "rank": 1}], ids=["a report", "another process"])
def test_who_does_not_write_a_file_does_not_mend_it(whole, tmp_path, reader):
    shutil.copytree(whole, tmp_path / "running")
    lines = tmp_path / "running" / "results.jsonl"
    lines.write_bytes(content := lines.read_bytes()[:-7])  # the last line is being written
    results = Results(tmp_path / "running", **reader)
    assert len(results.records) == len(Results(whole).records) - 1
    assert lines.read_bytes() == content


def test_what_other_processes_did_before_a_run_was_killed_counts(model, documents, whole, tmp_path):
    folder = tmp_path / "out"
    Results(folder, MODEL)
    run_task(model, lm_task(documents), LM, Results(folder, MODEL, rank=1), group=Processes(1, 2))
    part = folder / "results-1.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text(lines[0])  # it was being taken in
    part.write_text("".join(lines)[:-9])
    continued = run_both(model, documents, folder)
    assert continued.records == Results(whole).records
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(continued.records)
    assert not part.exists()


def test_what_is_finished_is_not_run_again(model, documents, whole, monkeypatch):
    before = Results(whole).records
    monkeypatch.setattr(LanguageModelling, "run", None)
    monkeypatch.setattr(Answering, "run", None)
    assert run_both(model, documents, whole).records == before


def test_a_larger_limit_adds_to_what_is_there(model, documents, tmp_path):
    task = lm_task(documents)
    for limit in (1, 2):
        run_task(model, task, Plan(("full",), (), (3 * CHUNK,), limit), Results(tmp_path / "out", MODEL))
    assert [key.sample for key in Results(tmp_path / "out").records] == ["doc0", "doc1"]


def test_progress_counts_every_unit(model, documents, tmp_path):
    calls = []
    results = Results(tmp_path / "out", MODEL)
    run_task(model, lm_task(documents), LM, results, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(25))
    assert {total for _, total, _ in calls} == {24}
    assert calls[3][2] == f"lm {3 * CHUNK} beacons x4"


def test_texts_that_do_not_fit_are_on_record(documents, tmp_path):
    model = beacon_model(max_position_embeddings=2 * CHUNK)
    results = Results(tmp_path / "out", MODEL)
    run_task(model, lm_task(documents), Plan(("full", "beacons"), (2, 8), (5 * CHUNK,), 1), results)
    full, at_2, at_8 = results.records.values()
    assert at_2["refused"].startswith("A text of 160 tokens needs")
    assert full["nats"] > 0
    assert at_8["nats"] > 0


def test_documents_of_one_id_are_told_apart(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text((json.dumps({"id": "same", "text": STORY}) + "\n") * 3, encoding="utf-8")
    assert [text.id for text in lm_task(path).samples(40)] == ["same", "same#2", "same#3"]


def test_three_turns_run(model, tmp_path):
    results = Results(tmp_path / "out", MODEL)
    run_task(model, multi_turn(byte_prompt(), ids_of(STORY), count=2), Plan(("beacons",), (4,), (900,)), results)
    assert [len(record["answer_seconds"]) for record in results.records.values()] == [3, 3]


# --- shuffling -------------------------------------------------------------------------------------------------------


def test_a_shuffled_context_is_always_another_one():
    assert [other_value("aabbc", index) for index in range(5)] == ["b", "b", "a", "a", "b"]


def test_chunks_are_read_on_another_document_s_beacons(model, documents, tmp_path):
    results = Results(tmp_path / "out", MODEL)
    run_task(model, lm_task(documents), Plan(("beacons", "shuffled"), (4,), (3 * CHUNK,), 2), results)
    nats = {(key.method, key.sample): record["nats"] for key, record in results.records.items()}
    first, second = (text.ids for text in itertools.islice(lm_task(documents).samples(3 * CHUNK), 2))
    expected = language_modelling.measure(model, first, "shuffled", ratio=4, other=second)["nats"]
    assert nats["shuffled", "doc0"] == expected != nats["beacons", "doc0"]


def test_one_context_cannot_be_shuffled():
    with pytest.raises(InputError, match=r'The method "shuffled" needs samples of two contexts at least.'):
        other_value("aa", 0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            Plan(("best",), (2,), (96,)),
            f"The task lm has no method 'best'. Use some of {', '.join(LanguageModelling.methods)}.",
        ),
        (
            Plan(("full",), (2,), (96, 10**5)),
            "The task lm has no sample of 100,000 tokens. Use a shorter length, or longer texts.",
        ),
        (
            Plan(("full",), (2,), (96, CHUNK + 1)),
            f"A text of {CHUNK + 1} tokens has none after its first chunk ({CHUNK}) to measure. Use a longer length.",
        ),
        (
            Plan(("full", "shuffled"), (2,), (96,), 1),
            'The method "shuffled" needs samples of two contexts at least. Take more of them (--limit).',
        ),
    ],
)
def test_plans_that_cannot_be_run_are_refused_before_anything_is_measured(model, documents, tmp_path, plan, message):
    results = Results(tmp_path / "out", MODEL)
    with pytest.raises(InputError) as error:
        run_task(model, lm_task(documents), plan, results)
    assert str(error.value) == message
    assert not results.records


@pytest.mark.parametrize("length", [1, 50, 140])
@pytest.mark.parametrize(
    "task",
    [
        needle_task(),
        needle_task(kinds=("fact",)),
        multi_turn(byte_prompt(), ids_of(STORY), count=4),
        reconstruction(byte_prompt(), ids_of(STORY), count=4),
    ],
    ids=lambda task: task.name,
)
def test_a_length_that_has_no_room_is_refused_with_one_that_has_for_all_samples(model, task, length):
    with pytest.raises(InputError) as error:
        draw_samples(model, task, Plan(("full",), (), (length,)))
    pattern = (
        rf"The task {task.name} has samples that {length} tokens have no room for: template, questions, answers and some text need "
        r"more\. Use a length of at least (\d+)\."
    )
    least = int(re.fullmatch(pattern, str(error.value))[1])
    [drawn] = draw_samples(model, task, Plan(("full",), (), (least,))).values()
    for sample in drawn:
        asked = sum(len(byte_prompt().question(each.text)) + each.max_new_tokens for each in sample.questions)
        assert sample.context
        assert len(byte_prompt().opening(sample.context)) + asked <= least


def test_a_folder_that_does_not_say_has_no_local_tokens(tmp_path):
    Results(tmp_path, MODEL)
    Results(tmp_path, {**MODEL, "local_tokens": 0})
    with pytest.raises(MismatchError, match=r"\(local_tokens 0, this one has 8\)"):
        Results(tmp_path, {**MODEL, "local_tokens": 8})


def test_results_of_another_model_are_not_mixed_in(tmp_path):
    Results(tmp_path, MODEL)
    with pytest.raises(MismatchError) as error:
        Results(tmp_path, {**MODEL, "adapter": "c"})
    assert (
        str(error.value)
        == f"{tmp_path} holds results of another model (adapter b, this one has c). Choose another folder."
    )


def test_results_of_another_setting_are_not_mixed_in(model, tmp_path):
    run_task(model, needle_task(), NEEDLES, Results(tmp_path, MODEL))
    with pytest.raises(MismatchError) as error:
        run_task(model, needle_task(seed=1), NEEDLES, Results(tmp_path, MODEL))
    assert str(error.value) == (
        f"{tmp_path} holds results of needles with seed 0; this run has 1. Choose another folder, or the same settings."
    )


TASKS_OF_FILES = {
    "lm": lm_task,
    "qa": lambda path: packed_qa(byte_prompt(), [path]),
    "needles": lambda path: needle_task(source=Origin(path.name, (path,))),
    "multi-turn": lambda path: multi_turn(byte_prompt(), ids_of(STORY), source=Origin(path.name, (path,))),
    "reconstruction": lambda path: reconstruction(byte_prompt(), ids_of(STORY), source=Origin(path.name, (path,))),
}


def write_records(folder, text):
    """A file of one name that every task can read."""
    folder.mkdir(exist_ok=True)
    record = {"id": "1", "text": text, "context": text, "question": "What?", "answer": "Nothing."}
    (folder / "docs.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return folder / "docs.jsonl"


def opened(folder, task):
    results = Results(folder, MODEL)
    results.open_task(task.name, task.settings, task.quality)
    return results


@pytest.mark.parametrize("name", TASKS_OF_FILES)
def test_results_on_a_file_of_the_same_name_and_other_contents_are_not_mixed_in(tmp_path, name):
    make = TASKS_OF_FILES[name]
    first, other = write_records(tmp_path / "a", STORY), write_records(tmp_path / "b", STORY + "More.")
    task = make(first)
    assert task.name == name
    opened(tmp_path / "out", task)
    opened(tmp_path / "out", make(write_records(tmp_path / "moved", STORY)))  # the same file elsewhere
    with pytest.raises(MismatchError) as error:
        opened(tmp_path / "out", make(other))
    [ours], [theirs] = make(other).settings["sha256"], task.settings["sha256"]
    assert str(error.value) == (
        f"{tmp_path}/out holds results of {name} on files of these names with other contents (SHA-256 {theirs}; these have "
        f"{ours}). Choose another folder, or the files that it was begun with."
    )


@pytest.mark.parametrize("name", TASKS_OF_FILES)
def test_a_file_that_was_written_anew_is_another_one(tmp_path, name):
    make = TASKS_OF_FILES[name]
    opened(tmp_path / "out", make(write_records(tmp_path / "a", STORY)))
    with pytest.raises(MismatchError, match="on files of these names with other contents"):
        opened(tmp_path / "out", make(write_records(tmp_path / "a", STORY[1:])))


@pytest.mark.parametrize("name", TASKS_OF_FILES)
def test_results_without_contents_are_read_and_gone_on_with_only_by_who_vouches_for_them(tmp_path, name):
    task = TASKS_OF_FILES[name](write_records(tmp_path / "a", STORY))
    before = {key: value for key, value in task.settings.items() if key != "sha256"}
    results = Results(tmp_path / "out", MODEL)
    results.open_task(name, before, task.quality)
    results.add(key := Key(name, "full", None, 96, "1"), {task.quality: 1.0})
    assert Results(tmp_path / "out").records[key][task.quality] == 1.0
    with pytest.raises(MismatchError) as error:
        opened(tmp_path / "out", task)
    [digest] = task.settings["sha256"]
    assert str(error.value) == (
        f"{tmp_path}/out holds results of {name} from before the contents of files were noted: whether they are of these files "
        f'cannot be told. Choose another folder; or, if you know that they are, add "sha256": ["{digest}"] to the settings of '
        f"{name} in {tmp_path}/out/run.json."
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["tasks"][name]["settings"] |= json.loads("{" + str(error.value).split("add ")[1].split(" to the")[0] + "}")
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    assert key in opened(tmp_path / "out", task).records


def test_what_comes_from_no_file_has_no_contents_to_be_checked():
    assert "sha256" not in needle_task(source=Origin("A book")).settings
    assert "sha256" not in LanguageModelling(byte_tokenizer(), ["owner/name:train"]).settings


def test_another_setting_is_named_before_other_contents(tmp_path):
    first, other = write_records(tmp_path / "a", STORY), write_records(tmp_path / "b", STORY + "More.")
    opened(tmp_path / "out", LanguageModelling(byte_tokenizer(), [first], field="text"))
    with pytest.raises(MismatchError, match=r"holds results of lm with on_error 'stop'; this run has 'skip'\."):
        opened(tmp_path / "out", LanguageModelling(byte_tokenizer(), [other], on_error="skip"))


# --- who ran it, and when --------------------------------------------------------------------------------------------


@pytest.fixture
def days(monkeypatch):
    """Sets the day that it is."""
    from activation_beacon.evaluation import results

    class Clock(datetime):
        today = "2026-05-01"

        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(cls.today).replace(hour=23, tzinfo=tz)

    monkeypatch.setattr(results, "datetime", Clock)
    return Clock


def add_sample(folder, sample, **options):
    Results(folder, MODEL, **options).add(Key("lm", "full", None, 96, sample), {"nats": 1.0})


def origin_of(folder):
    return json.loads((folder / "run.json").read_text()).get("origin")


def test_a_folder_knows_the_model_by_name_the_version_and_the_first_and_last_day(tmp_path, days):
    Results(tmp_path, MODEL, name="mine")
    assert origin_of(tmp_path) is None, "no sample has been run"
    add_sample(tmp_path, "a", name="mine")
    expected = {"models": ["mine"], "versions": [__version__], "first": "2026-05-01", "last": "2026-05-01"}
    assert origin_of(tmp_path) == Results(tmp_path).origin == expected
    days.today = "2026-05-03"
    Results(tmp_path, MODEL, name="mine")
    assert origin_of(tmp_path) == expected, "nothing was run"
    add_sample(tmp_path, "b", name="runs/mine")
    assert origin_of(tmp_path) == expected | {"models": ["mine", "runs/mine"], "last": "2026-05-03"}


def test_every_version_that_ran_samples_is_noted(tmp_path, monkeypatch):
    from activation_beacon.evaluation import results

    add_sample(tmp_path, "a")
    monkeypatch.setattr(results, "__version__", "9.0")
    add_sample(tmp_path, "b")
    assert origin_of(tmp_path)["versions"] == [__version__, "9.0"]
    assert origin_of(tmp_path)["models"] == []


def test_the_first_process_notes_what_the_others_ran(tmp_path, days):
    Results(tmp_path, MODEL, name="mine")
    add_sample(tmp_path, "a", rank=1)
    assert origin_of(tmp_path) is None, "only the first process writes the file"
    os.utime(tmp_path / "results-1.jsonl", (86400, 86400))
    Results(tmp_path, MODEL, name="mine")
    assert origin_of(tmp_path)["first"] == origin_of(tmp_path)["last"] == "1970-01-02"
    add_sample(tmp_path, "b", name="mine")
    assert (origin_of(tmp_path)["first"], origin_of(tmp_path)["last"]) == ("1970-01-02", "2026-05-01")


def test_a_folder_from_before_dates_goes_on_and_says_that_its_first_is_not_known(tmp_path, days):
    add_sample(tmp_path, "a")
    run = json.loads((tmp_path / "run.json").read_text())
    del run["origin"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert Results(tmp_path).origin is None
    add_sample(tmp_path, "b", name="mine")
    assert (origin_of(tmp_path)["first"], origin_of(tmp_path)["last"]) == (None, "2026-05-01")
    days.today = "2026-05-02"
    add_sample(tmp_path, "c", name="mine")
    assert (origin_of(tmp_path)["first"], origin_of(tmp_path)["last"]) == (None, "2026-05-02")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("run.json", "{", FileFormatError, "{folder}/run.json is damaged ("),
        ("run.json", '{"format_version": 9}', FileFormatError, "{folder}/run.json has format version 9; this release reads 1."),
        ("run.json", None, StorageError, "{folder} holds no results (run.json is missing). Name a folder of `beacon eval`."),
        ("results.jsonl", "oh\n", FileFormatError, "{folder}/results.jsonl, line 1 is not JSON. Remove that line."),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, name, content, error, message):
    Results(tmp_path, MODEL)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(error) as caught:
        Results(tmp_path)
    assert str(caught.value).startswith(message.format(folder=tmp_path))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        Results(tmp_path / "file" / "out", MODEL)
    assert str(error.value) == f"{tmp_path}/file/out cannot be made: Not a directory. Choose another folder."
