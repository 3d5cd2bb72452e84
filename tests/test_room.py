"""Appending in place: the same entries as concatenating, and nobody's view ever changes."""

import copy

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.entries import BeaconLayer
from activation_beacon.room import GROWTH, LEAST_SPARE, Room
from families import random_ids, with_beacons


def entries(length, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, length, 4, generator=generator).to(dtype).unbind()


def grown(steps, layer=None):
    """A layer after reading pieces of these lengths, and what concatenation makes of them."""
    layer = layer or BeaconLayer()
    pieces = [entries(length, seed) for seed, length in enumerate(steps)]
    for keys, values in pieces:
        layer.update(keys, values)
    return layer, [torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)]


@pytest.mark.parametrize("steps", [[5], [5, 1], [1] * 200, [70, 1, 1, 300, 1], [3, 90, 0, 2]])
@torch.no_grad()
def test_entries_are_those_that_concatenation_gives(steps):
    layer, (keys, values) = grown(steps)
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    assert layer.get_seq_length() == sum(steps)
    assert layer.num_bytes == keys.nbytes + values.nbytes


@torch.no_grad()
def test_decoding_copies_the_cache_rarely():
    layer, _ = grown([1000, 1])
    rooms = set()
    for step in range(1000):
        layer.update(*entries(1, step))
        rooms.add(id(layer.room))
        assert layer.room.num_slots <= layer.keys.shape[2] * (1 + 1 / GROWTH) + LEAST_SPARE + 16
    assert len(rooms) <= 8


@torch.no_grad()
def test_a_copy_keeps_what_it_saw_and_both_go_on_apart():
    layer, (keys, _) = grown([50, 1])
    other = layer.copy()
    ours, theirs = entries(1, 7), entries(1, 8)
    layer.update(*ours)
    assert torch.equal(other.keys, keys)
    other.update(*theirs)
    assert torch.equal(layer.keys, torch.cat((keys, ours[0]), dim=2))
    assert torch.equal(other.keys, torch.cat((keys, theirs[0]), dim=2))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, BeaconLayer.copy])
@torch.no_grad()
def test_whichever_of_two_appends_first(duplicate):
    layer, (keys, _) = grown([50, 1])
    other = duplicate(layer)
    theirs, ours = entries(1, 8), entries(1, 7)
    other.update(*theirs)
    layer.update(*ours)
    assert torch.equal(layer.keys, torch.cat((keys, ours[0]), dim=2))
    assert torch.equal(other.keys, torch.cat((keys, theirs[0]), dim=2))


@torch.no_grad()
def test_what_is_taken_back_is_not_written_over_in_a_copy():
    layer, (keys, _) = grown([50, 1, 1])
    other = layer.copy()
    layer.crop(-2)
    layer.update(*entries(2, 9))
    assert torch.equal(other.keys, keys)
    assert torch.equal(layer.keys, torch.cat((keys[:, :, :-2], entries(2, 9)[0]), dim=2))


@torch.no_grad()
def test_reading_a_text_leaves_no_slot_to_spare():
    layer, _ = grown([30, 1, 200])
    assert layer.room is None
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_gradients_flow_through_what_is_appended():
    layer, _ = grown([5])
    new = [tensor.requires_grad_() for tensor in entries(2, 3)]
    keys, values = layer.update(*new)
    (keys.sum() + values.sum()).backward()
    assert layer.room is None
    assert all(torch.equal(tensor.grad, torch.ones_like(tensor)) for tensor in new)


@torch.no_grad()
def test_other_dtypes_are_joined_as_concatenation_joins_them():
    layer, _ = grown([5, 1])
    half = BeaconLayer.of(layer.keys.bfloat16(), layer.values.bfloat16())
    keys, _ = half.update(*entries(1, 4))
    assert keys.dtype == torch.float32


def test_room_made_in_inference_mode_serves_only_there():
    with torch.inference_mode():
        layer, (keys, _) = grown([5, 1])
        room = layer.room
        layer.update(*entries(1, 4))
        assert layer.room is room
    with torch.no_grad():
        layer.update(*entries(1, 5))
    assert layer.room is not room
    assert torch.equal(layer.keys[:, :, :6], keys)


@torch.no_grad()
def test_a_room_is_for_the_tensors_that_it_handed_out():
    keys, values = entries(5)
    room = Room(keys, values, 1)
    held = room.append(*entries(1, 1))
    assert room.can_append_to(*held, 1)
    assert not room.can_append_to(keys, values, 1)
    assert not room.can_append_to(*(tensor[:, :, :3] for tensor in held), 1)
    assert not room.can_append_to(*held, room.num_slots)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_two_answers_on_one_context_do_not_meet(attention):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4)), attention=attention)
    context = model.compress(random_ids(40), ratio=4)
    tokens = [random_ids(1, seed) for seed in range(12)]

    def steps(cache, ids):
        return torch.cat([model(token, past_key_values=cache, use_cache=True).logits for token in ids])

    alone = [steps(context.fork(), ids) for ids in (tokens[:6], tokens[6:])]
    one, other = context.fork(), context.fork()
    mixed = [
        torch.cat(parts)
        for parts in zip(
            *[(steps(one, [a]), steps(other, [b])) for a, b in zip(tokens[:6], tokens[6:], strict=True)], strict=True
        )
    ]
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed[1], alone[1])
