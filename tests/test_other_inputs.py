"""What a base takes besides ids: pictures, kinds of tokens, positions with several axes."""

import pytest
import torch
from transformers import DynamicCache

from activation_beacon import BeaconCache, BeaconConfig
from activation_beacon.errors import UnsupportedError
from activation_beacon.other_inputs import other_input, text_positions, without_kinds_of_text
from families import PICTURE, random_ids, with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4), num_sinks=2, anchored=True, placement="append")
NUM_PATCHES = 4  # of a picture, each in the place of a token
KINDS = {"gemma3": "token_type_ids", "qwen3_vl": "mm_token_type_ids"}  # what processors tell of each token
WITH_AXES = ("glm4v", "glm4v_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
GREEDY = {"do_sample": False, "eos_token_id": None}


def picture_of(family):
    """What a processor makes of one picture, besides ids."""
    generator = torch.Generator().manual_seed(0)
    if family == "qwen3_vl":
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}


def picture_prompt(family, num_words):
    """A prompt with a picture in its middle, as the family's processor hands it over."""
    words = random_ids(num_words).clamp(max=PICTURE - 1)
    ids = torch.cat((words, torch.tensor([[92, *[PICTURE] * NUM_PATCHES, 93, 7, 8]])), dim=1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture_of(family)}
    if family in KINDS:
        prompt[KINDS[family]] = (ids == PICTURE).long()
    return prompt


@pytest.fixture(scope="module", params=["gemma3", "llava", "qwen3_vl"])
def seeing(request):
    return request.param, with_beacons(request.param, CONFIG, attention="sdpa")


@torch.no_grad()
def test_a_picture_is_seen(seeing):
    """Otherwise the comparisons below would show nothing."""
    family, model = seeing
    prompt = picture_prompt(family, 3)
    other = dict(prompt, pixel_values=prompt["pixel_values"] + 1)
    assert (model(**prompt).logits[0, -1] - model(**other).logits[0, -1]).abs().max() > 1e-3


def test_after_a_short_prompt_with_a_picture_the_answer_is_the_bases_at_any_length(seeing):
    """Its chunks could only be read again from ids, without the picture."""
    family, model = seeing
    options = {"max_new_tokens": 3 * CHUNK, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    ours = model.generate(**picture_prompt(family, 3), **options)
    with model.beacon_disabled():
        theirs = model.generate(**picture_prompt(family, 3), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert not isinstance(ours.past_key_values, BeaconCache)


@torch.no_grad()
def test_a_forward_with_a_picture_leaves_the_bases_own_cache(seeing):
    family, model = seeing
    prompt = picture_prompt(family, 3)
    prompt["labels"] = prompt["input_ids"]
    ours = model(**prompt, use_cache=True)
    with model.beacon_disabled():
        theirs = model(**prompt, use_cache=True)
    assert isinstance(ours.past_key_values, DynamicCache)
    assert not isinstance(ours.past_key_values, BeaconCache)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("how", ["too long", "with a ratio", "on a context", "on a given cache"])
@pytest.mark.parametrize("is_generating", [True, False])
def test_a_picture_in_a_text_that_is_compressed_is_refused_by_name(seeing, how, is_generating):
    family, model = seeing
    context = model.compress(random_ids(40).clamp(max=PICTURE - 1), ratio=4)
    before = context.cache_length
    extra = {"with a ratio": {"beacon_ratio": 4}, "on a given cache": {"past_key_values": context}}.get(how, {})
    if how == "on a context":
        extra = {"context" if is_generating else "past_key_values": context}
    prompt = picture_prompt(family, 30 if how == "too long" else 3)
    if how == "on a given cache" and is_generating:
        ids = torch.cat((context.token_ids, prompt["input_ids"]), dim=1)
        prompt |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    call = model.generate if is_generating else model
    with pytest.raises(
        UnsupportedError, match=r"^(pixel_values|\w*token_type_ids) cannot go with a text that is compre"
    ):
        call(**prompt, **extra)
    assert context.cache_length == before


@pytest.mark.parametrize(("family", "kind"), KINDS.items())
@torch.no_grad()
def test_kinds_that_name_nothing_but_text_are_no_obstacle(family, kind):
    """Processors hand them over with any text."""
    model = with_beacons(family, CONFIG, attention="sdpa")
    for length in (10, 3 * CHUNK + 5):
        ids = random_ids(length).clamp(max=PICTURE - 1)
        kinds = {kind: torch.zeros_like(ids)}
        options = {"max_new_tokens": CHUNK + 3, **GREEDY}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **kinds, **options), expected)
        again = model.generate(ids.repeat(2, 1), **{kind: kinds[kind].repeat(2, 1)}, **options)
        assert torch.equal(again, expected.repeat(2, 1))
        output = model(ids, **kinds, use_cache=True)
        assert isinstance(output.past_key_values, BeaconCache)
        torch.testing.assert_close(output.logits, model(ids).logits)


@pytest.mark.parametrize("family", WITH_AXES)
@torch.no_grad()
def test_positions_with_several_axes_are_a_texts_own_where_all_are_equal(family):
    """`generate` hands them over for short prompts, and callers may."""
    model = with_beacons(family, CONFIG, attention="sdpa")
    ids = random_ids(12).clamp(max=PICTURE - 1)
    padded, mask = torch.cat((torch.zeros_like(ids[:, :5]), ids), dim=1), torch.ones(1, 17, dtype=torch.long)
    mask[:, :5] = 0
    options = {"max_new_tokens": 2 * CHUNK, **GREEDY}
    expected = model.generate(ids, **options)[:, 12:]
    assert torch.equal(model.generate(padded[:, -17:], attention_mask=mask, **options)[:, 17:], expected)
    positions = torch.arange(12).expand(3, 1, -1)
    output = model(ids, position_ids=positions, use_cache=True)
    assert isinstance(output.past_key_values, BeaconCache)
    torch.testing.assert_close(output.logits, model(ids).logits)
    crooked = positions.clone()
    crooked[1, 0, 5:] += 2
    ours = model(ids, position_ids=crooked, use_cache=True)
    assert not isinstance(ours.past_key_values, BeaconCache)
    with model.beacon_disabled():
        assert torch.equal(ours.logits, model(ids, position_ids=crooked).logits)
    long = random_ids(40).clamp(max=PICTURE - 1)
    positions = torch.arange(40).expand(3, 1, -1)
    torch.testing.assert_close(model(long, position_ids=positions).logits, model(long).logits)
    crooked = positions.clone()
    crooked[1, 0, 5:] += 2
    with pytest.raises(UnsupportedError, match="do not count up"):
        model(long, position_ids=crooked)


def test_which_inputs_are_others():
    tensor, zeros = torch.ones(1), torch.zeros(1, 3)
    assert other_input({"attention_mask": tensor, "use_cache": True, "cache_position": tensor, "size": (3, 4)}) is None
    assert other_input({"use_cache": True, "pixel_values": [tensor]}) == "pixel_values"
    assert other_input({"images": ([tensor], None)}) == "images"
    kinds = {"token_type_ids": zeros, "mm_token_type_ids": tensor, "pixel_values": zeros}
    assert list(without_kinds_of_text(kinds)) == ["mm_token_type_ids", "pixel_values"]


def test_axes_of_positions():
    positions = torch.arange(6).view(1, 6)
    assert text_positions(positions) is positions
    assert torch.equal(text_positions(positions.expand(3, 1, -1)), positions)
    assert text_positions(torch.stack((positions, positions + 1))) is None
