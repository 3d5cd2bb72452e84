"""The side branch: beacon rows go through weights of their own, all others through the base's, and nothing stays behind."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from activation_beacon.projection import (
    BeaconProjection,
    PassState,
    forget_beacon_slots,
    replace_beacon_rows,
    take_beacon_slots,
)


class Attention(nn.Module):
    """As far as the hooks are concerned."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.q_proj = nn.Linear(4, 6, bias=bias)
        self.seen = []

    def forward(self, hidden, **kwargs):
        self.seen.append(kwargs)
        if kwargs.get("fail"):
            raise RuntimeError("fail")
        return self.q_proj(hidden)


def with_branch(bias: bool = True) -> Attention:
    attention = Attention(bias)
    attention.beacon_state = PassState()
    attention.register_forward_pre_hook(take_beacon_slots, with_kwargs=True)
    attention.register_forward_hook(forget_beacon_slots, always_call=True)
    linear = attention.q_proj
    linear.beacon = BeaconProjection(linear.weight, linear.bias, attention.beacon_state)
    linear.register_forward_hook(replace_beacon_rows)
    with torch.no_grad():
        for parameter in linear.beacon.parameters():
            parameter.normal_()
    return attention


def test_a_branch_starts_as_a_copy():
    linear = nn.Linear(4, 6)
    branch = BeaconProjection(linear.weight, linear.bias, state := PassState())
    hidden = torch.randn(2, 3, 4)
    state.beacon_slots = torch.tensor([0, 2])
    assert torch.equal(branch(hidden), linear(hidden[:, [0, 2]]))
    assert branch.weight is not linear.weight
    assert branch.weight.requires_grad
    assert branch.weight.data_ptr() != linear.weight.data_ptr()
    assert BeaconProjection(linear.weight, None, PassState()).bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slots", [[0], [2, 4], [0, 1, 2, 3, 4]])
def test_beacon_rows_are_the_branchs_and_all_others_the_bases(bias, slots):
    attention = with_branch(bias)
    hidden = torch.randn(2, 5, 4)
    out = attention(hidden, beacon_slots=torch.tensor(slots), other=1)
    plain = attention(hidden)
    for slot in range(5):
        beacon = attention.q_proj.beacon
        own = torch.nn.functional.linear(hidden[:, slot], beacon.weight, beacon.bias)
        expected = own if slot in slots else plain[:, slot]
        torch.testing.assert_close(out[:, slot], expected)
    assert attention.seen == [{"other": 1}, {}]


def test_an_anchored_branch_starts_from_the_anchors_and_opens_its_gate_to_the_beacons():
    linear, state, hidden = nn.Linear(4, 6), PassState(), torch.randn(2, 6, 4)
    branch = BeaconProjection(linear.weight, linear.bias, state, is_anchored=True)
    state.beacon_slots, state.anchor_slots = torch.tensor([2, 5]), torch.tensor([1, 4])
    assert torch.equal(branch(hidden), linear(hidden[:, [1, 4]]))
    branch(hidden).sum().backward()
    assert branch.gate.grad.any()
    with torch.no_grad():
        branch.gate.copy_(torch.tensor([0.5, 0.0, 1.0, -2.0]))
    torch.testing.assert_close(branch(hidden), linear(hidden[:, [1, 4]] + branch.gate * hidden[:, [2, 5]]))


def test_an_idle_branch_is_the_base_bit_for_bit():
    attention, hidden = with_branch(), torch.randn(2, 5, 4)
    bare = nn.functional.linear(hidden, attention.q_proj.weight, attention.q_proj.bias)
    assert torch.equal(attention(hidden), bare)
    assert torch.equal(attention(hidden, beacon_slots=None), bare)


def test_nothing_stays_behind_even_after_an_error():
    attention, hidden = with_branch(), torch.randn(1, 5, 4)
    attention(hidden, beacon_slots=torch.tensor([1]))
    assert attention.beacon_state.beacon_slots is None
    with pytest.raises(RuntimeError, match="fail"):
        attention(hidden, beacon_slots=torch.tensor([1]), fail=True)
    assert attention.beacon_state.beacon_slots is None


def test_gradients_reach_the_branch_through_its_rows_only():
    attention, hidden = with_branch(), torch.randn(1, 5, 4)
    attention.q_proj.weight.requires_grad_(False)
    attention(hidden, beacon_slots=torch.tensor([3]))[:, [0, 1, 2, 4]].sum().backward()
    assert not attention.q_proj.beacon.weight.grad.any()
    attention(hidden, beacon_slots=torch.tensor([3])).sum().backward()
    torch.testing.assert_close(attention.q_proj.beacon.weight.grad, hidden[0, 3].expand(6, 4))


def test_a_base_of_another_dtype_gets_its_own_dtype_back():
    attention = with_branch().to(torch.bfloat16)
    beacon = attention.q_proj.beacon.float()
    with torch.no_grad():
        beacon.weight.normal_()  # no longer what a half can hold
    hidden = torch.randn(1, 5, 4).to(torch.bfloat16)
    out = attention(hidden, beacon_slots=torch.tensor([3]))
    assert out.dtype == torch.bfloat16
    # Computed in it too: a product in float32 is many times slower where there is hardware for halves.
    halves = nn.functional.linear(hidden[:, 3], beacon.weight.bfloat16(), beacon.bias.bfloat16())
    assert torch.equal(out[:, 3], halves)
    out[:, 3].sum().backward()
    assert beacon.weight.grad.dtype == torch.float32


def test_each_thread_has_a_pass_of_its_own():
    state, seen = PassState(), []
    state.beacon_slots, state.is_disabled = torch.tensor([1]), True
    thread = threading.Thread(target=lambda: seen.append((state.beacon_slots, state.is_disabled)))
    thread.start()
    thread.join()
    assert seen == [(None, False)]
    assert state.is_disabled


def test_a_copied_or_pickled_state_starts_anew():
    state = PassState()
    state.is_disabled = True
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert isinstance(other, PassState)
        assert not other.is_disabled
        assert other.beacon_slots is None
