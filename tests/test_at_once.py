import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.at_once import chunks_at_once, read_at_once
from activation_beacon.plan import TextPlanner
from families import EAGER_ONLY, FAMILIES, random_ids, with_beacons

CHUNK = 16


def layouts_of(model, ratios, length):
    return TextPlanner(model.beacon_config, model.ratio_policy(ratios), None).layouts(length)


def losses_at_once(model, ids, ratios):
    with chunks_at_once(model):
        hidden = read_at_once(model, model._beacon.site, ids, layouts_of(model, ratios, ids.shape[1]))
        logits = model.base_forward(inputs_embeds=torch.zeros_like(hidden[:, :1])).logits
    return hidden, logits


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.beacon_parameters()}


def hidden_chunk_by_chunk(model, ids, ratios):
    """Hidden states of the raw tokens before the head, as the loop over chunks makes them."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(ids, labels=ids, beacon_ratio=ratios)
    finally:
        handle.remove()
    return torch.cat(seen, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_chunks_at_once_equal_the_loop_over_chunks(family, attention):
    model = with_beacons(
        family, BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3), attention=attention
    ).train()
    if family in EAGER_ONLY and attention == "sdpa":
        pytest.skip("the family has no sdpa")
    ids = random_ids(4 * CHUNK + 5, batch=2)
    ratios = (4, 2, 8, 4)
    expected = hidden_chunk_by_chunk(model, ids, ratios)
    with chunks_at_once(model):
        got = read_at_once(model, model._beacon.site, ids, layouts_of(model, ratios, ids.shape[1]))
        weights = torch.randn_like(got)
        ours = gradients(model, (got * weights).sum())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    theirs = gradients(model, (expected * weights).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name)
