"""Layers with a sliding window hold the entries that a token to come sees, and give what they would give with all of them."""

import functools

import pytest
import torch

from activation_beacon import BeaconCache, BeaconConfig
from activation_beacon.entries import BeaconLayer
from activation_beacon.errors import FileFormatError, MismatchError
from activation_beacon.files import read_context_file, write_context_file
from activation_beacon.layouts import entries_held, within
from activation_beacon.server.prefixes import opening, reusable_length
from families import PICTURE, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2)
APPENDED = BeaconConfig(
    chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2, placement="append", anchored=True, local_tokens=5
)
CASES = [
    ("mistral", "sdpa", CONFIG),
    ("mistral", "eager", APPENDED),
    ("gemma3_text", "sdpa", APPENDED),
    ("gemma3_text", "eager", CONFIG),
    ("gpt_oss", "eager", CONFIG),
    ("gemma4-small", "sdpa", APPENDED),
]
LENGTHS = (9 * CHUNK + 7, 5, 6 * CHUNK + 2)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].placement}")
def model(request):
    family, attention, config = request.param
    model = with_beacons(family, config, attention=attention)
    assert model._beacon.site.windows
    return model


def ids_of(length, seed=0, **options):
    return random_ids(length, seed, **options).clamp(max=PICTURE - 1)


def whole(cache):
    """An empty cache whose layers never drop anything."""
    for layer in cache.layers:
        layer.window = None
    return cache


def compressed(model, length, ratio=2, seed=0):
    """A context, and one of the same text that holds everything."""
    ids = ids_of(length, seed)
    return model.compress(ids, ratio=ratio), model.compress(ids, cache=whole(model.new_cache(ratio=ratio)))


def with_windows(model, cache):
    return [(cache.layers[index], window) for index, window in model._beacon.site.windows.items()]


def assert_holds_what_is_seen(model, cache):
    for layer, window in with_windows(model, cache):
        due = max(within(row.memory_length, window) + row.tail_length for row in cache.rows)
        assert (layer.entries()[0].shape[2], layer.get_seq_length()) == (due, cache.num_slots)


def assert_ends_alike(cache, everything, tolerance=2e-5):
    """What is held is the end of what would be held without windows, or of what another holds."""
    assert cache.rows == everything.rows
    for layer, other in zip(cache.layers, everything.layers, strict=True):
        if layer.has_entries:
            for held, all_of_it in zip(layer.entries(), other.entries(), strict=True):
                torch.testing.assert_close(
                    held, all_of_it[:, :, layer.dropped - other.dropped :], rtol=0, atol=tolerance
                )


def assert_reads_on_alike(model, cache, everything, count=2 * CHUNK + 3, seed=7):
    """Token by token, across chunks, and once more in one call."""
    new = ids_of(count, seed, batch=cache.batch_size)
    for token in new.T[:, :, None]:
        ours = model(token, past_key_values=cache).logits
        torch.testing.assert_close(ours, model(token, past_key_values=everything).logits, rtol=0, atol=1e-4)
    ours, due = (model(new, past_key_values=each).logits for each in (cache, everything))
    torch.testing.assert_close(ours, due, rtol=0, atol=1e-4)


@torch.no_grad()
def test_entries_beyond_the_window_are_dropped_and_nothing_comes_out_differently(model):
    cache, everything = compressed(model, LENGTHS[0])
    assert_holds_what_is_seen(model, cache)
    assert any(layer.dropped for layer, _ in with_windows(model, cache))
    assert cache.cache_bytes < everything.cache_bytes
    assert_ends_alike(cache, everything)
    assert_reads_on_alike(model, cache, everything)
    assert_holds_what_is_seen(model, cache)


@torch.no_grad()
def test_a_longer_text_takes_more_in_the_other_layers_alone(model):
    short, long = (model.compress(ids_of(length), ratio=2) for length in (20 * CHUNK + 5, 40 * CHUNK + 5))
    added = long.rows[0].memory_length - short.rows[0].memory_length
    for layer, other, site in zip(short.layers, long.layers, model._beacon.site.layers, strict=True):
        if layer.has_entries:
            grown = other.keys.shape[2] - layer.keys.shape[2]
            assert grown == (0 if site.window else added)
            storages = {tensor.untyped_storage().nbytes() for tensor in (other.keys, other.values)}
            assert storages == {other.keys.nbytes}  # nothing longer is kept alive


@torch.no_grad()
def test_rows_of_a_ragged_batch_are_what_they_are_alone(model):
    width = max(LENGTHS)
    ids, mask = torch.zeros((3, width), dtype=torch.long), torch.zeros((3, width), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, width - length :], mask[row, width - length :] = ids_of(length, row)[0], 1
    batch = model.compress(ids, attention_mask=mask, ratio=2)
    assert_holds_what_is_seen(model, batch)
    alone = [model.compress(ids_of(length, row), ratio=2) for row, length in enumerate(LENGTHS)]
    new = ids_of(2 * CHUNK + 3, 9, batch=3)  # rows close chunks at different steps
    for token in new.T[:, :, None]:
        logits = model(token, past_key_values=batch).logits
        due = [model(token[row, None], past_key_values=each).logits for row, each in enumerate(alone)]
        torch.testing.assert_close(logits, torch.cat(due), rtol=0, atol=1e-4)
    for row, each in enumerate(alone):
        taken = batch.row(row)
        assert_holds_what_is_seen(model, taken)
        assert_ends_alike(taken, each)
    stacked = BeaconCache.stack([batch.row(row) for row in (2, 0)])
    batch.batch_select_indices(torch.tensor([2, 0]))
    for one in (stacked, batch):
        assert_holds_what_is_seen(model, one)
        for row, each in enumerate((alone[2], alone[0])):
            assert_ends_alike(one.row(row), each)


@torch.no_grad()
def test_beams_that_swap_rows_keep_what_these_see(model):
    contexts = [model.compress(ids_of(length, row), ratio=2) for row, length in enumerate(LENGTHS)]
    batch = BeaconCache.stack(contexts)
    batch.reorder_cache(torch.tensor([1, 1, 2]))
    assert_holds_what_is_seen(model, batch)
    for row, each in enumerate((1, 1, 2)):
        assert_ends_alike(batch.row(row), contexts[each])


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_beacons_are_dropped_too(model, bits):
    cache, everything = (each.quantize(bits) for each in compressed(model, LENGTHS[0]))
    assert_reads_on_alike(model, cache, everything)
    assert_holds_what_is_seen(model, cache)
    assert cache.quantized_bits == bits
    assert cache.cache_bytes < everything.cache_bytes
    assert_ends_alike(cache, everything)


@torch.no_grad()
def test_tokens_are_taken_back_and_the_tail_is_left_out(model):
    cache, everything = compressed(model, LENGTHS[0])
    ids = ids_of(4, 5)
    before = [layer.dropped for layer in cache.layers]
    model(ids, past_key_values=cache)
    cache.crop(-4)
    assert [layer.dropped for layer in cache.layers] == before
    assert_ends_alike(cache, everything)
    one, other = cache.without_tail(), everything.without_tail()
    assert_holds_what_is_seen(model, one)
    assert_reads_on_alike(model, one, other)
    contexts = [model.compress(ids_of(length, row), ratio=2) for row, length in enumerate(LENGTHS)]
    batch = BeaconCache.stack(contexts)
    model(ids_of(4, 8, batch=3), past_key_values=batch)
    batch.take_back([4, 4, 3])
    assert_holds_what_is_seen(model, batch)
    assert_ends_alike(batch.row(0), contexts[0])


@torch.no_grad()
def test_auto_that_reads_anew_starts_from_nothing(model):
    ids = ids_of(12 * CHUNK + 4)
    limit = CONFIG.num_sinks + model.untouched_length + 6 * CHUNK // 2
    cache = model.compress(ids[:, : 6 * CHUNK + 6], ratio="auto", budget=limit)
    assert set(cache.ratios) == {2}
    model.compress(ids[:, 6 * CHUNK + 6 :], cache=cache)
    assert set(cache.ratios) == {4}
    assert_holds_what_is_seen(model, cache)
    assert_ends_alike(cache, model.compress(ids, cache=whole(model.new_cache(ratio=4))))


@torch.no_grad()
def test_a_context_is_cut_back_as_far_as_its_windows_hold_what_is_seen_there(model):
    ids, spared = ids_of(LENGTHS[0]), {}
    held = model.compress(ids, ratio=2)
    for shared in range(0, LENGTHS[0], 5):
        text = torch.cat((ids[:, :shared], ids_of(2 * CHUNK, 9)), dim=1)
        spared[shared] = length = reusable_length(held, text[0])
        if length:
            grown = model.compress(text[:, length:], cache=opening(held, length))
            assert_holds_what_is_seen(model, grown)
            assert_ends_alike(grown, model.compress(text, cache=whole(model.new_cache(ratio=2))))
    first_of_tail = LENGTHS[0] - held.tail_length
    assert all(length == (shared if shared >= first_of_tail else 0) for shared, length in spared.items())
    short = model.compress(ids[:, : 2 * CHUNK + 7], ratio=8)  # no window is full: nothing is gone
    assert reusable_length(short, torch.cat((ids[0, : CHUNK + 3], ids_of(2 * CHUNK, 9)[0]))) == CHUNK


@torch.no_grad()
def test_what_was_padding_in_a_batch_is_not_taken_for_what_a_row_holds(model):
    batch = BeaconCache.stack([model.compress(ids_of(length), ratio=2) for length in (12 * CHUNK, LENGTHS[0])])
    model(
        ids_of(CHUNK - 3, 4, batch=2), past_key_values=batch
    )  # one row closes a chunk: slots of the other become junk
    for row in (0, 1):
        single = batch.row(row)
        seen = single.rows[0].tokens_seen - single.tail_length
        text = torch.cat((single.token_ids[0, : seen - CHUNK], ids_of(2 * CHUNK, 9)[0]))
        assert reusable_length(single, text) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_padding_behind_texts_that_end_alike_is_not_held(family, batch):
    model = with_beacons(family, APPENDED, attention="sdpa")
    ids, more = ids_of(14, 3, batch=batch), ids_of(60, 4, batch=batch)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    padded, plain = model.new_cache(batch, ratio=2), model.new_cache(batch, ratio=2)
    model(ids, attention_mask=mask, past_key_values=padded)
    model(ids[:, :10], past_key_values=plain)
    assert {layer.get_seq_length() for layer in padded.layers} == {padded.num_slots} == {10}
    ours, due = (model(more, past_key_values=cache).logits for cache in (padded, plain))
    torch.testing.assert_close(ours, due, rtol=0, atol=1e-4)
    for count in (1, 3):
        padded.take_back([count] * batch)
        plain.crop(-count)
        assert {layer.get_seq_length() for layer in padded.layers} == {padded.num_slots}
        ours, due = (model(ids[:, :1], past_key_values=cache.fork()).logits for cache in (padded, plain))
        torch.testing.assert_close(ours, due, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_model_with_other_windows_is_refused():
    model = with_beacons("gemma3_text", CONFIG)
    wider = with_beacons("gemma3_text", CONFIG, sliding_window=60)
    context = model.compress(ids_of(LENGTHS[0]), ratio=2)
    assert context.base_fingerprint == wider.base_fingerprint
    with pytest.raises(
        MismatchError, match=r"made with sliding windows of \{0: 20, 2: 20\} .* the model has \{0: 60, 2: 60\}"
    ):
        wider(ids_of(3), past_key_values=context)
    with pytest.raises(MismatchError, match="made with sliding windows"):
        wider.generate(ids_of(3), context=context, max_new_tokens=2)


# --- what is saved ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bytes_uncompressed_are_those_of_the_base_s_own_cache(model):
    for length in (5, LENGTHS[0]):
        cache = model.compress(ids_of(length), ratio=2)
        with model.beacon_disabled():
            base = model(ids_of(length), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in base.layers if layer.keys is not None)
        assert cache.uncompressed_bytes == held
        entries = functools.partial(entries_held, cache.config, length, 2)
        assert model._beacon.site.features_held(entries) * 4 == cache.cache_bytes


# --- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_file_holds_what_the_context_holds(model, tmp_path):
    cache, everything = compressed(model, LENGTHS[0])
    for number, context in enumerate((cache, cache.quantize(8), BeaconCache.stack([cache, model.compress(ids_of(5))]))):
        path = tmp_path / f"{number}.beacon"
        context.save(path)
        for loaded in (BeaconCache.load(path), BeaconCache.load(path, model)):
            assert [(layer.dropped, layer.window) for layer in loaded.layers] == [
                (layer.dropped, layer.window) for layer in context.layers
            ]
            assert loaded.cache_bytes == context.cache_bytes
    loaded = BeaconCache.load(tmp_path / "0.beacon", model)
    assert_reads_on_alike(model, loaded, everything)


@torch.no_grad()
def test_a_file_that_names_no_windows_holds_all_and_is_read_on(model, tmp_path):
    cache, everything = compressed(model, LENGTHS[0])
    everything.save(tmp_path / "old.beacon")
    header, _ = read_context_file(tmp_path / "old.beacon")
    assert "windows" not in header
    old = BeaconCache.load(tmp_path / "old.beacon")
    stacked = BeaconCache.stack([old, cache])
    assert_ends_alike(stacked.row(0), everything)
    assert_ends_alike(stacked.row(1), everything)
    assert_reads_on_alike(model, stacked, BeaconCache.stack([everything, everything]))
    everything.quantize(8).save(tmp_path / "packed.beacon")
    packed = BeaconCache.load(tmp_path / "packed.beacon", model).row(0)
    assert packed.quantized_bits == 8
    assert all(layer.stored is not None for layer in packed.layers if layer.has_entries)
    assert_reads_on_alike(model, packed, everything.quantize(8))
    loaded = BeaconCache.load(tmp_path / "old.beacon", model)
    assert loaded.cache_bytes == everything.cache_bytes
    assert_reads_on_alike(model, loaded, everything)
    assert_holds_what_is_seen(model, loaded)


def cut_first(context):
    index = next(index for index, layer in enumerate(context.layers) if layer.window)
    layer = context.layers[index]
    context.layers[index] = layer.map(lambda tensor: tensor[:, :, 1:].contiguous())


def cut_whole_layer(context):
    index = next(index for index, layer in enumerate(context.layers) if layer.has_entries and not layer.window)
    context.layers[index] = context.layers[index].map(lambda tensor: tensor[:, :, 1:].contiguous())


def of_another_window(context):
    for layer in context.layers:
        layer.window = layer.window and layer.window - 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_first, r"a layer holds .* where \d+ entries a row are due"),
        (cut_whole_layer, r"a layer holds .* where \d+ entries a row are due"),
        (of_another_window, r"windows must be the model's \{0: 20, 2: 20\}; got \{0: 19, 2: 19\}"),
    ],
)
@torch.no_grad()
def test_files_of_other_windows_or_too_few_entries_are_refused(damage, reason, tmp_path):
    model = with_beacons("gemma3_text", CONFIG)
    context = model.compress(ids_of(LENGTHS[0]), ratio=2)
    damage(context)
    context.save(tmp_path / "a.beacon")
    with pytest.raises(FileFormatError, match=reason):
        BeaconCache.load(tmp_path / "a.beacon", model)


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        ([[0]], r"windows must be of layers and their numbers; got \[0\]"),
        ("20", "windows must be a list; got '20'"),
        ([[0, 0]], "windows must be an int of at least 1; got 0"),
        ([[0, "20"]], "windows must be an int of at least 1; got '20'"),
        ([[-1, 20]], r"a layer of windows must be an int within 0..10000; got -1"),
        ([[0, 20], [2, 1]], r"windows must be the model's"),
    ],
)
@torch.no_grad()
def test_windows_that_are_none_are_refused(windows, reason, tmp_path):
    model = with_beacons("gemma3_text", CONFIG)
    path = tmp_path / "a.beacon"
    model.compress(ids_of(LENGTHS[0]), ratio=2).save(path)
    header, tensors = read_context_file(path)
    write_context_file(path, {**header, "windows": windows}, tensors)
    with pytest.raises(FileFormatError, match=reason):
        BeaconCache.load(path, model)


# --- one layer --------------------------------------------------------------------------------------------------------


def layer_of(length, dropped=0, batch=2):
    slots = torch.arange(dropped, length, dtype=torch.float32)
    entries = slots.view(1, 1, -1, 1).expand(batch, 2, -1, 4)
    return BeaconLayer.of(entries.clone(), -entries, window=6, dropped=dropped)


@pytest.mark.parametrize(
    ("ends", "length", "most", "held", "dropped"),
    [
        ([10, 10], 10, None, [[4, 5, 6, 7, 8, 9]] * 2, 4),
        ([10, 10], 8, None, [[4, 5, 6, 7, 8, 9]] * 2, 2),  # two of padding before, less
        ([10, 10], 10, 3, [[7, 8, 9]] * 2, 7),
        ([10, 8], 10, None, [[4, 5, 6, 7, 8, 9], [4, 4, 4, 5, 6, 7]], 4),
        ([10, 8], 8, None, [[4, 5, 6, 7, 8, 9], [4, 4, 4, 5, 6, 7]], 2),
        ([9, 9], 9, 20, [[4, 5, 6, 7, 8]] * 2, 4),
    ],
)
def test_slots_are_taken_as_if_all_were_held(ends, length, most, held, dropped):
    taken = layer_of(10, 4).taken(ends, length, most=most)
    assert taken.keys[:, 0, :, 0].tolist() == held
    assert taken.values[:, 1, :, 3].tolist() == [[-slot for slot in row] for row in held]
    assert (taken.dropped, taken.get_seq_length(), taken.window) == (dropped, length, 6)


def test_layers_that_have_dropped_other_numbers_stack_aligned_at_the_right():
    stacked = BeaconLayer.stack([layer_of(10, 4, 1), layer_of(5, 2, 1)])
    assert stacked.keys[:, 0, :, 0].tolist() == [[4, 5, 6, 7, 8, 9], [0, 0, 0, 2, 3, 4]]
    assert (stacked.dropped, stacked.get_seq_length(), stacked.window) == (4, 10, 6)


def test_masks_are_sized_by_what_is_held():
    layer = layer_of(10, 4)
    assert layer.is_sliding
    assert layer.get_mask_sizes(3) == (9, 4)
    layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert (layer.get_mask_sizes(1), layer.get_seq_length()) == ((8, 4), 11)
    layer.truncate(10)
    assert (layer.get_mask_sizes(1), layer.keys.shape[2]) == ((7, 4), 6)
    assert not BeaconLayer().is_sliding
