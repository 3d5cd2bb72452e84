"""One layer's keys and values: cut, joined, quantised, lent to a pass."""

import itertools

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from activation_beacon.entries import BeaconLayer, ChunkLayer
from activation_beacon.quantized import Quantized
from activation_beacon.rows import merge, take


def numbered(*shape: int) -> torch.Tensor:
    """Every number once, so that a wrong place cannot hide."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).reshape(shape)


def taken_by_loop(tensor, rows, ends, length, dim):
    """`take`, slot by slot; None where a slot lies before the first."""
    return [
        [None if slot < 0 else tensor[row].select(dim - 1, slot) for slot in range(end - length, end)]
        for row, end in zip(rows, ends, strict=True)
    ]


@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 7, 4)])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1, 1, 2, 0], [1]])
@pytest.mark.parametrize("length", [0, 1, 4, 7, 9])
def test_take_equals_a_loop(shape, rows, length):
    tensor, dim = numbered(*shape), 1 if len(shape) == 2 else 2
    choices = [7, 5, 4, 7]
    for ends in (choices[: len(rows)], [6] * len(rows), [7] * len(rows)):
        cut = take(tensor, rows, ends, length, dim=dim)
        assert cut.shape == (len(rows), *shape[1:dim], length, *shape[dim + 1 :])
        for b, row in enumerate(taken_by_loop(tensor, rows, ends, length, dim)):
            for slot, expected in enumerate(row):
                if expected is not None:
                    assert torch.equal(cut[b].select(dim - 1, slot), expected)


def test_take_is_a_view_where_all_rows_are_cut_alike():
    tensor = numbered(2, 1, 5, 3)
    cut = take(tensor, [0, 1], [5, 5], 3, dim=2)
    assert cut.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_take_from_nothing_is_padding():
    assert take(torch.zeros(2, 1, 0, 3), [1, 0, 1], [0, 0, 0], 4, dim=2).shape == (3, 1, 4, 3)
    assert take(torch.zeros(2, 0, dtype=torch.long), [0, 1], [0, 0], 2, dim=1).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("shape", "dim"), [((5,), 1), ((2, 5, 3), 2)])
def test_merge_equals_a_loop(shape, dim):
    sizes, order = [3, 5, 1], [[4, 0], [1], [3, 2]]
    parts = []
    for rows, size in zip(order, sizes, strict=True):
        sized = list(shape)
        sized[dim - 1] = size
        parts.append((rows, numbered(len(rows), *sized) + 1000 * size))
    merged = merge(parts, dim=dim)
    assert merged.shape == (5, *shape)
    for (rows, tensor), size in zip(parts, sizes, strict=True):
        for b, row in enumerate(rows):
            assert torch.equal(merged[row].narrow(dim - 1, 5 - size, size), tensor[b])
            assert not merged[row].narrow(dim - 1, 0, 5 - size).any()


def test_merging_one_part_copies_nothing():
    tensor = numbered(2, 3)
    assert merge([([0, 1], tensor)], dim=1) is tensor


def test_taking_rows_apart_and_merging_them_is_the_whole():
    tensor = numbered(4, 2, 6, 3)
    for rows in itertools.permutations(range(4)):
        parts = [(chosen, take(tensor, chosen, [6, 6], 6, dim=2)) for chosen in (rows[:2], rows[2:])]
        assert torch.equal(merge(parts, dim=2), tensor)


class FromHost(TorchDispatchMode):
    """Counts what is copied to another device, or indexed with something that is not on it."""

    def __init__(self):
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_index = func is torch.ops.aten.index.Tensor
        self.num_copies += is_index or any(tensor.device.type == "cpu" for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shape", "dim"), [((3, 7), 1), ((3, 2, 7, 4), 2)])
def test_indices_are_on_the_device_for_all_layers_but_the_first(shape, dim):
    """On "meta", which stands for any device that is not the host."""
    tensor = torch.empty(shape, device="meta")

    def of_one_layer():
        alike = take(tensor, [2, 0], [7, 7], 4, dim=dim)
        ragged = take(tensor, [2, 0, 1], [7, 5, 6], 6, dim=dim)
        return merge([([2, 0], alike), ([1, 3, 4], ragged)], dim=dim)

    assert of_one_layer().shape == (5, *shape[1:dim], 6, *shape[dim + 1 :])
    with FromHost() as layers:
        of_one_layer()
    assert layers.num_copies == 0


def test_gradients_flow_through_cutting_and_joining_also_after_inference():
    tensor = numbered(3, 2, 7, 4)

    def joined(tensor):
        parts = [([2, 0], take(tensor, [2, 0], [7, 5], 6, dim=2)), ([1], take(tensor, [1], [7], 4, dim=2))]
        return merge(parts, dim=2)

    with torch.inference_mode():
        expected = joined(tensor)
    tensor.requires_grad_()
    assert torch.equal(joined(tensor), expected)
    joined(tensor).sum().backward()
    assert tensor.grad[1].sum() == 2 * 4 * 4


# --- quantised -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 64, 80, 33])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_is_at_most_half_a_step(dim, bits):
    if dim % 2 and bits == 4:
        pytest.skip("two codes a byte need an even number of them")
    tensor = torch.randn(2, 3, 5, dim)
    packed = Quantized.of(tensor, bits)
    dense = packed.dense()
    assert (dense.dtype, dense.shape) == (tensor.dtype, tensor.shape)
    groups = packed.scale.shape[-1]
    assert dim // groups <= 32
    error = (dense - tensor).abs().unflatten(-1, (groups, -1))
    # Half a step, and what float16 takes from the scale and the least value.
    allowed = 0.5 * packed.scale.float() + 0.004 * tensor.abs().amax()
    assert (error <= allowed[..., None]).all()


def test_more_bits_are_more_bytes_and_less_error():
    tensor = torch.randn(2, 3, 5, 64)
    eight, four = Quantized.of(tensor, 8), Quantized.of(tensor, 4)
    assert (four.num_bytes, eight.num_bytes, tensor.nbytes) == (30 * (32 + 8), 30 * (64 + 8), 30 * 256)
    errors = [(packed.dense() - tensor).abs().mean().item() for packed in (eight, four)]
    assert errors[0] < 0.01 < errors[1] < 0.1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.25, -100.0])
def test_a_constant_vector_survives(bits, value):
    tensor = torch.full((1, 1, 2, 32), value)
    torch.testing.assert_close(Quantized.of(tensor, bits).dense(), tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_joining_and_mapping_quantised_parts_equals_doing_it_to_the_dense(bits):
    tensor = torch.randn(3, 2, 7, 32)
    whole = Quantized.of(tensor, bits)
    parts = Quantized.of(tensor[:, :, :3], bits).joined(Quantized.of(tensor[:, :, 3:], bits))
    assert (whole.length, parts.length, parts.bits) == (7, 7, bits)
    assert torch.equal(parts.dense(), whole.dense())
    assert torch.equal(whole.map(lambda part: part[[2, 0]]).dense(), whole.dense()[[2, 0]])
    assert torch.equal(whole.map(lambda part: part[:, :, 2:5]).dense(), whole.dense()[:, :, 2:5])


# --- a layer -------------------------------------------------------------------------------------------------------------


def layer_of(length: int, bits: int | None = None, stored: int = 0) -> BeaconLayer:
    layer = BeaconLayer.of(torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8))
    return layer if bits is None else layer.quantized(bits, stored)


def test_an_empty_layer_holds_nothing():
    layer = BeaconLayer()
    assert (layer.get_seq_length(), layer.num_bytes, dict(layer.named_tensors())) == (0, 0, {})
    for other in (layer.copy(), layer.map(torch.neg), layer.with_dtype(torch.bfloat16), BeaconLayer.of_named({}, None)):
        assert other is not layer
        assert other.get_seq_length() == 0


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_updating_appends_and_returns_all(bits):
    layer = layer_of(5, bits, 3)
    before = layer.entries()
    new = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    returned = layer.update(*new)
    assert layer.get_seq_length() == 9
    assert layer.stored_length == (0 if bits is None else 3)
    for mine, old, fresh in zip(returned, before, new, strict=True):
        assert torch.equal(mine, torch.cat((old, fresh), dim=2))
    assert all(torch.equal(a, b) for a, b in zip(layer.entries(), returned, strict=True))


def test_a_copy_shares_tensors_and_grows_apart():
    layer = layer_of(5, 8, 3)
    copy = layer.copy()
    assert copy.keys is layer.keys
    assert copy.stored is layer.stored
    copy.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    assert (layer.get_seq_length(), copy.get_seq_length()) == (5, 6)


def test_quantising_a_layer_keeps_the_rest_dense_to_the_bit():
    dense = layer_of(6)
    small = dense.quantized(8, 4)
    assert (small.stored_length, small.keys.shape[2], small.get_seq_length()) == (4, 2, 6)
    assert torch.equal(small.keys, dense.keys[:, :, 4:])
    assert torch.equal(small.values, dense.values[:, :, 4:])
    assert small.num_bytes < dense.num_bytes
    for mine, theirs in zip(small.entries(), dense.entries(), strict=True):
        assert not torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0)
    thawed = small.dense()
    assert thawed.stored is None
    assert torch.equal(thawed.keys, small.entries()[0])
    assert dense.dense() is dense


@pytest.mark.parametrize("bits", [None, 8])
def test_another_dtype_is_that_of_everything_that_comes_out(bits):
    layer = layer_of(5, bits, 3).with_dtype(torch.bfloat16)
    assert {tensor.dtype for tensor in layer.entries()} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_layer_survives_its_names(bits):
    layer = layer_of(5, bits, 3)
    again = BeaconLayer.of_named(dict(layer.named_tensors()), bits)
    assert again.stored_length == layer.stored_length
    assert all(torch.equal(a, b) for a, b in zip(again.entries(), layer.entries(), strict=True))


# --- lent to a pass --------------------------------------------------------------------------------------------------------


def test_a_chunk_sees_the_memory_and_keeps_its_own():
    memory = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    calls = []

    def lend():
        calls.append(1)
        return memory

    layer = ChunkLayer(lend, 3)
    assert (layer.get_seq_length(), calls) == (3, [])
    new = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    for mine, held, fresh in zip(layer.update(*new), memory, new, strict=True):
        assert torch.equal(mine, torch.cat((held, fresh), dim=2))
    assert layer.keys is new[0]
    assert layer.values is new[1]
    assert calls == [1]
    assert layer.get_seq_length() == 3


def test_a_first_chunk_has_no_memory():
    layer = ChunkLayer(None, 0)
    new = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    assert layer.update(*new) == new
    assert layer.get_seq_length() == 0
