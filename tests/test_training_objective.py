import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.at_once import chunks_at_once
from activation_beacon.errors import ConfigError, UnsupportedError
from activation_beacon.training import objective as module
from activation_beacon.training.objective import Objective, check_at_once, check_head, losses
from families import ONE_SETTING, random_ids, with_beacons

CHUNK = 16
RATIOS = (4, 2)
# The last three do something to their logits after the head.
FAMILIES = ("llama", "qwen2", "granite", "gemma2", "cohere")


@pytest.fixture(params=FAMILIES)
def model(request):
    extra = {
        "granite": {"logits_scaling": 3.0},
        "gemma2": {"final_logit_softcapping": 2.0},
        "cohere": {"logit_scale": 0.5},
    }
    config = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4))
    return with_beacons(request.param, config, **extra.get(request.param, {})).train()


def plain_losses(model, ids, is_target, objective):
    """The same from all logits at once, and autograd's own gradients."""
    logits = model(ids, beacon_ratio=RATIOS).logits[:, :-1]
    targets, wanted = ids[:, 1:], is_target[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    with torch.no_grad(), model.beacon_disabled():
        full = model(ids).logits[:, :-1]
        alone = torch.cat([model(piece).logits for piece in ids.split(CHUNK, dim=1)], dim=1)[:, :-1]
    teacher = full.softmax(-1)
    divergence = (teacher * (full.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    loss = objective.cross_entropy * nll + objective.distillation * divergence
    if objective.context_weight:
        gain = [torch.nn.functional.cross_entropy(x.transpose(1, 2), targets, reduction="none") for x in (alone, full)]
        weights = 1 + objective.context_weight * (gain[0] - gain[1]).clamp(0, 5)
        loss = loss * weights / torch.stack([w[row].mean() for w, row in zip(weights, wanted, strict=True)])[:, None]
    return loss[wanted].sum(), nll, divergence[wanted].sum()


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(0.0, 1.0), Objective(0.7, 0.4), Objective(1.0, 0.5, 2.0)], ids=str
)
def test_the_loss_in_slices_equals_that_of_all_logits(model, objective, monkeypatch):
    monkeypatch.setattr(module, "SLICE_LOGITS", 97 * 7)  # slices that end anywhere
    ids = random_ids(2 * CHUNK + 9, batch=2)
    is_target = torch.rand(ids.shape) < 0.7
    expected, nll, divergence = plain_losses(model, ids, is_target, objective)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.beacon_parameters()}
    model.zero_grad()
    with chunks_at_once(model):
        got = losses(model, ids, is_target, RATIOS, objective=objective)
        (2 * got.total).backward()
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=1e-4)
    wanted = is_target[:, 1:]
    assert int(got.num_targets) == int(wanted.sum())
    torch.testing.assert_close(got.nll[wanted], nll[wanted], rtol=1e-4, atol=1e-4)
    assert bool(got.nll[~wanted].isnan().all())
    if objective.distillation:
        torch.testing.assert_close(got.divergence, divergence, rtol=1e-4, atol=1e-4)
    for name, parameter in model.beacon_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, 2 * gradients[name], rtol=1e-3, atol=2e-4 * scale, msg=name)


@pytest.mark.parametrize("objective", [Objective(), Objective(0.7, 0.4), Objective(1.0, 0.5, 2.0)], ids=str)
def test_texts_cost_the_same_whether_read_together_or_one_by_one(model, objective):
    ids = random_ids(2 * CHUNK + 9, batch=3)
    is_target = torch.rand(ids.shape) < torch.tensor([[0.9], [0.1], [0.0]])  # the last has nothing to predict
    with chunks_at_once(model):
        together = losses(model, ids, is_target, RATIOS, objective=objective).total
        together.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.beacon_parameters()}
        model.zero_grad()
        one_by_one = [losses(model, ids[[i]], is_target[[i]], RATIOS, objective=objective).total for i in range(3)]
        sum(one_by_one).backward()
    torch.testing.assert_close(together, sum(one_by_one), rtol=1e-5, atol=1e-5)
    for name, parameter in model.beacon_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-4 * scale, msg=name)


def test_texts_without_targets_cost_nothing_under_every_objective(model):
    ids = random_ids(2 * CHUNK + 9, batch=2)
    with chunks_at_once(model):
        got = losses(model, ids, torch.zeros_like(ids, dtype=torch.bool), RATIOS, objective=Objective(1.0, 0.5, 2.0))
        got.total.backward()
    assert float(got.total.detach()) == 0.0
    assert all(not parameter.grad.any() for _, parameter in model.beacon_parameters())


def test_a_head_that_is_known_passes_the_check(model):
    check_head(model)


def test_a_head_that_does_more_is_refused():
    model = with_beacons("granite", BeaconConfig(chunk_size=CHUNK, ratios=(2, 4)), logits_scaling=3.0)
    model.config.logits_scaling = 4.0  # ours reads this, the base keeps what it was built with
    model.base_forward = lambda **kwargs: type(model).base_forward(model, **kwargs)
    own = model.base_forward(input_ids=torch.arange(8)[None]).logits
    model.base_forward = lambda **kwargs: type("Output", (), {"logits": own * 1.5})()
    with pytest.raises(UnsupportedError, match="does more after its decoder than is known"):
        check_head(model)


def test_chunks_that_one_pass_reads_as_the_loop_does_pass_the_check(model):
    check_at_once(model)


def test_a_family_that_puts_more_into_its_masks_is_refused():
    model = with_beacons("doge", BeaconConfig(chunk_size=CHUNK, ratios=(2, 4)), attention="sdpa")
    with pytest.raises(UnsupportedError, match="puts more into its attention masks than is known here"):
        check_at_once(model)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"cross_entropy": -1.0}, "cross_entropy must be at least 0; got -1.0."),
        ({"distillation": float("nan")}, "distillation must be at least 0; got nan."),
        ({"context_weight": -0.5}, "context_weight must be at least 0; got -0.5."),
        ({"cross_entropy": 0.0}, "cross_entropy and distillation are both 0: nothing is left to minimise."),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, text):
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        Objective(**weights)


@pytest.mark.parametrize("family", ONE_SETTING)
def test_further_families_can_be_trained(family):
    model = with_beacons(
        family, BeaconConfig(chunk_size=CHUNK, ratios=(2, 4), num_sinks=2, anchored=True, placement="append")
    )
    check_head(model)
    check_at_once(model)
