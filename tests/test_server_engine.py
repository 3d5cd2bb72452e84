"""The engine against plain `generate`: the same tokens, alone and among others, whoever joins and leaves."""

import time

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.errors import CapacityError
from activation_beacon.server import engine as engine_module
from activation_beacon.server.engine import Engine
from activation_beacon.server.jobs import BusyError, ClosedError, Ended, LateError, Piece, Progress
from activation_beacon.server.sampling import Sampling
from evaluation_models import byte_tokenizer
from families import random_ids
from server_models import CONFIG, GREEDY, Heard, assert_same_cache, engine_of, plain, run_until_over, serving_model


@pytest.fixture(scope="module")
def model():
    return serving_model()


def ids_of(length, seed=0):
    return random_ids(length, seed)[0].tolist()


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("ratio", [2, 8, "auto", (2, 8)])
def test_a_text_read_and_answered_equals_generate(model, length, ratio):
    prompt = ids_of(length)
    expected, grown = plain(model, model.new_cache(ratio=ratio), prompt, GREEDY.max_tokens)
    engine = engine_of(model)
    heard = Heard(engine, model.new_cache(ratio=ratio), prompt, GREEDY)
    run_until_over(engine, heard)
    assert heard.ids() == expected
    assert heard.reason() == "length"
    assert_same_cache(heard.cache, grown)


@pytest.mark.parametrize("config", [CONFIG, BeaconConfig(chunk_size=16, ratios=(2, 8), local_tokens=5)])
def test_compressing_piece_by_piece_equals_compress(config):
    model = serving_model(config)
    for length in (3, 16, 17, 21, 22, 48, 49, 100):
        engine = engine_of(model)
        heard = Heard(engine, model.new_cache(ratio=8), ids_of(length))
        run_until_over(engine, heard)
        assert_same_cache(heard.cache, model.compress(ids_of(length), ratio=8))


def test_no_piece_closes_more_than_one_chunk(model):
    engine = engine_of(model)
    heard = Heard(engine, model.new_cache(ratio=4), ids_of(100))
    seen = []
    while not heard.is_over:
        engine.step()
        seen += [len(task.reading.cache.rows[0].chunks) for task in engine._tasks]
    assert seen == [1, 2, 3, 4, 5, 6]  # the last piece, the tail, ends the job
    assert [e for e in heard.events if isinstance(e, Progress)] == [Progress(n, 7) for n in range(8)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_that_join_and_leave_at_any_step_are_what_they_are_alone(attention):
    """Rows of different lengths, ratios, local tokens and starts; chunks are closed in the middle of answers."""
    model = serving_model(attention=attention)
    empty = [model.new_cache(ratio=(2, 4, 8)[n % 3], local_tokens=n % 4 * 3) for n in range(6)]
    contexts = [model.compress(ids_of(20 + 17 * n, n), cache=cache) for n, cache in enumerate(empty)]
    questions = [ids_of(3 + 2 * n, 50 + n) for n in range(6)]
    lengths = [3, 40, 9, 25, 1, 33]
    engine = engine_of(model)
    heard = []
    for context, question, length in zip(contexts, questions, lengths, strict=True):
        heard.append(Heard(engine, context, question, Sampling(max_tokens=length, temperature=0.0)))
        for _ in range(5):
            engine.step()
    run_until_over(engine, *heard)
    for each, context, question, length in zip(heard, contexts, questions, lengths, strict=True):
        expected, grown = plain(model, context, question, length)
        assert each.ids() == expected
        assert_same_cache(each.cache, grown)


def test_answers_really_share_passes():
    model, widths = serving_model(), []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    engine = engine_of(model)
    heard = [Heard(engine, model.new_cache(ratio=4), ids_of(5, n), Sampling(max_tokens=60)) for n in range(4)]
    run_until_over(engine, *heard)
    assert widths.count((4, 1)) >= 20


def test_a_context_stays_as_it_was(model):
    context = model.compress(ids_of(40), ratio=4)
    before = context.fork()
    engine = engine_of(model)
    heard = [Heard(engine, context, ids_of(4, n), GREEDY) for n in range(3)]
    run_until_over(engine, *heard)
    assert_same_cache(context, before, atol=0)


@pytest.mark.parametrize("local_tokens", [0, 3])
def test_auto_reads_anew_in_pieces_when_its_ratio_no_longer_fits(local_tokens):
    """The text outgrows ratio 2 while an answer is written: as `generate` does, but piece by piece."""
    model = serving_model(max_position_embeddings=64)
    prompt, empty = ids_of(90), model.new_cache(ratio="auto", local_tokens=local_tokens)
    expected, grown = plain(model, empty, prompt, 40)
    assert grown.ratios[0] > model.compress(prompt, ratio="auto").ratios[0]
    engine = engine_of(model)
    heard = Heard(engine, empty, prompt, Sampling(max_tokens=40, temperature=0.0))
    most = 0
    while not heard.is_over:
        engine.step()
        most = max(most, *(task.reading.num_pieces for task in engine._tasks), 0)
    assert most > 5
    assert heard.ids() == expected
    assert_same_cache(heard.cache, grown)


def test_quantised_contexts_answer_as_their_dense_selves(model):
    context = model.compress(ids_of(40), ratio=4).quantize(8)
    dense = context.fork()
    dense.layers = [layer.dense() for layer in dense.layers]
    engine = engine_of(model)
    heard = Heard(engine, context, ids_of(4), GREEDY)
    run_until_over(engine, heard)
    assert heard.ids() == plain(model, dense, ids_of(4), GREEDY.max_tokens)[0]


def test_several_answers_differ_and_come_again_with_the_same_seed(model):
    sampling = Sampling(max_tokens=12, seed=7)
    texts = []
    for company in (0, 3):
        engine = engine_of(model)
        others = [Heard(engine, model.new_cache(ratio=2), ids_of(20, n), GREEDY) for n in range(company)]
        heard = Heard(engine, model.new_cache(ratio=4), ids_of(30), *[sampling] * 3)
        run_until_over(engine, heard, *others)
        texts.append([heard.ids(number) for number in range(3)])
    assert texts[0] == texts[1]
    assert len({tuple(ids) for ids in texts[0]}) == 3


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(model):
    expected, _ = plain(model, model.new_cache(ratio=4), ids_of(30), 24)
    engine = engine_of(model)
    engine.ends = frozenset([expected[5]])
    heard = Heard(engine, model.new_cache(ratio=4), ids_of(30), GREEDY)
    run_until_over(engine, heard)
    end = expected.index(expected[5])
    assert heard.ids() == expected[:end]
    assert heard.reason() == "stop"


def test_an_answer_with_no_place_left_ends_by_length():
    model = serving_model(max_position_embeddings=40)
    engine = engine_of(model)
    heard = Heard(engine, model.new_cache(ratio=2), ids_of(20), Sampling(max_tokens=500, temperature=0.0))
    run_until_over(engine, heard)
    assert heard.reason() == "length"
    assert 10 < len(heard.ids()) < 500


def test_a_text_that_does_not_fit_fails_alone(model):
    engine = engine_of(model)
    good = Heard(engine, model.new_cache(ratio=4), ids_of(10), GREEDY)
    bad = Heard(engine, model.new_cache(ratio=2), ids_of(3000), GREEDY)
    run_until_over(engine, good, bad)
    assert isinstance(bad.error, CapacityError)
    assert len(good.ids()) == GREEDY.max_tokens


def test_a_cancelled_job_frees_its_rows(model):
    engine = engine_of(model)
    gone = Heard(engine, model.new_cache(ratio=4), ids_of(10), *[Sampling(max_tokens=400)] * 2)
    stays = Heard(engine, model.new_cache(ratio=4), ids_of(12), GREEDY)
    for _ in range(8):
        engine.step()
    assert engine.num_rows == 3
    gone.job.cancel()
    engine.step()
    assert engine.num_rows == 1
    assert isinstance(gone.error, ClosedError)
    run_until_over(engine, stays)
    assert stays.ids() == plain(model, model.new_cache(ratio=4), ids_of(12), GREEDY.max_tokens)[0]


def test_a_late_job_is_told_so(model):
    engine = engine_of(model)
    heard = Heard(engine, model.new_cache(ratio=4), ids_of(10), GREEDY, seconds=0.0)
    while time.monotonic() <= heard.job.started:
        pass
    run_until_over(engine, heard)
    assert isinstance(heard.error, LateError)


def test_a_full_queue_refuses(model):
    engine = engine_of(model, max_waiting=2)
    for n in range(2):
        Heard(engine, model.new_cache(ratio=4), ids_of(5, n), GREEDY)
    with pytest.raises(BusyError, match="As many requests are waiting as may"):
        Heard(engine, model.new_cache(ratio=4), ids_of(5), GREEDY)


def test_rows_are_bounded_in_number_and_bytes(model):
    engine = engine_of(model, max_rows=3)
    heard = [Heard(engine, model.new_cache(ratio=4), ids_of(5, n), GREEDY) for n in range(8)]
    most = 0
    while not all(each.is_over for each in heard):
        engine.step()
        most = max(most, engine.num_rows)
    assert most == 3

    narrow = engine_of(model, max_batch_bytes=1)
    heard = [Heard(narrow, model.new_cache(ratio=4), ids_of(5, n), GREEDY) for n in range(3)]
    while not all(each.is_over for each in heard):
        narrow.step()
        assert len(narrow._batch) <= 1


def test_answers_go_on_while_a_text_is_compressed(model):
    engine = engine_of(model)
    talk = Heard(engine, model.new_cache(ratio=4), ids_of(5), Sampling(max_tokens=200, temperature=0.0))
    for _ in range(3):
        engine.step()
    book = Heard(engine, model.new_cache(ratio=8), ids_of(400))
    between, last = [], len(talk.ids())
    while not book.is_over:
        before = [e for e in book.events if isinstance(e, Progress)]
        engine.step()
        after = [e for e in book.events if isinstance(e, Progress)]
        if len(after) > max(1, len(before)):
            between.append(len(talk.ids()) - last)
            last = len(talk.ids())
    assert len(between) > 20
    assert all(count >= 1 for count in between[1:])


def test_a_stop_text_ends_an_answer(model):
    expected, _ = plain(model, model.new_cache(ratio=4), ids_of(30), 24)
    whole = byte_tokenizer().decode(expected)
    stop = whole[6:8]
    engine = engine_of(model)
    heard = Heard(engine, model.new_cache(ratio=4), ids_of(30), Sampling(max_tokens=24, temperature=0.0, stop=(stop,)))
    run_until_over(engine, heard)
    assert heard.text() == whole[: whole.index(stop)]
    assert heard.reason() == "stop"


def test_an_error_in_one_row_leaves_the_others_alone(model, monkeypatch):
    engine = engine_of(model)
    bad = Heard(engine, model.new_cache(ratio=4), ids_of(10), *[GREEDY] * 2)
    good = Heard(engine, model.new_cache(ratio=4), ids_of(12), GREEDY)
    while engine.num_rows < 3 or bad.ids()[1:] == []:
        engine.step()

    def broken(logits):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(next(a for a in engine._batch if a.job is bad.job), "take", broken)
    run_until_over(engine, bad, good)
    assert isinstance(bad.error, ZeroDivisionError)
    assert good.ids() == plain(model, model.new_cache(ratio=4), ids_of(12), GREEDY.max_tokens)[0]


def test_a_failing_step_of_answers_leaves_texts_that_are_read_alone(model, monkeypatch):
    engine = engine_of(model)
    answers = [Heard(engine, model.new_cache(ratio=4), ids_of(10, n), GREEDY) for n in range(2)]
    while engine.num_rows < 2:
        engine.step()
    book = Heard(engine, model.new_cache(ratio=8), ids_of(200))
    engine.step()

    def broken(*args):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(model, "read_next", broken)
        run_until_over(engine, *answers)
    run_until_over(engine, book)
    assert all(isinstance(each.error, torch.OutOfMemoryError) for each in answers)
    assert (book.error, engine.num_running) == (None, 0)
    assert_same_cache(book.cache, model.compress(ids_of(200), ratio=8))


def test_a_job_that_cannot_begin_fails_alone(model, monkeypatch):
    engine = engine_of(model)
    good = Heard(engine, model.new_cache(ratio=4), ids_of(10), GREEDY)
    engine.step()
    bad = Heard(engine, model.new_cache(ratio=4), ids_of(12), GREEDY)

    def broken(*args):
        raise ZeroDivisionError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "Answer", broken)
        engine.step()
    run_until_over(engine, bad, good)
    assert isinstance(bad.error, ZeroDivisionError)
    assert good.error is None
    assert engine.num_running == 0


def test_the_thread_finishes_what_it_has_begun(model):
    engine = Engine(model, byte_tokenizer())
    heard = Heard(engine, model.new_cache(ratio=4), ids_of(10), GREEDY)
    engine.start()
    engine.stop(seconds=60)
    assert len(heard.ids()) == GREEDY.max_tokens
    assert any(isinstance(e, Ended) for e in heard.events)
    with pytest.raises(ClosedError):
        Heard(engine, model.new_cache(ratio=4), ids_of(10), GREEDY)


def test_the_thread_cancels_what_takes_too_long(model):
    engine = Engine(model, byte_tokenizer())
    heard = Heard(engine, model.new_cache(ratio="auto"), ids_of(10), Sampling(max_tokens=10**6))
    engine.start()
    engine.stop(seconds=0.05)
    assert not engine.is_alive
    assert isinstance(heard.error, ClosedError)
    assert all(isinstance(e.chosen.token, int) for e in heard.events if isinstance(e, Piece))


def test_probabilities_are_the_models_own(model):
    engine = engine_of(model)
    heard = Heard(
        engine, model.new_cache(ratio=4), ids_of(20), Sampling(max_tokens=3, temperature=0.0, num_likeliest=4)
    )
    run_until_over(engine, heard)
    with torch.no_grad():
        ids = torch.tensor([[*ids_of(20), *heard.ids()]])
        logprobs = model(ids, beacon_ratio=4).logits[0].log_softmax(-1)
    for step, piece in enumerate(e for e in heard.events if isinstance(e, Piece)):
        expected = logprobs[19 + step]
        assert piece.chosen.logprob == pytest.approx(float(expected[piece.chosen.token]), abs=1e-4)
        assert [token for token, _ in piece.chosen.likeliest] == expected.topk(4).indices.tolist()
