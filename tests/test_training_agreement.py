import json

import pytest
import torch
from typer.testing import CliRunner

from activation_beacon import BeaconConfig
from activation_beacon.at_once import chunks_at_once
from activation_beacon.cli import app
from activation_beacon.training.agreement import OBJECTIVES, measure
from activation_beacon.training.batches import draw_ratios
from activation_beacon.training.objective import losses
from families import random_ids, with_beacons
from saved_models import save_adapter, save_base

CHUNK, LENGTH = 16, 50
DIVIDE = ", and every ratio must divide it."


def test_agreement_is_the_mean_cosine_between_the_gradients_of_two_texts():
    model = with_beacons("llama", BeaconConfig(chunk_size=CHUNK, ratios=(2, 4)))
    texts = [random_ids(LENGTH + 5 * number, seed=number) for number in range(4)]
    found = {each.objective: each for each in measure(model, texts, chunk_size=CHUNK, seed=3)}
    assert list(found) == list(OBJECTIVES)
    assert not model.training
    for name, objective in OBJECTIVES.items():
        gradients = []
        for index, ids in enumerate(texts):
            model.zero_grad()
            ratios = draw_ratios((ids.shape[1] - 1) // CHUNK, (2, 4), "chunk", seed=3, index=index)
            wanted = torch.arange(ids.shape[1])[None] >= CHUNK
            with chunks_at_once(model):
                losses(model, ids, wanted, ratios, objective=objective).total.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for _, parameter in model.beacon_parameters()]))
        pairs = [
            torch.cosine_similarity(gradients[i], gradients[j], dim=0) for i in range(4) for j in range(4) if i != j
        ]
        assert found[name].cosine == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-4)
        assert found[name].num_texts == 4


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("objectives")
    base = save_base(folder / "base")
    return ["bench", "objectives", "--model", str(save_adapter(folder / "adapter", base, seed=1)), "--base", str(base)]


def test_the_command_reads_the_book_or_texts_of_ones_own(options, tmp_path):
    result = CliRunner().invoke(app, [*options, "--length", "64", "--chunk-size", "16", "--texts", "3", "--json"])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["measured"]
    assert [each["objective"] for each in measured] == list(OBJECTIVES)
    assert all(each["num_texts"] == 3 for each in measured)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} lions. " * 9}) + "\n" for number in range(5)))
    table = CliRunner().invoke(app, [*options, str(path), "--length", "64", "--chunk-size", "16", "--texts", "3"])
    assert [line.split()[0] for line in table.stdout.splitlines()] == [
        "objective",
        "cross-entropy",
        "distillation",
        "both",
        "context",
    ]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--length", "16", "--chunk-size", "16"), "Error: --chunk-size (16) must be less than --length (16)" + DIVIDE),
        (("--length", "64", "--chunk-size", "20"), "Error: --chunk-size (20) must be less than --length (64)" + DIVIDE),
        (("--length", "99999"), "Error: There are not two texts of 99,999 tokens. Name more texts, or lower --length."),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(options, args, text):
    result = CliRunner().invoke(app, [*options, *args])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == text
