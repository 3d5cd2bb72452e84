"""Layers that attend to keys and values of layers before them and keep none, and are given embeddings of ids (Gemma 3n and 4)."""

import copy

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconCache, BeaconConfig, attach, detach, forward, grouped
from activation_beacon.bench.cost import ModelShape
from activation_beacon.errors import FileFormatError, UnsupportedError, UnsupportedModelError
from activation_beacon.ragged import OwnEntries
from families import PICTURE, WITH_LENDERS, needs_onednn, tiny, with_beacons
from families import random_ids as any_ids

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8), num_sinks=2, anchored=True, placement="append")
LAST_KEPT, NUM_LAYERS = 2, 5
LENGTHS = (3 * CHUNK + 7, 5, 2 * CHUNK + 2)


def random_ids(*args, **options) -> torch.Tensor:
    """Ids of words: in the place of others there is to be a picture."""
    return any_ids(*args, **options).clamp(max=PICTURE - 1)


@pytest.fixture(params=WITH_LENDERS)
def model(request):
    return with_beacons(request.param, CONFIG, attention="sdpa")


def passes(model, read) -> list[int]:
    """How often a call comes to each layer."""
    counts = [0] * NUM_LAYERS

    def note(index):
        def count(*_):
            counts[index] += 1

        return count

    layers = model.get_decoder().layers
    handles = [layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers)]
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_only_layers_that_keep_something_have_beacon_weights(model):
    layers = {name.split(".")[1] for name, _ in model.beacon_parameters() if name != "embedding"}
    assert layers == {str(index) for index in range(LAST_KEPT + 1)}


@torch.no_grad()
@pytest.mark.parametrize("placement", ["append", "interleave"])
@pytest.mark.parametrize("family", WITH_LENDERS)
def test_a_pass_that_closes_a_chunk_ends_in_the_last_layer_that_keeps_something(family, placement, monkeypatch):
    config = BeaconConfig(chunk_size=CHUNK, ratios=(4,), placement=placement)
    model = with_beacons(family, config, attention="sdpa")
    ids = random_ids(3 * CHUNK + 7)
    assert passes(model, lambda: model.compress(ids)) == [2, 2, 2, 0, 0]  # three chunks, and the tail
    with monkeypatch.context() as patched:
        patched.setattr(grouped, "ROWS_TOGETHER", 0)
        assert passes(model, lambda: model.compress(ids)) == [4, 4, 4, 0, 0]
    context = model.compress(ids)
    handle = model.get_decoder().layers[LAST_KEPT].register_forward_hook(lambda *_: None)  # somebody waits for its end
    assert passes(model, lambda: model.compress(ids)) == [2] * NUM_LAYERS
    for layer, other in zip(context.layers, model.compress(ids).layers, strict=True):
        for (_, tensor), (_, same) in zip(layer.named_tensors(), other.named_tensors(), strict=True):
            torch.testing.assert_close(tensor, same, rtol=0, atol=1e-5)
    handle.remove()


@torch.no_grad()
def test_several_contexts_go_on_in_one_pass(model):
    contexts = [model.compress(random_ids(length, length), ratio=4) for length in LENGTHS]
    alone = [context.fork() for context in contexts]
    for tokens in random_ids(2 * CHUNK, 9, batch=len(LENGTHS)).T:
        found = model.read_next(contexts, tokens)
        for row, context in enumerate(alone):
            due = model(tokens[row, None, None], past_key_values=context).logits[0, -1]
            torch.testing.assert_close(found[row], due, rtol=0, atol=5e-5)
    last = model.get_decoder().layers[-1].self_attn
    assert passes(model, lambda: model.read_next(contexts, tokens)) == [1] * NUM_LAYERS
    assert last.beacon_lender in range(LAST_KEPT + 1)


@torch.no_grad()
def test_rows_of_a_batch_go_on_as_they_would_alone(model):
    texts = [random_ids(length, length)[0].tolist() for length in LENGTHS]
    batch, alone = model.compress(texts, ratio=4), [model.compress([text], ratio=4) for text in texts]
    again = BeaconCache.stack([batch.row(index) for index in range(len(texts))])
    for tokens in random_ids(CHUNK + 3, 9, batch=len(LENGTHS)).T:
        found, same = (model(tokens[:, None], past_key_values=cache).logits[:, -1] for cache in (batch, again))
        due = [model(tokens[row, None, None], past_key_values=cache).logits[0, -1] for row, cache in enumerate(alone)]
        torch.testing.assert_close(found, torch.stack(due), rtol=0, atol=5e-5)
        torch.testing.assert_close(same, found, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("products", ["torch", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("num_new", [2, 8, CHUNK + 4, 3 * CHUNK])
def test_where_one_row_of_logits_is_wanted_it_is_that_of_all(model, num_new, products):
    """The base drops all rows but the last before layers that keep nothing."""
    model.cpu_matmul = products
    context, ids = model.compress(random_ids(3 * CHUNK + 3), ratio=4), random_ids(num_new, 9)
    every = model(ids, past_key_values=context.fork()).logits
    last = model(ids, past_key_values=context, logits_to_keep=1).logits
    torch.testing.assert_close(last, every[:, -1:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_decoding_with_local_tokens_closes_chunks_to_the_same_logits(model, monkeypatch):
    model.local_tokens = 4

    def decoded():
        context = model.compress(random_ids(3 * CHUNK + 3), ratio=4)
        options = {"past_key_values": context, "logits_to_keep": 1}
        return torch.cat([model(token[None], **options).logits for token in random_ids(CHUNK + 4, 2).T])

    told = decoded()
    monkeypatch.setattr(forward, "understands_told_masks", lambda *_: False)
    torch.testing.assert_close(told, decoded(), rtol=0, atol=2e-5)


@torch.no_grad()
def test_contexts_of_several_lengths_are_generated_from(model):
    contexts = [model.compress(random_ids(length, length), ratio=4) for length in LENGTHS]
    ids = random_ids(4, 3, batch=len(LENGTHS))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, context=BeaconCache.stack(contexts), **options)
    for row, context in enumerate(contexts):
        assert found[row : row + 1].equal(model.generate(ids[row : row + 1], context=context, **options))


@torch.no_grad()
def test_of_entries_only_those_of_lenders_are_told_twice(model, monkeypatch):
    told = []
    monkeypatch.setattr(OwnEntries, "attended_to", noting(OwnEntries.attended_to, told))
    contexts = [model.compress(random_ids(length, length), ratio=4).quantize(8) for length in LENGTHS]
    model.read_next(contexts, random_ids(1, 9, batch=len(LENGTHS))[:, 0])
    assert {layer for mask in told for layer in mask.of_layer} == model._beacon.site.lenders


def noting(attended_to, masks):
    def noted(mask, *args, **options):
        masks.append(mask)
        return attended_to(mask, *args, **options)

    return noted


@torch.no_grad()
def test_hooks_of_layers_that_keep_nothing_are_called(model):
    seen = []
    handle = model.get_decoder().layers[-1].register_forward_hook(lambda *_: seen.append(1))
    model.compress(random_ids(3 * CHUNK + 7), ratio=4)
    handle.remove()
    assert seen


def test_a_base_that_hands_its_decoder_no_embeddings_for_layers_is_refused(monkeypatch):
    base = tiny("gemma4-small-multimodal")
    monkeypatch.setattr(type(base.model), "forward", lambda self, inputs_embeds=None, **options: None)
    with pytest.raises(UnsupportedModelError, match="takes no embeddings for its layers beside those of its input"):
        attach(base, CONFIG)


@torch.no_grad()
def test_short_prompts_and_what_follows_are_the_bases_own(model):
    ids = random_ids(CHUNK - 6)
    due = copy.deepcopy(model)
    detach(due)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = model.generate(ids, **options), due.generate(ids, **options)
    assert found.sequences.equal(expected.sequences)
    assert all(one.equal(other) for one, other in zip(found.logits, expected.logits, strict=True))


@torch.no_grad()
def test_a_context_goes_through_a_file_and_takes_back_tokens(model, tmp_path):
    context = model.compress(random_ids(3 * CHUNK + 7), ratio=4)
    quantized = context.quantize(8)
    assert quantized.cache_bytes < context.cache_bytes
    for each in (context, quantized, model.new_cache()):
        each.save(tmp_path / "a.beacon")
        loaded = BeaconCache.load(tmp_path / "a.beacon", model)
        pairs = [
            zip(one.named_tensors(), two.named_tensors(), strict=True)
            for one, two in zip(each.layers, loaded.layers, strict=True)
        ]
        assert all(tensor.equal(other) for layer in pairs for (_, tensor), (_, other) in layer)
    before, tokens = context.fork(), random_ids(3, 4)
    model(tokens, past_key_values=context)
    context.crop(-3)
    one, two = (model(tokens, past_key_values=cache).logits for cache in (before, context))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@torch.no_grad()
def test_contexts_of_a_model_with_other_lenders_are_refused(tmp_path):
    model = with_beacons("gemma4-small", CONFIG)
    context = model.compress(random_ids(3 * CHUNK), ratio=4)
    kept = context.layers[LAST_KEPT + 1]
    context.layers[LAST_KEPT + 1] = context.layers[LAST_KEPT].map(torch.clone)
    context.save(tmp_path / "a.beacon")
    with pytest.raises(FileFormatError, match=r"num_states must be the model's \{3: 0, 4: 0\}; got \{4: 0\}"):
        BeaconCache.load(tmp_path / "a.beacon", model)
    assert not kept.has_entries


@torch.no_grad()
def test_a_text_is_the_same_however_it_arrives(model):
    ids = random_ids(3 * CHUNK + 7)
    whole, pieces = model.compress(ids, ratio=4), model.compress(ids[:, :20], ratio=4)
    for token in ids[:, 20:].T:
        model(token[None], past_key_values=pieces)
    assert whole.ratios == pieces.ratios
    for layer, other in zip(whole.layers, pieces.layers, strict=True):
        for (_, tensor), (_, same) in zip(layer.named_tensors(), other.named_tensors(), strict=True):
            torch.testing.assert_close(tensor, same, rtol=0, atol=1e-5)


def test_nothing_is_left_on_a_model(model):
    detach(model)
    assert not any(name.startswith("beacon") for module in model.modules() for name in vars(module))
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().layers.modules()
    )


def test_operations_that_are_not_counted_are_refused():
    config = CONFIG_MAPPING["gemma4_text"](num_kv_shared_layers=20)
    with pytest.raises(UnsupportedError, match=r"layers that share keys and values \(gemma4_text\)"):
        ModelShape.of(config, {})


@pytest.mark.parametrize("family", WITH_LENDERS)
def test_the_beacons_embedding_learns_through_all_of_it(family):
    model = with_beacons(family, CONFIG, attention="eager")
    model(random_ids(3 * CHUNK + 7), labels=random_ids(3 * CHUNK + 7), beacon_ratio=4).loss.backward()
    assert all(parameter.grad is not None for _, parameter in model.beacon_parameters())
    assert tiny(family).get_decoder().layers[-1].self_attn.is_kv_shared_layer
