"""lm-eval: our model beside its own, and RULER as it is there."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activation_beacon.errors import InputError, RatioError
from evaluation_models import OWN, STORY, beacon_model, byte_prompt
from families import tiny
from saved_models import CHUNK, byte_tokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its dependencies' own
]

LENGTH, SHORT = 9000, 1500
NAMES = ("niah_single_1", "niah_multikey_3", "ruler_cwe", "ruler_fwe")
POSITIONS = {"max_position_embeddings": 16384}


@pytest.fixture(scope="module")
def model():
    return beacon_model(**POSITIONS)


@pytest.fixture(scope="module")
def base():
    return tiny("llama", **{**OWN, **POSITIONS})


@pytest.fixture(scope="module")
def plain_lm(base):
    """lm-eval's own run of the base."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=base, tokenizer=byte_tokenizer(), device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


def beacon_lm(model, ratio, **options):
    from activation_beacon.evaluation.harness import BeaconLM

    return BeaconLM(model, beacon_ratio=ratio, tokenizer=byte_tokenizer(), **options)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=n) for n, each in enumerate(arguments)]


PROMPTS = (STORY[: 3 * CHUNK + 5], STORY[: CHUNK - 20])
UNTIL = {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False}


def test_the_ratio_none_is_the_base_model(model, plain_lm):
    ours = beacon_lm(model, "none")
    generations = requests("generate_until", *((prompt, UNTIL) for prompt in PROMPTS))
    assert ours.generate_until(generations) == plain_lm.generate_until(generations)
    likelihoods = requests("loglikelihood", *((prompt, " It was late!") for prompt in PROMPTS))
    assert ours.loglikelihood(likelihoods) == plain_lm.loglikelihood(likelihoods)


def test_a_ratio_compresses_prompts_of_more_than_a_chunk_only(model, plain_lm):
    ours = beacon_lm(model, "4")
    generations = requests("generate_until", *((prompt, UNTIL) for prompt in PROMPTS))
    ids = torch.tensor([byte_tokenizer()(PROMPTS[0])["input_ids"]])
    out = model.generate(ids, beacon_ratio=4, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    expected = byte_tokenizer().decode(out, skip_special_tokens=True).split("\n\n")[0]
    found = ours.generate_until(generations)
    assert found == [expected, plain_lm.generate_until(generations)[1]]
    short = requests("loglikelihood", (PROMPTS[1], " It"))
    assert ours.loglikelihood(short) == plain_lm.loglikelihood(short)
    long = requests("loglikelihood", (PROMPTS[0], " It"))
    assert ours.loglikelihood(long)[0][0] != pytest.approx(plain_lm.loglikelihood(long)[0][0], abs=1e-3)


def test_a_model_object_goes_straight_into_lm_evals_own_class():
    from lm_eval.models.huggingface import HFLM

    model = beacon_model(**POSITIONS)
    model.beacon_ratio = 4
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu", batch_size=1)
    ours = beacon_lm(beacon_model(**POSITIONS), "4")
    generations = requests("generate_until", *((prompt, UNTIL) for prompt in PROMPTS))
    assert theirs.generate_until(generations) == ours.generate_until(generations)
    likelihoods = requests("loglikelihood", *((prompt, " It was late!") for prompt in PROMPTS))
    assert theirs.loglikelihood(likelihoods) == ours.loglikelihood(likelihoods)


def test_the_model_is_registered_and_loads_an_adapter(tmp_path, model):
    from lm_eval.api.registry import get_model

    import activation_beacon.evaluation.harness

    assert get_model("activation-beacon") is activation_beacon.evaluation.harness.BeaconLM


@pytest.mark.parametrize(
    ("ratio", "limit"), [(None, 1024), (2, (1024 - 32) // 16 * 32 + 32), ("auto", (1024 - 32) // 4 * 32 + 32)]
)
def test_the_longest_text_is_that_which_fits(ratio, limit):
    from activation_beacon.evaluation.harness import text_limit

    model = beacon_model(max_position_embeddings=1024)
    assert text_limit(model, ratio) == limit
    if ratio is not None:
        model.compress(torch.randint(3, 200, (1, limit)), ratio=ratio)


def test_the_longest_text_is_one_within_the_positions_that_longrope_begins_with():
    from activation_beacon.evaluation.harness import text_limit

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 128}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, **factors}
    model = beacon_model(max_position_embeddings=1024, rope_parameters=rope)
    assert (text_limit(model, None), model.max_positions) == (1024, 128)
    limit = text_limit(model, 2)
    assert limit == (128 - 32) // 16 * 32 + 32
    model.compress(torch.randint(3, 200, (1, limit)), ratio=2)


def test_what_cannot_be_loaded_is_refused(model):
    from activation_beacon.evaluation.harness import BeaconLM

    with pytest.raises(InputError, match=r"A model object needs its tokenizer beside it"):
        BeaconLM(model)
    with pytest.raises(RatioError, match=r"ratio \(3\) must divide chunk_size"):
        beacon_lm(model, 3)


@pytest.mark.parametrize("batch_size", [2, "4", "auto", "auto:4"])
def test_several_texts_at_once_are_for_the_base_alone(model, batch_size):
    with pytest.raises(InputError, match=rf"batch_size \({batch_size}\) must be 1 with beacons: .* Leave it out\."):
        beacon_lm(model, 4, batch_size=batch_size)
    assert beacon_lm(model, 4, batch_size="1").batch_size == 1
    assert beacon_lm(model, 4, batch_size=None).batch_size == 1
    assert beacon_lm(model, "none", batch_size=2).batch_size == 2


# --- RULER -----------------------------------------------------------------------------------------------------------


def test_the_uncompressed_column_is_lm_eval_s_own_run_of_the_base(model, plain_lm, tokenizer_folder, monkeypatch):
    import lm_eval
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    from activation_beacon.evaluation import ruler
    from activation_beacon.evaluation.samples import answer_sample

    generate = prepare_niah.generate_samples
    for module in (niah_utils, prepare_niah):  # two samples in place of 500
        monkeypatch.setattr(module, "generate_samples", lambda *a, **k: generate(*a, **{**k, "num_samples": 2}))
    metadata = {"max_seq_lengths": [SHORT], "tokenizer": str(tokenizer_folder)}
    with ruler._quiet():
        found = lm_eval.simple_evaluate(plain_lm, tasks=["niah_single_1"], metadata=metadata, bootstrap_iters=0)
    samples = found["samples"]["niah_single_1"]
    assert len(samples) == 2
    for number, theirs in enumerate(samples):
        sample = ruler._sample("niah_single_1", number, theirs["doc"])
        assert sample.context + sample.questions[0].text == theirs["arguments"][0][0]
        ours = answer_sample(model, byte_prompt(), sample, "full")
        assert ours["answers"][0] == theirs["resps"][0][0].strip()


def test_prompts_are_put_together_as_lm_eval_s_own():
    import lm_eval
    import yaml

    from activation_beacon.evaluation.ruler import TASKS

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    folder = Path(lm_eval.__file__).parent / "tasks/ruler"
    common = yaml.load((folder / "niah_single_1.yaml").read_text(), Loader)
    for name, (_, _, delimiter, num_tokens) in TASKS.items():
        theirs = {**common, **yaml.load((folder / f"{name.removeprefix('ruler_')}.yaml").read_text(), Loader)}
        assert theirs["target_delimiter"] == delimiter
        assert theirs["generation_kwargs"]["max_gen_toks"] == num_tokens
        assert theirs["doc_to_text"] == "{{input}}"


def test_scores_are_lm_eval_s_own():
    from lm_eval.tasks.ruler.common_utils import string_match_all

    from activation_beacon.answer_scores import contains_share

    for answer in ("1. Lion 2. tiger", "nothing", "LION\nbear"):
        references = ["lion", "tiger", "bear"]
        assert contains_share(answer, references) == pytest.approx(string_match_all([answer], [references]))


def test_the_question_is_kept_from_the_context():
    from activation_beacon.evaluation.ruler import ruler_samples

    samples = list(ruler_samples(byte_tokenizer(), LENGTH, tasks=NAMES, count=2))
    assert [sample.facts["kind"] for sample in samples] == [*NAMES, *NAMES]
    for sample in samples:
        [question] = sample.questions
        assert question.text.startswith("\n")
        assert "?" in question.text
        assert question.text not in sample.context
        assert len(byte_tokenizer()(sample.context + question.text)["input_ids"]) <= LENGTH
        if sample.facts["kind"] != "ruler_fwe":
            assert all(reference in sample.context for reference in question.references)


def test_more_samples_begin_with_the_same_ones_in_any_process():
    from activation_beacon.evaluation.ruler import ruler_samples

    few = list(ruler_samples(byte_tokenizer(), LENGTH, tasks=NAMES, count=1))
    more = list(ruler_samples(byte_tokenizer(), LENGTH, tasks=NAMES, count=2))
    assert more[: len(few)] == few
    assert len({sample.context for sample in more}) == len(more)
    code = (
        "from saved_models import byte_tokenizer; import json\n"
        "from activation_beacon.evaluation.ruler import ruler_samples\n"
        f"drawn = lambda: [s.context for s in ruler_samples(byte_tokenizer(), {LENGTH}, tasks={NAMES!r}, count=1)]\n"
        "print(json.dumps([drawn(), drawn()]))"  # the first of a process is what it is later
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [[sample.context for sample in few]] * 2


def test_drawing_leaves_the_global_generators_as_they_were():
    from activation_beacon.evaluation.ruler import ruler_samples

    before = random.getstate()
    list(ruler_samples(byte_tokenizer(), LENGTH, tasks=["niah_single_1"], count=1))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("tasks", "length", "message"),
    [
        (
            ["niah_single_2"],
            LENGTH,
            (
                "There is no RULER task 'niah_single_2' that can be generated offline. Use niah_single_1, niah_multikey_2, "
                "niah_multikey_3, ruler_vt, ruler_cwe, ruler_fwe."
            ),
        ),
        (
            ["ruler_vt"],
            LENGTH,
            "ruler_vt cannot be made with this tokenizer: the example that opens its prompts has room for 500",
        ),
        (["niah_single_1"], 200, "niah_single_1 cannot be made as short as 200 tokens: its smallest text has about"),
        (["niah_multikey_3"], 50, "niah_multikey_3 cannot be made as short as 50 tokens: its smallest text has about"),
        (["ruler_cwe"], 1000, "ruler_cwe cannot be made as short as 1000 tokens: its smallest text has about"),
        (["ruler_fwe"], 200, "ruler_fwe cannot be made as short as 200 tokens: its smallest text has about"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tasks, length, message):
    from activation_beacon.evaluation.ruler import ruler_samples

    with pytest.raises(InputError) as error:
        list(ruler_samples(byte_tokenizer(), length, tasks=tasks, count=1))
    assert str(error.value).startswith(message)
