"""Several chunks in one pass give what one pass each gives."""

import pytest
import torch

from activation_beacon import BeaconConfig, grouped
from activation_beacon.entries import ChunkLayer
from activation_beacon.grouped import ByChunk, GroupLayer
from activation_beacon.layouts import GroupLayout, RawRun, chunk_layout
from activation_beacon.rope import KeyMover
from families import EAGER_ONLY, FAMILIES, needs_onednn, random_ids, tiny, widths, with_beacons
from reference import Reference

CHUNK = 16
APPEND = {"placement": "append"}
EXACT = {**APPEND, "anchored": True, "exact_ids": tuple(range(3, 97, 17))}


def model_of(family="llama", *, attention="sdpa", **settings):
    config = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8, 16), **settings)
    return with_beacons(family, config, attention=attention)


@pytest.fixture
def alone(monkeypatch):
    """Within a call of it, each chunk has a pass of its own."""

    def call(read):
        with monkeypatch.context() as patched:
            patched.setattr(grouped, "ROWS_TOGETHER", 0)
            return read()

    return call


def same(cache, expected, tolerance=1e-5):
    assert cache.rows == expected.rows
    assert torch.equal(cache.token_ids, expected.token_ids)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for (_, tensor), (_, same_tensor) in zip(layer.named_tensors(), other.named_tensors(), strict=True):
            torch.testing.assert_close(tensor, same_tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("products", ["torch", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("family", sorted({*FAMILIES, "gemma3n_text", "gemma4-small", "olmo3", "mixtral"} - EAGER_ONLY))
@torch.no_grad()
def test_a_text_read_in_groups_is_the_same_cache(family, products, alone):
    model, ids = model_of(family, num_sinks=2), random_ids(9 * CHUNK + 5, batch=2)
    model.cpu_matmul = products
    done = []
    together = model.compress(ids, ratio=4, progress=lambda *count: done.append(count))
    assert len(done) == 1
    same(together, alone(lambda: model.compress(ids, ratio=4)))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"ratio": 2}),
        ({}, {"ratio": 16}),
        ({"num_sinks": CHUNK}, {"ratio": 8}),
        ({"local_tokens": 5}, {"ratio": 4}),
        ({**APPEND, "num_sinks": 2}, {"ratio": [4, 16, 2, 8, 2, 4]}),
        ({"projections": ("q", "k", "v", "o")}, {"ratio": 4}),
        ({"anchored": True, "num_sinks": 2}, {"ratio": [2, 16, 4, 8, 2, 4]}),
        ({**EXACT, "num_sinks": 2}, {"ratio": [2, 8, 4, 8, 2, 4]}),
        ({**EXACT, "num_sinks": 2}, {"ratio": 2, "spans": [(10, 20, None), (50, 53, 2)]}),
        ({"num_sinks": 2}, {"budget": 55}),
    ],
    ids=str,
)
@torch.no_grad()
def test_in_groups_under_every_setting(settings, options, alone):
    model, ids = model_of(**settings), random_ids(6 * CHUNK + 9, batch=2)
    together = model.compress(ids, **options)
    same(together, alone(lambda: model.compress(ids, **options)))
    more = random_ids(5 * CHUNK, seed=3, batch=2)
    ratio = {"ratio": 4} if isinstance(options.get("ratio"), list) else {}
    other = together.fork()
    logits = model(more, past_key_values=together, beacon_ratio=None, logits_to_keep=1).logits if not ratio else None
    if logits is not None:
        expected = alone(lambda: model(more, past_key_values=other, logits_to_keep=1).logits)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        same(together, other)


@pytest.mark.parametrize("settings", [{"num_sinks": 2}, APPEND, EXACT], ids=["interleave", "append", "exact"])
@torch.no_grad()
def test_the_slow_reference_agrees(settings):
    model, ids = model_of(**settings), random_ids(7 * CHUNK + 3)
    beacons = {name: parameter.detach() for name, parameter in model.beacon_parameters()}
    known = {name: value for name, value in settings.items() if name != "anchored"}
    reference = Reference(tiny("llama"), beacons, **{"chunk_size": CHUNK, "num_sinks": 0, **known})
    logits = model(ids, beacon_ratio=4, logits_to_keep=3).logits[0]
    torch.testing.assert_close(logits, reference(ids, 4).logits[-3:], rtol=0, atol=1e-4)


# --- which passes are made -----------------------------------------------------------------------------------------------

SLOTS = CHUNK + 4  # at ratio 4


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, [SLOTS] * 5 + [3]),
        (2 * SLOTS - 1, [SLOTS] * 5 + [3]),
        (2 * SLOTS, [2 * SLOTS] * 2 + [SLOTS, 3]),
        (3 * SLOTS, [3 * SLOTS, 2 * SLOTS, 3]),
        (1024, [5 * SLOTS, 3]),
    ],
)
@torch.no_grad()
def test_as_many_chunks_go_together_as_the_rows_allow(most, expected, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", most)
    model, done = model_of(), []
    assert widths(model, lambda: model.compress(random_ids(5 * CHUNK + 3), ratio=4)) == expected
    model.compress(random_ids(5 * CHUNK + 3), ratio=4, progress=lambda *count: done.append(count))
    assert done[-1] == (5, 5)
    assert len(done) == len(expected) - 1
    two = widths(model, lambda: model.compress(random_ids(5 * CHUNK + 3, batch=2), ratio=4))
    assert len(two) >= len(expected)  # rows of both texts count


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("eager", [SLOTS] * 3 + [3]),
        ("unknown family", [SLOTS] * 3 + [3]),
        ("gradients", [SLOTS] * 3 + [3]),
        ("training", [SLOTS] * 3 + [3]),
        ("all logits", [SLOTS] * 3 + [3]),
        ("logits from the third chunk on", [2 * SLOTS, SLOTS, 3]),
        ("ragged", [3 * SLOTS, 3]),  # both rows are new: their memories are of one length, none
        ("begun", [8 + 4, 2 * SLOTS, 3]),
    ],
)
def test_only_chunks_that_can_go_together_do(case, expected):
    settings = APPEND if case == "begun" else {}
    family, attention = ("diffllama" if case == "unknown family" else "llama"), ("eager" if case == "eager" else "sdpa")
    model, ids = model_of(family, attention=attention, **settings), random_ids(3 * CHUNK + 3)
    calls = {
        "all logits": lambda: model(ids, beacon_ratio=4),
        "logits from the third chunk on": lambda: model(ids, beacon_ratio=4, logits_to_keep=9),
        "ragged": lambda: model.compress([ids[0].tolist(), ids[0, :-1].tolist()], ratio=4),
        "gradients": lambda: model(ids, beacon_ratio=4, logits_to_keep=1),
    }
    read = calls.get(case, lambda: model.compress(ids, ratio=4))
    model.train(case == "training")
    if case == "begun":
        cache = model.compress(ids[:, :8], ratio=4)
        read = lambda: model.compress(ids[:, 8:], cache=cache)  # noqa: E731
    with torch.set_grad_enabled(case == "gradients"):
        assert widths(model, read) == expected


@pytest.mark.parametrize("settings", [{}, EXACT], ids=["interleave", "exact"])
@torch.no_grad()
def test_an_error_in_the_middle_of_a_group_leaves_the_cache_as_it_was(settings, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 2 * SLOTS)
    model, ids = model_of(**settings), random_ids(6 * CHUNK + 3)
    cache = model.compress(ids[:, : CHUNK + 1], ratio=4)
    before, rows = [layer.keys.clone() for layer in cache.layers], cache.rows
    for number in range(0, 12, 2):  # of a layer's calls
        left = [number]

        def fail(*_, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        handles = [layer.register_forward_pre_hook(fail) for layer in model.model.layers]
        with pytest.raises(KeyboardInterrupt):
            model.compress(ids[:, CHUNK + 1 :], cache=cache)
        for handle in handles:
            handle.remove()
        assert cache.rows == rows
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    same(model.compress(ids[:, CHUNK + 1 :], cache=cache), model.compress(ids, ratio=4))


# --- by hand -------------------------------------------------------------------------------------------------------------


def test_layouts_laid_end_to_end():
    first = chunk_layout(4, 2, "interleave", num_sinks=1)  # t t b t t b
    second = chunk_layout(4, 4, "interleave", raw_runs=(RawRun(1, 2),))  # t t t t b
    group = GroupLayout((first, second))
    assert group.sizes == (6, 5)
    assert group.first_slots == (0, 6, 11)
    assert group.num_kept == (0, 3, 5)
    assert group.positions == (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7)
    assert group.raw_slots == (0, 1, 3, 4, 6, 7, 8, 9)
    assert group.beacon_slots == (2, 5, 10)
    assert group.kept_slots == (0, 2, 5, 7, 10)
    assert group.shifts == (0, -1, -3, -1, -3)
    assert [group.positions[slot] + shift for slot, shift in zip(group.kept_slots, group.shifts, strict=True)] == [
        *range(5)
    ]


def test_each_chunk_is_told_what_it_sees():
    group = GroupLayout((chunk_layout(2, 2, "interleave"), chunk_layout(2, 2, "interleave")))
    mask = ByChunk.on(torch.device("cpu"))
    memory = torch.full((1, 1, 2, 1), -1.0), torch.full((1, 1, 2, 1), -2.0)
    held, mover = ChunkLayer(lambda: memory, 2), KeyMover([None], torch.tensor(group.shifts))
    layer = GroupLayer(held, group, mover, 0, mask, lambda *both: both)
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    layer.update(keys, keys + 10)
    (one, one_keys, one_values), (two, two_keys, two_values) = mask.entries
    assert (one, two) == (3, 3)
    assert one_keys.flatten().tolist() == [-1, -1, 0, 1, 2]
    assert one_values.flatten().tolist() == [-2, -2, 10, 11, 12]
    assert two_keys.flatten().tolist() == [-1, -1, 2, 3, 4, 5]  # the first chunk's beacon, then its own
    assert two_values.flatten().tolist() == [-2, -2, 12, 13, 14, 15]
    assert (layer.keys.flatten().tolist(), layer.values.flatten().tolist()) == ([2, 5], [12, 15])
    assert layer.get_seq_length() == 2
