"""Steps of decoding that are recorded and replayed: the same logits and entries as passes of their own.

What a CUDA graph does is done here on a CPU: the operations of one run are run again on the same tensors, so that whatever a
step reads from Python is what it was when it was recorded.
"""

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from activation_beacon import BeaconConfig, recorded
from activation_beacon.cache import BeaconCache
from activation_beacon.errors import UnsupportedError
from activation_beacon.room import Room
from families import EAGER_ONLY, FAMILIES, ONE_SETTING, WITH_STATES, random_ids, widths, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=3)


class Operations(TorchDispatchMode):
    """Notes every operation, and what it wrote where; refuses to hand a value to Python, as recording on a GPU does.

    Its own results it keeps, as a graph's memory does. Whatever else it was given is somebody else's to keep.
    """

    def __init__(self):
        super().__init__()
        self.done = []
        self.results = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        given = tree_map_only(torch.Tensor, self._noted, (args, kwargs or {}))
        result = operation(*args, **(kwargs or {}))
        made = [tensor for tensor in tensors(result) if not any(tensor is each for each in tree_leaves((args, kwargs)))]
        self.results |= {id(tensor): tensor for tensor in made}
        self.done.append((operation, given, tree_map_only(torch.Tensor, self._noted, tensors(result))))
        return result

    def _noted(self, tensor):
        return (lambda: tensor) if id(tensor) in self.results else weakref.ref(tensor)

    def replay(self):
        with torch.inference_mode():
            for operation, given, results in self.done:
                args, kwargs = tree_map_only(Callable, found, given)
                for old, new in zip(map(found, results), tensors(operation(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def found(noted):
    tensor = noted()
    assert tensor is not None, "a replay would read memory that has been freed"
    return tensor


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [each for each in result if isinstance(each, torch.Tensor)]


class Recordings:
    """Stands for `record_on_cuda`: counts recordings and replays."""

    def __init__(self):
        self.made = self.replayed = 0

    def __call__(self, step):
        self.made += 1
        with Operations() as operations:
            result = step()

        def replay():
            self.replayed += 1
            operations.replay()

        return replay, result


@pytest.fixture
def recordings(monkeypatch):
    made = Recordings()
    monkeypatch.setitem(recorded.RECORDERS, "cpu", made)
    return made


def graphed(family="llama", **settings):
    model = with_beacons(family, CONFIG, attention="sdpa", **settings)
    model.cuda_graphs = True
    return model


def step(model, cache, tokens):
    return model(input_ids=torch.as_tensor(tokens).view(-1, 1), past_key_values=cache).logits


def recorded_model():
    """A model, and a context on which a step has been recorded."""
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    for token in (5, 6):
        step(model, cache, token)
    return model, cache


def assert_same(ours, expected):
    assert ours.rows == expected.rows
    assert torch.equal(ours.token_ids, expected.token_ids)
    for layer, other in zip(ours.layers, expected.layers, strict=True):
        if not layer.has_entries:
            continue
        for tensor, wanted in zip(layer.entries(), other.entries(), strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=2e-5)


def go_on(model, cache, count, seed=5):
    """Logits of so many steps, and those of ordinary ones on a fork; both end alike."""
    other = cache.fork()
    for tokens in random_ids(count, seed, batch=cache.batch_size).T:
        model.cuda_graphs = True
        logits = step(model, cache, tokens)
        model.cuda_graphs = False
        torch.testing.assert_close(logits, step(model, other, tokens), rtol=0, atol=1e-4)
    model.cuda_graphs = True
    assert_same(cache, other)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *ONE_SETTING} - EAGER_ONLY - {*WITH_STATES}))
@torch.no_grad()
def test_replayed_steps_are_those_of_passes_across_chunks(family, recordings):
    model = graphed(family)
    if "epsilon_tensor = torch.tensor(" in inspect.getsource(type(model.get_decoder())):
        pytest.skip("an older transformers makes a tensor on the host in every step of Gemma 3n")
    cache = model.compress(random_ids(3 * CHUNK + 2), ratio=4)
    go_on(model, cache, CHUNK + 5)
    assert recordings.made == 2  # for the tail, and for that which a chunk left
    assert recordings.replayed == CHUNK + 5 - 2  # all but the first, which makes room, and that which closes a chunk


@torch.no_grad()
def test_rooms_of_recordings_are_free_without_a_search_for_circles(recordings, monkeypatch):
    alive, make = weakref.WeakSet(), Room.__init__
    monkeypatch.setattr(Room, "__init__", lambda room, *values: alive.add(room) or make(room, *values))
    model = graphed()
    gc.collect()
    gc.disable()
    try:
        model.generate(random_ids(3 * CHUNK + 2), beacon_ratio=4, max_new_tokens=2 * CHUNK, do_sample=False)
        assert recordings.made > 1
        assert not alive
    finally:
        gc.enable()


@torch.no_grad()
def test_rows_of_a_ragged_batch_go_on_as_ever(recordings):
    model = graphed()
    texts = [random_ids(length, length)[0].tolist() for length in (3 * CHUNK + 2, 5, 2 * CHUNK + 9)]
    cache = model.compress(texts, ratio=4)
    go_on(model, cache, 2 * CHUNK)
    assert recordings.replayed > CHUNK


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
@torch.no_grad()
def test_windows_are_heeded(family, settings, recordings):
    model = graphed(family, **settings)
    go_on(model, model.compress(random_ids(3 * CHUNK + 2), ratio=4), CHUNK)
    assert recordings.replayed > CHUNK / 2


@torch.no_grad()
def test_a_room_that_is_full_is_left_for_a_larger_one(recordings, monkeypatch):
    monkeypatch.setattr("activation_beacon.room.LEAST_SPARE", 4)
    monkeypatch.setattr("activation_beacon.room.ALIGNED", 1)
    model = with_beacons("llama", BeaconConfig(chunk_size=64, ratios=(2, 4, 8)), attention="sdpa")
    go_on(model, model.compress(random_ids(70), ratio=8), 40)
    assert recordings.made > 4


@torch.no_grad()
def test_passes_of_several_tokens_may_come_between(recordings):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    other = cache.fork()
    for count in (1, 1, 3, 1, 1, 2, 1):
        ids = random_ids(count, count)
        model.cuda_graphs = True
        ours = model(input_ids=ids, past_key_values=cache).logits
        model.cuda_graphs = False
        torch.testing.assert_close(ours, model(input_ids=ids, past_key_values=other).logits, rtol=0, atol=1e-4)
    assert_same(cache, other)
    assert recordings.made == 1
    assert recordings.replayed == 4


@torch.no_grad()
def test_inference_mode_may_begin_and_end_between_two_steps(recordings):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    go_on(model, cache, 1)
    with torch.inference_mode():
        go_on(model, cache, 2)
    go_on(model, cache, 2)
    with torch.inference_mode():
        inner = cache.fork()
        go_on(model, inner, 3)
    go_on(model, inner, 3)
    assert recordings.replayed >= 4 + 1


@torch.no_grad()
def test_forks_keep_what_they_saw_and_go_on_by_themselves(recordings):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    for token in (5, 6, 7):
        step(model, cache, token)
    fork = cache.fork()
    before = [tensor.clone() for layer in fork.layers for tensor in layer.entries()]
    assert fork.recorded is None
    go_on(model, cache, 4)
    for tensor, expected in zip((t for layer in fork.layers for t in layer.entries()), before, strict=True):
        assert torch.equal(tensor, expected)
    go_on(model, fork, 4, seed=6)


@torch.no_grad()
def test_logits_that_were_returned_stay_as_they_were(recordings):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    step(model, cache, 5)
    kept = step(model, cache, 6)
    copied = kept.clone()
    step(model, cache, 7)
    assert recordings.replayed == 2
    assert torch.equal(kept, copied)


@torch.no_grad()
def test_a_cache_is_copied_saved_and_taken_back_without_its_recording(recordings, tmp_path):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    for token in (5, 6, 7):
        step(model, cache, token)
    assert isinstance(cache.recorded, recorded.RecordedStep)
    copied = copy.deepcopy(cache)
    assert copied.recorded is None
    torch.save(cache, stream := io.BytesIO())
    assert stream.tell() > 0
    cache.save(tmp_path / "context")
    loaded = BeaconCache.load(tmp_path / "context", model)
    cache.crop(-2)
    for each, seed in ((copied, 1), (loaded, 2), (cache, 3)):
        go_on(model, each, 4, seed)
    assert recordings.replayed > 2 * 3


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}])
def test_generate_writes_the_same_and_leaves_the_context_alone(options, recordings):
    model = graphed()
    context = model.compress(random_ids(3 * CHUNK + 2), ratio=4)
    length = context.tokens_seen
    question = random_ids(3, 8, batch=2)
    answers = []
    for is_on in (True, False):
        model.cuda_graphs = is_on
        torch.manual_seed(0)
        ids = model.generate(question, context=context, max_new_tokens=2 * CHUNK, eos_token_id=None, **options)
        answers.append(ids)
    assert torch.equal(*answers)
    assert context.tokens_seen == length
    assert (recordings.replayed > CHUNK) == ("num_beams" not in options)  # beams change places with every token


def of_no_tested_family(model, cache):
    model._beacon.site = dataclasses.replace(model._beacon.site, is_known=False)
    return cache


def quantized(model, cache):
    return cache.quantize(8)


def training(model, cache):
    model.train()
    return cache


def eager(model, cache):
    model.set_attn_implementation("eager")
    return cache


def off(model, cache):
    model.cuda_graphs = False
    return cache


@pytest.mark.parametrize("change", [of_no_tested_family, quantized, training, eager, off])
@torch.no_grad()
def test_steps_that_a_recording_cannot_stand_for_are_passes(change, recordings):
    model = graphed()
    cache = change(model, model.compress(random_ids(CHUNK + 2), ratio=4))
    assert widths(model, lambda: [step(model, cache, token) for token in (5, 6, 7)]) == [1, 1, 1]
    assert not recordings.made


@torch.no_grad()
def test_autocast_gradients_and_hidden_states_are_for_passes(recordings):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    step(model, cache, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, cache, 6)
    with torch.enable_grad():
        step(model, cache, 6)
    output = model(input_ids=torch.tensor([[7]]), past_key_values=cache, output_hidden_states=True)
    assert output.hidden_states is not None
    assert not recordings.made


@torch.no_grad()
def test_a_model_that_has_moved_is_recorded_anew(recordings):
    model, cache = recorded_model()
    model.double().float()
    go_on(model, cache, 3)
    assert recordings.made == 2


@torch.no_grad()
def test_weights_that_have_moved_never_stand_where_those_of_the_recording_did(recordings):
    model, cache = recorded_model()
    memory = StorageWeakRef(model.get_input_embeddings().weight.untyped_storage())
    model.double().float()
    assert not memory.expired()
    assert not cache.recorded.serves(model, cache)
    step(model, cache, 7)
    assert memory.expired()


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_is_refused_and_leaves_the_cache(recordings, monkeypatch):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    step(model, cache, 5)
    own = model.base_forward

    def waiting(**inputs):
        inputs["position_ids"].max().item()
        return own(**inputs)

    monkeypatch.setattr(model, "base_forward", waiting)
    before = cache.tokens_seen, cache.num_slots
    with pytest.raises(
        UnsupportedError, match=r"\(operation not permitted when stream is capturing\).*cuda_graphs = False"
    ):
        step(model, cache, 6)
    assert (cache.tokens_seen, cache.num_slots) == before
    monkeypatch.undo()
    assert torch.isfinite(step(model, cache, 6)).all()


@pytest.mark.parametrize("failure", [None, RuntimeError("operation not permitted"), torch.OutOfMemoryError("CUDA")])
def test_what_went_wrong_in_recording_is_told_and_the_stream_is_what_it_was(failure, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            assert recorded.ONE_AT_A_TIME.locked()

    outside, own = Stream(), Stream()
    current, runs = [outside], []

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(graph, *, stream, capture_error_mode):
        assert stream is own
        assert capture_error_mode == "thread_local"
        current.append(stream)
        try:
            yield
        finally:
            if failure is not None:
                raise RuntimeError("a capture cannot be ended")  # and the stream stays
            current.pop()

    def step():
        assert current[-1] is own
        runs.append(None)
        if failure is not None and len(runs) == 2:
            raise failure
        return torch.ones(1)

    fakes = {"current_device": lambda: 0, "current_stream": lambda: current[-1], "Stream": lambda device: own}
    fakes |= {"stream": on, "graph": graph, "set_stream": lambda stream: current.append(stream)}
    for name, fake in {**fakes, "CUDAGraph": lambda: SimpleNamespace(replay=None)}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorded._recording_stream.cache_clear()
    with contextlib.nullcontext() if failure is None else pytest.raises(type(failure), match=str(failure)):
        recorded.record_on_cuda(step)
    recorded._recording_stream.cache_clear()
    assert len(runs) == 2
    assert current[-1] is outside
    assert not recorded.ONE_AT_A_TIME.locked()


@pytest.mark.parametrize("num_slots", [16, 48, 255, 512, 1504, 20480, 38912])
def test_rooms_are_cut_into_parts_of_one_size(num_slots):
    parts = recorded.num_parts(num_slots)
    assert num_slots % parts == 0
    assert parts == 1 or num_slots // parts >= recorded.LEAST_PART


@pytest.mark.parametrize(("held", "least"), [(1000, 4), (20_000, 32), (39_000, 32)])
def test_large_rooms_have_many_parts(held, least):
    keys = torch.empty(1, 1, held, 1)
    room = Room(keys, keys, 1)
    assert least <= recorded.num_parts(room.num_slots) <= 64
    assert room.num_slots <= held * (1 + 1 / 8 + 1 / 32) + 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_in_parts_is_attention_to_what_is_filled(dtype, scale):
    torch.manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, count, 8, dtype=dtype) for heads, count in ((6, 1), (2, 1024), (2, 1024))
    )
    filled = (torch.arange(1024)[None] < torch.tensor([[700], [3]]))[:, None, None]
    ours = recorded.FilledEntries.on(torch.device("cpu")).attended_to(query, [keys, values, filled], scale=scale)
    copies = [states.double().repeat_interleave(3, dim=1) for states in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *copies, attn_mask=filled, scale=scale)
    assert ours.dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_large_scores_in_half_precision_are_numbers():
    states = torch.full((1, 2, 64, 128), 24.0, dtype=torch.float16)  # 73,728 before they are scaled
    filled = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    attended = recorded.FilledEntries.on(torch.device("cpu")).attended_to(
        states[:, :, :1], [states, states, filled], scale=None
    )
    assert torch.equal(attended, states[:, :, :1])


@torch.no_grad()
def test_memory_that_runs_out_is_told_as_it_is(recordings, monkeypatch):
    model = graphed()
    cache = model.compress(random_ids(CHUNK + 2), ratio=4)
    step(model, cache, 5)
    monkeypatch.setattr(model, "base_forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        step(model, cache, 6)


def test_on_a_cpu_nothing_is_recorded():
    model = graphed()
    context = model.compress(random_ids(CHUNK + 2), ratio=4)
    ids = model.generate(random_ids(2), context=context, max_new_tokens=3, return_dict_in_generate=True)
    assert ids.past_key_values.recorded is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_cuda_graphs_give_what_passes_give():
    model = graphed().cuda()
    cache = model.compress(random_ids(3 * CHUNK + 2).cuda(), ratio=4)
    other = cache.fork()
    for token in random_ids(2 * CHUNK + 5, 5)[0].cuda():
        model.cuda_graphs = True
        logits = step(model, cache, token)
        model.cuda_graphs = False
        torch.testing.assert_close(logits, step(model, other, token), rtol=0, atol=1e-4)
    assert_same(cache, other)
