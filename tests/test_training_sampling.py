"""A sample is a pure function of seed and index, holds one document only, and every token has its turn."""

import collections
import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.at_once import chunks_at_once
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.evaluation.language_modelling import beacon_losses
from activation_beacon.training.objective import Objective, losses
from activation_beacon.training.samplers import RunData, stage_samplers
from activation_beacon.training.sampling import (
    MIX_BLOCK,
    DocumentSampler,
    MixedSampler,
    Sample,
    random_of,
)
from activation_beacon.training.settings import Stage, TrainingSettings
from activation_beacon.training.token_store import TokenStore
from families import with_beacons

CHUNK, LENGTH = 4, 12
USE_8 = "of one chunk there is nothing to compress. Use 8, or another chunk_size."
LENGTHS = [100, 12, 7, 25, 11, 8, 24, 3, 37]


@pytest.fixture
def store(tmp_path) -> TokenStore:
    return store_of(tmp_path / "store", LENGTHS)


def store_of(folder, lengths) -> TokenStore:
    """Documents whose tokens say where they stand: 1000 * document + place."""
    folder.mkdir()
    tokens = np.concatenate([np.arange(length) + 1000 * number for number, length in enumerate(lengths)])
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths]))
    (folder / "ids.json").write_text(json.dumps([f"d{number}" for number in range(len(lengths))]))
    sizes = {"documents": len(lengths), "tokens": len(tokens), "summary": ""}
    (folder / "header.json").write_text(json.dumps({"format": "activation-beacon tokens", "version": 1, **sizes}))
    return TokenStore(folder)


def sampler_of(store, seed=0, **settings) -> DocumentSampler:
    return DocumentSampler(store, **{"length": LENGTH, "chunk_size": CHUNK, **settings}, seed=seed)


def epoch_of(sampler, epoch=0) -> list[list[int]]:
    size = len(sampler)
    return [sampler.sample(index).ids.tolist() for index in range(epoch * size, (epoch + 1) * size)]


def test_a_sample_is_a_run_of_whole_chunks_of_one_document(store):
    sampler = sampler_of(store)
    for index in range(3 * len(sampler)):
        sample = sampler.sample(index)
        assert sample.ids.dtype == torch.long
        document, length = int(sample.ids[0]) // 1000, len(sample.ids)
        assert sample.ids.tolist() == list(range(int(sample.ids[0]), int(sample.ids[0]) + length))
        assert int(sample.ids[-1]) // 1000 == document
        assert length == min(LENGTH, LENGTHS[document] // CHUNK * CHUNK)
        assert length // CHUNK >= 2


def test_the_loss_begins_after_the_first_chunk(store):
    for index in range(len(sampler_of(store))):
        sample = sampler_of(store).sample(index)
        assert sample.is_target.dtype == torch.bool
        assert sample.is_target.tolist() == [False] * CHUNK + [True] * (len(sample.ids) - CHUNK)


@pytest.mark.parametrize("local_tokens", [0, 1, CHUNK - 1])
def test_what_is_predicted_from_a_chunk_s_first_tokens_does_not_count(store, local_tokens):
    for index in range(len(sampler_of(store))):
        sample = sampler_of(store, local_tokens=local_tokens).sample(index)
        counted = [token >= CHUNK and not (token - 1) % CHUNK < local_tokens for token in range(len(sample.ids))]
        assert sample.is_target.tolist() == counted
        assert any(counted)


def test_a_stage_counts_what_contexts_of_its_local_tokens_predict(store):
    stages = tuple(Stage(length=LENGTH, chunk_size=CHUNK, local_tokens=number) for number in (0, 1))
    settings = TrainingSettings(output="run", documents=("texts",), config=BeaconConfig(ratios=(2,)), stages=stages)
    every, fewer = stage_samplers(settings, RunData(store, store, [], []), None, print)
    assert int(every.sample(0).is_target.sum()) > int(fewer.sample(0).is_target.sum()) > 0


@torch.no_grad()
@pytest.mark.parametrize("local_tokens", [1, 5, 13])
def test_what_counts_is_predicted_as_a_context_with_local_tokens_decodes_it(tmp_path, local_tokens):
    chunk, ratios = 16, (4, 2, 4)
    model = with_beacons("llama", BeaconConfig(chunk_size=chunk, ratios=(2, 4), anchored=True, placement="append"))
    store = store_of(tmp_path / "store", [4 * chunk])
    sample = DocumentSampler(store, length=4 * chunk, chunk_size=chunk, seed=0, local_tokens=local_tokens).sample(0)
    ids = sample.ids % 97
    with chunks_at_once(model):
        trained = losses(model, ids[None], sample.is_target[None], ratios, objective=Objective()).nll[0]
    decoded = beacon_losses(model, ids.tolist(), ratios, local_tokens=local_tokens).nll
    counts = sample.is_target[1:]
    torch.testing.assert_close(trained[counts], decoded[counts], atol=1e-5, rtol=0)
    plain = beacon_losses(model, ids.tolist(), ratios, local_tokens=0).nll
    others = ~counts & (torch.arange(1, len(ids)) > chunk)
    assert not torch.isclose(plain[others], decoded[others], atol=1e-4).all()  # those that do not count


def test_an_epoch_takes_as_many_windows_of_each_document_as_fit_and_no_token_twice(store):
    sampler = sampler_of(store)
    for epoch in range(4):
        windows = epoch_of(sampler, epoch)
        tokens = [token for window in windows for token in window]
        assert len(tokens) == len(set(tokens))
        taken = collections.Counter(window[0] // 1000 for window in windows)
        assert taken == {0: 8, 1: 1, 3: 2, 4: 1, 5: 1, 6: 2, 8: 3}  # 7 and 3 tokens are less than two chunks
    assert len(sampler) == sum(taken.values())


def test_every_token_has_its_turn_in_some_epoch(store):
    sampler = sampler_of(store)
    seen = {token for epoch in range(60) for window in epoch_of(sampler, epoch) for token in window}
    expected = {
        1000 * number + place for number, length in enumerate(LENGTHS) if length >= 8 for place in range(length)
    }
    assert seen == expected


def test_epochs_differ_in_order_and_in_where_windows_begin(store):
    sampler = sampler_of(store)
    epochs = [[window[0] for window in epoch_of(sampler, epoch)] for epoch in range(3)]
    assert len({tuple(starts) for starts in epochs}) == 3
    assert len({tuple(sorted(starts)) for starts in epochs}) == 3


def test_a_sample_is_a_function_of_seed_and_index_alone(store, tmp_path):
    indices = list(range(60))
    unbroken = [sampler_of(store).sample(index).ids.tolist() for index in indices]
    resumed = sampler_of(TokenStore(store.folder))
    other_process = pickle.loads(pickle.dumps(sampler_of(store)))
    for index in reversed(indices):
        assert resumed.sample(index).ids.tolist() == unbroken[index]
        assert other_process.sample(index).ids.tolist() == unbroken[index]
    assert [sampler_of(store, seed=1).sample(index).ids.tolist() for index in indices] != unbroken


def test_documents_are_drawn_in_proportion_to_their_length(tmp_path):
    sampler = sampler_of(store_of(tmp_path / "store", [400, 40, 80]), length=8)
    first = collections.Counter(sampler.window(index)[0] for index in range(len(sampler)))
    assert first == {0: 50, 1: 5, 2: 10}


@pytest.mark.parametrize(
    ("length", "chunk", "message"),
    [
        (10, 4, "The length of samples (10) must be a multiple of chunk_size (4), and two chunks at least: " + USE_8),
        (4, 4, USE_8),
        (0, 4, USE_8),
    ],
)
def test_lengths_that_cannot_be_trained_are_refused(store, length, chunk, message):
    with pytest.raises(ConfigError) as caught:
        sampler_of(store, length=length, chunk_size=chunk)
    assert str(caught.value).endswith(message)


def test_documents_that_are_all_too_short_are_refused(store):
    with pytest.raises(InputError) as caught:
        sampler_of(store, length=200, chunk_size=100)
    assert str(caught.value) == (
        "No document has the two chunks (200 tokens) that training needs; the longest of 9 has 100. "
        "Use longer documents or a smaller chunk_size."
    )


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed must be 0 or more; got -1"):
        random_of(-1, 0)


# --- mixes ------------------------------------------------------------------------------------------------------------


class Numbered:
    """Samples that say what they were asked for."""

    def sample(self, index: int) -> Sample:
        return Sample(torch.tensor([index]), torch.tensor([True]))


@pytest.mark.parametrize(
    ("shares", "counts"),
    [([1], [1000]), ([3, 1], [750, 250]), ([1, 1, 1], [334, 333, 333]), ([0.6, 0.25, 0.15], [600, 250, 150])],
)
def test_every_share_is_met_in_every_block_and_no_sample_is_left_out(shares, counts):
    mix = MixedSampler([(Numbered(), share) for share in shares], seed=3)
    given: dict[int, list[int]] = collections.defaultdict(list)
    for index in range(3 * MIX_BLOCK):
        part, number = mix.choice(index)
        assert mix.sample(index).ids.item() == number
        given[part].append(number)
        if (index + 1) % MIX_BLOCK == 0:
            blocks = (index + 1) // MIX_BLOCK
            assert [len(given[part]) for part in range(len(shares))] == [blocks * count for count in counts]
    assert all(numbers == list(range(len(numbers))) for numbers in given.values())


def test_a_mix_is_a_function_of_seed_and_index_alone_and_random(store):
    def choices(seed, indices):
        mix = MixedSampler([(Numbered(), 1), (Numbered(), 1)], seed=seed)
        return {index: mix.choice(index) for index in indices}

    indices = list(range(0, 2500, 7))
    assert choices(0, indices) == choices(0, reversed(indices))
    assert choices(0, indices) != choices(1, indices)
    parts = [part for part, _ in choices(0, range(MIX_BLOCK)).values()]
    assert parts != [part for part, _ in choices(0, range(MIX_BLOCK, 2 * MIX_BLOCK)).values()]
    assert 400 < sum(one != other for one, other in itertools.pairwise(parts)) < 600


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], "A mix needs samplers with shares above 0; got shares []."),
        ([0, 0], "A mix needs samplers with shares above 0; got shares [0, 0]."),
        ([2, -1], "A mix needs samplers with shares above 0; got shares [2, -1]."),
        ([1, float("nan")], "A mix needs samplers with shares above 0; got shares [1, nan]."),
        (
            [1, 0.0001],
            "A share of 0.0001 in 1.0001 is less than one sample in 1000. Give it more, or leave it out.",
        ),
    ],
)
def test_shares_that_cannot_be_met_are_refused(shares, message):
    with pytest.raises(ConfigError) as caught:
        MixedSampler([(Numbered(), share) for share in shares], seed=0)
    assert str(caught.value) == message
