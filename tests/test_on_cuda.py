"""What would go wrong on a GPU only, on an emulated one: devices that are mixed, waits of the host, masks that cost the flash kernel.

Its values are the CPU's: each path must give what it gives there. How fast a GPU is, nobody learns here.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from activation_beacon import BeaconCache, BeaconConfig, grouped, recorded
from activation_beacon.at_once import chunks_at_once
from activation_beacon.bench import measure
from activation_beacon.bench.measure import Cell
from activation_beacon.constants import sent
from activation_beacon.evaluation.methods import METHODS
from activation_beacon.processes import Processes
from activation_beacon.training.batches import Batch
from activation_beacon.training.metrics import StepTotals
from activation_beacon.training.objective import Losses
from emulated_cuda import EmulatedCuda, OnCuda, to_cuda
from families import random_ids, with_beacons
from server_models import GREEDY, Heard, engine_of, run_until_over, serving_model

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="emulated where torch is built for CPUs alone")

CHUNK = 16
PAPER = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)
DEFAULT = BeaconConfig(
    chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3, anchored=True, placement="append", exact_ids=tuple(range(5, 13))
)
KINDS = {"paper": PAPER, "default": DEFAULT}
# Those that have sdpa.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "granite", "olmo2", "smollm3")


def model_of(family, kind):
    return with_beacons(family, KINDS[kind], attention="sdpa")


@pytest.fixture
def cuda():
    with EmulatedCuda().on() as emulated:
        yield emulated


def ids_on(model, count, seed=0, batch=1):
    return random_ids(count, seed, batch=batch).to(model.device)


def compressed_and_read_on(model):
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    yield model(ids_on(model, 2 * CHUNK, 1), past_key_values=context).logits


def decoded(model):
    context = model.compress(ids_on(model, 3 * CHUNK + 3), ratio=2)
    for token in ids_on(model, CHUNK, 2)[0]:
        yield model(token.view(1, 1), past_key_values=context).logits


def a_ragged_batch(model):
    contexts = [model.compress(ids_on(model, count), ratio=4) for count in (5 * CHUNK + 3, 2 * CHUNK + 1)]
    batch = BeaconCache.stack(contexts)
    yield model(ids_on(model, CHUNK + 4, 3, batch=2), past_key_values=batch).logits
    for tokens in ids_on(model, 3, 4, batch=2).T:
        yield model(tokens[:, None], past_key_values=batch).logits
    yield model.read_next([batch.row(0), *contexts], [7, 8, 9])


def padded_with_labels(model):
    ids = ids_on(model, 4 * CHUNK, 5, batch=2)
    mask = torch.ones_like(ids)
    mask[0, : CHUNK + 5] = 0
    output = model(ids, attention_mask=mask, labels=ids, beacon_ratio=4)
    yield output.loss
    yield output.nll.nan_to_num(7.0)
    yield output.logits


def quantised_and_moved(model):
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    away = context.to("cpu")
    assert all(layer.device.type == "cpu" for layer in away.layers if layer.has_entries)
    packed = away.to(model.device).quantize(8)
    yield model(ids_on(model, CHUNK, 1), past_key_values=packed).logits


def with_raw_spans(model):
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=8, spans=[(20, 30, None), (40, 60, 2)])
    yield model(ids_on(model, 5, 1), past_key_values=context).logits


def generated(model):
    options = {"max_new_tokens": CHUNK + 2, "min_new_tokens": CHUNK + 2, "do_sample": False}
    context = model.compress(ids_on(model, 3 * CHUNK + 3), ratio=2)
    yield model.generate(ids_on(model, 4, 1), context=context, **options)
    prompts = ids_on(model, 3 * CHUNK, 6, batch=2)
    mask = torch.ones_like(prompts)
    mask[0, :CHUNK] = 0
    yield model.generate(prompts, attention_mask=mask, beacon_ratio=4, num_beams=2, **options)


def all_chunks_at_once(model):
    with chunks_at_once(model):
        yield model.hidden_states(ids_on(model, 5 * CHUNK + 3), [4, 2, 8, 4, 4])


PATHS = [
    compressed_and_read_on,
    decoded,
    a_ragged_batch,
    padded_with_labels,
    quantised_and_moved,
    with_raw_spans,
    generated,
    all_chunks_at_once,
]


@pytest.mark.parametrize(("family", "kind"), [("llama", "paper"), *((family, "default") for family in FAMILIES)])
@torch.no_grad()
def test_on_a_gpu_every_path_gives_what_it_gives_on_a_cpu(family, kind):
    assert_paths_agree(model_of(family, kind), to_cuda)


def assert_paths_agree(model, place):
    """Every path gives on a CPU what it gives once `place` has put the model where it is to be."""
    expected = [[tensor.clone() for tensor in path(model)] for path in PATHS]
    with EmulatedCuda().on():
        place(model)
        assert model.device.type == "cuda"
        for path, wanted in zip(PATHS, expected, strict=True):
            atol = 1e-2 if path is quantised_and_moved else 1e-4  # a hair's breadth rounds to another code
            for tensor, other in zip(path(model), wanted, strict=True):
                assert isinstance(tensor, OnCuda), path.__name__
                torch.testing.assert_close(tensor.inner, other, rtol=0, atol=atol, msg=path.__name__)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_context_is_loaded_to_where_the_model_is(kind, tmp_path, cuda):
    model = to_cuda(model_of("llama", kind))
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    context.save(tmp_path / "context.beacon")
    loaded = BeaconCache.load(tmp_path / "context.beacon", model)
    ids = ids_on(model, 5, 1)
    assert torch.equal(
        model(ids, past_key_values=loaded).logits.inner, model(ids, past_key_values=context).logits.inner
    )


@torch.no_grad()
def test_answers_of_a_server_on_a_gpu_are_those_on_a_cpu():
    """Three texts that are read and answered among one another, one with draws and probabilities."""
    model = serving_model()
    drawn = replace(GREEDY, temperature=0.9, top_p=0.9, seed=3, num_likeliest=2)
    jobs = [
        (random_ids(70)[0].tolist(), 4, GREEDY),
        (random_ids(33, 1)[0].tolist(), 2, drawn),
        ([5, 6, 7], "auto", GREEDY),
    ]

    def answers():
        engine = engine_of(model)
        heard = [Heard(engine, model.new_cache(ratio=ratio), ids, how) for ids, ratio, how in jobs]
        run_until_over(engine, *heard)
        return [(each.ids(), each.reason()) for each in heard]

    expected = answers()
    with EmulatedCuda().on():
        to_cuda(model)
        assert answers() == expected


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_contexts_of_evaluation_answer_on_a_gpu_as_on_a_cpu(name):
    model = model_of("llama", "default")
    ids, question = random_ids(5 * CHUNK + 3)[0].tolist(), random_ids(5, 3)[0].tolist()

    def answers():
        first, grown = METHODS[name].read(model, ids, 3, 4).ask(question, max_new_tokens=6)
        return first, grown.ask(question, max_new_tokens=4)[0]

    expected = answers()
    with EmulatedCuda().on():
        to_cuda(model)
        assert answers() == expected


# --- layers on several GPUs --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_context_that_is_loaded_follows_layers_to_several_gpus(tmp_path, cuda):
    model = spread_over_two(model_of("llama", "default"))
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    assert {layer.device.index for layer in context.layers} == {0, 1}
    context.save(tmp_path / "context.beacon")
    loaded = BeaconCache.load(tmp_path / "context.beacon", model)
    ids = ids_on(model, 5, 1)
    assert torch.equal(
        model(ids, past_key_values=loaded).logits.inner, model(ids, past_key_values=context).logits.inner
    )
    assert [layer.device for layer in loaded.layers] == [layer.device for layer in context.layers]


OUTSIDE_LAYERS = [
    f"model.{name}"
    for name in (
        "norm", "embed_tokens", "rotary_emb", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm",
    )
]  # fmt: skip


def spread_over_two(model):
    """The layers on two GPUs, with accelerate's hooks between them, as `device_map` leaves a model."""
    hooks = pytest.importorskip("accelerate.hooks")
    first, second = (torch.device("cuda", index) for index in (0, 1))
    layers = model.get_decoder().layers
    split = (
        model._beacon.site.last_kept + 1 if model._beacon.site.lenders else 1
    )  # lenders apart from those that borrow
    places = {"": first, **{name: first for name, _ in model.named_modules() if name in ("lm_head", *OUTSIDE_LAYERS)}}
    places |= {f"model.layers.{index}": first if index < split else second for index in range(len(layers))}
    to_cuda(model)
    for name, device in places.items():
        module = model.get_submodule(name)
        hook = hooks.AlignDevicesHook(execution_device=device, io_same_device=not name, skip_keys="past_key_values")
        hooks.add_hook_to_module(module, hook)
    for layer in layers[split:]:
        to_cuda(layer, second)
    return model


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "paper"), ("llama", "default"), ("mistral", "default"), ("gemma4-small", "default")]
)
@torch.no_grad()
def test_layers_may_be_on_several_gpus(family, kind):
    model = model_of(family, kind)
    if "shared_kv_states" in model._skip_keys_device_placement:
        pytest.skip("an older transformers leaves lent keys on the lender's GPU")
    assert_paths_agree(model, spread_over_two)


@torch.no_grad()
def test_what_is_timed_runs_on_a_gpu(cuda):
    model = to_cuda(model_of("llama", "default").bfloat16())
    full, *others = Cell(5 * CHUNK, 2, None, 0), Cell(5 * CHUNK, 2, None, 0, is_tuned=True), Cell(5 * CHUNK, 2, 4, 0)
    cache_bytes = [measure.run(model, full, 3).cache_bytes]
    for way in others:
        by_cudnn = []
        for num_new in (1, 3):
            cuda.clear()
            cache_bytes.append(measure.run(model, way, num_new).cache_bytes)
            by_cudnn.append(cuda.by_cudnn)
        assert by_cudnn[0] == by_cudnn[1] > 0  # the text, but no token
    assert cache_bytes[0] == cache_bytes[2] > 3 * cache_bytes[4]
    assert len(measure.chunk_seconds(model, 6, 4)) == 6
    assert measure.seconds_in_one_call(model, 6, 4) > 0
    assert len(measure.idle_pairs(model, 8, 2, 1)) == measure.TIMES_EACH


# --- what the host waits for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reading_waits_no_oftener_for_many_chunks_than_for_few(kind, cuda):
    model = to_cuda(model_of("llama", kind))
    texts = [ids_on(model, count * CHUNK + 3) for count in (2, 20, 2, 20)]
    waits = []
    for ids in texts:
        cuda.clear()
        model.compress(ids, ratio=4)
        waits.append(cuda.waits.total())
    assert waits[2] == waits[3] <= 4, cuda.waits  # the first two make the constants of the layouts


@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_a_step_of_a_server_waits_once_for_all_answers(count, cuda):
    model = to_cuda(serving_model())
    engine = engine_of(model)
    heard = [
        Heard(engine, model.compress(ids_on(model, 33 + number)), [5, 6], replace(GREEDY, max_tokens=8))
        for number in range(count)
    ]
    while engine.num_rows < count or engine._tasks:
        engine.step()
    engine.step()
    cuda.clear()
    engine.step()
    assert cuda.waits.total() == 1, cuda.waits
    run_until_over(engine, *heard)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_losses_of_many_chunks_wait_no_oftener_than_of_few(kind, cuda):
    model = to_cuda(model_of("llama", kind))
    waits = []
    for count in (2, 9, 2, 9):
        ids = ids_on(model, count * CHUNK + 3)
        cuda.clear()
        model(ids, labels=ids, beacon_ratio=4, logits_to_keep=1)
        waits.append(cuda.waits.total())
    assert waits[2] == waits[3] <= 4, cuda.waits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_of_decoding_wait_for_nothing(kind, cuda):
    model = to_cuda(model_of("llama", kind))
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    tokens = ids_on(model, 6)[0].view(-1, 1, 1).unbind()
    model(tokens[0], past_key_values=context)  # sees to it that the context is this model's
    cuda.clear()
    for token in tokens[1:]:
        model(token, past_key_values=context)
    assert not cuda.waits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_of_a_ragged_batch_wait_for_nothing(kind, cuda):
    model = to_cuda(model_of("llama", kind))
    contexts = [model.compress(ids_on(model, count), ratio=4) for count in (5 * CHUNK + 3, 2 * CHUNK + 1)]
    batch = BeaconCache.stack(contexts)
    steps = ids_on(model, 6, batch=2).T[:, :, None].unbind()
    model(steps[0], past_key_values=batch)
    model.read_next(contexts, [1, 2])
    cuda.clear()
    for tokens in steps[1:]:
        model(tokens, past_key_values=batch)
        model.read_next(contexts, [3, 4])
    assert not cuda.waits


@pytest.mark.parametrize("is_ragged", [False, True])
@torch.no_grad()
def test_a_step_that_is_recorded_waits_for_nothing(is_ragged, cuda, monkeypatch):
    """Recording it as a graph would fail where it did."""
    waits = []

    def record(step):
        cuda.clear()
        result = step()
        waits.append(dict(cuda.waits))
        return lambda: result.copy_(step()), result

    monkeypatch.setitem(recorded.RECORDERS, "cuda", record)
    model = to_cuda(model_of("llama", "default"))
    lengths = (5 * CHUNK + 3, 2 * CHUNK + 1)[: 1 + is_ragged]
    batch = BeaconCache.stack([model.compress(ids_on(model, count), ratio=4) for count in lengths])
    plain = batch.fork()
    for tokens in ids_on(model, 6, batch=len(lengths)).T:
        model.cuda_graphs = True
        logits = model(tokens[:, None], past_key_values=batch).logits
        model.cuda_graphs = False
        expected = model(tokens[:, None], past_key_values=plain).logits
        torch.testing.assert_close(logits.inner, expected.inner, rtol=0, atol=1e-4)
    assert waits == [{}]


@torch.no_grad()
def test_generate_waits_once_for_a_token(cuda):
    """Transformers' own loop does, to learn whether all answers have ended."""
    model = to_cuda(model_of("llama", "default"))
    context = model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    waits = []
    for count in (4, 4, 10):
        cuda.clear()
        model.generate(
            ids_on(model, 3, 1), context=context, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        waits.append(cuda.waits.total())
    assert waits[2] - waits[1] == 6


@torch.no_grad()
def test_all_chunks_in_one_pass_wait_no_oftener_for_many(cuda):
    model = to_cuda(model_of("llama", "paper"))
    waits = []
    with chunks_at_once(model):
        for count in (2, 9, 2, 9):
            ids = ids_on(model, count * CHUNK + 3)
            cuda.clear()
            model.hidden_states(ids, [4] * count)
            waits.append(cuda.waits.total())
    assert waits[2] == waits[3] <= 1, cuda.waits


@torch.no_grad()
def test_losses_of_training_are_summed_without_a_wait(cuda):
    ids, is_target = random_ids(5 * CHUNK, batch=2), torch.ones(2, 5 * CHUNK, dtype=torch.bool)
    batch = Batch(ids, is_target, (4, 2, 8, 4), CHUNK)
    nll = torch.rand(2, 5 * CHUNK - 1).cuda()
    nll[0, 7:9] = torch.nan
    result = Losses(nll.nansum(), nll.nansum(), nll, None, is_target.sum())
    cuda.clear()
    totals = StepTotals((2, 4, 8))
    totals.add(result, batch)
    assert sent(batch.ids, nll.device).device == nll.device
    assert not cuda.waits
    line, values = totals.line(Processes(), torch.device("cpu")), nll.inner.double()
    assert line["loss"] == pytest.approx(float(values.nansum()) / (2 * (5 * CHUNK - 1)))
    assert line["loss_by_ratio"]["8"] == pytest.approx(float(values[:, 3 * CHUNK - 1 : 4 * CHUNK - 1].mean()))


# --- which kernels of attention may run --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_mask_keeps_the_flash_kernel_from_running(kind, cuda):
    """Not while a text is read, nor while it is decoded; closing a chunk that has been read raw may write its mask out."""
    model = to_cuda(model_of("llama", kind).bfloat16())
    context = model.compress(ids_on(model, 9 * CHUNK + 3), ratio=4)
    model(ids_on(model, 7, 1), past_key_values=context)
    model(ids_on(model, 1, 2), past_key_values=context)
    with chunks_at_once(model):
        model.hidden_states(ids_on(model, 5 * CHUNK + 3), [4] * 5)
    assert cuda.masks["lower right"] > 0
    assert cuda.masks["written out"] == 0


@torch.no_grad()
def test_steps_of_decoding_are_not_left_to_cudnn(cuda):
    """It makes a plan for each number of keys, on the host."""
    model = to_cuda(model_of("llama", "default"))
    contexts = [model.compress(ids_on(model, count), ratio=4) for count in (5 * CHUNK + 3, 2 * CHUNK + 1)]
    assert cuda.by_cudnn > 0
    cuda.clear()
    model(ids_on(model, 1), past_key_values=contexts[0])
    model.read_next(contexts, [3, 4])
    assert cuda.masks.total() > cuda.by_cudnn == 0
    context = model.compress(ids_on(model, 3 * CHUNK + model.local_tokens), ratio=4)
    cuda.clear()
    model(ids_on(model, 1), past_key_values=context)  # closes a chunk
    assert len(context.ratios) == 3
    assert cuda.masks["written out"] > 0
    assert cuda.by_cudnn == cuda.masks["lower right"]  # torch's flash kernel takes these whatever else there is
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # whoever wants nothing else has it
        model(ids_on(model, 1), past_key_values=contexts[0])
    assert cuda.by_cudnn > 0


def test_with_gradients_chunks_are_told_that_they_are_causal(cuda, monkeypatch):
    """Gradients are not emulated: what keeps them is asked for, and a pass without is made."""
    model = to_cuda(model_of("llama", "paper"))
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    ids = ids_on(model, 3 * CHUNK + 3)
    with torch.no_grad():
        model(ids, labels=ids, beacon_ratio=4)
    assert cuda.masks["lower right"] > 0
    assert cuda.masks["written out"] == 0


@pytest.mark.parametrize(("most", "passes"), [(8192, 2), (0, 6)])
@torch.no_grad()
def test_a_gpu_is_given_more_chunks_at_a_time(most, passes, cuda, monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 0)
    monkeypatch.setattr(grouped, "ROWS_TOGETHER_ON_CUDA", most)
    model, seen = to_cuda(model_of("llama", "paper")), []
    model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(1))
    model.compress(ids_on(model, 5 * CHUNK + 3), ratio=4)
    assert len(seen) == passes  # the last one reads the tail


# --- the emulation itself ----------------------------------------------------------------------------------------------


def test_the_emulation_refuses_tensors_of_two_devices(cuda):
    there, here = torch.ones(3).cuda(), torch.ones(3)
    for mix in (lambda: there + here, lambda: torch.cat((there, here)), lambda: here.index_select(0, there.long())):
        with pytest.raises((RuntimeError, AssertionError), match=r"devices|same device"):
            mix()
    assert torch.equal((there + torch.tensor(1.0)).inner, torch.full((3,), 2.0))


WAITS = {
    "a value": (lambda there: bool(there.sum() > 0), "value"),
    "a list": (lambda there: there.tolist(), "value"),
    "a slice's end": (lambda there: there[: there.long().sum()], "value"),
    "what is not zero": (lambda there: there.nonzero(), "shape"),
    "a selection": (lambda there: there[there > 0], "shape"),
    "to the host": (lambda there: there.cpu(), "copy"),
    "from the host": (lambda there: torch.ones(3).to("cuda"), "copy"),
    "not from pinned memory": (lambda there: torch.ones(3).to("cuda", non_blocking=True), "copy"),
    "numbers": (lambda there: torch.tensor([1, 2], device="cuda"), "copy"),
    "a list of indices": (lambda there: there[[0, 2]], "copy"),
}


@pytest.mark.parametrize("case", WAITS)
def test_the_emulation_counts_what_the_host_waits_for(case, cuda):
    act, reason = WAITS[case]
    there = torch.ones(3).cuda()
    cuda.clear()
    act(there)
    assert [reason for reason, _ in cuda.waits.elements()] == [reason]


def test_the_emulation_lets_pass_what_needs_no_wait(cuda):
    there = torch.ones(3).cuda()
    cuda.clear()
    sent = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    view = (there + sent)[1:]
    view.mul_(2.0)
    torch.arange(3, device=view.device)
    assert not cuda.waits
    assert torch.equal(view.inner, torch.full((2,), 4.0))
