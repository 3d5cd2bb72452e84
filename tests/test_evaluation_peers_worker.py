"""kvpress itself, in its own environment (`make peers`): the same model, the sizes asked for, the answers of its own pipeline."""

import json
import subprocess
from pathlib import Path

import pytest

import activation_beacon
from activation_beacon.evaluation.methods import beacon_entries, read_context
from activation_beacon.evaluation.peers import PEERS, PYTHON, Peers, peer_records
from activation_beacon.evaluation.results import Key
from activation_beacon.evaluation.samples import Question, Sample, asked_ids
from activation_beacon.prompts import ChatPrompt
from evaluation_models import STORY
from saved_models import save_adapter, save_base

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / PYTHON).is_file(), reason="there is no .venv-peers (make peers)")

RATIOS = (2, 8)
QUESTIONS = (Question("Who spoke?", ("lion",), max_new_tokens=9), Question("Why?", ("moon",), max_new_tokens=6))
ASKED = Sample("asked", STORY[:400], QUESTIONS)
TURNS = Sample("turns", STORY[7:400], QUESTIONS, is_conversation=True)
SHORT = Sample("short", STORY[:12], QUESTIONS)
PLAIN = Sample("plain", STORY[:300], QUESTIONS[:1], is_plain=True)

# kvpress's own pipeline, one press at a time.
PIPELINE = """
import json, sys, torch, kvpress
from transformers import AutoModelForCausalLM, AutoTokenizer
base, path = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base).eval()
pipeline = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(base), device="cpu")
presses = {"snapkv": kvpress.SnapKVPress, "expected-attention": kvpress.ExpectedAttentionPress, "knorm": kvpress.KnormPress,
           "kvzip": kvpress.KVzipPress, "streaming-llm-kvpress": kvpress.StreamingLLMPress}
for job in map(json.loads, open(path)):
    context, questions = torch.tensor([job["context"]]), [torch.tensor([q["ids"]]) for q in job["questions"]]
    for way in job["ways"]:
        if way["press"] in presses and len(job["context"]) > way["entries"] and job["opening"] and not job["is_conversation"]:
            press = presses[way["press"]](compression_ratio=1 - (way["entries"] + 1e-3) / len(job["context"]))
            tensors = {"context_ids": context, "questions_ids": questions}
            with torch.no_grad():
                answers = pipeline._forward(tensors, max_new_tokens=9, press=press)
            print(json.dumps([job["id"], way["press"], way["entries"], answers]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    base = save_base(root / "base")
    return activation_beacon.load(save_adapter(root / "adapter", base, seed=1))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Records of all methods, and the folder of the exchange. That they are there says that the control was passed."""
    loaded, tokenizer = model
    folder = tmp_path_factory.mktemp("run")
    samples = (ASKED, TURNS, SHORT, PLAIN)
    wanted = [(Key("own", method, r, 400, each.id), each) for each in samples for method in PEERS for r in RATIOS]
    peers = Peers(ROOT / PYTHON)
    return dict(peer_records(peers, loaded, ChatPrompt(tokenizer), wanted, folder)), folder / "peers"


@pytest.mark.parametrize("sample", [ASKED, TURNS, SHORT, PLAIN], ids=lambda sample: sample.id)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", PEERS)
def test_a_method_holds_what_beacons_hold(model, run, method, ratio, sample):
    loaded, tokenizer = model
    num_tokens = len(asked_ids(ChatPrompt(tokenizer), sample)[0])
    entries = beacon_entries(loaded, num_tokens, ratio)
    record = run[0][Key("own", method, ratio, 400, sample.id)]
    assert record["cache_length"] == pytest.approx(entries, abs=0.51)  # a pyramid is rounded layer by layer
    held = num_tokens if record["only_masks"] else record["cache_length"]
    assert record["cache_bytes"] == held * 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, dimensions, bytes
    assert record["only_masks"] is (method == "kvzip" and entries < num_tokens)


@pytest.mark.parametrize("sample", [ASKED, TURNS, SHORT, PLAIN], ids=lambda sample: sample.id)
def test_without_a_press_the_answers_are_those_of_the_full_context(model, run, sample):
    loaded, tokenizer = model
    prompt = ChatPrompt(tokenizer)
    ids, opening, asked = asked_ids(prompt, sample)
    job = {
        "id": "control",
        "context": ids,
        "opening": opening,
        "questions": [{"ids": each, "max_new_tokens": 9} for each in asked],
        "is_conversation": sample.is_conversation,
        "end_ids": [256],
        "ways": [{"press": "none", "entries": len(ids)}],
    }
    held, expected = read_context(loaded, ids, "full"), []
    for each in asked:
        answer, grown = held.ask(each, max_new_tokens=9)
        held = grown if sample.is_conversation else held
        expected.append(answer)
    assert worker_answers(run[1], loaded, job) == expected


def worker_answers(folder, model, job):
    jobs, answers = folder / f"{job['id']}.jsonl", folder / "control-answers.jsonl"
    jobs.write_text(json.dumps(job) + "\n")
    answers.unlink(missing_ok=True)
    from activation_beacon.evaluation.peers import WORKER

    subprocess.run([ROOT / PYTHON, "-I", WORKER, jobs, answers, "--base", model.name_or_path], check=True)
    return json.loads(answers.read_text())["answers"]


def test_reading_once_for_all_gives_what_the_pipeline_gives_for_each(model, run):
    loaded, tokenizer = model
    command = [ROOT / PYTHON, "-I", "-c", PIPELINE, loaded.name_or_path, run[1] / "jobs.jsonl"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    ours = {
        (r["job"], r["press"], r["entries"]): r["answers"] for r in map(json.loads, (run[1] / "answers.jsonl").open())
    }
    assert len(lines) == 5 * len(RATIOS)
    for job, press, entries, theirs in map(json.loads, lines):
        found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ours[job, press, entries]]
        assert theirs[0] == found[0]
        assert theirs[1].startswith(found[1])  # the pipeline has one length for all answers
