"""A mask that is told: the same attention as with the mask written out, wherever it is computed and whoever asks."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from activation_beacon import BeaconConfig, forward, grouped
from activation_beacon.causal import LowerRight, can_be_split
from families import needs_onednn, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)
HEADS = [(4, 4), (6, 2)]
SIZES = [(0, 8), (5, 8), (8, 8), (3, 40), (300, 20)]


def drawn(heads, size, held, dtype=torch.float32):
    query = torch.randn(2, heads[0], size, 16, dtype=dtype)
    key, value = torch.randn(2, 2, heads[1], held + size, 16, dtype=dtype)
    return query, key, value


def attention(query, key, value, mask, **options):
    options = {"scale": 0.3, "enable_gqa": query.shape[1] != key.shape[1], **options}
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def written_out(query, key):
    size, total = query.shape[2], key.shape[2]
    return torch.ones(size, total, dtype=torch.bool).tril(total - size)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("held", "size"), SIZES)
@torch.no_grad()
def test_told_and_written_out_masks_give_the_same_attention(heads, held, size):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float64, 0)):
        tensors = drawn(heads, size, held, dtype)
        told = attention(*tensors, LowerRight.on(torch.device("cpu")))
        assert type(told) is torch.Tensor
        torch.testing.assert_close(told, attention(*tensors, written_out(*tensors[:2])), rtol=0, atol=tolerance)


def test_gradients_take_the_written_out_mask():
    tensors = [tensor.requires_grad_() for tensor in drawn((4, 2), 8, 5)]
    assert not can_be_split(*tensors, 0.0)
    weights = torch.randn(2, 4, 8, 16)
    told = torch.autograd.grad((attention(*tensors, LowerRight.on(torch.device("cpu"))) * weights).sum(), tensors)
    expected = torch.autograd.grad((attention(*tensors, written_out(*tensors[:2])) * weights).sum(), tensors)
    for gradient, other in zip(told, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_caller_who_rules_the_flash_kernel_out_is_obeyed():
    tensors = drawn((4, 2), 8, 5)
    assert can_be_split(*tensors, 0.0)
    with sdpa_kernel(SDPBackend.MATH):
        assert not can_be_split(*tensors, 0.0)


@torch.no_grad()
def test_autocast_makes_different_dtypes_alike():
    query, key, value = drawn((4, 2), 8, 5)
    tensors = (query, key.bfloat16(), value)
    assert not can_be_split(*tensors, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        told = attention(*tensors, LowerRight.on(torch.device("cpu")))
        expected = attention(*tensors, written_out(query, key))
    assert torch.equal(told, expected)


def masks_of_passes(model, read):
    """What the attention modules are given as mask in each pass."""
    seen = []
    first = model._beacon.site.layers[0].attention
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    try:
        read(model)
    finally:
        handle.remove()
    names = {type(None): "none", LowerRight: "told", torch.Tensor: "written"}
    return ["onednn" if getattr(mask, "num_copies", 0) else names[type(mask)] for mask in seen]


def compress(model):
    return model.compress(random_ids(3 * CHUNK + 5, batch=2), ratio=4)


def compress_ragged(model):
    return model.compress([random_ids(3 * CHUNK + 5)[0].tolist(), random_ids(2 * CHUNK)[0].tolist()], ratio=4)


def decode(model):
    model.generate(random_ids(3), context=model.compress(random_ids(20), ratio=4), max_new_tokens=3, min_new_tokens=3)


def read_with_gradients(model):
    return model(random_ids(2 * CHUNK + 5), beacon_ratio=4)


@pytest.mark.parametrize(
    ("family", "attention", "products", "read", "masks"),
    [
        ("llama", "sdpa", "torch", compress, ["none", "told", "told", "told"]),
        ("mistral-full", "sdpa", "torch", compress, ["none", "told", "told", "told"]),
        ("llama", "sdpa", "torch", compress_ragged, ["none", "told", "told", "written"]),
        ("llama", "sdpa", "torch", decode, ["none", "told", "told", "none", "none"]),
        ("llama", "sdpa", "torch", read_with_gradients, ["none", "written", "written"]),
        ("llama", "eager", "torch", compress, ["written"] * 4),
        ("mistral", "sdpa", "torch", compress, ["none", "written", "written", "written"]),
        pytest.param("llama", "sdpa", "onednn", compress, ["onednn"] * 4, marks=needs_onednn),
        pytest.param("llama", "sdpa", "onednn", compress_ragged, ["onednn"] * 3 + ["written"], marks=needs_onednn),
        pytest.param("llama", "sdpa", "onednn", decode, ["onednn"] * 3 + ["none"] * 2, marks=needs_onednn),
        pytest.param(
            "llama", "sdpa", "onednn", read_with_gradients, ["none", "written", "written"], marks=needs_onednn
        ),
        pytest.param("llama", "eager", "onednn", compress, ["written"] * 4, marks=needs_onednn),
    ],
)
def test_masks_are_told_where_they_are_understood(family, attention, products, read, masks, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)  # a pass for each chunk
    model = with_beacons(family, CONFIG, attention=attention)
    model.cpu_matmul = products
    assert masks_of_passes(model, read) == masks


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "granite", "olmo2", "smollm3", "mistral-full"])
def test_a_text_read_with_told_masks_is_the_same_cache(family, monkeypatch):
    model = with_beacons(family, CONFIG, attention="sdpa")
    told = compress(model)
    monkeypatch.setattr(forward, "understands_told_masks", lambda *args: False)
    for layer, expected in zip(told.layers, compress(model).layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_the_flash_kernel_runs_and_gives_the_same_attention():
    query, key, value = (tensor.cuda() for tensor in drawn((4, 4), 128, 300, torch.bfloat16))
    with torch.profiler.profile() as profile:
        told = attention(query, key, value, LowerRight.on(query.device))
    assert "aten::_flash_attention_forward" in {event.name for event in profile.events()}
    expected = attention(query, key, value, written_out(query, key).cuda())
    torch.testing.assert_close(told, expected, rtol=0, atol=2e-2)
