"""Short names for weights: the same in every float dtype, different after any change that matters."""

import re

import pytest
import torch

from activation_beacon import BeaconConfig, attach, detach
from activation_beacon.config import is_same_fingerprint
from activation_beacon.fingerprint import fingerprint
from families import TESTED, tiny, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4))


def named(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"w{number}": torch.randn(shape) for number, shape in enumerate(shapes)}


def test_it_is_sixteen_hexadecimal_digits_or_twice_as_many():
    assert re.fullmatch(r"[0-9a-f]{16}(-[0-9a-f]{16})?", fingerprint(named((3, 4)).items()))
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint([("w", torch.arange(5.0))]))
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint([]))


def test_the_order_of_tensors_does_not_matter():
    tensors = list(named((3, 4), (7,), (100, 5)).items())
    assert fingerprint(tensors) == fingerprint(reversed(tensors))


def test_it_is_the_same_wherever_it_is_computed():
    tensors = {"a": torch.arange(200.0).reshape(20, 10), "b": torch.tensor([-0.0, 1.0])}
    assert fingerprint(tensors.items(), "settings") == "40d32f1c9bffe48b"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_does_not_depend_on_the_dtype(dtype):
    tensors = named(*[(30, 40), (7,), (1000,)] * 20)
    tensors["tiny"] = torch.randn(40) * 1e-6
    loaded = fingerprint((name, tensor.to(dtype)) for name, tensor in tensors.items())
    assert is_same_fingerprint(loaded, fingerprint(tensors.items()))
    tensors["w0"] = tensors["w0"] * 1.01
    assert not is_same_fingerprint(loaded, fingerprint(tensors.items()))


def test_numbers_that_float16_holds_have_one_name_there_too():
    tensors = {"w": torch.randn(300).to(torch.bfloat16).float()}
    assert fingerprint([("w", tensors["w"].half())]) == fingerprint(tensors.items())


def test_minus_zero_is_zero():
    assert fingerprint([("w", torch.tensor([0.0, -0.0]))]) == fingerprint([("w", torch.zeros(2))])


def test_layout_in_memory_does_not_matter():
    tensor = torch.randn(40, 30)
    assert fingerprint([("w", tensor.t().contiguous().t())]) == fingerprint([("w", tensor)])


def test_names_shapes_values_and_settings_matter():
    tensors = named((3, 4), (70, 10))
    prints = [
        fingerprint(tensors.items()),
        fingerprint(tensors.items(), "other settings"),
        fingerprint([("v0", tensors["w0"]), ("w1", tensors["w1"])]),
        fingerprint([("w0", tensors["w0"].reshape(4, 3)), ("w1", tensors["w1"])]),
        fingerprint([("w0", tensors["w0"])]),
        fingerprint([("w0", tensors["w0"]), ("w1", tensors["w1"] * 1.01)]),
        fingerprint([("w0", tensors["w0"]), ("w1", tensors["w1"].flip(0))]),
        fingerprint([]),
    ]
    assert len(set(prints)) == len(prints)


def test_the_first_and_further_parts_of_a_large_tensor_are_looked_at():
    tensor = torch.randn(64, 1000)
    before = fingerprint([("w", tensor)])
    for rows in (slice(0, 2), slice(30, 34), slice(56, 64)):
        changed = tensor.clone()
        changed[rows] += 1
        assert fingerprint([("w", changed)]) != before


def test_empty_and_meta_tensors_count_by_name_and_shape():
    assert fingerprint([("w", torch.zeros(0, 3))]) != fingerprint([("w", torch.zeros(0, 4))])
    with torch.device("meta"):
        assert fingerprint([("w", torch.zeros(2, 3))]) != fingerprint([("w", torch.zeros(3, 2))])


# --- of models -----------------------------------------------------------------------------------------------------------


def test_every_parameter_of_a_base_counts():
    model = attach(tiny("llama"), CONFIG)
    before, seen = model.base_fingerprint, set()
    for name, parameter in model.named_parameters():
        if "beacon" in name:
            continue
        with torch.no_grad():
            parameter.mul_(1.01)
            seen.add(model.base_fingerprint)
            assert before not in seen, name
    assert len(seen) == sum("beacon" not in name for name, _ in model.named_parameters())


def test_every_beacon_parameter_counts_for_the_adapter_alone():
    model = with_beacons("llama", CONFIG)
    base, seen = model.base_fingerprint, {model.adapter_fingerprint}
    for _, parameter in model.beacon_parameters():
        with torch.no_grad():
            parameter.mul_(1.01)
        seen.add(model.adapter_fingerprint)
    assert len(seen) == 1 + len(list(model.beacon_parameters()))
    assert model.base_fingerprint == base


@pytest.mark.parametrize("family", TESTED)
def test_a_base_has_one_name_with_and_without_beacons_and_in_any_dtype(family):
    model = attach(tiny(family), CONFIG)
    first = model.base_fingerprint
    assert model.beacon_config.base_fingerprint == first
    again = attach(detach(model), CONFIG)
    assert again.base_fingerprint == first
    assert not is_same_fingerprint(attach(tiny(family, seed=1), CONFIG).base_fingerprint, first)
    for dtype in (torch.bfloat16, torch.float16):
        assert is_same_fingerprint(attach(tiny(family).to(dtype), CONFIG).base_fingerprint, first)


@pytest.mark.parametrize("changes", [{"chunk_size": 32}, {"num_sinks": 1}, {"placement": "append"}, {"anchored": True}])
def test_settings_that_a_context_depends_on_count_for_the_adapter(changes):
    settings = {"chunk_size": 16, "ratios": (2, 4)}
    plain = with_beacons("llama", BeaconConfig(**settings))
    other = with_beacons("llama", BeaconConfig(**{**settings, **changes}))
    assert other.adapter_fingerprint != plain.adapter_fingerprint
    assert other.base_fingerprint == plain.base_fingerprint


def test_anchored_counts_where_the_weights_are_the_same():
    plain, anchored = (BeaconConfig(chunk_size=16, ratios=(2, 4), anchored=anchored) for anchored in (False, True))
    assert plain.fingerprint_settings != anchored.fingerprint_settings


def test_exact_ids_count():
    settings = {"chunk_size": 16, "ratios": (2, 4), "anchored": True, "placement": "append"}
    prints = {BeaconConfig(**settings, exact_ids=ids).fingerprint_settings for ids in ((), (3,), (3, 4))}
    assert len(prints) == 3


def test_ratios_and_remarks_do_not_count():
    plain = with_beacons("llama", CONFIG)
    other = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4, 8), training={"steps": 1}))
    assert other.adapter_fingerprint == plain.adapter_fingerprint


def test_a_model_made_in_inference_mode_has_a_name():
    with torch.inference_mode():
        model = attach(tiny("llama"), CONFIG)
        assert model.base_fingerprint == attach(tiny("llama"), CONFIG).base_fingerprint
        assert model.compress([5, 6, 7]).tokens_seen == 3
