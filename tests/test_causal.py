"""A mask that is told: the same attention as with the mask written out, wherever it is computed and whoever asks."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from activation_beacon import BeaconConfig, causal, forward, grouped
from activation_beacon.causal import LowerRight, Spans, can_be_split
from families import EAGER_ONLY, FAMILIES, FURTHER, needs_onednn, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)
HEADS = [(4, 4), (6, 2)]
# Families with a sliding window in some layers, or in all.
WINDOWED = [
    name for name, own in FURTHER.items() if "sliding_window" in own and name != "lfm3"
]  # whose states are not interleaved
WINDOWS = [None, 1, 7, 300]
SIZES = [(0, 8), (5, 8), (8, 8), (3, 40), (300, 20)]


def drawn(heads, size, held, dtype=torch.float32):
    query = torch.randn(2, heads[0], size, 16, dtype=dtype)
    key, value = torch.randn(2, 2, heads[1], held + size, 16, dtype=dtype)
    return query, key, value


def attention(query, key, value, mask, **options):
    options = {"scale": 0.3, "enable_gqa": query.shape[1] != key.shape[1], **options}
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def written_out(query, key, window=None):
    size, total = query.shape[2], key.shape[2]
    seen = torch.ones(size, total, dtype=torch.bool).tril(total - size)
    return seen if window is None else seen.triu(total - size + 1 - window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("held", "size"), [*SIZES, (70, 900)])
@torch.no_grad()
def test_told_and_written_out_masks_give_the_same_attention(heads, held, size, window):
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)):
        tensors, mask = drawn(heads, size, held, dtype), LowerRight.on(torch.device("cpu"))
        mask.window = window
        told = attention(*tensors, mask)
        assert type(told) is torch.Tensor
        expected = attention(*tensors, written_out(*tensors[:2], window))
        torch.testing.assert_close(told, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_what_no_query_of_a_band_sees_is_not_computed(monkeypatch):
    sizes, whole = [], nn.functional.scaled_dot_product_attention
    query, key, value = drawn((4, 2), 600, 900)
    mask = LowerRight.on(torch.device("cpu"))
    mask.window = 100

    def noted(query, key, *rest, **options):
        sizes.append((query.shape[2], key.shape[2]))
        return whole(query, key, *rest, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    mask.attended(query, key, value, mask, enable_gqa=True)
    assert sizes == [(256, 355), (256, 355), (88, 187)]


def drawn_spans(size, held):
    """Firsts of two texts, and stops of each of their queries, in no order."""
    firsts = [0, held // 2]
    stops = torch.stack([torch.randint(first + 1, held + size + 1, (size,)) for first in firsts])
    return firsts, stops


@pytest.mark.parametrize("are_copies", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("held", "size"), [*SIZES, (7, 300), (500, 400)])
@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.float32, 6), (torch.float64, 6), (torch.bfloat16, None)]
)
@needs_onednn
@torch.no_grad()
def test_spans_give_the_attention_of_the_mask_written_out(dtype, window, heads, held, size, are_copies, monkeypatch):
    blocks = []
    monkeypatch.setattr(causal, "_block", lambda *args, inner=causal._block: blocks.append(1) or inner(*args))
    query, key, value = drawn(heads, size, held, dtype)
    if are_copies:
        key, value = (tensor.repeat_interleave(heads[0] // heads[1], dim=1) for tensor in (key, value))
    firsts, stops = drawn_spans(size, held)
    entries = torch.arange(held + size)
    seen = torch.stack(
        [(entries >= first) & (entries < stop[:, None]) for first, stop in zip(firsts, stops, strict=True)]
    )
    if window is not None:
        seen &= entries >= stops[..., None] - window
    expected = attention(query, key, value, seen[:, None])
    mask = Spans.on(torch.device("cpu"), firsts, stops, num_copies=heads[0] // heads[1], least=int(stops.min()))
    mask.window = window
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-15, torch.bfloat16: 0}[dtype]
    for told in (mask, mask[:, :, :, :1].to(torch.bool)):  # as transformers cuts masks
        assert type(told) is Spans
        found = attention(query, key, value, told)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert bool(blocks) == (dtype is torch.float32)
    torch.testing.assert_close(mask.written_out(held + size), seen[:, None])


def test_spans_written_out_by_hand():
    stops = torch.tensor([[4, 6, 6, 7, 8]])
    even, uneven = (Spans.on(stops.device, firsts, stops, num_copies=1).written_out(8) for firsts in ([0], [0, 1]))
    expected = [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert even.int().tolist() == [[expected]]
    assert uneven.int().tolist() == [[expected], [[[0, *row[1:]] for row in expected]]]
    own = Spans.on(stops.device, [0, 0], torch.tensor([[1, 5], [3, 5]]), num_copies=1).written_out(5)
    assert own.int().tolist() == [[[[1, 0, 0, 0, 0], [1] * 5]], [[[1, 1, 1, 0, 0], [1] * 5]]]


@needs_onednn
@torch.no_grad()
def test_spans_that_are_the_same_for_all_texts_are_told_once():
    query, key, value = drawn((6, 2), 200, 40)
    stops = torch.arange(200)[None].flip(1) + 41
    mask = Spans.on(torch.device("cpu"), [0, 0], stops, num_copies=3)
    seen = torch.arange(240) < stops[0, :, None]
    torch.testing.assert_close(
        attention(query, key, value, mask), attention(query, key, value, seen), rtol=0, atol=3e-6
    )


def test_spans_with_gradients_take_the_mask_written_out():
    query, key, value = (tensor.requires_grad_() for tensor in drawn((4, 2), 8, 5))
    firsts, stops = drawn_spans(8, 5)
    mask = Spans.on(torch.device("cpu"), firsts, stops, num_copies=2)
    weights = torch.randn(2, 4, 8, 16)
    told = torch.autograd.grad((attention(query, key, value, mask) * weights).sum(), (query, key, value))
    written = attention(query, key, value, mask.written_out(13))
    expected = torch.autograd.grad((written * weights).sum(), (query, key, value))
    for gradient, other in zip(told, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_the_two_parts_are_those_of_the_written_out_mask(heads, dtype, scale, monkeypatch):
    tensors = [tensor.requires_grad_() for tensor in drawn(heads, 8, 5, dtype)]
    weights = torch.randn(2, heads[0], 8, 16, dtype=dtype)
    expected = torch.autograd.grad(
        (attention(*tensors, written_out(*tensors[:2]), scale=scale) * weights).sum(), tensors
    )
    mask = LowerRight.on(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: pytest.fail("a mask is written out"))
    told = torch.autograd.grad((attention(*tensors, mask, scale=scale) * weights).sum(), tensors)
    for gradient, other in zip(told, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5 if dtype is torch.float32 else 3e-2)


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
    names = {type(None): "none", LowerRight: "told", Spans: "spans", torch.Tensor: "written"}
    found = [names[type(mask)] for mask in seen]
    return ["onednn" if name == "told" and mask.num_copies else name for name, mask in zip(found, seen, strict=True)]


def compress(model):
    return model.compress(random_ids(3 * CHUNK + 5, batch=2), ratio=4)


def compress_ragged(model):
    return model.compress([random_ids(3 * CHUNK + 5)[0].tolist(), random_ids(2 * CHUNK)[0].tolist()], ratio=4)


def read_on(model):
    """A chunk that is read, and a token more, with which it is closed."""
    ids = random_ids(CHUNK + 1)
    model.compress(ids[:, CHUNK:], cache=model.compress(ids[:, :CHUNK], ratio=4))


def read_ragged_on(model):
    model.compress(random_ids(CHUNK, batch=2), cache=compress_ragged(model))


def read_uneven_on(model):
    """Tails of two lengths on memories of one: padding stands behind, where nobody who counts sees it."""
    held = model.compress(random_ids(CHUNK + 1, batch=2), ratio=4)
    model.compress(random_ids(7, batch=2), cache=held, attention_mask=torch.tensor([[1] * 7, [1] * 3 + [0] * 4]))


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
        ("llama", "sdpa", "torch", read_uneven_on, ["none", "none", "told"]),
        ("llama", "sdpa", "torch", read_with_gradients, ["none", "told", "told"]),
        ("llama", "eager", "torch", compress, ["written"] * 4),
        ("mistral", "sdpa", "torch", compress, ["told"] * 4),
        ("mistral", "sdpa", "torch", compress_ragged, ["told"] * 3 + ["spans"]),
        ("diffllama", "sdpa", "torch", compress, ["none", "written", "written", "written"]),  # not known
        pytest.param("llama", "sdpa", "onednn", compress, ["onednn"] * 4, marks=needs_onednn),
        pytest.param("llama", "sdpa", "onednn", compress_ragged, ["onednn"] * 3 + ["written"], marks=needs_onednn),
        pytest.param("llama", "sdpa", "onednn", decode, ["onednn"] * 3 + ["none"] * 2, marks=needs_onednn),
        pytest.param("llama", "sdpa", "onednn", read_with_gradients, ["none", "told", "told"], marks=needs_onednn),
        pytest.param("llama", "eager", "onednn", compress, ["written"] * 4, marks=needs_onednn),
    ],
)
def test_masks_are_told_where_they_are_understood(family, attention, products, read, masks, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)  # a pass for each chunk
    model = with_beacons(family, CONFIG, attention=attention)
    model.cpu_matmul = products
    assert masks_of_passes(model, read) == masks


@pytest.mark.parametrize(
    ("placement", "read", "products", "fewest", "masks"),
    [
        ("append", read_on, "onednn", 1, ["none", "spans", "none"]),
        ("append", read_on, "onednn", 9, ["none", "written", "none"]),  # 4 beacons, and the 4 tokens that they begin as
        ("append", read_on, "torch", 1, ["none", "written", "none"]),
        ("append", read_ragged_on, "onednn", 1, ["onednn"] * 3 + ["spans"] * 3),
        ("append", read_ragged_on, "torch", 1, ["none", "told", "told"] + ["written"] * 3),
        ("interleave", read_on, "onednn", 1, ["none", "onednn", "none"]),
        ("interleave", read_ragged_on, "onednn", 1, ["onednn"] * 3 + ["spans"] * 3),
        ("interleave", read_ragged_on, "onednn", CHUNK + 5, ["onednn"] * 3 + ["written"] * 3),
    ],
)
@needs_onednn
def test_spans_are_told_where_other_masks_would_be_written_out(placement, read, products, fewest, masks, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)
    monkeypatch.setattr(forward, "FEWEST_IN_SPANS", fewest)
    config = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), placement=placement, anchored=True)
    model = with_beacons("llama", config, attention="sdpa")
    model.cpu_matmul = products
    assert masks_of_passes(model, read) == masks


@pytest.mark.parametrize("products", ["torch", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("read", [compress, compress_ragged])
@pytest.mark.parametrize("family", sorted({*FAMILIES, *WINDOWED} - EAGER_ONLY))
def test_a_text_read_with_told_masks_is_the_same_cache(family, read, products, monkeypatch):
    monkeypatch.setattr(causal, "FEWEST_QUERIES", 1)
    monkeypatch.setattr(forward, "FEWEST_IN_SPANS", 1)
    model = with_beacons(family, CONFIG, attention="sdpa")
    model.cpu_matmul = products
    told = read(model)
    monkeypatch.setattr(forward, "understands_told_masks", lambda *args: False)
    for layer, expected in zip(told.layers, read(model).layers, strict=True):
        for (_, tensor), (_, other) in zip(layer.named_tensors(), expected.named_tensors(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_losses_and_gradients_of_chunks_that_are_told_masks_are_the_same(family, monkeypatch):
    model, ids, found = with_beacons(family, CONFIG, attention="sdpa"), random_ids(3 * CHUNK + 5, batch=2), []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(forward, "TOLD_WITH_GRADIENTS", devices)
        model.zero_grad()
        loss = model(ids, labels=ids, beacon_ratio=4).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for _, parameter in model.beacon_parameters())])
    assert masks_of_passes(model, read_with_gradients) == ["none", "told", "told"]
    for told, expected in zip(*found, strict=True):
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_the_flash_kernel_runs_and_gives_the_same_attention():
    query, key, value = (tensor.cuda() for tensor in drawn((4, 4), 128, 300, torch.bfloat16))
    with torch.profiler.profile() as profile:
        told = attention(query, key, value, LowerRight.on(query.device))
    assert "aten::_flash_attention_forward" in {event.name for event in profile.events()}
    expected = attention(query, key, value, written_out(query, key).cuda())
    torch.testing.assert_close(told, expected, rtol=0, atol=2e-2)
