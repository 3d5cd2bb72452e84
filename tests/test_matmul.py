"""Products through oneDNN: as precise, where they are taken and where not, and nothing left behind."""

import threading

import pytest
import torch
from torch import nn

from activation_beacon import BeaconConfig, attach, detach, matmul
from activation_beacon.errors import ConfigError
from families import EAGER_ONLY, TESTED, random_ids, tiny, with_beacons

CHUNK = 32
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2)
APPENDED = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2, anchored=True, placement="append")
MANY = 2 * matmul.MANY_ROWS
TRY, GAIN = matmul._is_setting_exact.__wrapped__, matmul._gain.__wrapped__  # as they are before they know

needs_onednn = pytest.mark.skipif(not matmul.is_offered(), reason="this build of torch has no oneDNN")
needs_exact_setting = pytest.mark.skipif(
    not matmul._is_setting_exact(), reason="torch before 2.9, or a processor that would round"
)


def close(measured, expected, tolerance=1e-4):
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance)


@pytest.fixture
def calls(monkeypatch):
    """Rows of each product that oneDNN was called for by name."""
    found = []
    original = matmul._by_onednn

    def noted(rows, weight, bias):
        found.append(rows.numel() // rows.shape[-1])
        return original(rows, weight, bias)

    monkeypatch.setattr(matmul, "_by_onednn", noted)
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
    monkeypatch.setattr(matmul, "_TORCHS_OWN", Noted())
    return found


def read_and_write(model, num_steps=CHUNK + 5):
    """Logits (1, steps, V) of a text that is compressed and written on until a chunk is closed, and the cache."""
    cache = model.compress(random_ids(3 * CHUNK + 7), ratio=4)
    logits = [model(token, past_key_values=cache).logits for token in random_ids(num_steps, 1).split(1, dim=1)]
    return torch.cat(logits, dim=1), cache


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
    assert {1, CHUNK} <= set(calls) | {CHUNK}
    close(found, expected)
    for layer, other in zip(cache.layers, held.layers, strict=True):
        close(layer.keys, other.keys)
        close(layer.values, other.values)


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


@needs_exact_setting
@torch.no_grad()
def test_attention_and_products_of_many_rows_are_the_same_under_the_setting():
    query, key = (matmul._sample(2 * MANY, 64).view(1, 2, MANY, 64) for _ in range(2))
    rows, weight = matmul._sample(MANY, 64), matmul._sample(96, 64)

    def results():
        attended = nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
        return attended, nn.functional.linear(rows, weight), rows @ weight.T

    expected = results()
    with matmul.everything_by_onednn():
        found = results()
    for measured, wanted in zip(found, expected, strict=True):
        close(measured, wanted, 1e-5)


@needs_exact_setting
@pytest.mark.parametrize("way", ["in the block", "behind it"])
def test_gradients_are_the_same(way):
    model = with_beacons(
        "llama", BeaconConfig(chunk_size=MANY, ratios=(4,)), attention="sdpa", max_position_embeddings=2048
    )
    ids = random_ids(2 * MANY + 5)
    gradients = {}
    for choice in ("torch", "onednn"):
        model.cpu_matmul = choice
        with matmul.training_products(
            choice if way == "in the block" else "torch", device=ids.device, dtype=model.dtype
        ):
            model(ids, labels=ids, beacon_ratio=4).loss.backward()
        gradients[choice] = {name: parameter.grad for name, parameter in model.beacon_parameters()}
        for _, parameter in model.beacon_parameters():
            parameter.grad = None
    for name, gradient in gradients["onednn"].items():
        close(gradient, gradients["torch"][name])


# --- where it is taken -------------------------------------------------------------------------------------------------


@needs_onednn
@torch.no_grad()
def test_short_texts_and_disabled_beacons_are_the_base_to_the_bit(calls, settings):
    base, model = tiny("llama"), with_beacons("llama", CONFIG)
    model.cpu_matmul = "onednn"
    ids = random_ids(CHUNK)
    assert torch.equal(model(ids).logits, base(ids).logits)
    cache = model.new_cache()
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache)
    with model.beacon_disabled():
        assert torch.equal(model(random_ids(3 * CHUNK)).logits, base(random_ids(3 * CHUNK)).logits)
    model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    assert not calls
    assert not settings
    model(random_ids(1), past_key_values=cache)  # closes the chunk
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
    assert not matmul.is_chosen("onednn", rows)


@needs_onednn
@pytest.mark.parametrize("is_few", [True, False])
def test_trying_both_draws_no_random_numbers_and_finds_a_factor(is_few):
    state = torch.get_rng_state()
    assert 0.05 < GAIN(is_few, torch.get_num_threads()) < 50
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
def test_products_that_are_not_precise_gain_nothing(monkeypatch):
    original = matmul._by_onednn
    monkeypatch.setattr(matmul, "_by_onednn", lambda *args: original(*args).bfloat16().float())
    assert GAIN(is_few=True, num_threads=1) == 0


@pytest.mark.parametrize("choice", ["mkl", None, True, "ONEDNN"])
def test_other_choices_are_refused(choice):
    model = with_beacons("llama", CONFIG)
    with pytest.raises(ConfigError, match=r"one of auto, onednn, torch; got"):
        model.cpu_matmul = choice
    assert model.cpu_matmul == "auto"


# --- the setting of the process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "is_on"), [(matmul.MANY_ROWS, True), (matmul.MANY_ROWS // 4, False)])
@torch.no_grad()
def test_it_is_on_for_passes_of_many_rows_only(settings, chunk, is_on):
    config = BeaconConfig(chunk_size=chunk, ratios=(4,))
    model = with_beacons("llama", config, max_position_embeddings=2048)
    model.cpu_matmul = "onednn"
    cache = model.compress(random_ids(2 * chunk + 3), ratio=4)
    assert settings == ["bf16", "none"] * (2 if is_on else 0)
    settings.clear()
    model(random_ids(1), past_key_values=cache)
    assert not settings


def test_it_is_as_before_after_an_error_and_in_nested_blocks(settings):
    with pytest.raises(KeyError), matmul.everything_by_onednn(), matmul.everything_by_onednn():
        raise KeyError
    assert settings == ["bf16", "none"]


def test_it_stays_on_until_the_last_thread_leaves(settings):
    entered, may_leave = threading.Event(), threading.Event()

    def other():
        with matmul.everything_by_onednn():
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with matmul.everything_by_onednn():
        thread.start()
        assert entered.wait(10)
    assert settings == ["bf16"]
    may_leave.set()
    thread.join()
    assert settings == ["bf16", "none"]


def test_it_is_let_alone_where_products_would_be_rounded(settings, monkeypatch):
    monkeypatch.setattr(matmul, "_is_setting_exact", lambda: False)
    with matmul.everything_by_onednn():
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
