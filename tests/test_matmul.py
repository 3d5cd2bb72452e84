"""Products through oneDNN: as precise, where they are taken and where not, and nothing left behind."""

import itertools
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from activation_beacon import BeaconConfig, attach, attached, detach, matmul, projection
from activation_beacon.errors import ConfigError, UnsupportedError
from families import EAGER_ONLY, TESTED, needs_onednn, random_ids, tiny, with_beacons

CHUNK = 32
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2)
APPENDED = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2, anchored=True, placement="append")
WIDE = BeaconConfig(chunk_size=512, ratios=(4,), num_sinks=2, anchored=True, placement="append")

TRY, GAIN = matmul._is_setting_exact.__wrapped__, matmul._gain.__wrapped__  # as they are before they know

needs_exact_setting = pytest.mark.skipif(
    not matmul._is_setting_exact(), reason="torch before 2.9, or a processor that would round"
)


def close(measured, expected, tolerance=1e-4):
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance)


@pytest.fixture
def calls(monkeypatch):
    """Rows of each product that oneDNN was called for by name."""
    found = []
    original = matmul.linear

    def noted(rows, weight, bias=None):
        found.append(rows.numel() // rows.shape[-1])
        return original(rows, weight, bias)

    monkeypatch.setattr(matmul, "linear", noted)
    return found


@pytest.fixture
def settings(monkeypatch):
    """What the setting of the process was set to, in order."""
    found = []

    class Noted:
        fp32_precision = "none"

        def __setattr__(self, name, value):
            found.append(value)
            super().__setattr__(name, value)

    monkeypatch.setattr(matmul, "_is_setting_exact", lambda: True)
    monkeypatch.setattr(matmul, "_PRECISION", Noted())
    return found


def training(choice="onednn", dtype=torch.float32):
    return matmul.training_products(choice, device=torch.device("cpu"), dtype=dtype)


def read_and_write(model, num_steps=CHUNK + 5):
    """Logits (1, steps, V) of a text that is compressed and written on until a chunk is closed, and the cache."""
    cache = model.compress(random_ids(3 * CHUNK + 7), ratio=4)
    logits = [model(token, past_key_values=cache).logits for token in random_ids(num_steps, 1).split(1, dim=1)]
    return torch.cat(logits, dim=1), cache


def same_cache(cache, other):
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        close(layer.keys, expected.keys)
        close(layer.values, expected.values)


# --- the same numbers --------------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("config", [CONFIG, APPENDED], ids=["interleaved", "appended"])
@pytest.mark.parametrize("family", [*TESTED, "llama-biases"])
@torch.no_grad()
def test_what_is_read_and_written_is_the_same(family, config, calls):
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    model = with_beacons(family, config, attention=attention)
    model.cpu_matmul = "torch"
    expected, held = read_and_write(model)
    assert not calls
    model.cpu_matmul = "onednn"
    found, cache = read_and_write(model)
    assert {1, CHUNK // 4} <= set(calls)  # steps, and the rows of a chunk's beacons
    close(found, expected)
    same_cache(cache, held)


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3"])
@torch.no_grad()
def test_wide_chunks_attend_in_blocks_to_the_same_result(family, calls, monkeypatch):
    from activation_beacon import causal

    sizes, whole = [], causal._in_blocks
    monkeypatch.setattr(causal, "_in_blocks", lambda query, *rest: sizes.append(query.shape[2]) or whole(query, *rest))
    model = with_beacons(family, WIDE, attention="sdpa", max_position_embeddings=4096)
    text = random_ids(3 * 512 + 300, batch=2)
    model.cpu_matmul = "torch"
    held = model.compress(text, ratio=4)
    assert not sizes
    model.cpu_matmul = "onednn"
    cache = model.compress(text, ratio=4)
    assert set(sizes) == {512 + 128, 300}  # chunks, the first without a memory among them, and the tail
    same_cache(cache, held)


@needs_onednn
@torch.no_grad()
def test_several_contexts_are_written_on_together_through_it(calls):
    model = with_beacons("llama", CONFIG, attention="sdpa")
    model.cpu_matmul = "onednn"
    texts = [random_ids(length, length) for length in (40, 77)]
    contexts = [model.compress(text, ratio=4) for text in texts]
    calls.clear()
    logits = model.read_next(contexts, [5, 6])
    assert set(calls) == {2}
    model.cpu_matmul = "torch"
    for text, token, row in zip(texts, (5, 6), logits, strict=True):
        whole = torch.cat((text, torch.tensor([[token]])), dim=1)
        close(row, model(whole, beacon_ratio=4).logits[0, -1])


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 24), (1, 1, 24), (2, 3, 24), (24,)])
@torch.no_grad()
def test_products_are_the_same_whatever_the_memory_looks_like(shape):
    rows, weight, wide = torch.randn(shape), torch.randn(17, 24), torch.randn(34)
    for bias in (None, wide[:17], wide[::2], torch.randn(1).expand(17)):
        for each in (rows, torch.randn(*shape[:-1], 48)[..., ::2], torch.randn(*shape[:-1], 25)[..., 1:]):
            close(matmul.linear(each, weight, bias), nn.functional.linear(each, weight, bias), 1e-5)


@needs_exact_setting
def test_gradients_are_the_same_under_the_setting():
    config = BeaconConfig(chunk_size=512, ratios=(4,))
    model = with_beacons("llama", config, attention="sdpa", max_position_embeddings=2048)
    ids = random_ids(2 * 512 + 5)
    gradients = {}
    for choice in ("torch", "onednn"):
        with training(choice):
            model(ids, labels=ids, beacon_ratio=4).loss.backward()
        gradients[choice] = {name: parameter.grad for name, parameter in model.beacon_parameters()}
        for _, parameter in model.beacon_parameters():
            parameter.grad = None
    for name, gradient in gradients["onednn"].items():
        close(gradient, gradients["torch"][name])


# --- where it is taken -------------------------------------------------------------------------------------------------


@needs_onednn
@torch.no_grad()
def test_short_texts_and_disabled_beacons_are_the_base_to_the_bit(calls):
    base, model = tiny("llama", attention="sdpa"), with_beacons("llama", CONFIG, attention="sdpa")
    model.cpu_matmul = "onednn"
    ids = random_ids(CHUNK)
    assert torch.equal(model(ids).logits, base(ids).logits)
    caches = [model.new_cache(), model.new_cache()]
    for token in ids[:, :-1].split(1, dim=1):
        model(token, past_key_values=caches[0])
    model.compress(ids[:, :5], cache=caches[1])
    model.read_next(caches, [7, 8])
    with model.beacon_disabled():
        assert torch.equal(model(random_ids(3 * CHUNK)).logits, base(random_ids(3 * CHUNK)).logits)
    model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    assert not calls
    model(random_ids(1), past_key_values=caches[0])  # closes the chunk
    assert calls


@needs_onednn
def test_gradients_and_other_dtypes_are_left_to_torch(calls):
    model = with_beacons("llama", CONFIG)
    model.cpu_matmul = "onednn"
    model(random_ids(70), labels=random_ids(70), beacon_ratio=4).loss.backward()
    assert not calls
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(70), beacon_ratio=4)
    assert not calls
    model.to(torch.bfloat16).compress(random_ids(70), ratio=4)
    assert not calls


@needs_onednn
@torch.no_grad()
def test_weights_with_a_way_of_their_own_are_multiplied_by_it(calls):
    class Packed(torch.Tensor):
        """Float32 outside, and multiplied as it sees fit, as torchao's are."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            if func is not nn.functional.linear:
                return result
            asked.append(args[0].shape[1])
            return result.as_subclass(torch.Tensor)

    asked = []
    model = with_beacons("llama", CONFIG)
    model.cpu_matmul = "onednn"
    expected = model.compress(random_ids(70), ratio=4)
    projection_ = model.model.layers[0].mlp.up_proj
    projection_.weight = nn.Parameter(projection_.weight.detach().as_subclass(Packed), requires_grad=False)
    found = model(random_ids(1), past_key_values=expected.fork()).logits
    assert asked == [1]
    model.cpu_matmul = "torch"
    close(found, model(random_ids(1), past_key_values=expected).logits)


@pytest.mark.parametrize(
    ("gains", "rows", "is_taken"),
    [
        ((2.0, 1.0), 1, True),
        ((2.0, 1.0), 300, False),
        ((1.0, 2.0), 1, False),
        ((1.0, 2.0), 300, True),
        ((0.0, 0.0), 1, False),
    ],
)
def test_auto_takes_what_is_faster_for_so_many_rows(monkeypatch, gains, rows, is_taken):
    monkeypatch.setattr(matmul, "is_offered", lambda: True)
    monkeypatch.setattr(matmul, "_gain", lambda is_few, threads: gains[0] if is_few else gains[1])
    assert matmul.is_chosen("auto", rows) is is_taken
    assert matmul.is_chosen("onednn", rows)
    assert not matmul.is_chosen("torch", rows)
    monkeypatch.setattr(matmul, "is_offered", lambda: False)
    assert not matmul.is_chosen("auto", rows)


@needs_onednn
@pytest.mark.parametrize("is_few", [True, False])
def test_trying_both_draws_no_random_numbers_and_finds_a_factor(is_few):
    state = torch.get_rng_state()
    with torch.device("meta"):  # where a caller makes tensors is no matter
        assert 0.01 < GAIN(is_few, torch.get_num_threads()) < 100
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
def test_products_that_are_not_precise_gain_nothing(monkeypatch):
    original = matmul.linear
    monkeypatch.setattr(matmul, "linear", lambda *args: original(*args).bfloat16().float())
    assert GAIN(is_few=True, num_threads=1) == 0


@pytest.mark.parametrize("choice", ["mkl", None, True, "ONEDNN"])
def test_other_choices_are_refused(choice):
    model = with_beacons("llama", CONFIG)
    with pytest.raises(ConfigError, match=r"one of auto, onednn, torch; got"):
        model.cpu_matmul = choice
    assert model.cpu_matmul == "auto"


def test_what_this_build_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(attached, "is_offered", lambda: False)
    model = with_beacons("llama", CONFIG)
    with pytest.raises(UnsupportedError, match=r'no oneDNN. Use cpu_matmul = "auto" or "torch"'):
        model.cpu_matmul = "onednn"


# --- steps that are held up --------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(matmul, "time", clock)
    return clock


def step(pace, clock, monkeypatch, seconds, num_rows=1, besides=0.0):
    """A step of one product; True if it is left to torch."""
    if pace.begin_step():
        return True
    monkeypatch.setattr(matmul, "linear", lambda *_: setattr(clock, "now", clock.now + seconds))
    pace.linear(None, None, None)
    clock.now += besides
    pace.end_step(num_rows)
    return False


def test_steps_that_are_held_up_are_left_to_torch_for_a_while(clock, monkeypatch):
    pace = matmul.Pace()
    for seconds in (3.0, 1.0, 3.0, 3.9):  # the fastest is 1
        assert not step(pace, clock, monkeypatch, seconds)
    for seconds in (4.1, 4.1, 1.0, 4.1, 4.1, 9.0):  # three in a row at the end
        assert not step(pace, clock, monkeypatch, seconds)
    left = [step(pace, clock, monkeypatch, 1.0) for _ in range(pace.PAUSE)]
    assert left == [True] * (pace.PAUSE - 1) + [False]
    assert not step(pace, clock, monkeypatch, 1.0)


def test_steps_of_more_rows_and_of_more_attention_may_take_longer(clock, monkeypatch):
    pace = matmul.Pace()
    for _ in range(5):
        assert not step(pace, clock, monkeypatch, 1.0)
        assert not step(pace, clock, monkeypatch, 5.0, num_rows=8)
    for _ in range(5):
        assert not step(pace, clock, monkeypatch, 1.0, besides=100.0)


def test_a_step_without_products_through_it_is_no_measure(clock, monkeypatch):
    pace = matmul.Pace()
    assert not pace.begin_step()
    pace.end_step(1)
    for _ in range(5):
        assert not step(pace, clock, monkeypatch, 1.0)


@needs_onednn
def test_steps_with_gradients_do_not_spoil_those_without(calls, monkeypatch):
    monkeypatch.setattr(
        matmul, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__)
    )  # each takes as long
    model = with_beacons("llama", CONFIG)
    with torch.no_grad():
        cache = model.compress(random_ids(3 * CHUNK), ratio=4)
    model(random_ids(1), past_key_values=cache.fork())  # gradients are kept: oneDNN takes nothing
    calls.clear()
    with torch.no_grad():
        for _ in range(5):
            model(random_ids(1), past_key_values=cache.fork())
    assert calls.count(1) == 5 * sum(isinstance(module, projection.OneDnnLinear) for module in model.modules())


@needs_onednn
@pytest.mark.parametrize(("choice", "is_left"), [("auto", True), ("onednn", False)])
@torch.no_grad()
def test_only_steps_and_only_auto_are_watched(choice, is_left, calls, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(
        matmul, "time", types.SimpleNamespace(perf_counter=lambda: 1.05 ** next(now))
    )  # slower and slower
    model = with_beacons("llama", CONFIG)
    model.cpu_matmul = choice
    cache = model.compress(random_ids(3 * CHUNK), ratio=4)
    tokens = random_ids(20).split(1, dim=1)
    for token in tokens[:12]:
        model(token, past_key_values=cache)
    calls.clear()
    model(tokens[12], past_key_values=cache)
    assert bool(calls) is not is_left
    model.compress(random_ids(40), cache=cache)
    assert max(calls) > matmul.FEW_ROWS


# --- the setting of the process ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_passes_leave_the_setting_alone(settings):
    model = with_beacons("llama", WIDE, attention="sdpa", max_position_embeddings=4096)
    model.cpu_matmul = "onednn"
    cache = model.compress(random_ids(2 * 512 + 3), ratio=4)
    model(random_ids(1), past_key_values=cache)
    assert not settings


@pytest.mark.parametrize(("choice", "dtype"), [("torch", torch.float32), ("onednn", torch.bfloat16)])
def test_training_leaves_it_alone_where_it_is_of_no_use(settings, choice, dtype):
    with training(choice, dtype):
        pass
    assert not settings


@needs_onednn
def test_it_is_as_before_after_an_error_and_in_nested_blocks(settings):
    with pytest.raises(KeyError), training(), training():
        raise KeyError
    assert settings == ["bf16", "none"]


@needs_onednn
def test_what_somebody_sets_meanwhile_stays(settings):
    with training():
        matmul._PRECISION.fp32_precision = "ieee"
    assert settings == ["bf16", "ieee"]


@needs_onednn
def test_it_stays_on_until_the_last_thread_leaves(settings):
    entered, may_leave = threading.Event(), threading.Event()

    def other():
        with training():
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with training():
        thread.start()
        assert entered.wait(10)
    assert settings == ["bf16"]
    may_leave.set()
    thread.join()
    assert settings == ["bf16", "none"]


def test_it_is_let_alone_where_products_would_be_rounded(settings, monkeypatch):
    monkeypatch.setattr(matmul, "_is_setting_exact", lambda: False)
    with training():
        pass
    assert not settings


@pytest.mark.parametrize(("rounded", "is_exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_it_is_tried_before_it_is_relied_on(settings, monkeypatch, rounded, is_exact):
    original = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda rows, weight: original(*(x.to(rounded).float() for x in (rows, weight)))
    )
    assert TRY() is is_exact
    assert settings == ["bf16", "none"]


# --- put on, taken off -------------------------------------------------------------------------------------------------


def test_linear_layers_are_still_the_bases_own_and_are_given_back():
    model = tiny("llama")
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    attach(model, CONFIG)
    assert all(isinstance(layer, nn.Linear) and type(layer) is not nn.Linear for layer in layers)
    detach(model)
    assert all(type(layer) is nn.Linear and "beacon_state" not in vars(layer) for layer in layers)


def test_a_linear_layer_of_another_class_is_let_alone():
    class Quantised(nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Quantised
    attach(model, CONFIG)
    assert type(model.model.layers[0].mlp.up_proj) is Quantised
    detach(model)
    assert type(model.model.layers[0].mlp.up_proj) is Quantised


@torch.no_grad()
def test_what_other_libraries_put_on_meanwhile_goes_on_working():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, ids = with_beacons("llama", CONFIG), random_ids(20)
    parametrize.register_parametrization(model.lm_head, "weight", Double())
    kept = model.model.layers[0].mlp.up_proj.forward  # as accelerate keeps a module's method
    expected, hidden = model(ids).logits, torch.randn(1, 3, 32)
    projected = kept(hidden)
    detach(model)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(kept(hidden), projected)
