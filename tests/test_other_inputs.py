"""What a base takes besides ids: pictures, kinds of tokens, positions with several axes."""

import inspect

import pytest
import torch
from transformers import AutoModelForMultimodalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from activation_beacon import BeaconCache, BeaconConfig, attach
from activation_beacon.adapt import find_decoder
from activation_beacon.errors import UnsupportedError, UnsupportedModelError
from activation_beacon.other_inputs import other_input, positions_of, without_kinds_of_text
from families import MROPE, PICTURE, SIZES, VOCABULARY, random_ids, randomize, tiny, with_beacons

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


@torch.no_grad()
def test_a_picture_that_has_been_encoded_is_one(seeing):
    """transformers 5.23 takes what the encoder made of it in place of pixels."""
    family, model = seeing
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes pixels only")
    prompt = picture_prompt(family, 3)
    grid = {name: prompt.pop(name) for name in ("pixel_values", "image_grid_thw") if name in prompt}
    encoded = {"mm_encoder_outputs": {"image": model.model.get_image_features(**grid, return_dict=True)}}
    options = {"max_new_tokens": 3 * CHUNK, **GREEDY}
    expected = model.generate(**picture_prompt(family, 3), **options)
    grid.pop("pixel_values")
    assert torch.equal(model.generate(**prompt, **grid, **encoded, **options), expected)
    for extra in ({"context": model.compress(random_ids(40), ratio=4)}, {"beacon_ratio": 2}):
        with pytest.raises(
            UnsupportedError, match=r"^(mm_encoder_outputs|image_grid_thw|\w*token_type_ids) cannot go with"
        ):
            model.generate(**prompt, **grid, **encoded, **extra, **options)


def test_without_a_cache_a_picture_is_seen_at_every_step(seeing):
    family, model = seeing
    options = {"max_new_tokens": CHUNK + 5, "use_cache": False, **GREEDY}
    ours = model.generate(**picture_prompt(family, 3), **options)
    with model.beacon_disabled():
        assert torch.equal(ours, model.generate(**picture_prompt(family, 3), **options))


@torch.no_grad()
def test_arguments_stand_in_the_bases_order(seeing):
    family, model = seeing
    prompt = picture_prompt(family, 3)
    names = list(inspect.signature(model.forward).parameters)
    given = {name: prompt.get(name) for name in names[: 1 + max(map(names.index, prompt.keys() & set(names)))]}
    assert torch.equal(model(*given.values()).logits, model(**prompt).logits)
    with pytest.raises(TypeError, match="forward takes"):
        model(*range(len(names) + 1))


@pytest.mark.parametrize("num_words", [3, 30])
def test_compress_takes_no_pictures(seeing, num_words):
    family, model = seeing
    with pytest.raises(
        UnsupportedError, match=r"^(pixel_values|\w*token_type_ids) cannot go with a text that is compre"
    ):
        model.compress(picture_prompt(family, num_words))
    arrays = {name: value.numpy() for name, value in picture_prompt(family, num_words).items()}
    with pytest.raises(
        UnsupportedError, match=r"^(pixel_values|\w*token_type_ids) cannot go with a text that is compre"
    ):
        model.compress(arrays)
    words = {"input_ids": random_ids(40), "attention_mask": torch.ones(1, 40), "token_type_ids": torch.zeros(1, 40)}
    words |= {"special_tokens_mask": torch.zeros(1, 40), "offset_mapping": torch.zeros(1, 40, 2)}  # as tokenizers tell
    assert model.compress(words, ratio=4).tokens_seen == 40


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


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
@torch.no_grad()
def test_padding_that_a_base_does_not_count_is_no_obstacle(name):
    """These make positions of the mask, other ones along the axes of pictures at padding."""
    model = omni(name)
    ids = random_ids(12).clamp(max=PICTURE - 1)
    padded, mask = torch.cat((torch.zeros_like(ids[:, :5]), ids), dim=1), (torch.arange(17) >= 5).long()[None]
    cache, alone = model(padded, attention_mask=mask, use_cache=True).past_key_values, model.compress(ids)
    assert isinstance(cache, BeaconCache)
    for mine, theirs in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
    options = {"max_new_tokens": 2 * CHUNK, **GREEDY}
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **options)[:, 17:], model.generate(ids, **options)[:, 12:]
    )


def test_the_whole_of_a_model_that_talks_is_refused_by_name():
    config = CONFIG_MAPPING["qwen2_5_omni"]()
    with torch.device("meta"):
        whole = AutoModelForMultimodalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"^Qwen2_5OmniForConditionalGeneration cannot carry beacons: "):
        find_decoder(whole, ("q", "k", "v"))


def omni(name):
    """A tiny model that hears and sees and answers in text."""
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in name else {}
    text = {**SIZES, "rope_parameters": MROPE, **experts}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}
    config = CONFIG_MAPPING[name](text_config=text, audio_config=audio, vision_config={"depth": 1})
    for each in ("image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "audio_start_token_id"):
        if getattr(config, each, None) is None or getattr(config, each) >= VOCABULARY:
            setattr(config, each, PICTURE)
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    randomize(model.named_parameters(), 0)
    return attach(model, CONFIG)


def test_a_text_configuration_may_name_no_tokens():
    base = tiny("glm4v")
    for name in ("bos_token_id", "eos_token_id"):
        vars(base.config.text_config).pop(name, None)
    model = attach(base, CONFIG)
    assert torch.equal(model.beacon_embedding, model.get_input_embeddings().weight[0])
    assert model.generate(random_ids(9), max_new_tokens=3, do_sample=False).shape[1] > 9


def test_which_inputs_are_others():
    tensor, zeros = torch.ones(1), torch.zeros(1, 3)
    assert other_input({"attention_mask": tensor, "use_cache": True, "cache_position": tensor, "size": (3, 4)}) is None
    assert other_input({"use_cache": True, "pixel_values": [tensor]}) == "pixel_values"
    assert other_input({"images": ([tensor], None)}) == "images"
    assert other_input({"encoded": {"image": {"states": tensor}}}) == "encoded"
    assert other_input({"encoded": {"image": {}}, "other": {}}) is None
    kinds = {"token_type_ids": zeros, "mm_token_type_ids": tensor, "pixel_values": zeros}
    assert list(without_kinds_of_text(kinds)) == ["mm_token_type_ids", "pixel_values"]


def test_positions_of_a_row():
    positions = torch.arange(12).view(2, 6)
    assert positions_of(positions, 1, 2, 3).tolist() == [[8, 9, 10]]
    assert positions_of(positions[:1], 1, 2, 3).tolist() == [[2, 3, 4]]
    assert positions_of(torch.stack((positions, positions + 1)), 1, 0, 1).tolist() == [[6], [7]]
