"""The adapter that ships: on a text nobody trained on, beacons are worth more than no context at all."""

import json
from pathlib import Path

import pytest
import torch

from activation_beacon import ChatPrompt, load
from activation_beacon.books import read_demo_book
from activation_beacon.data.hiding import hide
from activation_beacon.hub import default_adapter_folder
from activation_beacon.training.settings import TrainingSettings


def test_the_recipe_of_the_adapter_is_beside_it_and_leaves_the_demo_book_out():
    folder = default_adapter_folder()
    settings = TrainingSettings.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    assert "gutenberg/25519" in settings.exclude
    assert settings.config.ratios == (2, 4, 8, 16, 32)
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 40e6


@pytest.fixture(scope="module")
def loaded():
    return load("default")


@pytest.mark.default_model
@pytest.mark.slow
@torch.no_grad()
def test_beacons_close_part_of_the_gap_between_a_chunk_alone_and_the_whole_text(loaded):
    """On the second half of a second chunk."""
    model, tokenizer = loaded
    size = model.beacon_config.chunk_size
    ids = torch.tensor([tokenizer(read_demo_book(), verbose=False)["input_ids"][: 2 * size]])
    keep = size // 2 + 1

    def nats(logits):
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, -(keep - 1) :]))

    with model.beacon_disabled():
        full, alone = (nats(model(text, logits_to_keep=keep).logits) for text in (ids, ids[:, size:]))
    beacons = nats(model(ids, beacon_ratio=8, logits_to_keep=keep).logits)
    assert full < alone
    # Beacons know how books are written, which the base does not: they may even do better than it with the whole text.
    assert beacons < alone - 0.5 * (alone - full), (full, beacons, alone)


@pytest.mark.default_model
@pytest.mark.parametrize("ratio", [8, 16])
def test_a_number_is_found_through_beacons(loaded, ratio):
    model, tokenizer = loaded
    prompt = ChatPrompt(tokenizer)
    ids = tokenizer(read_demo_book(), verbose=False)["input_ids"][:1250]
    text = hide(tokenizer.decode(ids), "The special magic number of the violin is 7853176.", 0.3)
    context = model.compress([prompt.opening(text)], ratio=ratio)
    assert context.num_beacons == model.beacon_config.chunk_size // ratio
    asked = torch.tensor([prompt.question("What is the special magic number of the violin?")])
    answer = model.generate(asked, context=context, max_new_tokens=24, do_sample=False)
    assert "7853176" in tokenizer.decode(answer[0, asked.shape[1] :])


@pytest.mark.default_model
@torch.no_grad()
def test_a_chunk_that_has_been_read_is_closed_to_the_same_cache(loaded):
    model, tokenizer = loaded
    size = model.beacon_config.chunk_size
    ids = torch.tensor([tokenizer(read_demo_book(), verbose=False)["input_ids"][: model.untouched_length + 1]])
    in_pieces = model.compress(ids[:, : size - 24], ratio=8)
    model.compress(ids[:, size - 24 :], cache=in_pieces)
    assert in_pieces.num_beacons == size // 8
    for layer, expected in zip(in_pieces.layers, model.compress(ids, ratio=8).layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-4)
