"""kvpress itself, in its own environment (`make peers`): the same model, the sizes asked for, the answers of its own pipeline."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import activation_beacon
from activation_beacon.evaluation.methods import beacon_entries, read_context
from activation_beacon.evaluation.peers import PEERS, WORKER, Peers, peer_records
from activation_beacon.evaluation.results import Key
from activation_beacon.evaluation.samples import Question, Sample, asked_ids
from activation_beacon.peers_environment import PYTHON
from activation_beacon.prompts import ChatPrompt
from evaluation_models import STORY
from saved_models import save_adapter, save_base

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not (ROOT / PYTHON).is_file(), reason="there is no .venv-peers (make peers)"),
]

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
           "pyramidkv": kvpress.PyramidKVPress, "kvzip": kvpress.KVzipPress, "streaming-llm-kvpress": kvpress.StreamingLLMPress}
job = json.load(open(path))
ids = {"context_ids": torch.tensor([job["context"]]), "questions_ids": [torch.tensor([q["ids"]]) for q in job["questions"]]}
for way in job["ways"]:
    press = presses[way["press"]](compression_ratio=1 - (way["entries"] + 1e-3) / len(job["context"]))
    with torch.no_grad():
        print(json.dumps(pipeline._forward(ids, max_new_tokens=9, press=press)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    base = save_base(root / "base")
    plain = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():  # the end mark's is born as zeros, which no key can be hidden from
        plain.model.embed_tokens.weight[256] = plain.model.embed_tokens.weight[:256].mean(0)
    plain.save_pretrained(base)
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


@pytest.mark.parametrize("sample", [ASKED, TURNS], ids=lambda sample: sample.id)
def test_without_a_press_the_answers_are_those_of_the_full_context(model, run, sample):
    loaded, tokenizer = model
    job = job_of(tokenizer, sample, ways=[("none", 1000)])
    held, expected = read_context(loaded, job["context"], "full"), []
    for question in job["questions"]:
        answer, grown = held.ask(question["ids"], max_new_tokens=9)
        held = grown if sample.is_conversation else held
        expected.append(answer)
    [line] = lines_of_worker(run[1], loaded, job)
    assert line["answers"] == expected


# The pipeline cannot read several tokens at once where layers differ in length, or where they are many for a tiny head.
ALONE = [("pyramidkv", 90), ("kvzip", 150), ("kvzip", 50)]
SEVERAL = [("snapkv", 150), ("snapkv", 70), ("expected-attention", 70), ("knorm", 50), ("streaming-llm-kvpress", 50)]


@pytest.mark.parametrize(("ways", "questions"), [([*ALONE, *SEVERAL], [[40], [41]]), (SEVERAL, None)])
def test_reading_once_for_all_gives_what_the_pipeline_gives_for_each(model, run, ways, questions):
    loaded, tokenizer = model
    job = job_of(tokenizer, ASKED, ways, questions)
    ours = [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in line["answers"]]
        for line in lines_of_worker(run[1], loaded, job)
    ]
    command = [ROOT / PYTHON, "-I", "-c", PIPELINE, loaded.name_or_path, run[1] / "job.jsonl"]
    theirs = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert ours == [json.loads(line) for line in theirs]
    assert len({str(answers) for answers in ours}) > 3


def test_questions_read_in_one_pass_are_answered_as_token_by_token(model, run):
    loaded, tokenizer = model
    job = job_of(tokenizer, ASKED, [*ALONE, *SEVERAL])
    job["questions"] = job["questions"][:1]
    assert len(job["questions"][0]["ids"]) > 5
    together, in_turn = (lines_of_worker(run[1], loaded, {**job, "is_conversation": each}) for each in (False, True))
    assert [line["answers"] for line in together] == [line["answers"] for line in in_turn]
    assert len({str(line["answers"]) for line in together}) > 3


def job_of(tokenizer, sample, ways, questions=None):
    ids, opening, asked = asked_ids(ChatPrompt(tokenizer), sample)
    return {
        "id": "job",
        "context": ids,
        "opening": opening,
        "questions": [{"ids": each, "max_new_tokens": 9} for each in questions or asked],
        "is_conversation": sample.is_conversation,
        "end_ids": [256],
        "ways": [{"press": press, "entries": entries} for press, entries in ways],
    }


def lines_of_worker(folder, model, job):
    jobs, answers = folder / "job.jsonl", folder / "answers-of-job.jsonl"
    jobs.write_text(json.dumps(job) + "\n")
    answers.unlink(missing_ok=True)
    subprocess.run([ROOT / PYTHON, "-I", WORKER, jobs, answers, "--base", model.name_or_path], check=True)
    return [json.loads(line) for line in answers.read_text().splitlines()]
