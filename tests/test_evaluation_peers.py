"""kvpress's methods with a stand-in for kvpress: what is asked, what becomes of answers, and what goes wrong."""

import json
import re
import sys

import pytest

from activation_beacon.errors import FileFormatError, PeerError
from activation_beacon.evaluation.blocks import markdown_of
from activation_beacon.evaluation.methods import beacon_entries, read_context
from activation_beacon.evaluation.peers import PEERS, Peers, peer_records
from activation_beacon.evaluation.report import tables
from activation_beacon.evaluation.results import Key, Results
from activation_beacon.evaluation.runner import Plan, run_task
from activation_beacon.evaluation.samples import Question, Sample, asked_ids
from activation_beacon.evaluation.tasks import Answering
from evaluation_models import STORY, beacon_model, byte_prompt, ids_of

PROMPT = byte_prompt()
QUESTIONS = (Question("Who spoke?", ("lion",), max_new_tokens=6), Question("Why?", ("moon",), max_new_tokens=4))
SAMPLES = [Sample(name, STORY[start : start + 300], QUESTIONS) for name, start in (("a", 0), ("b", 11))]
KEYS = [(Key("own", method, 4, 400, sample.id), sample) for sample in SAMPLES for method in ("snapkv", "kvzip")]

STAND_IN = """
import json, os, sys
full, limit = json.loads({full!r}), {limit}
for job in map(json.loads, open(sys.argv[1])):
    for way in job["ways"]:
        if limit == 0:
            {end}
        limit -= 1
        answers = full[str(job["context"])] if way["press"] == "none" else [{said}, {said}]
        sizes = {{"cache_length": way["entries"], "cache_bytes": 1000, "only_masks": way["press"] == "kvzip"}}
        seconds = {{"read_seconds": 2.5, "answer_seconds": [0.5, 0.25]}}
        line = {{"job": job["id"], **way, "answers": answers, **sizes, **seconds, "by": "a stand-in"}}
        with open(sys.argv[2], "a") as file:
            file.write(json.dumps(line) + chr(10))
        print(way["press"], file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def model():
    model = beacon_model()
    model.name_or_path = "tiny"
    return model


@pytest.fixture(scope="module")
def full(model):
    """The base model's answers, by the context."""

    def answers(ids, asked):
        held = read_context(model, ids, "full")
        return [held.ask(each, max_new_tokens=q.max_new_tokens)[0] for each, q in zip(asked, QUESTIONS, strict=True)]

    found = [asked_ids(PROMPT, sample) for sample in SAMPLES]
    return {str(ids): answers(ids, asked) for ids, _, asked in found}


@pytest.fixture
def peers(tmp_path, full):
    """Makes a stand-in that dies before answer number `limit`, if there is one."""

    def peers(limit=-1, end="sys.exit(0)", control=None):
        path = tmp_path / "stand_in.py"
        path.write_text(
            STAND_IN.format(
                full=json.dumps({context: control or answers for context, answers in full.items()}),
                limit=limit,
                end=end,
                said=ids_of("a lion"),
            ),
            "utf-8",
        )
        return Peers(python=type(path)(sys.executable), worker=path)

    return peers


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_scored_like_any_others(model, peers, tmp_path):
    records = dict(peer_records(peers(), model, PROMPT, KEYS, tmp_path))
    assert set(records) == {key for key, _ in KEYS}
    record = records[KEYS[0][0]]
    assert (record["answers"], record["scores"], record["score"]) == (["a lion"] * 2, [1.0, 0.0], 0.5)
    assert (record["read_seconds"], record["only_masks"], record["by"]) == (2.5, False, "a stand-in")
    assert records[KEYS[1][0]]["only_masks"] is True


def test_a_job_has_the_size_of_beacons_and_keeps_the_questions_from_the_context(model, peers, tmp_path):
    list(peer_records(peers(), model, PROMPT, KEYS, tmp_path))
    first, second = lines_of(tmp_path / "peers" / "jobs.jsonl")
    ids, opening, asked = asked_ids(PROMPT, SAMPLES[0])
    assert (first["context"], first["opening"]) == (ids, opening)
    assert [question["ids"] for question in first["questions"]] == asked
    entries = beacon_entries(model, len(ids), 4)
    assert entries < len(ids) / 3
    ways = [{"press": "snapkv", "entries": entries}, {"press": "kvzip", "entries": entries}]
    assert first["ways"] == [{"press": "none", "entries": len(ids)}, *ways]
    assert second["ways"] == ways
    assert first["id"] != second["id"]


def test_a_run_that_was_killed_goes_on(model, peers, tmp_path):
    out_of_memory = peers(3, "sys.exit(print('out of memory', file=sys.stderr) or 7)")
    found = []
    with pytest.raises(PeerError, match=re.escape("ended with status 7: out of memory. What is finished is kept.")):
        found.extend(key for key, _ in peer_records(out_of_memory, model, PROMPT, KEYS, tmp_path))
    assert len(found) == 2
    left = [(key, sample) for key, sample in KEYS if key not in found]
    again = dict(peer_records(peers(), model, PROMPT, left, tmp_path))
    assert {*again, *found} == {key for key, _ in KEYS}


def test_answers_that_are_there_are_taken_without_another_process(model, peers, tmp_path):
    before = dict(peer_records(peers(), model, PROMPT, KEYS, tmp_path))
    with (tmp_path / "peers" / "answers.jsonl").open("a") as file:
        file.write('{"job": "cut sho')
    assert dict(peer_records(peers(0, "sys.exit(1)"), model, PROMPT, KEYS, tmp_path)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0, "end": "sys.exit(3)"}, "kvpress's process ended with status 3: it said nothing. What is finished is kept."),
        ({"limit": 0, "end": "os.kill(os.getpid(), 9)"}, "kvpress's process ended with status -9: it said nothing. What is"),
        ({"limit": 2}, "kvpress's process ended before all was answered; its last line: snapkv."),
        ({"limit": 0, "end": "sys.exit('python cannot run kvpress (No module)')"}, "status 1: python cannot run kvpress (No module)."),
        ({"control": [ids_of("A")] * 2}, "Without compression, the environment of kvpress answers 'A' where the method full answers "),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(model, peers, tmp_path, options, message):
    with pytest.raises(PeerError) as error:
        list(peer_records(peers(**options), model, PROMPT, KEYS, tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_answers_is_named(model, peers, tmp_path):
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "answers.jsonl").write_text("{]\n")
    with pytest.raises(FileFormatError, match=r"answers\.jsonl, line 1 is not JSON\. Remove that line\."):
        list(peer_records(peers(), model, PROMPT, KEYS, tmp_path))


def test_a_missing_environment_says_how_to_make_one(tmp_path):
    with pytest.raises(
        PeerError, match=re.escape("there is no nowhere/python. Make it with `make peers`, or anywhere")
    ):
        Peers(python=type(tmp_path)("nowhere/python"))


def test_a_run_has_own_and_other_methods_in_one_table(model, peers, tmp_path):
    task = Answering("own", PROMPT, lambda _: iter(SAMPLES), {})
    results, calls = Results(tmp_path / "out", {"name": "tiny"}), []
    plan = Plan(("full", "beacons", "kvzip", "snapkv"), (4, 8), (400,))
    run_task(model, task, plan, results, peers=peers(), progress=lambda *call: calls.append(call))
    assert len(results.records) == 2 * 7
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1] == (14, 14, "own")
    text = markdown_of(tables(results))
    rows = re.findall(r"^\| (\S+(?: x\d)?(?: \(masks only\))?) \|", text, re.M)
    ways = ["snapkv x4", "snapkv x8", "kvzip x4 (masks only)", "kvzip x8 (masks only)"]
    assert rows[2:9] == ["full", "beacons x4", "beacons x8", *ways]
    assert "Run by a stand-in: kvzip, snapkv. **Masks only**: it hides entries from attention and frees none." in text
    run_task(model, task, plan, results, peers=peers(0, "sys.exit(1)"))  # nothing is left to be done


def test_every_method_has_a_place_in_tables():
    from activation_beacon.evaluation.names import RATIO_ORDER

    assert RATIO_ORDER[-len(PEERS) :] == tuple(PEERS)
