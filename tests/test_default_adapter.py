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

CHUNKS = 2


def test_the_recipe_of_the_adapter_is_beside_it_and_leaves_the_demo_book_out():
    folder = default_adapter_folder()
    settings = TrainingSettings.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    assert "gutenberg/25519" in settings.exclude
    assert settings.config.ratios == (2, 4, 8, 16, 32)
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 40e6


@pytest.mark.default_model
@pytest.mark.slow
def test_beacons_close_part_of_the_gap_between_a_chunk_alone_and_the_whole_text():
    model, tokenizer = load("default")
    size = model.beacon_config.chunk_size
    ids = torch.tensor([tokenizer(read_demo_book(), verbose=False)["input_ids"][: CHUNKS * size]])
    counts = torch.arange(CHUNKS * size - 1) % size != size - 1  # a chunk's first token has no prediction when alone
    counts[: size - 1] = False
    with torch.no_grad(), model.beacon_disabled():
        full = model(ids, labels=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].neg()
        pieces = [model(piece).logits[0, :-1] for piece in ids.split(size, dim=1)]
    alone = torch.full_like(full, torch.nan)
    for number, logits in enumerate(pieces):
        first = number * size
        targets = ids[0, first + 1 : first + size]
        alone[first : first + size - 1] = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        beacons = model(ids, labels=ids, beacon_ratio=8, logits_to_keep=1).nll[0]
    full, beacons, alone = (float(nll[counts].mean()) for nll in (full, beacons, alone))
    assert full < alone
    # Beacons know how books are written, which the base does not: they may even do better than it with the whole text.
    assert beacons < alone - 0.5 * (alone - full), (full, beacons, alone)


@pytest.mark.default_model
@pytest.mark.parametrize("ratio", [8, 16])
def test_a_number_is_found_through_beacons(ratio):
    model, tokenizer = load("default")
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
def test_a_chunk_that_has_been_read_is_closed_to_the_same_cache():
    model, tokenizer = load("default")
    size = model.beacon_config.chunk_size
    ids = torch.tensor([tokenizer(read_demo_book(), verbose=False)["input_ids"][: model.untouched_length + 1]])
    in_pieces = model.compress(ids[:, : size - 24], ratio=8)
    model.compress(ids[:, size - 24 :], cache=in_pieces)
    assert in_pieces.num_beacons == size // 8
    for layer, expected in zip(in_pieces.layers, model.compress(ids, ratio=8).layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-4)
