"""A stored key is moved by one rotation, and then is the key that the model makes at the new position."""

import pytest
import torch

from activation_beacon.adapt import find_decoder
from activation_beacon.rope import KeyMover, rotary_layout
from families import FAMILIES, tiny


def keys_at(model, positions: list[int]) -> list[torch.Tensor]:
    """Keys (1, K, n, D) of one and the same token in each layer: alone, so that it sees nothing but itself."""
    token = torch.linspace(-1, 1, 32)[None, None]
    per_position = []
    for position in positions:
        with torch.no_grad():
            cache = model.get_decoder()(
                inputs_embeds=token, position_ids=torch.tensor([[position]]), use_cache=True
            ).past_key_values
        per_position.append([layer.keys for layer in cache.layers])
    return [torch.cat(keys, dim=2) for keys in zip(*per_position, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_moved_key_is_the_models_own_at_the_new_position(family):
    model = tiny(family)
    site = find_decoder(model, ("q", "k", "v"))
    before, after = [0, 3, 40, 200], [5, 0, 41, 17]
    mover = KeyMover(site.ropes, torch.tensor(after) - torch.tensor(before))
    for layer, (keys, expected) in enumerate(zip(keys_at(model, before), keys_at(model, after), strict=True)):
        moved = mover.move(keys, layer)
        assert moved.dtype == keys.dtype
        torch.testing.assert_close(moved, expected, atol=2e-5, rtol=1e-5)
        if site.ropes[layer] is not None:
            assert not torch.allclose(moved, keys, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_moving_nowhere_changes_nothing_and_there_and_back_is_home(family):
    site = find_decoder(tiny(family), ("q", "k", "v"))
    keys = torch.randn(2, 2, 3, 8)
    here = KeyMover(site.ropes, torch.tensor((0, 0, 0)))
    there = KeyMover(site.ropes, torch.tensor((7, -30, 400)))
    back = KeyMover(site.ropes, torch.tensor((-7, 30, -400)))
    assert torch.equal(here.move(keys, 0), keys)
    torch.testing.assert_close(back.move(there.move(keys, 0), 0), keys, atol=1e-5, rtol=0)


def test_a_layer_without_positions_keeps_its_keys():
    site = find_decoder(tiny("smollm3"), ("q", "k", "v"))
    keys = torch.randn(1, 2, 3, 8)
    mover = KeyMover(site.ropes, torch.tensor((1, 2, 3)))
    assert [rope is None for rope in site.ropes] == [False, True, False]
    assert mover.move(keys, 1) is keys
    assert not torch.equal(mover.move(keys, 0), keys)


def test_layers_of_different_kinds_are_moved_by_their_own_frequencies():
    site = find_decoder(tiny("gemma3_text"), ("q", "k", "v"))
    keys = torch.randn(1, 2, 1, 8)
    mover = KeyMover(site.ropes, torch.tensor((9,)))
    sliding, full, other = (mover.move(keys, layer) for layer in range(3))
    assert torch.equal(sliding, other)
    assert not torch.allclose(sliding, full, atol=1e-2)


def test_the_rotation_is_computed_in_float32_whatever_the_keys_are():
    site = find_decoder(tiny("llama"), ("q", "k", "v"))
    keys = torch.randn(1, 2, 1, 8).to(torch.bfloat16)
    rope = site.ropes[0]
    cos, sin = rope.rotation(torch.tensor([100_003]))
    assert cos.dtype == sin.dtype == torch.float32
    exact = (100_003.0 * rope.rotary.inv_freq.double()).cos()
    torch.testing.assert_close(cos[0, 0, :4].double(), exact, atol=1e-2, rtol=0)
    moved = rope.move(keys, rope.rotation(torch.tensor([31])))
    assert moved.dtype == torch.bfloat16
    reference = rope.move(keys.float(), rope.rotation(torch.tensor([31])))
    assert torch.equal(moved, reference.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "repeated"), ("phi3", "repeated"), ("gpt_oss", "half"), ("glm4", "repeated")]
)
def test_layouts_are_found_by_asking(family, layout):
    rotary = tiny(family).model.rotary_emb
    assert rotary_layout(rotary, "inv_freq", None) == layout


class Rotary(torch.nn.Module):
    """A rotary module that lays out its cosines in one way or another."""

    def __init__(self, spread, scale=1.0):
        super().__init__()
        self.inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
        self.spread, self.scale = spread, scale

    def forward(self, hidden, positions):
        angles = self.spread(positions[..., None] * self.inv_freq)
        return angles.cos() * self.scale, angles.sin() * self.scale


@pytest.mark.parametrize("scale", [1.0, 1.37])
@pytest.mark.parametrize(
    ("spread", "layout"),
    [
        (lambda angles: angles, "half"),
        (lambda angles: torch.cat((angles, angles), dim=-1), "repeated"),
        (lambda angles: angles.repeat_interleave(2, dim=-1), "interleaved"),
        (lambda angles: angles.flip(-1), None),
        (lambda angles: torch.cat((angles, angles, angles), dim=-1), None),
    ],
)
def test_every_layout_is_told_apart_and_scaling_does_not_matter(spread, layout, scale):
    assert rotary_layout(Rotary(spread, scale), "inv_freq", None) == layout
