import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from activation_beacon.adapt import find_decoder
from activation_beacon.bench import shapes
from activation_beacon.bench.cost import (
    FULL_ATTENTION,
    SHAPES,
    Compression,
    ModelShape,
    Run,
    break_even,
    cache_bytes,
    decode_bytes,
    decode_flops,
    end_to_end_speedup,
    longest_text,
    memory_bytes,
    obstacle,
    prefill_flops,
)
from activation_beacon.bench.shapes import MANY_POSITIONS, known_config, read_shape, shape_of
from activation_beacon.cli import app
from activation_beacon.config import BeaconConfig
from activation_beacon.default_base import _default_config
from activation_beacon.errors import BaseModelError, CapacityError, ConfigError, UnsupportedError, UnsupportedModelError
from activation_beacon.evaluation.contexts import base_cache_bytes
from activation_beacon.hub import default_adapter_folder
from activation_beacon.layouts import chunks_closed, entries_held
from activation_beacon.persistence import load_adapter_config
from activation_beacon.plan import Row, TextPlanner
from activation_beacon.ratios import as_policy
from families import FAMILIES, FURTHER, SIZES, TESTED, beacon_tensors, random_ids, tiny, with_beacons

TINY = ModelShape(
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=16, vocab_size=10
)


NUM_EXPERTS = 2
WITH_EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "afmoe")
OTHERWISE = ("gpt_neox", "starcoder2", "cohere2", "persimmon")  # feed-forward parts without a gate, other projections


def counted_pairs(num_tokens, how):
    """Pairs of a query and a key it sees, one by one."""
    pairs = slots = held = 0
    closed = how.num_closed(num_tokens)
    for chunk in range(closed + 1):
        is_last = chunk == closed
        size = num_tokens - closed * how.chunk_size if is_last else how.chunk_size + how.chunk_size // how.ratio
        for slot in range(size):
            pairs += held + slot + 1
            slots += 1
        held += 0 if is_last else how.chunk_size // how.ratio
    return pairs, slots


@pytest.mark.parametrize("how", [FULL_ATTENTION, Compression(2, 8), Compression(4, 8)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 40])
def test_reading_costs_what_counting_one_by_one_gives(how, num_tokens):
    pairs, slots = counted_pairs(num_tokens, how)
    expected = TINY.attention_flops(pairs) + TINY.token_flops(slots) + TINY.head_flops(1)
    assert prefill_flops(TINY, num_tokens, how) == expected


def test_operations_of_weights_and_attention_are_those_of_their_products():
    per_layer = 8 * (4 * 2) * 2 + 8 * (2 * 2) * 2 + 3 * 8 * 16
    assert TINY.layer_weights == per_layer
    assert TINY.token_flops(5) == 2 * 5 * 2 * per_layer
    assert TINY.attention_flops(7) == 2 * (2 * 7 * 2 + 2 * 7 * 2) * 4
    assert TINY.cache_bytes(3, 4) == 3 * 2 * 2 * 2 * 2 * 4


def test_entries_and_bytes_are_those_of_a_real_cache():
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4), num_sinks=3))
    shape = ModelShape.of(model.config, {})
    for length in (16, 17, 40, 65):
        cache = model.compress(random_ids(length), ratio=4)
        how = Compression(4, 16, 3)
        assert how.entries(length) == cache.cache_length
        assert shape.cache_bytes(how.entries(length), 4) == cache.cache_bytes


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_layers_with_a_window_hold_what_is_counted(family):
    model = with_beacons(family, BeaconConfig(chunk_size=16, ratios=(2, 4), num_sinks=3))
    windows, sizes = model._beacon.site.windows, SIZES | FAMILIES[family][1]
    heads = {"num_heads": 4, "num_kv_heads": sizes["num_key_value_heads"], "head_dim": model.config.head_dim}
    shape = dataclasses.replace(
        TINY, num_layers=3, **heads, num_windowed=len(windows), window=next(iter(windows.values()))
    )
    for length in (1, 16, 17, 40, 65, 120, 200):
        cache = model.compress(random_ids(length), ratio=4)
        assert cache_bytes(shape, length, Compression(4, 16, 3), 4) == cache.cache_bytes
        with model.beacon_disabled():
            full = model(random_ids(length), use_cache=True).past_key_values
        assert cache_bytes(shape, length, FULL_ATTENTION, 4) == base_cache_bytes(full) == cache.uncompressed_bytes


@pytest.mark.parametrize(("rows", "held", "step"), [(1, 0, 1), (9, 0, 1), (9, 4, 1), (5, 30, 1), (6, 3, 4), (1, 8, 2)])
def test_within_a_window_pairs_are_those_that_counting_one_by_one_gives(rows, held, step):
    for window in (1, 2, 7, 8, 9, 12, 13, 31, 100):
        seen = [min(window, held + step * (row + 1)) for row in range(rows)]
        assert Run(rows, held, step).pairs(window) == sum(seen)


@pytest.mark.parametrize(
    "how", [FULL_ATTENTION, Compression(2, 8), Compression(4, 8, 3), Compression(8, 8, 1, "append")]
)
def test_pairs_of_a_prefill_are_those_of_its_passes(how):
    for num_tokens in (1, 8, 9, 17, 40, 41, 200):
        closed = how.num_closed(num_tokens)
        tail = Run(num_tokens - closed * how.chunk_size, how.held_before(closed))
        runs = [*(run for each in how.closings(0, num_tokens) for run in each.runs), tail]
        for window in (None, 1, 2, 5, 9, 12, 13, 20, 64, 1000):
            assert how.prefill_pairs(num_tokens, window) == sum(run.pairs(window) for run in runs)


def test_reading_and_writing_within_a_window_cost_less_by_what_is_beyond_it():
    windowed, how = dataclasses.replace(TINY, num_windowed=2, window=6), Compression(4, 8)
    beyond = sum(max(0, entries - 6) for entries in range(1, 21))
    per_pair = TINY.attention_flops(1)
    full = prefill_flops(TINY, 20, FULL_ATTENTION)
    assert full - prefill_flops(windowed, 20, FULL_ATTENTION) == beyond * per_pair
    closed = [held + slot + 1 for held in (0, 2) for slot in range(10)] + [4 + slot + 1 for slot in range(4)]
    assert prefill_flops(TINY, 20, how) - prefill_flops(windowed, 20, how) == per_pair * sum(
        max(0, entries - 6) for entries in closed
    )
    written = [how.entries(length) for length in (21, 22, 23)]
    assert decode_flops(TINY, 20, 3, how) - decode_flops(windowed, 20, 3, how) == per_pair * sum(
        max(0, entries - 6) for entries in written
    )
    half = dataclasses.replace(windowed, num_windowed=1)
    held_twice = memory_bytes(half, 200, FULL_ATTENTION, 2) - cache_bytes(half, 200, FULL_ATTENTION, 2)
    assert held_twice == memory_bytes(TINY, 200, FULL_ATTENTION, 2) - cache_bytes(TINY, 200, FULL_ATTENTION, 2)
    assert full - prefill_flops(half, 20, FULL_ATTENTION) == beyond * per_pair // 2
    assert memory_bytes(windowed, 200, how, 2) < memory_bytes(half, 200, how, 2) < memory_bytes(TINY, 200, how, 2)


LOCAL = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=3, local_tokens=10, placement="append", anchored=True)


@pytest.mark.parametrize("local_tokens", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("ratio", [2, 8])
def test_an_adapter_s_local_tokens_count_as_they_are_held(ratio, local_tokens):
    config = dataclasses.replace(LOCAL, local_tokens=local_tokens)
    how = Compression.of(config, ratio)
    for length in range(1, 150):
        assert how.entries(length) == entries_held(config, length, ratio)
        assert how.num_closed(length) == chunks_closed(length, 16, local_tokens)
    full = Compression.of(config, None)
    assert (full.entries(149), full.num_closed(149)) == (149, 0)


def test_a_tail_of_local_tokens_is_counted_in_the_bytes_of_a_step():
    config = BeaconConfig(num_sinks=4, local_tokens=100)
    how, shape = Compression.of(config, 8), SHAPES["smollm2-135m"]
    assert how.entries(2049) == 4 + 128 + 1025 == 1157
    without = decode_bytes(shape, 2049, Compression.of(BeaconConfig(num_sinks=4), 8), 2)
    assert decode_bytes(shape, 2049, how, 2) - without == shape.cache_bytes(1157 - 261, 2)


@pytest.mark.parametrize("length", [26, 27, 43, 58, 59, 75])
def test_operations_and_entries_with_local_tokens_are_those_of_a_real_model(length):
    model, passes = with_beacons("llama", LOCAL, attention="sdpa"), []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: passes.append(args[0].shape[1]))
    cache = model.compress(random_ids(length), ratio=4)
    how = Compression.of(LOCAL, 4)
    closings = [each.rows for each in how.closings(0, length)]
    assert sum(passes) == sum(closings) + length - 16 * len(closings) == how.prefill_rows(length)
    assert how.entries(length) == cache.cache_length
    passes.clear()
    model.compress(random_ids(1), cache=cache)
    written = [*how.resumed_closings(length, length + 1), *how.tails_read_again(length, length + 1)]
    assert sum(passes) == sum(each.rows for each in written) + 1
    assert bool(written) == (length in (26, 58))
    assert how.entries(length + 1) == cache.cache_length


def test_weights_are_those_of_real_models():
    model = tiny("llama")
    shape = ModelShape.of(model.config, {})
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.num_weights == sum(parameter.numel() for parameter in model.parameters()) - norms
    assert ModelShape.of(LlamaConfig(**SIZES), {}).head_dim == SIZES["head_dim"]
    beacons = beacon_tensors(with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4))))
    assert shape.beacon_weights == sum(tensor.numel() for tensor in beacons.values())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("llama-2-7b", 6.738),
        ("llama-3-8b", 8.03),
        ("qwen2-7b", 7.615),
        ("qwen3-30b-a3b", 30.53),
        ("gemma-3-1b", 1.0),  # with 4B those of the technical report, table 1: 302M and 675M are embeddings
        ("gemma-3-4b", 3.884),
    ],
)
def test_known_shapes_have_as_many_weights_as_the_models(name, billions):
    assert SHAPES[name].num_weights / 1e9 == pytest.approx(billions, rel=0.002)


# With causal attention: a kernel that computes all pairs, also those that are masked, would give 3.4 and 1.6 for Qwen2-7B.
@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("smollm2-135m", 8192, 1.58),
        ("smollm2-135m", 16384, 2.19),
        ("smollm2-135m", 32768, 3.09),
        ("qwen2-7b", 32768, 1.23),
        ("qwen2-7b", 131072, 2.09),
    ],
)
def test_speedups_of_reading_on_paper(name, tokens, expected):
    how = Compression(8, 1024 if name == "smollm2-135m" else 2048)
    speedup = prefill_flops(SHAPES[name], tokens, FULL_ATTENTION) / prefill_flops(SHAPES[name], tokens, how)
    assert speedup == pytest.approx(expected, abs=0.01)


def test_a_text_of_whole_chunks_pays_for_its_last_one_when_writing_begins():
    shape, how = SHAPES["smollm2-135m"], Compression(8)
    assert end_to_end_speedup(shape, 8192, 64, how) < end_to_end_speedup(shape, 8193, 64, how) - 0.1


@pytest.mark.parametrize("num_new", [0, 1, 5, 8, 30])
@pytest.mark.parametrize(
    "how",
    [
        Compression(2, 4),
        Compression(2, 8),
        Compression(4, 8),
        Compression(4, 8, 2),
        Compression(2, 8, placement="append"),
        Compression(4, 8, placement="append", anchored=True),
        Compression(2, 4, local_tokens=3),
        Compression(4, 8, 2, "append", anchored=True, local_tokens=11),
    ],
    ids=str,
)
def test_the_break_even_lies_behind_the_last_text_that_loses(how, num_new):
    losing = [tokens for tokens in range(1, 600) if end_to_end_speedup(TINY, tokens, num_new, how) <= 1]
    assert losing[-1] < 500
    assert break_even(TINY, how, num_new=num_new, limit=2000) == losing[-1] + 1


def test_beacons_that_never_pay_have_no_break_even():
    assert break_even(SHAPES["qwen2-7b"], Compression(2), limit=4096) is None
    assert break_even(TINY, FULL_ATTENTION, limit=4096) is None


def test_writing_costs_its_entries_and_the_chunks_that_it_closes():
    how = Compression(4, 8)
    without = decode_flops(TINY, 9, 6, how)
    assert without == 6 * (TINY.token_flops(1) + TINY.head_flops(1)) + TINY.attention_flops(sum(range(2 + 2, 2 + 8)))
    closing = decode_flops(TINY, 9, 9, how) - decode_flops(TINY, 9, 7, how)
    one_pass = TINY.token_flops(10) + TINY.attention_flops(10 * 2 + 55)
    entries = [how.entries(17), how.entries(18)]
    assert closing == 2 * (TINY.token_flops(1) + TINY.head_flops(1)) + TINY.attention_flops(sum(entries)) + one_pass


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("ratio", [2, 4])
def test_writing_closes_a_chunk_by_what_is_missing_of_it(ratio, anchored):
    how = Compression(ratio, 8, 1, "append", anchored)
    beacons, held = 8 // ratio, 1 + 8 // ratio
    anchors = [held + (unit + 1) * ratio for unit in range(beacons)] if anchored else []
    pairs = sum(anchors) + sum(held + 8 + beacon + 1 for beacon in range(beacons))
    anew, missing = (dataclasses.replace(how, placement=placement) for placement in ("interleave", "append"))
    saved = decode_flops(TINY, 9, 9, anew) - decode_flops(TINY, 9, 9, missing)
    slots = 8 + beacons
    whole = TINY.token_flops(slots) + TINY.attention_flops(slots * held + slots * (slots + 1) // 2)
    assert whole - saved == TINY.token_flops(len(anchors) + beacons) + TINY.attention_flops(pairs)
    assert prefill_flops(TINY, 20, anew) == prefill_flops(TINY, 20, missing)


def test_the_rows_that_are_counted_are_those_that_are_computed():
    settings = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), anchored=True, placement="append", num_sinks=2)
    model, rows = with_beacons("llama", settings, attention="sdpa"), []
    cache = model.compress(random_ids(48), ratio=4)
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: rows.append(args[0].shape[1]))
    model.compress(random_ids(1), cache=cache)
    counted = list(Compression.of(settings, 4).resumed_closings(48, 49))
    assert rows == [*(each.rows for each in counted), 1]
    assert [each.held for each in counted] == [2 + 2 * 4]


def test_writing_reads_all_weights_and_the_cache():
    assert decode_bytes(TINY, 20, FULL_ATTENTION, 2) == (TINY.num_weights - 80) * 2 + TINY.cache_bytes(20, 2)


def test_writing_to_a_batch_reads_the_weights_once():
    how = Compression(4, 8)
    weights = 2 * (2 * (8 * 4 * 2 * 2 + 8 * 2 * 2 * 2 + 3 * 8 * 16) + 10 * 8)
    entries = 2 * 2 + 4  # two chunks closed, four tokens behind them
    assert decode_bytes(TINY, 20, how, 2, batch_size=3) == weights + 3 * entries * 2 * 2 * (2 * 2) * 2


def test_memory_is_weights_adapter_activations_and_the_cache_at_its_largest():
    how, adapter = Compression(4, 8), 2 * 8 * (8 + 4 + 4) + 8
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16) + 2 * 10 * 8
    entry, slot = 3 * 2 * (2 * 2), 3 * 16 + 4 * 8  # of the two layers one is held twice
    assert memory_bytes(TINY, 20, FULL_ATTENTION, 4) == 4 * (weights + 20 * slot + 20 * entry)
    assert memory_bytes(TINY, 20, FULL_ATTENTION, 4, num_new=5) == 4 * (weights + 20 * slot + 25 * entry)
    closing = 20 * slot + (2 + 10) * entry  # the second chunk is read behind the first one's beacons, in one pass
    assert memory_bytes(TINY, 20, how, 4) == 4 * (weights + adapter + closing)
    assert memory_bytes(TINY, 20, how, 4, batch_size=3) == 4 * (weights + adapter + 3 * closing)
    assert memory_bytes(TINY, 20, how, 4, num_new=5) == 4 * (weights + adapter + closing + 2 * entry)
    assert memory_bytes(TINY, 20, how, 4, batch_size=500) == 4 * (weights + adapter + 500 * (closing - 10 * slot))
    assert memory_bytes(TINY, 7, how, 4, num_new=1) == 4 * (weights + adapter + 7 * slot + 8 * entry)
    assert memory_bytes(TINY, 7, how, 4, num_new=2) == 4 * (weights + adapter + 10 * slot + 10 * entry)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("ratio", [None, 8, 32])
def test_the_longest_text_fits_a_gpu_and_one_token_more_does_not(ratio, batch_size):
    shape = dataclasses.replace(SHAPES["llama-3-8b"], max_positions=None)
    how, room = Compression(ratio), 24 * 2**30
    tokens, stops = longest_text(shape, how, 2, gpu_bytes=room, batch_size=batch_size, num_new=64)
    assert stops == "memory"
    fits, exceeds = (
        memory_bytes(shape, length, how, 2, batch_size=batch_size, num_new=64) for length in (tokens, tokens + 1)
    )
    assert fits <= room < exceeds


@pytest.mark.parametrize("local_tokens", [0, 5, 20])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_the_longest_text_in_the_positions_is_the_longest_that_is_read(ratio, sinks, local_tokens):
    config = BeaconConfig(16, (2, 4, 8), num_sinks=sinks, local_tokens=local_tokens)
    planner, shape = TextPlanner(config, as_policy(config, ratio), 64), dataclasses.replace(TINY, max_positions=64)
    tokens, stops = longest_text(shape, Compression.of(config, ratio), 2)
    assert stops == "positions"
    planner.plan(Row(16), tokens)
    for longer in range(tokens + 1, tokens + 100):
        with pytest.raises(CapacityError):
            planner.plan(Row(16), longer)


def is_read_and_written(planner, num_tokens, num_new):
    """Whether a text can be read in one go, and then token by token."""
    row = Row(16)
    try:
        for count in (num_tokens, *[1] * num_new):
            reading = planner.plan(row, count)
            for layout in reading.closings:
                row = row.after_closing(layout)
            row = row.after_reading(reading.stop - row.tokens_seen)
    except CapacityError:
        return False
    return True


@pytest.mark.parametrize("num_new", [0, 1, 7, 40])
@pytest.mark.parametrize("local_tokens", [0, 5, 20])
@pytest.mark.parametrize("ratio", [2, 8])
def test_what_is_too_long_for_the_positions_is_what_the_plan_refuses_on_the_way(ratio, local_tokens, num_new):
    config = BeaconConfig(16, (2, 4, 8), num_sinks=3, local_tokens=local_tokens)
    planner, shape = TextPlanner(config, as_policy(config, ratio), 64), dataclasses.replace(TINY, max_positions=64)
    how = Compression.of(config, ratio)
    for length in range(1, 400):
        fits = obstacle(shape, length, how, 2, num_new=num_new) is None
        assert fits == is_read_and_written(planner, length, num_new), length
    longest = max(length for length in range(400) if not length or is_read_and_written(planner, length, num_new))
    assert longest_text(shape, how, 2, num_new=num_new)[0] == longest


def test_ratio_times_the_positions_can_be_read_but_for_one_raw_chunk():
    shape = SHAPES["smollm2-135m"]
    assert longest_text(shape, FULL_ATTENTION, 2) == (8192, "positions")
    assert longest_text(shape, FULL_ATTENTION, 2, num_new=64) == (8128, "positions")
    # 56 chunks closed leave 7,168 entries, and 1,024 tokens behind them fill the positions; closing that chunk would exceed them.
    assert longest_text(shape, Compression(8), 2) == (57 * 1024, "positions")


def test_positions_and_memory_both_limit():
    shape, how = SHAPES["llama-3-8b"], Compression(8)
    assert longest_text(shape, how, 2, gpu_bytes=2**30) == (0, "memory")
    assert longest_text(shape, how, 2, gpu_bytes=1000 * 2**30)[1] == "positions"
    assert longest_text(TINY, how, 2, limit=5000) == (5000, None)
    assert obstacle(shape, 8192, how, 2) is None
    assert obstacle(shape, 8192, how, 2, gpu_bytes=2**30) == "memory"
    assert obstacle(shape, 8193, FULL_ATTENTION, 2, gpu_bytes=2**30) == "positions"


@pytest.mark.parametrize(("ratio", "chunk"), [(3, 1024), (1, 1024), (2048, 1024)])
def test_a_ratio_that_does_not_divide_the_chunk_is_refused(ratio, chunk):
    with pytest.raises(ConfigError, match=r"chunk_size \(1024\) must be divisible by ratio"):
        Compression(ratio, chunk)


# --- shapes of models ------------------------------------------------------------------------------------------------


def saved_config(folder, model_type, **settings):
    config = CONFIG_MAPPING[model_type](**settings)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", [*TESTED, *WITH_EXPERTS, *OTHERWISE])
def test_a_config_alone_gives_the_shape_of_the_model(tmp_path, family):
    model_type, own = FAMILIES[family] if family in FAMILIES else (family, FURTHER[family])
    shape = read_shape(saved_config(tmp_path, model_type, **SIZES, **own))
    model = tiny(family)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (shape.num_weights, shape.max_positions) == (matrices, 512)
    windows = {
        "mistral": (3, 24),
        "mixtral": (3, 24),
        "starcoder2": (3, 24),
        "gemma3_text": (2, 20),
        "gpt_oss": (2, 20),
    }
    windows |= {"afmoe": (2, 20), "cohere2": (2, 20), "qwen3_moe": (3, 24)}
    assert (shape.num_windowed, shape.window) == windows.get(family, (0, None))


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_of_a_known_shape_is_of_that_shape(tmp_path, name):
    known_config(name).save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == dataclasses.replace(SHAPES[name], max_positions=MANY_POSITIONS)


def test_matrices_outside_the_layers_are_refused(tmp_path, monkeypatch):
    name = saved_config(tmp_path, "llama", **SIZES)
    monkeypatch.setattr(shapes, "_weights_of_layers", lambda layers: (1000, 0))
    with pytest.raises(
        UnsupportedModelError, match=r"29,248 weights in matrices; its layers, embeddings and head, .* 7,208"
    ):
        read_shape(name)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_whose_share_is_not_told_are_refused(family):
    model = with_beacons(family, BeaconConfig(chunk_size=16, ratios=(2, 4)))
    assert shape_of(model, model._beacon.site).num_experts == NUM_EXPERTS
    vars(model.config)["num_experts_per_tok"] = None
    with pytest.raises(UnsupportedError, match="does not say how many of its experts a token takes"):
        shape_of(model, model._beacon.site)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", *WITH_EXPERTS, *OTHERWISE])
def test_operations_are_those_that_are_computed(family):
    num_tokens, few = 24, {"num_experts_per_tok": 1} if family in WITH_EXPERTS else {}
    model = tiny(family, **few)
    model.set_experts_implementation("eager")  # grouped products are not counted by torch
    shape = shape_of(model, find_decoder(model, ("q", "k", "v")))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_ids(num_tokens), logits_to_keep=1, use_cache=False)
    pairs = shape.attention_flops(num_tokens**2, num_tokens**2)  # eager attention computes those that are masked, too
    expected = shape.token_flops(num_tokens) + shape.head_flops(1) + pairs
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)  # rotations are a product here as well


def test_sizes_that_a_config_does_not_tell_are_refused(monkeypatch):
    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4)))
    own = {name: value for name, value in vars(model.config).items() if name != "intermediate_size"}
    monkeypatch.setattr(model.config, "get_text_config", lambda **_: SimpleNamespace(**own, model_type="llama"))
    with pytest.raises(UnsupportedError, match=r"sizes of llama are not told by its config \(.*intermediate_size"):
        shape_of(model, model._beacon.site)


def test_texts_of_a_batch_read_experts_of_their_own():
    shape = dataclasses.replace(TINY, shared_weights=1000, expert_weights=800, num_experts=8, experts_per_token=2)
    assert [shape.weights_for(count) for count in (1, 2, 4, 5)] == [1200, 1400, 1800, 1800]
    assert shape.token_flops(3) == 2 * 3 * 1200
    assert shape.num_weights == 1800 + 2 * 80
    read = [decode_bytes(shape, 20, FULL_ATTENTION, 2, batch_size=count) for count in (1, 2)]
    assert read[1] - read[0] == 2 * 200 + TINY.cache_bytes(20, 2)


def test_longrope_counts_with_its_original_positions(tmp_path):
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    rope["original_max_position_embeddings"] = 64
    name = saved_config(tmp_path, "phi3", **SIZES, rope_parameters=rope, original_max_position_embeddings=64)
    assert read_shape(name).max_positions == 64


def test_the_default_model_is_known_without_a_config():
    assert read_shape("default") == SHAPES["smollm2-135m"] == ModelShape.of(_default_config(), {})


@pytest.mark.parametrize(
    ("model_type", "settings", "error", "message"),
    [
        (
            "gemma4_text",
            {**SIZES, **FURTHER["gemma4_text"]},
            UnsupportedError,
            "layers that differ in their heads",
        ),
        ("gemma3n_text", {**SIZES, **FURTHER["gemma3n_text"]}, UnsupportedError, "layers that share keys and values"),
        ("deepseek_v3", {**SIZES, **FURTHER["deepseek_v3"]}, UnsupportedError, "operations of latent attention"),
        ("qwen3_next", {**SIZES, **FURTHER["qwen3_next"]}, UnsupportedError, "operations of recurrent layers"),
        ("mamba", {}, UnsupportedModelError, "MambaForCausalLM cannot carry beacons"),
        ("t5", {}, BaseModelError, "cannot be read as a causal language model's: Unrecognized configuration class"),
    ],
)
def test_a_model_that_is_not_counted_is_refused(tmp_path, model_type, settings, error, message):
    with pytest.raises(error, match=message):
        read_shape(saved_config(tmp_path, model_type, **settings))


# --- the command -----------------------------------------------------------------------------------------------------


def plan(*args):
    return CliRunner().invoke(app, ["bench", "plan", *args])


def test_the_plan_prints_operations_bytes_break_even_and_what_fits():
    args = ["--shape", "qwen2-7b", "--lengths", "131072", "--ratios", "8", "--chunk-size", "2048", "--gpu-gib", "24"]
    result = plan(*args)
    assert result.exit_code == 0, result.output
    head, full, beacons, blank, full_limit, limit, fits = result.stdout.splitlines()
    assert head.split("  ")[-1] == "too long for"
    assert full.split()[:6] == ["131,072", "full", "5,158.66", "1.00x", "4.27", "1.00x"]
    assert full.split()[6:] == ["20.17", "GiB", "1.00x", "7.00", "GiB", "1.0x", "38.81", "GiB", "positions"]
    assert beacons.split()[:2] == ["131,072", "8"]
    assert beacons.split()[-4:] == ["7.2x", "16.97", "GiB", "-"]
    assert blank == ""
    assert re.fullmatch(r"full attention: up to [\d,]+ tokens \(positions\)", full_limit)
    pattern = r"ratio 8: fewer operations to read from [\d,]+ tokens on, in all from [\d,]+ tokens on, up to [\d,]+ tokens \(\w+\)"
    assert re.fullmatch(pattern, limit)
    assert fits == "131,072 tokens: fits with ratio 8"
    values = json.loads(plan(*args, "--json").stdout)
    assert [row["ratio"] for row in values["rows"]] == [None, 8]
    assert values["rows"][1]["speedup"] == pytest.approx(2.08, abs=0.02)


def test_the_plan_of_a_batch_is_that_of_its_texts_but_for_the_weights():
    args = ("--lengths", "2500", "--ratios", "4", "--json")
    one, four = (json.loads(plan(*args, "--batch-size", size).stdout)["rows"][1] for size in ("1", "4"))
    for name in ("prefill_flops", "decode_flops", "flops", "cache_bytes"):
        assert four[name] == 4 * one[name], name
    assert (four["speedup"], four["cache_factor"]) == (one["speedup"], one["cache_factor"])
    assert four["decode_bytes"] - one["decode_bytes"] == 3 * one["cache_bytes"]
    assert one["peak_bytes"] < four["peak_bytes"] < 4 * one["peak_bytes"]


def test_the_plan_counts_sinks_and_local_tokens():
    args = ("--lengths", "2100", "--ratios", "8", "--json")
    kinds = ((), ("--sinks", "0", "--local-tokens", "0"), ("--placement", "interleave"))
    own, bare, papers = (json.loads(plan(*args, *more).stdout) for more in kinds)
    known = [(values["num_sinks"], values["local_tokens"]) for values in (own, bare, papers)]
    assert known == [(4, 128), (0, 0), (0, 0)]
    entries = [values["rows"][1]["cache_bytes"] / values["rows"][0]["cache_bytes"] * 2100 for values in (own, bare)]
    assert entries == pytest.approx([4 + 128 + 1076, 2 * 128 + 52])  # one chunk less is closed


def test_the_plan_of_a_model_of_ones_own_needs_its_config_only(tmp_path):
    name = saved_config(tmp_path, "mistral", **SIZES, sliding_window=24)
    args = ("--model", name, "--lengths", "400,4000", "--ratios", "2,8", "--chunk-size", "64", "--new-tokens", "0")
    args += ("--sinks", "0", "--local-tokens", "0")
    lines = plan(*args).stdout.splitlines()
    assert "full attention: up to 512 tokens (positions)" in lines
    # 56 chunks closed leave 448 entries, and 64 tokens behind them fill the positions.
    assert lines[-3].endswith(f", up to {57 * 64:,} tokens (positions)")
    assert lines[-2:] == [
        "400 tokens: fits with full attention, ratio 2, ratio 8",
        "4,000 tokens: fits with none of these",
    ]
    values = json.loads(plan(*args, "--json").stdout)
    assert (values["shape"]["num_windowed"], values["shape"]["window"]) == (3, 24)
    assert (values["model"], values["shape"]["hidden_size"], values["shape"]["max_positions"]) == (name, 32, 512)
    assert [row["too_long_for"] for row in values["rows"]] == [None] * 3 + ["positions"] * 3


def test_without_limits_the_plan_says_so(monkeypatch):
    monkeypatch.setitem(SHAPES, "endless", dataclasses.replace(TINY, max_positions=None))
    out = plan("--shape", "endless", "--lengths", "4096", "--ratios", "32").stdout
    assert "full attention: up to 16,777,216 tokens at least" in out


def test_the_longest_texts_in_the_readme_are_those_that_the_default_adapter_reads():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    config = load_adapter_config(default_adapter_folder())
    for ratio, length in ((2, 14_400), (32, 229_340)):
        assert f"{length:,} " in readme
        planner = TextPlanner(config, as_policy(config, ratio), 8192)
        planner.plan(Row(config.chunk_size), length + 64)
        with pytest.raises(CapacityError):
            planner.plan(Row(config.chunk_size), length + 65)
        assert f"up to {length:,} tokens (positions)" in plan("--ratios", str(ratio)).stdout


@pytest.mark.parametrize(
    ("shape", "placement", "to_read", "in_all"),
    [
        ("smollm2-135m", (), 1622, 2177),
        ("smollm2-135m", ("--placement", "interleave"), 2140, 4097),
        ("qwen2-7b", (), 10520, 11393),
        ("qwen2-7b", ("--placement", "interleave"), 10515, 15361),
    ],
)
def test_the_break_evens_in_the_docs_are_those_that_are_computed(shape, placement, to_read, in_all):
    line = f"ratio 8: fewer operations to read from {to_read:,} tokens on, in all from {in_all:,} tokens on"
    args = ("--shape", shape, "--ratios", "8", "--chunk-size", "1024")
    assert line in plan(*args, *placement).stdout
    docs = (Path(__file__).parents[1] / "docs/performance.md").read_text(encoding="utf-8")
    assert f"beacon bench plan {' '.join(args)}" in docs
    assert " ".join(placement) in docs
    assert f"{to_read:,} | {in_all:,} |" in docs


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--shape", "gpt-5"),
            f"--shape must be one of {', '.join(SHAPES)}; got 'gpt-5'.",
        ),
        (("--shape", "qwen2-7b", "--model", "default"), "--shape (qwen2-7b) and --model (default) name two models."),
        (("--model", "no/such/folder"), "The config of 'no/such/folder' cannot be read"),
        (("--model", ""), "The config of '' cannot be read"),
        (("--model", "{tmp_path}"), "Unrecognized model"),
        (
            ("--model", "{adapter}"),
            "holds an adapter, not a base model. Name the model that it was made for: owner/model.",
        ),
        (("--gpu-gib", "inf"), "--gpu-gib must be a number of GiB such as 24; got inf."),
        (("--lengths", "0,5"), "--lengths must be ints of at least 1, such as 8192 or 2048,4096; got '0,5'."),
        (("--ratios", "two"), "--ratios must be ints such as 2,8,32; got 'two'."),
        (("--ratios", "3"), "chunk_size (1024) must be divisible by ratio (3), which is 2 or more."),
    ],
)
def test_bad_options_of_the_plan_are_refused_in_one_line(tmp_path, args, message):
    (tmp_path / "adapter").mkdir()
    settings = BeaconConfig(base_model="owner/model").to_dict()
    (tmp_path / "adapter/beacon_config.json").write_text(json.dumps(settings))
    result = plan(*(arg.format(tmp_path=tmp_path, adapter=tmp_path / "adapter") for arg in args))
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        *(
            (option, "-1")
            for option in ("--batch-size", "--chunk-size", "--element-bytes", "--new-tokens", "--gpu-gib")
        ),
        ("--gpu-gib", "nan"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(args):
    assert plan(*args).exit_code == 2
