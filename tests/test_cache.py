"""The cache as its holder sees it: numbers, forks, batches, devices, quantisation, what transformers asks of it."""

import copy
import functools
import re

import pytest
import torch

from activation_beacon import BeaconCache, BeaconConfig
from activation_beacon.errors import InputError, MismatchError, UnsupportedError
from activation_beacon.ratios import RatioPolicy
from families import random_ids, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=2)
ENTRY_BYTES = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dims, float32


@functools.cache
def model():
    return with_beacons("llama", CONFIG, eos_token_id=None)


def context_of(length: int, ratio=4, seed: int = 0) -> BeaconCache:
    return model().compress(random_ids(length, seed or length), ratio=ratio)


def tensors_of(cache: BeaconCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for _, tensor in layer.named_tensors()] + [cache.token_ids]


def assert_same(one: BeaconCache, other: BeaconCache, atol: float = 0.0) -> None:
    """Equal in rows, ids and every entry that is not padding."""
    assert one.rows == other.rows
    for b, row in enumerate(one.rows):
        if row.tokens_seen:
            assert torch.equal(one.token_ids[b, -row.tokens_seen :], other.token_ids[b, -row.tokens_seen :])
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == one.num_slots
        for left, right in zip(mine.entries(), theirs.entries(), strict=True):
            for b, row in enumerate(one.rows):
                held = slice(one.num_slots - row.cache_length, None)
                torch.testing.assert_close(left[b, :, held], right[b, :, held], atol=atol, rtol=0)


def next_logits(cache: BeaconCache, seed: int = 3, length: int = 5) -> torch.Tensor:
    ids = random_ids(length, seed).expand(cache.batch_size, -1)
    return model()(ids, past_key_values=cache.fork()).logits


# --- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "ratio", "sinks", "beacons", "tail", "ratios"),
    [
        (1, 4, 0, 0, 1, ()),
        (16, 4, 0, 0, 16, ()),
        (17, 4, 2, 4, 1, (4,)),
        (38, 4, 2, 8, 6, (4, 4)),
        (48, (2, 8), 2, 10, 16, (2, 8)),
    ],
)
def test_numbers(length, ratio, sinks, beacons, tail, ratios):
    cache = context_of(length, ratio)
    assert cache.tokens_seen == length
    assert (cache.num_sinks, cache.num_beacons, cache.tail_length) == (sinks, beacons, tail)
    assert cache.memory_length == sinks + beacons
    assert cache.cache_length == cache.num_slots == cache.get_seq_length() == sinks + beacons + tail
    assert cache.ratios == ratios
    assert cache.batch_size == 1
    assert not cache.is_ragged
    assert cache.quantized_bits is None
    assert cache.token_ids.shape == (1, length)
    assert cache.cache_bytes == cache.cache_length * ENTRY_BYTES
    assert cache.uncompressed_bytes == length * ENTRY_BYTES
    assert [layer.get_seq_length() for layer in cache.layers] == [cache.cache_length] * 3


def test_a_context_describes_itself():
    text = "38 tokens seen | 2 sinks | 8 beacons (x4) | 6 in the tail"
    cache = context_of(38)
    assert str(cache) == f"BeaconCache: {text}\n6.0 KiB held, 8.2 KiB saved of 14.2 KiB (2.4x)"
    assert repr(cache) == f"<BeaconCache: {text} / 6.0 KiB held, 8.2 KiB saved of 14.2 KiB (2.4x)>"


def test_what_is_kept_raw_and_several_ratios_are_described():
    cache = model().compress(random_ids(60), ratio=(2, 8, 4), spans=[(20, 25, None)])
    assert str(cache).splitlines()[0] == (
        "BeaconCache: 60 tokens seen | 2 sinks | 14 beacons (x2, x4, x8) | 5 kept raw | 12 in the tail"
    )


def test_an_empty_cache_and_a_batch_describe_themselves():
    assert str(model().new_cache()) == (
        "BeaconCache: 0 tokens seen | 0 sinks | 0 beacons | 0 in the tail\n0 bytes held"
    )
    lines = str(BeaconCache.stack([context_of(38), context_of(5)])).splitlines()
    assert len(lines) == 3
    assert lines[1] == "BeaconCache: 5 tokens seen | 0 sinks | 0 beacons | 5 in the tail"


def test_thousands_and_large_sizes_are_readable():
    cache = context_of(5)
    cache.rows = tuple(row.after_reading(3_000_000) for row in cache.rows)
    assert "3,000,005 tokens seen" in str(cache)
    assert re.search(r"^1\.9 KiB held, 1\.07 GiB saved of 1\.07 GiB \(600,?001\.0x\)$", str(cache).splitlines()[1])


@pytest.mark.parametrize(
    "name", ["tokens_seen", "num_sinks", "num_beacons", "memory_length", "tail_length", "cache_length"]
)
def test_a_number_that_differs_among_rows_is_refused(name):
    batch = BeaconCache.stack([context_of(38), context_of(5)])
    values = [getattr(row, name) for row in batch.rows]
    with pytest.raises(InputError) as caught:
        getattr(batch, name)
    assert str(caught.value) == f"{name} differs among the rows of this batch ({values}). Read rows[b].{name} instead."


# --- forks, devices, dtypes ----------------------------------------------------------------------------------------------


def test_a_fork_shares_tensors_and_is_independent():
    cache = context_of(38)
    before = [tensor.clone() for tensor in tensors_of(cache)]
    fork = cache.fork()
    assert all(mine is theirs for mine, theirs in zip(tensors_of(fork), tensors_of(cache), strict=True))
    model().compress(random_ids(40, 5), cache=fork)
    fork.policy = RatioPolicy(8)
    assert (fork.tokens_seen, cache.tokens_seen) == (78, 38)
    assert cache.policy == RatioPolicy(4)
    assert all(torch.equal(mine, old) for mine, old in zip(tensors_of(cache), before, strict=True))
    model().compress(random_ids(40, 5), cache=cache)
    assert_same(cache, fork)


def test_a_fork_of_an_empty_cache_fills_alone():
    cache = model().new_cache(ratio=4)
    model().compress(random_ids(20), cache=cache.fork())
    assert cache.num_slots == 0


def test_to_a_dtype_and_back():
    cache = context_of(38)
    for half in (cache.to(torch.bfloat16), cache.to("cpu", torch.bfloat16), cache.to(dtype=torch.bfloat16)):
        assert {tensor.dtype for tensor in tensors_of(half)} == {torch.bfloat16, torch.long}
        assert half.cache_bytes * 2 == cache.cache_bytes
        assert half.rows == cache.rows
        again = half.to(torch.float32)
        assert_same(again, cache, atol=0.05)
        torch.testing.assert_close(next_logits(again), next_logits(cache), atol=0.2, rtol=0)
    assert {tensor.dtype for tensor in tensors_of(cache)} == {torch.float32, torch.long}


def test_to_a_device_keeps_everything():
    cache = context_of(38)
    moved = cache.to("cpu")
    assert_same(moved, cache)
    assert (moved.policy, moved.base_fingerprint, moved.adapter_fingerprint) == (
        cache.policy,
        cache.base_fingerprint,
        cache.adapter_fingerprint,
    )
    elsewhere = cache.to("meta")
    assert {tensor.device.type for tensor in tensors_of(elsewhere)} == {"meta"}


# --- quantised ------------------------------------------------------------------------------------------------------------


def test_fewer_bits_are_fewer_bytes_and_more_error():
    cache = context_of(60)
    eight, four = cache.quantize(8), cache.quantize(bits=4)
    assert (eight.quantized_bits, four.quantized_bits, cache.quantized_bits) == (8, 4, None)
    memory, tail = cache.memory_length, cache.tail_length
    # 8 dims: a byte or half a byte each, and two float16 for the one group.
    assert cache.cache_bytes == (memory + tail) * ENTRY_BYTES
    assert eight.cache_bytes == tail * ENTRY_BYTES + memory * 12 * (8 + 4)
    assert four.cache_bytes == tail * ENTRY_BYTES + memory * 12 * (4 + 4)
    errors = []
    for small in (eight, four):
        assert small.rows == cache.rows
        assert small.num_slots == cache.num_slots
        keys = [(a.entries()[0] - b.entries()[0]).abs() for a, b in zip(small.layers, cache.layers, strict=True)]
        assert not any(error[:, :, memory:].any() for error in keys)
        errors.append(torch.stack(keys).mean().item())
    assert 0 < errors[0] < 0.01 < errors[1] < 0.2
    shifts = [(next_logits(small) - next_logits(cache)).abs().mean().item() for small in (eight, four)]
    assert 0 < shifts[0] < shifts[1]
    assert shifts[0] < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_context_reads_on_and_closes_chunks_quantised(bits):
    cache = context_of(38).quantize(bits)
    model().compress(random_ids(50, 5), cache=cache)
    assert cache.quantized_bits == bits
    assert len(cache.rows[0].chunks) == 5
    for layer in cache.layers:
        assert layer.stored_length == cache.memory_length
        assert layer.keys.shape[2] == cache.tail_length
    whole = model().compress(torch.cat((random_ids(38, 38), random_ids(50, 5)), dim=1), ratio=4)
    assert cache.rows == whole.rows
    difference = (next_logits(cache) - next_logits(whole)).abs().mean()
    assert difference < (0.05 if bits == 8 else 0.5)


def test_a_context_that_has_closed_nothing_yet_quantises_what_it_closes_later():
    cache = context_of(10).quantize(8)
    model().compress(random_ids(30, 5), cache=cache)
    assert cache.quantized_bits == 8
    assert cache.layers[0].stored_length == cache.memory_length == 10


def test_auto_that_reads_anew_stays_quantised():
    small = with_beacons("llama", CONFIG, eos_token_id=None, max_position_embeddings=48)
    cache = small.compress(random_ids(40)).quantize(8)
    assert set(cache.ratios) == {2}
    small.compress(random_ids(40, 5), cache=cache)
    assert set(cache.ratios) == {4}
    assert cache.quantized_bits == 8


def test_quantising_again_is_from_what_is_held():
    cache = context_of(38).quantize(8)
    assert cache.quantize(4).quantized_bits == 4
    assert cache.quantized_bits == 8


@pytest.mark.parametrize("bits", [0, 2, 5, 16, 8.0, True, "8", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(InputError) as caught:
        context_of(38).quantize(bits)
    assert str(caught.value) == f"bits must be 8 or 4; got {bits!r}. Use quantize(8), or 4 for half the bytes."


def test_a_ragged_batch_cannot_be_quantised():
    with pytest.raises(UnsupportedError) as caught:
        BeaconCache.stack([context_of(38), context_of(20)]).quantize()
    assert str(caught.value) == "A ragged batch cannot be quantised. Quantise each context before stacking."


def test_quantised_contexts_fork_move_and_stack():
    small = context_of(38).quantize(8)
    assert_same(small.fork(), small)
    assert small.fork().quantized_bits == 8
    assert_same(small.to("cpu"), small)
    assert small.to(torch.bfloat16).quantized_bits == 8
    stacked = BeaconCache.stack([small, context_of(20)])
    assert stacked.quantized_bits is None
    assert_same(stacked.row(0), small)


# --- batches -----------------------------------------------------------------------------------------------------------------


def test_stacking_and_taking_rows_is_a_round_trip():
    contexts = [context_of(length, ratio) for length, ratio in ((5, 4), (38, 2), (16, 4), (60, 8))]
    batch = BeaconCache.stack(contexts)
    assert (batch.batch_size, batch.num_slots, batch.is_ragged) == (4, max(c.cache_length for c in contexts), True)
    for b, context in enumerate(contexts):
        assert_same(batch.row(b), context)
        assert batch.row(b).num_slots == context.num_slots
        assert batch.row(b).token_ids.shape == context.token_ids.shape
    assert_same(BeaconCache.stack([batch.row(b) for b in range(4)]), batch)
    halves = BeaconCache.stack([BeaconCache.concatenate(contexts[:2]), BeaconCache.concatenate(contexts[2:])])
    assert_same(halves, batch)


def test_rows_of_one_length_stack_without_padding():
    contexts = [context_of(38, seed=seed) for seed in (1, 2)]
    batch = BeaconCache.stack(contexts)
    assert not batch.is_ragged
    assert batch.cache_length == 16
    for b, context in enumerate(contexts):
        assert_same(batch.row(b), context)


def test_every_row_of_a_batch_reads_on_as_alone():
    contexts = [context_of(length) for length in (5, 38, 31)]
    batch = BeaconCache.stack(contexts)
    more = [random_ids(length, length)[0].tolist() for length in (20, 3, 40)]
    model().compress(more, cache=batch)
    for b, (context, ids) in enumerate(zip(contexts, more, strict=True)):
        model().compress(ids, cache=context)
        assert_same(batch.row(b), context, atol=2e-5)


def test_rows_stacked_under_different_policies_keep_their_own(tmp_path):
    contexts = [context_of(38, 2), context_of(20, 8), context_of(31, "auto"), model().compress(
        random_ids(33, 9), ratio=4, spans=[(34, 40, None)]
    )]  # fmt: skip
    batch = BeaconCache.stack(contexts)
    batch.save(tmp_path / "batch.beacon")
    for stacked in (batch, BeaconCache.load(tmp_path / "batch.beacon", model()), batch.to("cpu"), batch.fork()):
        more = [random_ids(length, length)[0].tolist() for length in (20, 31, 40, 33)]
        model().compress(more, cache=stacked)
        for b, (context, ids) in enumerate(zip(contexts, more, strict=True)):
            assert_same(stacked.row(b), model().compress(ids, cache=context.fork()), atol=2e-5)
            assert stacked.row(b).policy == context.policy
        with pytest.raises(
            InputError, match=r"^policy differs among the rows of this batch\. Read policies\[b\] instead\.$"
        ):
            _ = stacked.policy


def test_a_batch_read_at_once_equals_its_rows():
    texts = [random_ids(length, length)[0].tolist() for length in (33, 4, 50)]
    batch = model().compress(texts, ratio=4)
    for b, text in enumerate(texts):
        assert_same(batch.row(b), model().compress(text, ratio=4), atol=2e-5)


def test_stacking_nothing_or_an_empty_context_is_refused():
    with pytest.raises(InputError, match=r"^stack needs at least one context; got none\.$"):
        BeaconCache.stack([])
    with pytest.raises(InputError, match=r"^An empty context cannot be stacked\. Compress a text into it first\.$"):
        BeaconCache.stack([context_of(5), model().new_cache()])


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("base_fingerprint", "0000", "base model"),
        ("adapter_fingerprint", "0000", "adapter"),
        ("config", BeaconConfig(chunk_size=32), "settings"),
    ],
)
def test_contexts_of_different_makers_cannot_be_mixed(name, value, what):
    other = context_of(38)
    setattr(other, name, value)
    with pytest.raises(MismatchError) as caught:
        BeaconCache.stack([context_of(38), other])
    assert str(caught.value) == f"Contexts of one batch must share their {what}; these differ. Compress both anew."


# --- what transformers asks ------------------------------------------------------------------------------------------------


@pytest.fixture
def ragged() -> BeaconCache:
    return BeaconCache.stack([context_of(5), context_of(60), context_of(38)])


def test_repeating_rows(ragged):
    rows = [ragged.row(b) for b in range(3)]
    ragged.batch_repeat_interleave(2)
    assert ragged.batch_size == 6
    for b in range(6):
        assert_same(ragged.row(b), rows[b // 2])


@pytest.mark.parametrize(
    "indices", [torch.tensor([1, 2]), torch.tensor([2, 0]), torch.tensor([True, False, True]), torch.tensor([0])]
)
def test_selecting_rows(ragged, indices):
    kept = torch.arange(3)[indices].tolist()
    rows = [ragged.row(b) for b in kept]
    ragged.batch_select_indices(indices)
    assert ragged.batch_size == len(kept)
    assert [layer.get_seq_length() for layer in ragged.layers] == [ragged.num_slots] * 3
    for b, row in enumerate(rows):
        assert_same(ragged.row(b), row)
    model().compress(random_ids(20).expand(len(kept), -1), cache=ragged)
    for b, row in enumerate(rows):
        model().compress(random_ids(20), cache=row)
        assert_same(ragged.row(b), row, atol=2e-5)


@pytest.mark.parametrize("beams", [[1, 1, 0], [2, 1, 0], [0, 0, 0]])
def test_reordering_beams(ragged, beams):
    rows = [ragged.row(b) for b in range(3)]
    ragged.reorder_cache(torch.tensor(beams))
    for b, beam in enumerate(beams):
        assert_same(ragged.row(b), rows[beam])
    model().compress(random_ids(20).expand(3, -1), cache=ragged)
    for b, beam in enumerate(beams):
        alone = rows[beam].fork()
        model().compress(random_ids(20), cache=alone)
        assert_same(ragged.row(b), alone, atol=2e-5)


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("bits", [None, 8])
def test_cropping_takes_back_the_last_tokens(count, bits):
    cache = context_of(38) if bits is None else context_of(38).quantize(bits)
    cache.crop(-count)
    assert (cache.tokens_seen, cache.tail_length) == (38 - count, 6 - count)
    assert cache.token_ids.shape == (1, 38 - count)
    if bits is None and count < 6:
        assert_same(cache, model().compress(random_ids(38, 38)[:, : 38 - count], ratio=4), atol=2e-5)
    again = context_of(38) if bits is None else context_of(38).quantize(bits)
    if count:
        model().compress(random_ids(38, 38)[:, 38 - count :], cache=cache)
    assert_same(cache, again, atol=2e-5 if bits is None else 0.05)  # its memory is not what it was read on


def test_cropping_a_ragged_batch(ragged):
    ragged.crop(-3)
    for b, length in enumerate((5, 60, 38)):
        assert_same(ragged.row(b), model().compress(random_ids(length, length)[:, :-3], ratio=4), atol=2e-5)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("ratio", [4, "auto"])
def test_a_cache_with_local_tokens_reads_on_after_a_crop(ratio, count):
    own = with_beacons("llama", BeaconConfig(16, (2, 4, 8), local_tokens=5), eos_token_id=None)
    cache, shorter = (own.compress(random_ids(40, 4)[:, :length], ratio=ratio) for length in (22, 22))
    cache.crop(-count)  # less is left behind the closed chunk than would close it
    assert [len(row.chunks) for row in cache.rows] == [1]
    ids = random_ids(40, 4)[:, 22 - count :]
    for start in range(ids.shape[1]):
        own.compress(ids[:, start : start + 1], cache=cache)
    own.compress(random_ids(40, 4)[:, 22:], cache=shorter)
    assert_same(cache, shorter, atol=2e-5)


def test_cropping_into_a_closed_chunk_is_refused_and_changes_nothing():
    cache = context_of(38)
    with pytest.raises(UnsupportedError) as caught:
        cache.crop(-7)
    assert str(caught.value) == "crop(-7) reaches into closed chunks. Keep a fork() to go back to."
    with pytest.raises(InputError) as caught:
        cache.crop(5)
    assert str(caught.value) == "crop takes a negative number, of tokens to take back; got 5. Use crop(-5)."
    assert_same(cache, context_of(38))


def test_a_cache_cannot_be_reset():
    with pytest.raises(
        UnsupportedError, match=r"^A BeaconCache cannot be reset\. Make a new one with model\.compress\.$"
    ):
        context_of(5).reset()


@pytest.mark.parametrize("bits", [None, 8])
def test_truncating_drops_the_last_slots(bits):
    cache = context_of(38) if bits is None else context_of(38).quantize(bits)
    cache.truncate(13)
    whole = context_of(38) if bits is None else context_of(38).quantize(bits)
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        assert mine.get_seq_length() == 13
        assert torch.equal(mine.entries()[0], theirs.entries()[0][:, :, :13])


@torch.no_grad()
def test_a_copy_by_pythons_own_is_a_fork():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8)), attention="sdpa")
    cache = model.compress(random_ids(37), ratio=4)
    logits = model.read_next([cache.fork()], [5])
    other = copy.copy(cache)
    model.compress(random_ids(9, 7), cache=other)
    assert (cache.tokens_seen, other.tokens_seen) == (37, 46)
    assert torch.equal(model.read_next([cache], [5]), logits)


def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    cache = context_of(38)
    before = cache.fork()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    for layer, length in ((0, 5), (2, 5), (0, 40), (2, 40)):
        with monkeypatch.context() as patch:
            patch.setattr(model().model.layers[layer].mlp, "forward", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model().compress(random_ids(length, 5), cache=cache)
        assert_same(cache, before)
    model().compress(random_ids(40, 5), cache=cache)
    model().compress(random_ids(40, 5), cache=before)
    assert_same(cache, before)
