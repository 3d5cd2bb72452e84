import json
import re

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from activation_beacon.bench.cost import (
    FULL_ATTENTION,
    SHAPES,
    Compression,
    ModelShape,
    break_even,
    decode_bytes,
    decode_flops,
    end_to_end_speedup,
    longest_text,
    memory_bytes,
    prefill_flops,
)
from activation_beacon.cli import app
from activation_beacon.errors import ConfigError
from families import SIZES, beacon_tensors, random_ids, tiny, with_beacons

TINY = ModelShape(
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=16, vocab_size=10
)


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
    from activation_beacon import BeaconConfig

    model = with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4), num_sinks=3))
    shape = ModelShape.of(model.config)
    for length in (16, 17, 40, 65):
        cache = model.compress(random_ids(length), ratio=4)
        how = Compression(4, 16, 3)
        assert how.entries(length) == cache.cache_length
        assert shape.cache_bytes(how.entries(length), 4) == cache.cache_bytes


def test_weights_are_those_of_real_models():
    model = tiny("llama")
    shape = ModelShape.of(model.config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.num_weights == sum(parameter.numel() for parameter in model.parameters()) - norms
    assert ModelShape.of(LlamaConfig(**SIZES)).head_dim == SIZES["head_dim"]
    from activation_beacon import BeaconConfig

    beacons = beacon_tensors(with_beacons("llama", BeaconConfig(chunk_size=16, ratios=(2, 4))))
    assert shape.beacon_weights == sum(tensor.numel() for tensor in beacons.values())


@pytest.mark.parametrize(
    ("name", "billions"), [("smollm2-135m", 0.1345), ("llama-2-7b", 6.738), ("llama-3-8b", 8.03), ("qwen2-7b", 7.615)]
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


def test_beacons_pay_from_the_break_even_on():
    how = Compression(8)
    tokens = break_even(SHAPES["smollm2-135m"], how)
    assert end_to_end_speedup(SHAPES["smollm2-135m"], tokens, 0, how) > 1
    assert end_to_end_speedup(SHAPES["smollm2-135m"], tokens - how.chunk_size, 0, how) <= 1
    assert break_even(SHAPES["qwen2-7b"], Compression(2), limit=4096) is None


def test_writing_costs_its_entries_and_the_chunks_that_it_closes():
    how = Compression(4, 8)
    without = decode_flops(TINY, 9, 6, how)
    assert without == 6 * (TINY.token_flops(1) + TINY.head_flops(1)) + TINY.attention_flops(sum(range(2 + 2, 2 + 8)))
    closing = decode_flops(TINY, 9, 9, how) - decode_flops(TINY, 9, 7, how)
    one_pass = TINY.token_flops(10) + TINY.attention_flops(10 * 2 + 55)
    entries = [how.entries(17), how.entries(18)]
    assert closing == 2 * (TINY.token_flops(1) + TINY.head_flops(1)) + TINY.attention_flops(sum(entries)) + one_pass


def test_writing_reads_all_weights_and_the_cache():
    assert decode_bytes(TINY, 20, FULL_ATTENTION, 2) == (TINY.num_weights - 80) * 2 + TINY.cache_bytes(20, 2)


def test_the_longest_text_fits_and_one_token_more_does_not():
    shape, how, room = SHAPES["llama-3-8b"], Compression(8), 24 * 2**30
    tokens = longest_text(shape, how, room, 2)
    assert memory_bytes(shape, tokens, how, 2) <= room < memory_bytes(shape, tokens + how.chunk_size, how, 2)
    assert tokens > 4 * longest_text(shape, FULL_ATTENTION, room, 2)
    assert longest_text(shape, how, 2**30, 2) == 0


@pytest.mark.parametrize(("ratio", "chunk"), [(3, 1024), (1, 1024), (2048, 1024)])
def test_a_ratio_that_does_not_divide_the_chunk_is_refused(ratio, chunk):
    with pytest.raises(ConfigError, match=r"chunk_size \(1024\) must be divisible by ratio"):
        Compression(ratio, chunk)


def test_the_plan_prints_operations_cache_break_even_and_what_fits():
    args = ["bench", "plan", "--shape", "qwen2-7b", "--lengths", "131072", "--ratios", "8", "--chunk-size", "2048"]
    result = CliRunner().invoke(app, [*args, "--gpu-gib", "80"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["131,072", "full", "5,162.93", "1.00x", "7.00", "GiB", "1.0x"]
    assert lines[2].split()[:2] == ["131,072", "8"]
    assert lines[2].split()[-1] == "7.2x"
    assert re.fullmatch(r"full attention: up to [\d,]+ tokens in 80 GiB", lines[4])
    assert re.fullmatch(r"ratio 8: fewer operations from [\d,]+ tokens on, up to [\d,]+ tokens in 80 GiB", lines[5])
    values = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert [row["ratio"] for row in values["rows"]] == [None, 8]
    assert values["rows"][1]["speedup"] == pytest.approx(2.05, abs=0.02)


def test_an_unknown_shape_is_refused_with_the_known_ones():
    result = CliRunner().invoke(app, ["bench", "plan", "--shape", "gpt-5"])
    assert result.exit_code == 1
    assert "--shape must be one of smollm2-135m, llama-2-7b, llama-3-8b, qwen2-7b; got 'gpt-5'." in result.stderr
