"""Quantised bases: by what their layers multiply, the same results as in floats, adapters of the base that they were made from."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations import FP8Linear
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from activation_beacon import BeaconConfig, attach, load
from activation_beacon.dense import dense_weight, is_linear, is_packed, is_quantised
from activation_beacon.errors import MismatchError, UnsupportedModelError
from families import TESTED, beacon_tensors, random_ids, tiny, with_beacons
from reference import Reference
from saved_models import save_adapter, save_base

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4), num_sinks=2, anchored=True, placement="append")
QUANTISED = "The base is quantised: it is taken to be"


class Codes(nn.Module):
    """A linear layer as GPTQ and AWQ have them: no `weight`, codes and scales in buffers, a bias in either."""

    def __init__(self, linear: nn.Linear, *, is_bias_a_buffer: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        bias = None if linear.bias is None else linear.bias.detach()
        if is_bias_a_buffer:
            self.register_buffer("bias", bias)
        else:
            self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.weight_of().to(rows.dtype), self.bias)

    def weight_of(self) -> torch.Tensor:
        return self.codes * self.scales


class Parts(torch.Tensor):
    """A weight as torchao has them: floats to those who ask, codes and scales inside, and next to no operators."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype, device=codes.device)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    def dequantize(self):
        return self.codes * self.scales

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        rows, weight, *bias = args
        return nn.functional.linear(rows, weight.dequantize(), *bias)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{func} is not known")
        return cls(args[0].codes, args[0].scales)


def in_parts(linear):
    packed = Codes(linear)
    linear.weight = nn.Parameter(Parts(packed.codes, packed.scales), requires_grad=False)
    return linear


def replaced(model, make):
    """The same model with other modules in place of its layers' linear layers."""
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if is_linear(child):
                    setattr(module, name, make(child))
    return model


def with_codes(family="llama", seed=0, **options):
    return replaced(tiny(family, seed), lambda linear: Codes(linear, **options))


SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # that kernels can cut into blocks


def by_transformers(folder, quantization):
    tiny("llama", **SIZES).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, device_map="cpu"
    ).eval()


def of_bitsandbytes(folder, **settings):
    pytest.importorskip("bitsandbytes")
    return by_transformers(folder, BitsAndBytesConfig(**settings))


def of_torchao(folder, name):
    quantization = pytest.importorskip("torchao.quantization")
    return by_transformers(folder, TorchAoConfig(getattr(quantization, name)()))


KINDS = {
    "codes": lambda _: with_codes(),
    "codes, Qwen's biases in buffers": lambda _: with_codes("qwen2", is_bias_a_buffer=True),
    "codes, Qwen's biases": lambda _: with_codes("qwen2"),
    "codes, fused": lambda _: with_codes("phi3"),
    "in parts": lambda _: replaced(tiny("llama"), in_parts),
    "bitsandbytes, 4 bits": lambda folder: of_bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao, int8": lambda folder: of_torchao(folder, "Int8WeightOnlyConfig"),
    "torchao, float8": lambda folder: of_torchao(folder, "Float8WeightOnlyConfig"),
    # These round what they are given as well, so that nothing in floats is equal to them.
    "bitsandbytes, 8 bits": lambda folder: of_bitsandbytes(folder, load_in_8bit=True),
    "torchao, int8 by int8": lambda folder: of_torchao(folder, "Int8DynamicActivationInt8WeightConfig"),
}
# On a CPU those of 4 bits multiply in bfloat16.
ROUNDED = ("bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "torchao, int8 by int8")


def weight_of(linear):
    """The weight that a packed layer was made to stand for, by its own library."""
    if isinstance(linear, Codes):
        return linear.weight_of()
    if isinstance(linear.weight, nn.Parameter) and type(linear.weight).__module__.startswith("bitsandbytes"):
        return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None)).float()
    return linear.weight.dequantize().float()


def in_floats(packed):
    """A copy of a quantised model with ordinary layers, which multiply by the same."""

    def plain(linear):
        dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        with torch.no_grad():
            dense.weight.copy_(weight_of(linear))
            if linear.bias is not None:
                dense.bias.copy_(linear.bias)
        return dense

    twin = like(packed)
    for own, theirs in zip(twin.model.layers, packed.model.layers, strict=True):
        for name, module in theirs.named_modules():
            if is_linear(module):
                own.set_submodule(name, plain(module))
    return twin


def like(packed):
    """The base that a quantised one was made from."""
    return tiny(packed.config.model_type, **sizes_of(packed))


def sizes_of(packed):
    return {name: getattr(packed.config, name) for name in SIZES}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def packed(kind, tmp_path):
    return KINDS[kind](tmp_path)


# --- weights -------------------------------------------------------------------------------------------------------------


def test_what_a_layer_multiplies_by_is_its_weight(kind, packed):
    for layer in packed.model.layers:
        for module in layer.modules():
            if is_linear(module):
                expected = weight_of(module)  # first: bitsandbytes lays out weights anew when it multiplies
                found = dense_weight(module, torch.float32)
                assert found.dtype is torch.float32
                assert found.is_contiguous()
                error = (5e-3 if kind in ROUNDED else 1e-6) * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=0, atol=error)


def test_a_large_bias_takes_no_digits_and_stays():
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.bias.fill_(300.0)
    for is_bias_a_buffer in (True, False):
        packed = Codes(linear, is_bias_a_buffer=is_bias_a_buffer)
        assert torch.equal(dense_weight(packed, torch.bfloat16), packed.weight_of())
        assert packed.bias.eq(300).all()
        assert packed(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).eq(300).all()


def test_more_features_than_are_given_at_once(monkeypatch):
    packed = Codes(nn.Linear(32, 16))
    whole = dense_weight(packed, torch.float32)
    monkeypatch.setattr("activation_beacon.dense.UNITS", 5)
    torch.testing.assert_close(dense_weight(packed, torch.float32), whole)


def test_weights_in_floats_are_given_as_they_are():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        linear = nn.Linear(4, 6, dtype=dtype)
        assert dense_weight(linear, torch.float32) is linear.weight


def test_which_bases_are_quantised(packed):
    assert is_quantised(packed) is (not isinstance(packed.model.layers[0].self_attn.o_proj, Codes))  # nobody says so


@pytest.mark.parametrize("family", TESTED)
def test_no_base_in_floats_is(family):
    assert not is_quantised(tiny(family))
    assert not any(is_packed(parameter) for parameter in tiny(family).bfloat16().parameters())


class Packed(nn.Module):
    """A linear layer to those who only read its numbers."""

    def __init__(self, weight: torch.Tensor | None, give=None):
        super().__init__()
        self.in_features, self.out_features = 32, 16
        self.give = give
        if weight is not None:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.give is None:
            raise RuntimeError("its kernel is not built\nsee the log")
        return self.give(rows)


BYTES = torch.zeros(256, dtype=torch.uint8)
FAILED, NO_WEIGHT = (
    "multiplying by it failed (its kernel is not built)",
    "what it gives for unit vectors is not a weight",
)
UNKNOWN = {
    "halves of bytes": (Packed(BYTES), FAILED),
    "whole bytes": (Packed(torch.zeros(16, 32, dtype=torch.int8)), FAILED),
    "floats of another shape": (Packed(torch.zeros(32, 16)), FAILED),
    "under another name": (Packed(None), FAILED),
    "something of nothing": (Packed(BYTES, lambda rows: rows[..., :16] + 1), NO_WEIGHT),
    "too few features": (Packed(BYTES, lambda rows: rows[..., :15]), NO_WEIGHT),
    "no numbers": (Packed(BYTES, lambda rows: rows[..., :16] / rows.sum(-1, keepdim=True).clamp(0, 0)), NO_WEIGHT),
    "no tensor": (
        Packed(BYTES, lambda rows: None),
        "multiplying by it failed ('NoneType' object has no attribute 'any')",
    ),
    "for another kind of device": (FP8Linear(32, 16, block_size=(16, 16)), "multiplying by it failed ("),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_layers_that_cannot_be_tried_are_refused_and_the_base_is_left_bare(name):
    linear, reason = UNKNOWN[name]
    model = tiny("llama")
    model.model.layers[1].self_attn.v_proj = linear
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model, BeaconConfig(chunk_size=16, ratios=(2,)))
    said = str(caught.value)
    assert said.startswith(f"v of layer 1 ({type(linear).__name__}) does not keep its weight in floats, and {reason}")
    assert said.endswith("Attach to the model in bf16, fp16 or fp32, or quantised where that form runs.")
    assert "\n" not in said
    assert not hasattr(model, "beacon_embedding")
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "beacon")
    with pytest.raises(UnsupportedModelError, match=f"^{type(linear).__name__} does not keep"):
        dense_weight(linear, torch.float32)


# --- beacons -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_beacons_on_a_quantised_base_are_those_of_the_slow_reference_in_floats(kind, packed):
    twin, ids, ratios = in_floats(packed), random_ids(75), [2, 4, 2, 4]
    alone = packed(ids[:, :16]).logits
    model = trained(attach(packed, CONFIG))
    assert torch.equal(model(ids[:, :16]).logits, alone)
    settings = {"chunk_size": 16, "num_sinks": 2, "placement": "append", "local_tokens": 0, "exact_ids": ()}
    expected = Reference(twin, beacon_tensors(model), **settings)(ids, ratios).logits
    error = (model(ids, beacon_ratio=ratios).logits[0] - expected).abs()
    assert error.mean() < 0.2 if kind in ROUNDED else error.max() < 1e-4
    context = model.compress(ids[:, :70], ratio=ratios)
    after = model(ids[:, 70:], past_key_values=context).logits[0]
    error = (after - expected[70:]).abs()
    assert error.mean() < 0.2 if kind in ROUNDED else error.max() < 1e-4


def trained(model):
    """The same model with other beacon weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.beacon_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_untrained_beacons_begin_as_what_the_quantised_base_does(kind, packed):
    """Anchored, with a gate of zero: a beacon's key is that of its token."""
    attention = packed.model.layers[0].self_attn
    linear = getattr(attention, "qkv_proj", None) or attention.k_proj
    rows = torch.randn(1, 9, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = linear(rows)
        attach(packed, CONFIG)
        found = nn.functional.linear(rows, linear.beacon.weight, linear.beacon.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if kind in ROUNDED else 1e-5)


def test_beacons_can_be_trained_on_it(kind, packed):
    if kind == "torchao, int8 by int8":
        pytest.skip("its products know no gradients")
    packed.train()  # of models in eval mode, bitsandbytes' products on a CPU know no gradients
    model = trained(attach(packed, CONFIG))
    ids = random_ids(70)
    model(ids, labels=ids, beacon_ratio=2).loss.backward()
    for name, parameter in model.beacon_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        is_unused = name.startswith("layers.2.q")  # nobody reads what the last layer makes of a beacon
        assert is_unused or parameter.grad.abs().sum() > 0, name
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "beacon" not in name)


# --- adapters and contexts -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(packed, tmp_path):
    """An adapter of the base that a quantised one was made from."""
    model = with_beacons(packed.config.model_type, CONFIG, **sizes_of(packed))
    model.save_pretrained(tmp_path / "adapter")
    return model


@torch.no_grad()
def test_an_adapter_of_the_base_in_floats_is_taken_with_a_warning(kind, packed, adapter, tmp_path, caplog):
    if not is_quantised(packed):
        packed.is_quantized = True  # as transformers says of what it has quantised
    with caplog.at_level(logging.WARNING):
        model, _ = load(tmp_path / "adapter", base=packed)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("activation_beacon")]
    assert said.startswith(QUANTISED)
    made_for, own = adapter.beacon_config.base_fingerprint, model.base_fingerprint
    assert f"(fingerprint {made_for[:16]}, this one has {own[:16]})" in said
    for name, tensor in beacon_tensors(adapter).items():
        assert torch.equal(dict(model.beacon_parameters())[name], tensor)
    ids = random_ids(70)
    loss, expected = (each(ids, labels=ids, beacon_ratio=4).loss for each in (model, adapter))
    assert abs(loss - expected) < 0.2
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again", base=like(packed))
    assert again.adapter_fingerprint == adapter.adapter_fingerprint


def test_its_contexts_are_not_those_of_the_base_in_floats(kind, packed, adapter, tmp_path):
    packed.is_quantized = True
    model, _ = load(tmp_path / "adapter", base=packed)
    ids = random_ids(40)
    model.generate(random_ids(3), context=model.compress(ids), max_new_tokens=2)
    with pytest.raises(MismatchError, match="another base"):
        model.generate(random_ids(3), context=adapter.compress(ids), max_new_tokens=2)
    with pytest.raises(MismatchError, match="another base"):
        adapter.generate(random_ids(3), context=model.compress(ids), max_new_tokens=2)


def test_a_base_has_one_name_before_and_after_its_library_lays_out_its_weights_anew(packed):
    model = attach(packed, CONFIG)
    first = model.base_fingerprint
    model.compress(random_ids(40))
    assert model.base_fingerprint == first == model.beacon_config.base_fingerprint


def test_other_codes_are_another_base():
    one, same = with_codes(), with_codes()
    other = with_codes()
    other.model.layers[1].mlp.up_proj.codes[3] += 1
    prints = [attach(model, CONFIG).base_fingerprint for model in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_other_weights_in_parts_are_another_base():
    prints = []
    for name in ("one", "same", "other"):
        model = replaced(tiny("llama"), in_parts)
        if name == "other":
            model.model.layers[1].mlp.up_proj.weight.codes.add_(1)
        prints.append(attach(model, CONFIG).base_fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_folder_of_a_quantised_base_may_be_named(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, seed=1)
    config = pytest.importorskip("bitsandbytes") and BitsAndBytesConfig(load_in_8bit=True)
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    quantised.save_pretrained(tmp_path / "quantised")
    model, tokenizer = load(adapter, base=str(tmp_path / "quantised"), device="cpu")
    assert is_quantised(model)
    assert tokenizer is None
    assert model.compress(random_ids(70)).num_beacons > 0


def test_a_base_is_quantised_while_it_is_loaded(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, seed=1)
    config = pytest.importorskip("bitsandbytes") and BitsAndBytesConfig(load_in_8bit=True)
    model, _ = load(adapter, base_options={"quantization_config": config, "device_map": "cpu"})
    assert is_quantised(model)
    assert model.compress(random_ids(70)).num_beacons > 0


class Scaled(nn.Linear):
    """Floats that are not all that the layer does: as low-rank additions, or scales of their own."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 0.05 * super().forward(rows)


@pytest.mark.parametrize("has_bias", [True, False])
def test_beacons_begin_as_what_a_layer_does_and_not_as_the_floats_that_it_keeps(has_bias):
    linear = Scaled(32, 16, bias=has_bias)
    torch.testing.assert_close(dense_weight(linear, torch.float32), 0.05 * linear.weight, rtol=0, atol=1e-7)
    plain = nn.Linear(32, 16)
    assert dense_weight(plain, torch.float32) is plain.weight
