"""`generate`: every option of transformers on compressed contexts and on long prompts, against loops written by hand."""

import functools
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from activation_beacon import BeaconCache, BeaconConfig, attach, detach
from activation_beacon.errors import (
    BeaconError,
    CapacityError,
    InputError,
    MismatchError,
    RatioError,
    UnsupportedError,
)
from activation_beacon.generation import REFUSED_OPTIONS
from activation_beacon.row_ends import end_ids
from families import EAGER_ONLY, random_ids, tiny, widths, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8))
FAMILIES = ("llama", "gemma3_text", "gpt_oss", "phi3")
TEXT = random_ids(38, 1)  # two closed chunks, 6 tokens in the tail
QUESTION = random_ids(3, 2)
PROMPT = random_ids(41, 3)  # two closed chunks, 9 tokens in the tail
SHORT = 7  # new tokens that close no chunk on TEXT + QUESTION or on PROMPT
greedy = functools.partial(dict, do_sample=False)


def shape_of(family: str) -> dict:
    """Two layers, one of each kind where there are two, and no end of text by itself."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3_text", "gpt_oss") else {}
    return {"num_hidden_layers": 2, "eos_token_id": None, **kinds}


def base_of(family: str = "llama", **overrides):
    return tiny(family, **shape_of(family), **overrides)


@functools.cache
def model_of(family: str = "llama", seed: int = 0, max_position_embeddings: int = 512, **settings):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), **settings)
    return with_beacons(family, config, seed, max_position_embeddings=max_position_embeddings, **shape_of(family))


@pytest.fixture(params=FAMILIES)
def any_model(request):
    return model_of(request.param)


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def context(model):
    return model.compress(TEXT, ratio=4)


@pytest.fixture(params=["question on a context", "long prompt"])
def start(request, model, context):
    """Arguments of `generate`, and the cache that a loop by hand starts from."""
    if request.param == "long prompt":
        return {"inputs": PROMPT, "beacon_ratio": 4}, model.new_cache(ratio=4)
    return {"inputs": QUESTION, "context": context}, context


@torch.no_grad()
def by_hand(model, cache, ids, num_new, *, sample=False, processors=()):
    """Ids after `num_new` steps, and the logits of each, with nothing but the model's forward."""
    cache, text, read, steps = cache.fork(), ids, ids, []
    for _ in range(num_new):
        logits = model(read, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        steps.append(logits)
        for process in processors:
            logits = process(text, logits)
        read = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        text = torch.cat((text, read), dim=1)
    return text, torch.stack(steps, dim=1)


def left_padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T), padded on the left as tokenizers do for decoders."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


def ordinary_cache(context: BeaconCache) -> DynamicCache:
    """The entries of a context as a cache of transformers' own."""
    cache = DynamicCache()
    for index, layer in enumerate(context.layers):
        cache.update(*layer.entries(), index)
    return cache


def contents(context: BeaconCache) -> list[torch.Tensor]:
    return [tensor for layer in context.layers for tensor in (layer.keys, layer.values)] + [context.token_ids]


def assert_same_cache(one: BeaconCache, other: BeaconCache, atol: float = 0.0) -> None:
    assert one.rows == other.rows
    assert torch.equal(one.token_ids, other.token_ids)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for left, right in zip(mine.entries(), theirs.entries(), strict=True):
            torch.testing.assert_close(left, right, atol=atol, rtol=0)


# --- greedy and sampling, by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_new", [1, SHORT, 30])
def test_greedy_equals_a_loop_by_hand(model, start, num_new):
    options, cache = start
    expected, _ = by_hand(model, cache, options["inputs"], num_new)
    assert torch.equal(model.generate(**options, **greedy(max_new_tokens=num_new)), expected)


def test_greedy_equals_a_loop_by_hand_in_every_family(any_model):
    context = any_model.compress(TEXT, ratio=(8, 2))
    for ids, cache, options in (
        (QUESTION, context, {"context": context}),
        (PROMPT, any_model.new_cache(ratio=2), {"beacon_ratio": 2}),
    ):
        expected, _ = by_hand(any_model, cache, ids, 20)
        assert torch.equal(any_model.generate(ids, **options, **greedy(max_new_tokens=20)), expected)


def test_sampling_with_a_seed_equals_a_loop_by_hand(model, start):
    options, cache = start
    torch.manual_seed(5)
    expected, _ = by_hand(model, cache, options["inputs"], 20, sample=True)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**options, do_sample=True, top_k=0, max_new_tokens=20), expected)
    torch.manual_seed(6)
    assert not torch.equal(model.generate(**options, do_sample=True, top_k=0, max_new_tokens=20), expected)


def test_the_answer_depends_on_the_context(model):
    other = model.compress(random_ids(38, 9), ratio=4)
    answers = [
        model.generate(QUESTION, context=c, **greedy(max_new_tokens=12)) for c in (other, model.compress(TEXT, ratio=4))
    ]
    assert not torch.equal(*answers)


# --- every option, against transformers on an ordinary cache with the same entries ----------------------------------------


class NeverTheLast(LogitsProcessor):
    """Forbids the last token, and counts how many ids it is shown."""

    def __init__(self):
        self.widths = []

    def __call__(self, input_ids, scores):
        self.widths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class WithoutPadding(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([96]), -torch.inf)


class After(StoppingCriteria):
    def __init__(self, num_ids):
        self.num_ids = num_ids

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.num_ids)


OPTIONS = {
    "greedy": {},
    "a generation config": {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False)},
    "max_length": {"max_length": 8, "max_new_tokens": None},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "typical_p": {"do_sample": True, "typical_p": 0.7},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "beams that stop early": {
        "num_beams": 3,
        "early_stopping": True,
        "length_penalty": 2.0,
        "eos_token_id": [5, 9, 40],
    },
    "beams that never stop early": {"num_beams": 2, "early_stopping": "never", "eos_token_id": list(range(3, 30))},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 50)]},
    "suppress_tokens": {"suppress_tokens": list(range(50, 97))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(40, 97))},
    "sequence_bias": {"sequence_bias": [[[7], 4.0], [[11, 13], 6.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 8},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(3, 90))},
    "min_length": {"min_length": 7, "eos_token_id": list(range(3, 90))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 5},
    "renormalize_logits": {"renormalize_logits": True, "num_beams": 2, "no_repeat_ngram_size": 1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [(int(ids[-1]) + 1) % 97, 5]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "guidance_scale": {"guidance_scale": 1.5},
    "negative_prompt_ids": {"guidance_scale": 2.0, "negative_prompt_ids": random_ids(4, 8)},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([After(6)])},
    "eos": {"eos_token_id": list(range(3, 97, 3)), "pad_token_id": 0},
    "logits_processor": {"logits_processor": LogitsProcessorList([NeverTheLast()])},
    "one prefill chunk size": {"prefill_chunk_size": 2},
    "use_cache": {"use_cache": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_works_as_on_an_ordinary_cache(model, context, name):
    options = dict(OPTIONS[name])
    if "generation_config" not in options:
        options = {"max_new_tokens": SHORT, "do_sample": False, **options}
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    oracle = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    expanded = ordinary_cache(context)
    expanded.batch_repeat_interleave(copies)
    mask = torch.ones(1, context.cache_length + 3, dtype=torch.long)
    torch.manual_seed(3)
    with model.beacon_disabled():
        expected = model.generate(QUESTION, past_key_values=expanded, attention_mask=mask, **oracle)
    torch.manual_seed(3)
    assert torch.equal(model.generate(QUESTION, context=context, **options), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "min_p": 0.05}])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_beams_and_sampling_work_in_other_families(family, options):
    model = model_of(family)
    context = model.compress(TEXT, ratio=4)
    expanded = ordinary_cache(context)
    expanded.batch_repeat_interleave(options.get("num_beams", 1))
    mask = torch.ones(1, context.cache_length + 3, dtype=torch.long)
    torch.manual_seed(3)
    with model.beacon_disabled():
        expected = model.generate(
            QUESTION, past_key_values=expanded, attention_mask=mask, max_new_tokens=SHORT, **options
        )
    torch.manual_seed(3)
    assert torch.equal(model.generate(QUESTION, context=context, max_new_tokens=SHORT, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 3},
        {"eos_token_id": list(range(3, 97, 3))},
        {"prefill_chunk_size": 5},
        {"stopping_criteria": [MaxTimeCriteria(1000.0), EosTokenCriteria(torch.tensor([5]))]},
    ],
)
def test_a_long_prompt_is_its_chunks_as_context_and_its_tail_as_question(model, options):
    context = model.compress(PROMPT[:, :33], ratio=4)
    options = {"max_new_tokens": 25, "pad_token_id": 0, **options}
    torch.manual_seed(3)
    expected = model.generate(PROMPT[:, 33:], context=context, **options)
    torch.manual_seed(3)
    out = model.generate(PROMPT, beacon_ratio=4, **options)
    assert torch.equal(out[:, :41], PROMPT.expand(out.shape[0], -1))
    assert torch.equal(out[:, 33:], expected)


def test_processors_see_the_whole_text_that_generate_was_given(model, start):
    options, cache = start
    spy, ids = NeverTheLast(), options["inputs"]
    own = [RepetitionPenaltyLogitsProcessor(1.8), NoRepeatNGramLogitsProcessor(2), NeverTheLast()]
    expected, _ = by_hand(model, cache, ids, 20, processors=own)
    out = model.generate(
        **options,
        repetition_penalty=1.8,
        no_repeat_ngram_size=2,
        logits_processor=LogitsProcessorList([spy]),
        **greedy(max_new_tokens=20),
    )
    assert torch.equal(out, expected)
    assert spy.widths == list(range(ids.shape[1], ids.shape[1] + 20))


def test_max_time_ends_the_answer(model, start):
    options, cache = start
    out = model.generate(**options, max_time=0.0, **greedy(max_new_tokens=20))
    assert torch.equal(out, by_hand(model, cache, options["inputs"], 1)[0])


def test_an_answer_ends_at_eos_and_not_before(model, start):
    options, cache = start
    expected, _ = by_hand(model, cache, options["inputs"], 20)
    width = options["inputs"].shape[1]
    eos = int(expected[0, width + 5])
    first = expected[0, width:].tolist().index(eos)
    out = model.generate(**options, eos_token_id=eos, **greedy(max_new_tokens=20))
    assert torch.equal(out, expected[:, : width + first + 1])


# --- streamers ---------------------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token(model, start):
    options, _ = start
    recorder = Recorder()
    out = model.generate(**options, streamer=recorder, **greedy(max_new_tokens=20))
    width = options["inputs"].shape[1]
    assert recorder.parts == [out[0, :width].tolist(), *[[token] for token in out[0, width:].tolist()]]
    assert recorder.ended


LETTERS = [chr(code) for code in range(ord("!"), ord("!") + 97)]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter for each id; the last one is the padding."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=LETTERS[-1], padding_side="left", clean_up_tokenization_spaces=False
    )


def text_of(ids: torch.Tensor) -> str:
    return "".join(LETTERS[token] for token in ids.flatten().tolist())


def test_text_streamers_stream_the_answer(model, start, capsys):
    options, cache = start
    tokenizer, width = letter_tokenizer(), options["inputs"].shape[1]
    expected, _ = by_hand(model, cache, options["inputs"], 20)
    answer = text_of(expected[0, width:])
    model.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True), **greedy(max_new_tokens=20))
    assert capsys.readouterr().out == answer + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(
        target=model.generate, kwargs={**options, "streamer": streamer, **greedy(max_new_tokens=20)}
    )
    thread.start()
    assert "".join(streamer) == answer
    thread.join()


def test_stop_strings_end_the_answer(model, start):
    options, cache = start
    expected, _ = by_hand(model, cache, options["inputs"], 20)
    width = options["inputs"].shape[1]
    stop = int(expected[0, width + 4])
    first = expected[0, width:].tolist().index(stop)
    out = model.generate(
        **options, stop_strings=[LETTERS[stop]], tokenizer=letter_tokenizer(), **greedy(max_new_tokens=20)
    )
    assert torch.equal(out, expected[:, : width + first + 1])


# --- dictionaries and going on -----------------------------------------------------------------------------------------


def test_scores_logits_and_hidden_states_are_those_of_each_step(model, start):
    options, cache = start
    width = options["inputs"].shape[1]
    expected, steps = by_hand(model, cache, options["inputs"], 20)
    out = model.generate(
        **options,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **greedy(max_new_tokens=20),
    )
    assert torch.equal(out.sequences, expected)
    assert torch.equal(torch.stack(out.logits, dim=1), steps)
    assert torch.equal(torch.stack(out.scores, dim=1), steps)
    assert len(out.hidden_states) == len(out.attentions) == 20
    for step in range(1, 20):
        assert [state.shape for state in out.hidden_states[step]] == [(1, 1, 32)] * 3
        assert [weights.shape[:3] for weights in out.attentions[step]] == [(1, 4, 1)] * 2
    head = model.lm_head
    last = torch.stack([head(states[-1][:, -1]) for states in out.hidden_states], dim=1)
    torch.testing.assert_close(last, steps, atol=1e-4, rtol=0)
    assert out.past_key_values.rows[0].tokens_seen == (0 if "context" not in options else 38) + width + 19


def test_the_returned_context_holds_what_has_been_read_and_goes_on(model, context):
    first = model.generate(QUESTION, context=context, return_dict_in_generate=True, **greedy(max_new_tokens=20))
    grown = first.past_key_values
    text = torch.cat((TEXT, first.sequences), dim=1)
    assert isinstance(grown, BeaconCache)
    assert_same_cache(grown, model.compress(text[:, :-1], ratio=4), atol=1e-5)
    # The answer's last token has not been read: it opens the next turn.
    second = torch.cat((first.sequences[:, -1:], random_ids(4, 5)), dim=1)
    out = model.generate(second, context=grown, **greedy(max_new_tokens=12))
    whole = torch.cat((text[:, :-1], second), dim=1)
    fresh = model.generate(whole, beacon_ratio=4, **greedy(max_new_tokens=12))
    assert torch.equal(out[:, -12:], fresh[:, -12:])


def test_past_key_values_take_the_full_text_or_only_what_is_new(model):
    text = random_ids(60, 4)
    for seen in (5, 16, 38):
        cache = model.compress(text[:, :seen], ratio=4)
        expected, _ = by_hand(model, cache, text[:, seen:], 6)
        full = model.generate(text, past_key_values=cache.fork(), **greedy(max_new_tokens=6))
        new = model.generate(text[:, seen:], past_key_values=cache.fork(), **greedy(max_new_tokens=6))
        masked = model.generate(
            text[:, seen:],
            past_key_values=cache.fork(),
            attention_mask=torch.ones_like(text),
            **greedy(max_new_tokens=6),
        )
        assert torch.equal(full[:, :60], text)
        assert torch.equal(full[:, seen:], expected)
        assert torch.equal(new, expected)
        assert torch.equal(masked, expected)


def test_past_key_values_grow_in_place_and_chat_on_with_full_ids(model):
    cache, text = model.new_cache(ratio=4), random_ids(30, 4)
    for turn in range(4):
        text = model.generate(text, past_key_values=cache, **greedy(max_new_tokens=9))
        assert cache.tokens_seen == text.shape[1] - 1
        text = torch.cat((text, random_ids(5, turn)), dim=1)
    alone = model.compress(text[:, :-6], ratio=4)
    assert_same_cache(cache, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("differs", "message"), [(44, "repeats the first 44 of the 45"), (30, "repeats the first 30 of the 45")]
)
def test_a_text_that_is_rendered_anew_is_not_read_twice(model, differs, message):
    text = random_ids(45, 4)
    cache = model.compress(text, ratio=4)
    before = cache.fork()
    other = torch.cat((text, random_ids(6, 5)), dim=1)
    other[0, differs] += 1
    with pytest.raises(InputError, match=f"^Row 0 of the prompt {message} tokens that were read, and then differs"):
        model.generate(other, past_key_values=cache, **greedy(max_new_tokens=3))
    with pytest.raises(InputError, match=r"^Row 0 of the prompt repeats the first 40 of the 45 .* and then ends"):
        model.generate(text[:, :40], past_key_values=cache, **greedy(max_new_tokens=3))
    assert_same_cache(cache, before)
    other = model.compress(random_ids(45, 6), ratio=4)
    rows = (torch.cat((text, random_ids(6, 5)), dim=1), random_ids(51, 7))
    for stranger, contexts, prompts in ((1, (cache, other), rows), (0, (other, cache), rows[::-1])):
        message = rf"^Row {stranger} of the prompt does not open with the text that was read, and others do\."
        with pytest.raises(InputError, match=message):
            model.generate(torch.cat(prompts), past_key_values=BeaconCache.stack(contexts), **greedy(max_new_tokens=3))


@pytest.mark.parametrize("count", [2, 4, 5])
def test_a_text_that_is_rendered_anew_after_a_crop_is_not_read_twice(model, count):
    text = random_ids(38, 1)
    options = greedy(max_new_tokens=2, return_dict_in_generate=True)
    cache = model.generate(random_ids(3, 2), context=model.compress(text, ratio=4), **options).past_key_values
    cache.crop(-count)  # within the question, or to where the context ends, or below
    other = torch.cat((text[:, :30], random_ids(9, 4)), dim=1)
    with pytest.raises(InputError, match=r"^Row 0 of the prompt repeats the first 30 of the "):
        model.generate(other, past_key_values=cache, **greedy(max_new_tokens=1))


def test_a_row_taken_back_to_its_context_is_asked_on(model):
    contexts = model.compress([random_ids(38, 1)[0].tolist(), random_ids(21, 2)[0].tolist()], ratio=4)
    questions = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = greedy(max_new_tokens=2, attention_mask=(questions != 0).long(), return_dict_in_generate=True)
    grown = model.generate(questions, context=contexts, **options).past_key_values
    grown.crop(-3)  # the first row to where its context ends, the second two tokens behind
    assert [row.tokens_seen for row in grown.rows] == [38, 23]
    new = random_ids(3, 4, batch=2)
    rows = [model.generate(new[row : row + 1], context=grown.row(row), **greedy(max_new_tokens=2)) for row in (0, 1)]
    together = model.generate(new, past_key_values=grown, **greedy(max_new_tokens=2))
    assert torch.equal(together, torch.cat(rows))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temprature": 0.5}, ValueError),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])}, InputError),
        ({"num_beams": 0}, ZeroDivisionError),
        ({"stopping_criteria": [lambda *_, **__: 1 / 0]}, ZeroDivisionError),
    ],
)
def test_a_call_that_fails_leaves_the_callers_cache_with_its_ratio_and_rows(model, options, error):
    cache = model.compress(random_ids(38), ratio=4)
    before = cache.fork()
    with pytest.raises(error):
        model.generate(random_ids(4, 3, batch=3), past_key_values=cache, beacon_ratio=8, max_new_tokens=3, **options)
    assert cache.policies == before.policies
    assert_same_cache(cache, before)
    out = model.generate(
        random_ids(4, 3, batch=3),
        past_key_values=cache,
        beacon_ratio=8,
        return_dict_in_generate=True,
        **greedy(max_new_tokens=3),
    )
    assert out.past_key_values is cache
    assert (cache.batch_size, {policy.ratio for policy in cache.policies}) == (3, {8})


def test_an_answer_that_local_tokens_leave_no_room_for_is_refused_before_it_begins():
    settings = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), local_tokens=25)
    model = with_beacons("llama", settings, attention="sdpa", max_position_embeddings=73, eos_token_id=None)
    context = model.compress(random_ids(170), ratio=4)
    before = context.fork()
    written = []

    class Written(BaseStreamer):
        def put(self, value):
            written.append(value)

        def end(self):
            pass

    for count, fits in ((6, True), (9, True), (10, False), (17, False)):
        if fits:
            model.generate(random_ids(3, 2), context=context, **greedy(max_new_tokens=count))
            continue
        with pytest.raises(CapacityError):
            model.generate(random_ids(3, 2), context=context, streamer=Written(), **greedy(max_new_tokens=count))
    assert not written
    assert_same_cache(context, before)


def test_past_key_values_of_a_ragged_batch_take_the_full_texts(model):
    texts = [random_ids(length, length)[0].tolist() for length in (21, 40, 9)]
    cache = model.compress([text[:-4] for text in texts], ratio=4)
    ids, mask = left_padded(texts)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **greedy(max_new_tokens=20))
    for row, text in zip(out, texts, strict=True):
        alone = model.generate(torch.tensor([text]), beacon_ratio=4, **greedy(max_new_tokens=20))
        assert torch.equal(row[-20:], alone[0, -20:])


# --- closing chunks while decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("llama", {"num_sinks": 2}), ("gemma3_text", {"local_tokens": 5})],
)
def test_chunks_closed_while_decoding_are_those_of_the_full_text(family, settings):
    model = model_of(family, **settings)
    context = model.compress(TEXT, ratio=4)
    out = model.generate(
        QUESTION, context=context, return_dict_in_generate=True, output_logits=True, **greedy(max_new_tokens=45)
    )
    text = torch.cat((TEXT, out.sequences), dim=1)
    for step, logits in enumerate(out.logits):
        if step % 3 == 0 or (41 + step) % 16 < 2:
            before = model.compress(text[:, : 40 + step], ratio=4)
            fresh = model(text[:, 40 + step : 41 + step], past_key_values=before).logits[:, -1]
            torch.testing.assert_close(logits, fresh.float(), atol=2e-4, rtol=0)
            assert torch.equal(fresh.argmax(-1), text[:, 41 + step])
    assert len(out.past_key_values.rows[0].chunks) == 5 - (1 if settings.get("local_tokens") else 0)
    assert_same_cache(out.past_key_values, model.compress(text[:, :-1], ratio=4), atol=2e-4)


def test_beams_that_close_chunks_have_the_scores_of_their_texts(model, start):
    options, cache = start
    width = options["inputs"].shape[1]
    out = model.generate(
        **options,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        max_new_tokens=24,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        read, own = cache.fork(), sequence[None]
        steps = [model(own[:, :width], past_key_values=read).logits[:, -1:]]
        steps += [model(own[:, n : n + 1], past_key_values=read).logits for n in range(width, width + 23)]
        chances = torch.cat(steps, dim=1).log_softmax(-1).gather(2, own[:, width:, None])
        torch.testing.assert_close(chances.sum(), score, atol=1e-3, rtol=0)
    assert len({tuple(sequence.tolist()) for sequence in out.sequences}) == 3


def test_auto_reads_the_text_anew_while_decoding(model):
    text = random_ids(20, 4)
    small = model_of(max_position_embeddings=40)
    out = small.generate(text, return_dict_in_generate=True, **greedy(max_new_tokens=60))
    assert set(out.past_key_values.ratios) == {4}
    assert_same_cache(out.past_key_values, small.compress(out.sequences[:, :-1]), atol=1e-4)


# --- the context stays as it was ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_context_stays_as_it_was(model, context, options):
    before, rows, policy = contents(context), context.rows, context.policy
    copies = [tensor.clone() for tensor in before]
    first = model.generate(QUESTION, context=context, max_new_tokens=25, beacon_ratio=8, **greedy(**options))
    assert context.rows == rows
    assert context.policy == policy
    for tensor, kept, copy in zip(contents(context), before, copies, strict=True):
        assert tensor is kept
        assert torch.equal(tensor, copy)
    if not options.get("do_sample"):
        again = model.generate(QUESTION, context=context, max_new_tokens=25, beacon_ratio=8, **greedy(**options))
        assert torch.equal(again, first)


def test_question_and_answer_ids_are_returned(model, context):
    out = model.generate(QUESTION, context=context, **greedy(max_new_tokens=9))
    assert out.shape == (1, 12)
    assert torch.equal(out[:, :3], QUESTION)


def test_beacon_ratio_rules_the_chunks_that_are_closed_from_now_on(model, context):
    out = model.generate(
        QUESTION, context=context, beacon_ratio=8, return_dict_in_generate=True, **greedy(max_new_tokens=30)
    )
    assert out.past_key_values.ratios == (4, 4, 8, 8)
    model.beacon_ratio = 2
    try:
        out = model.generate(PROMPT, return_dict_in_generate=True, **greedy(max_new_tokens=2))
        assert out.past_key_values.ratios == (2, 2)
        out = model.generate(PROMPT, beacon_ratio=(8, 4), return_dict_in_generate=True, **greedy(max_new_tokens=20))
        assert out.past_key_values.ratios == (8, 4, 4)
    finally:
        model.beacon_ratio = "auto"


def test_spans_in_the_tail_are_kept_raw_whatever_ratio_goes_on(model):
    text = random_ids(40, 4)
    spanned = model.compress(text, ratio=4, spans=[(34, 38, None)])
    for ratio in (None, 8):
        options = greedy(max_new_tokens=12, beacon_ratio=ratio, return_dict_in_generate=True)
        grown = model.generate(QUESTION, context=spanned, **options).past_key_values
        assert grown.ratios == (4, 4, ratio or 4)
        assert grown.rows[0].chunks[2].num_raw == 4


def test_a_quantised_context_answers_and_stays_quantised(model, context):
    small = context.quantize(8)
    out = model.generate(QUESTION, context=small, return_dict_in_generate=True, **greedy(max_new_tokens=30))
    assert out.sequences.shape == (1, 33)
    assert out.past_key_values.quantized_bits == 8
    assert len(out.past_key_values.rows[0].chunks) == 4
    assert small.rows == context.rows


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_context_serves_a_batch_of_questions(family):
    model = model_of(family)
    context = model.compress(TEXT, ratio=4)
    questions = [random_ids(length, length)[0].tolist() for length in (1, 5, 12)]
    ids, mask = left_padded(questions)
    out = model.generate(ids, attention_mask=mask, context=context, **greedy(max_new_tokens=18))
    for row, question in zip(out, questions, strict=True):
        alone = model.generate(torch.tensor([question]), context=context, **greedy(max_new_tokens=18))
        assert torch.equal(row[12 - len(question) :], alone[0])
    assert context.batch_size == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_ragged_contexts_with_ragged_questions_answer_as_each_alone(family):
    model = model_of(family, num_sinks=1)
    contexts = [model.compress(random_ids(n, n), ratio=r) for n, r in ((5, 4), (38, 2), (64, 8), (17, 4))]
    questions = [random_ids(length, length + 50)[0].tolist() for length in (9, 1, 4, 20)]
    ids, mask = left_padded(questions)
    out = model.generate(
        ids, attention_mask=mask, context=BeaconCache.stack(contexts), beacon_ratio=4, **greedy(max_new_tokens=18)
    )
    for row, question, context in zip(out, questions, contexts, strict=True):
        alone = model.generate(torch.tensor([question]), context=context, beacon_ratio=4, **greedy(max_new_tokens=18))
        assert torch.equal(row[20 - len(question) :], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_long_prompts_answer_as_each_alone(family):
    model = model_of(family)
    prompts = [random_ids(length, length)[0].tolist() for length in (3, 50, 16, 33)]
    ids, mask = left_padded(prompts)
    out = model.generate(ids, attention_mask=mask, beacon_ratio=4, **greedy(max_new_tokens=18))
    for row, prompt in zip(out, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), beacon_ratio=4, **greedy(max_new_tokens=18))
        assert torch.equal(row[50 - len(prompt) :], alone[0])


def test_ragged_batches_work_with_beams_and_eos(model):
    contexts = [model.compress(random_ids(n, n), ratio=4) for n in (38, 20)]
    questions = [random_ids(length, length + 50)[0].tolist() for length in (2, 6)]
    ids, mask = left_padded(questions)
    options = {"num_beams": 3, "max_new_tokens": 20, "eos_token_id": [4, 8, 12, 16], "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, context=BeaconCache.stack(contexts), **options)
    for row, question, context in zip(out, questions, contexts, strict=True):
        alone = model.generate(torch.tensor([question]), context=context, **options)[0]
        assert torch.equal(row[6 - len(question) :][: len(alone)], alone)
        assert (row[6 - len(question) + len(alone) :] == 0).all()


# --- short texts are the base's ------------------------------------------------------------------------------------------


SAME_AS_THE_BASE = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", SAME_AS_THE_BASE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_up_to_a_chunk_the_answer_is_the_bases_own_bit_for_bit(family, attention, name):
    if attention == "sdpa" and family in EAGER_ONLY:
        pytest.skip(f"{family} has no sdpa")
    batches = [
        (random_ids(8, 4), None),
        (random_ids(6, 4, batch=3), None),
        left_padded([[5, 6, 7], [8, 9, 10, 11, 12]]),
    ]
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    answers = []
    # The same frozen weights at the same address: torch's choice of kernels looks at both.
    model = base_of(family, attention=attention).requires_grad_(False)
    for turn in ("base", "with beacons"):
        if turn == "with beacons":
            attach(model, CONFIG)
        for ids, mask in batches:
            torch.manual_seed(0)
            out = model.generate(ids, attention_mask=mask, **options, **greedy(**SAME_AS_THE_BASE[name]))
            answers.append((out.sequences, *out.scores, *out.logits))
    for theirs, ours in zip(answers[:3], answers[3:], strict=True):
        assert len(ours) == 19
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_disabled_and_detached_models_generate_as_the_base(model):
    base, other = base_of(), attach(base_of(), CONFIG)
    theirs = base.generate(PROMPT, **greedy(max_new_tokens=9))
    with model.beacon_disabled():
        assert torch.equal(model.generate(PROMPT, **greedy(max_new_tokens=9)), theirs)
    assert torch.equal(detach(other).generate(PROMPT, **greedy(max_new_tokens=9)), theirs)


def test_without_a_cache_short_prompts_are_the_bases_own(model):
    ids = random_ids(5, 4)
    theirs = base_of().generate(ids, use_cache=False, **greedy(max_new_tokens=6))
    assert torch.equal(model.generate(ids, use_cache=False, **greedy(max_new_tokens=6)), theirs)


def test_without_a_cache_a_long_prompt_is_compressed_at_every_step(model):
    model.beacon_ratio = 4
    try:
        out = model.generate(PROMPT, use_cache=False, **greedy(max_new_tokens=10))
    finally:
        model.beacon_ratio = "auto"
    assert torch.equal(out, by_hand(model, model.new_cache(ratio=4), PROMPT, 10)[0])


@pytest.mark.parametrize("where", ["call", "config", "model"])
@pytest.mark.parametrize("what", ["context", "past_key_values", "beacon_ratio"])
def test_without_a_cache_nothing_can_hold_beacons(model, context, where, what):
    given = {"context": context, "past_key_values": context.fork(), "beacon_ratio": 4}
    options = {what: given[what]}
    if where == "call":
        options["use_cache"] = False
    elif where == "config":
        options["generation_config"] = GenerationConfig(use_cache=False, max_new_tokens=3)
    try:
        model.generation_config.use_cache = where != "model"
        with pytest.raises(
            UnsupportedError,
            match=r"^use_cache=False leaves no cache to hold beacons\. Generate with use_cache=True\.$",
        ):
            model.generate(QUESTION, **options)
        if where == "model":  # the call's own word goes first
            out = model.generate(QUESTION, use_cache=True, context=context, **greedy(max_new_tokens=5))
            assert torch.equal(out, by_hand(model, context, QUESTION, 5)[0])
    finally:
        model.generation_config.use_cache = True


# --- pipelines and callables ---------------------------------------------------------------------------------------------


def test_a_pipeline_reads_long_prompts_and_contexts(model, context):
    pipe = pipeline("text-generation", model=model, tokenizer=letter_tokenizer())
    options = greedy(max_new_tokens=20, return_full_text=False, suppress_tokens=[96])

    def answer_by_hand(cache, ids):
        return text_of(by_hand(model, cache, ids, 20, processors=[WithoutPadding()])[0][0, ids.shape[1] :])

    for ids in (PROMPT, QUESTION):
        out = pipe(text_of(ids), beacon_ratio=4, **options)
        assert out[0]["generated_text"] == answer_by_hand(model.new_cache(ratio=4), ids)
        out = pipe(text_of(ids), context=context, **options)
        assert out[0]["generated_text"] == answer_by_hand(context, ids)
    both = pipe([text_of(QUESTION), text_of(PROMPT)], context=context, batch_size=2, **options)
    assert [out[0]["generated_text"] for out in both] == [answer_by_hand(context, ids) for ids in (QUESTION, PROMPT)]
    whole = pipe(text_of(PROMPT), beacon_ratio=4, **{**options, "return_full_text": True})[0]["generated_text"]
    assert whole == text_of(PROMPT) + answer_by_hand(model.new_cache(ratio=4), PROMPT)


def test_a_custom_generate_is_called_with_the_cache_in_place(model, context):
    def step_by_step(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        assert isinstance(model_kwargs["past_key_values"], BeaconCache)
        return by_hand(model, model_kwargs["past_key_values"], input_ids, generation_config.max_new_tokens)[0]

    out = model.generate(QUESTION, context=context, custom_generate=step_by_step, max_new_tokens=8)
    assert torch.equal(out, by_hand(model, context, QUESTION, 8)[0])


def test_many_threads_share_one_context(model, context):
    questions = [random_ids(4, seed) for seed in range(4)]
    expected = [model.generate(ids, context=context, **greedy(max_new_tokens=15)) for ids in questions]
    answers = [None] * 4

    def ask(number):
        answers[number] = model.generate(questions[number], context=context, **greedy(max_new_tokens=15))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))


# --- refusals ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "assistant_model": "the assistant",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "cache_implementation": "static",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "speculation_type": "any",
    "use_mtp": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_work_are_refused_by_name(model, start, name):
    assert REFUSED.keys() == REFUSED_OPTIONS.keys()
    options, _ = start
    with pytest.raises(UnsupportedError) as caught:
        model.generate(**options, **{name: REFUSED[name]}, max_new_tokens=3)
    text = str(caught.value)
    assert text.startswith(f"generate({name}=...) does not work with beacons: {REFUSED_OPTIONS[name]}.")
    assert text.endswith(" Leave it out, or disable them.")
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, NotImplementedError)


def test_options_in_a_generation_config_are_refused_too(model, start):
    options, _ = start
    with pytest.raises(UnsupportedError, match=r"^generate\(prompt_lookup_num_tokens=\.\.\.\) does not work"):
        model.generate(**options, generation_config=GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=3))
    model.generation_config.prompt_lookup_num_tokens = 2
    try:
        with pytest.raises(UnsupportedError, match=r"^generate\(prompt_lookup_num_tokens=\.\.\.\) does not work"):
            model.generate(**options, max_new_tokens=3)
    finally:
        model.generation_config.prompt_lookup_num_tokens = None


def test_an_assistant_in_its_place_is_refused_too(model, context):
    with pytest.raises(UnsupportedError, match=r"^generate\(assistant_model=\.\.\.\) does not work"):
        model.generate(QUESTION, None, None, None, None, None, base_of(), context=context)


def test_disabled_options_work_on_the_base(model):
    with model.beacon_disabled():
        out = model.generate(PROMPT, prompt_lookup_num_tokens=2, **greedy(max_new_tokens=3))
    assert out.shape == (1, 44)


def test_a_default_cache_of_the_base_gives_way(model, context):
    model.generation_config.cache_implementation = "static"
    try:
        out = model.generate(QUESTION, context=context, **greedy(max_new_tokens=5))
        assert model.generation_config.cache_implementation == "static"
    finally:
        model.generation_config.cache_implementation = None
    assert torch.equal(out, by_hand(model, context, QUESTION, 5)[0])


def test_continuous_batching_is_refused(model):
    with pytest.raises(
        UnsupportedError,
        match=r"^generate_batch cannot take compressed contexts\. Use generate with stacked contexts\.$",
    ):
        model.generate_batch([[1, 2, 3]])


def test_a_context_is_refused_while_beacons_are_disabled(model, context):
    with (
        model.beacon_disabled(),
        pytest.raises(
            UnsupportedError,
            match=r"^A context cannot be used while beacons are disabled\. Leave beacon_disabled\(\) first\.$",
        ),
    ):
        model.generate(QUESTION, context=context)


def test_beacons_are_refused_in_every_form_while_they_are_disabled(model, context):
    with model.beacon_disabled():
        with pytest.raises(UnsupportedError, match=r"^beacon_ratio cannot be used while beacons are disabled\."):
            model.generate(QUESTION, max_new_tokens=2, beacon_ratio=4)
        with pytest.raises(UnsupportedError, match=r"^Beacons are disabled here\. Leave the beacon_disabled\(\) block"):
            model.generate(QUESTION, max_new_tokens=2, past_key_values=context.fork())


def test_a_context_and_past_key_values_are_one_too_many(model, context):
    with pytest.raises(
        InputError,
        match=r"^generate takes context or past_key_values, not both\. Use context; it stays as it was\.$",
    ):
        model.generate(QUESTION, context=context, past_key_values=context.fork())


def test_a_foreign_cache_cannot_be_compressed(model):
    with model.beacon_disabled():
        foreign = model(PROMPT[:, :5]).past_key_values
    with pytest.raises(
        UnsupportedError,
        match=r"^Compressing needs input_ids and a cache of its own; got neither or another cache\.$",
    ):
        model.generate(QUESTION, past_key_values=foreign, beacon_ratio=4)
    # Without a ratio it is the base's business.
    mask = torch.ones(1, 8, dtype=torch.long)
    out = model.generate(QUESTION, past_key_values=foreign, attention_mask=mask, **greedy(max_new_tokens=3))
    base = base_of()
    whole = base.generate(torch.cat((PROMPT[:, :5], QUESTION), dim=1), **greedy(max_new_tokens=3))
    assert torch.equal(out[:, -3:], whole[:, -3:])


def test_a_context_of_another_model_is_refused(model, context):
    other = model_of(seed=1)
    with pytest.raises(MismatchError, match=r"^The context was made with another base model \(fingerprint "):
        other.generate(QUESTION, context=context)


def test_a_batch_of_contexts_needs_as_many_questions(model, context):
    with pytest.raises(
        InputError,
        match=r"^The context has 2 rows, the prompt 3\. Stack as many contexts, or give one\.$",
    ):
        model.generate(QUESTION.repeat(3, 1), context=BeaconCache.stack([context, context]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros((1, 0), dtype=torch.long),
            r"^The text is empty: there is no token to read\. Give at least one\.$",
        ),
        (torch.tensor([[3, 97]]), r"^Token ids must be within 0\.\.96; got 97\. Use the model's own tokenizer\.$"),
        (torch.tensor([[97]]), r"^Token ids must be within 0\.\.96; got 97\. Use the model's own tokenizer\.$"),
        (torch.tensor([[-1]]), r"^Token ids must be within 0\.\.96; got -1\. Use the model's own tokenizer\.$"),
        (torch.tensor([3, 4]), r"^input_ids must be \(B, T\); got \(2,\)\. Give one row for each prompt\.$"),
    ],
)
def test_questions_that_cannot_be_read_are_refused(model, context, ids, message):
    with pytest.raises(InputError, match=message):
        model.generate(ids, context=context, max_new_tokens=3)


def test_a_mask_with_holes_is_refused(model, context):
    mask = torch.tensor([[1, 0, 1]])
    with pytest.raises(InputError, match=r"^attention_mask has holes"):
        model.generate(QUESTION, attention_mask=mask, context=context, max_new_tokens=3)


def test_an_unknown_ratio_is_refused(model, context):
    with pytest.raises(RatioError, match=r"^ratio \(16\) is not one that this adapter knows\. Use 2, 4, 8\.$"):
        model.generate(QUESTION, context=context, beacon_ratio=16)


# --- capacity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["call", "config", "model", "max_length"])
def test_an_answer_that_cannot_fit_is_refused_before_it_begins(where):
    model, recorder = model_of(max_position_embeddings=40), Recorder()
    options = {"call": {"max_new_tokens": 40}, "max_length": {"max_length": 81}, "model": {}}.get(where)
    if where == "config":
        options = {"generation_config": GenerationConfig(max_new_tokens=40)}
    try:
        model.generation_config.max_new_tokens = 40 if where == "model" else None
        with pytest.raises(CapacityError) as caught:
            model.generate(PROMPT, beacon_ratio=2, streamer=recorder, **options)
        assert str(caught.value) == (
            "A text of 80 tokens needs 48 positions at ratio 2; the base model has 40. Use ratio 4."
        )
        assert recorder.parts == []
        out = model.generate(PROMPT, beacon_ratio=4, **options)
        assert out.shape == (1, 81)
    finally:
        model.generation_config.max_new_tokens = None


def test_padding_does_not_count_against_capacity():
    model = model_of(max_position_embeddings=40)
    full = model.compress(random_ids(48, 1), ratio=2)  # 16 beacons, 16 in the tail
    short = model.compress(random_ids(2, 2), ratio=2)
    ids, mask = left_padded([[5], random_ids(30, 3)[0].tolist()])
    both = BeaconCache.stack([full, short])
    out = model.generate(ids, attention_mask=mask, context=both, beacon_ratio=2, **greedy(max_new_tokens=14))
    alone = model.generate(ids[:1, -1:], context=full, beacon_ratio=2, **greedy(max_new_tokens=14))
    assert torch.equal(out[0, -14:], alone[0, -14:])


def test_an_answer_that_cannot_fit_is_refused_for_new_ids_of_past_key_values_too():
    model = model_of(max_position_embeddings=40)
    cache = model.compress(PROMPT, ratio=2)
    with pytest.raises(CapacityError, match=r"at ratio 2; the base model has 40\."):
        model.generate(QUESTION, past_key_values=cache, **greedy(max_new_tokens=37))
    assert cache.tokens_seen == 41


@pytest.mark.parametrize(("prompts", "options"), [(1, {"beacon_ratio": 8}), (3, {})], ids=["ratio", "batch"])
def test_a_refused_call_leaves_the_callers_cache_as_it_was(prompts, options):
    model = model_of(max_position_embeddings=40)
    cache = model.compress(PROMPT, ratio=2)
    policies, rows, layers = cache.policies, cache.rows, cache.layers
    with pytest.raises(CapacityError):
        model.generate(QUESTION.repeat(prompts, 1), past_key_values=cache, **options, **greedy(max_new_tokens=10**4))
    assert (cache.policies, cache.rows, cache.layers, cache.is_continued) == (policies, rows, layers, False)
    model.generate(QUESTION.repeat(prompts, 1), past_key_values=cache, **options, **greedy(max_new_tokens=2))
    assert cache.batch_size == prompts
    assert cache.policy.ratio == options.get("beacon_ratio", 2)


# --- going on, and what new users get wrong --------------------------------------------------------------------------


def test_what_generate_returned_on_a_context_is_not_read_again(model, context):
    first = model.generate(QUESTION, context=context, max_new_tokens=SHORT, return_dict_in_generate=True, **greedy())
    grown = first.past_key_values.fork()
    prompt = torch.cat([first.sequences, random_ids(4, 9)], dim=1)
    second = model.generate(prompt, past_key_values=first.past_key_values, max_new_tokens=SHORT, **greedy())
    new_ids = prompt[:, grown.tokens_seen - context.tokens_seen :]
    expected = model.generate(new_ids, context=grown, max_new_tokens=SHORT, **greedy())
    assert torch.equal(second[:, -SHORT:], expected[:, -SHORT:])
    assert first.past_key_values.tokens_seen == context.tokens_seen + prompt.shape[1] + SHORT - 1


MOVES = {
    "row": lambda cache, path: cache.row(0),
    "to": lambda cache, path: cache.to(torch.float32),
    "quantize": lambda cache, path: cache.quantize(8),
    "compacted": lambda cache, path: cache.compacted(),
    "stack": lambda cache, path: BeaconCache.stack([cache]),
    "save and load": lambda cache, path: (cache.save(path), BeaconCache.load(path))[1],
}


@pytest.mark.parametrize("name", MOVES)
def test_what_was_returned_is_not_read_again_after_the_cache_was_moved(model, context, tmp_path, name):
    first = model.generate(QUESTION, context=context, max_new_tokens=SHORT, return_dict_in_generate=True, **greedy())
    cache = MOVES[name](first.past_key_values, tmp_path / "one.beacon")
    prompt = torch.cat([first.sequences, random_ids(4, 9)], dim=1)
    model.generate(prompt, past_key_values=cache, max_new_tokens=1, **greedy())
    assert cache.tokens_seen == context.tokens_seen + prompt.shape[1]


def test_each_row_of_a_batch_goes_on_after_its_own_context(model):
    contexts = BeaconCache.stack([model.compress(random_ids(length, length), ratio=4) for length in (38, 21)])
    questions = random_ids(3, 5, batch=2)
    first = model.generate(questions, context=contexts, max_new_tokens=5, return_dict_in_generate=True, **greedy())
    seen = [row.tokens_seen for row in first.past_key_values.rows]
    prompt = torch.cat([first.sequences, random_ids(2, 6, batch=2)], dim=1)
    model.generate(prompt, past_key_values=first.past_key_values, max_new_tokens=1, **greedy())
    assert [row.tokens_seen for row in first.past_key_values.rows] == [number + 3 for number in seen]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, c: m.generate(QUESTION, context="book.beacon"),
            InputError,
            "context must be a BeaconCache; got str. Load it: BeaconCache.load(path, model).",
        ),
        (
            lambda m, c: m.generate(context=c),
            InputError,
            "generate(context=...) needs input_ids: the ids of what follows the context, a question.",
        ),
        (
            lambda m, c: m.generate(PROMPT, past_key_values=DynamicCache()),
            UnsupportedError,
            (
                "A DynamicCache cannot hold beacons, and the prompt of 41 tokens is longer than a chunk. "
                "Leave past_key_values out, or use beacon_disabled()."
            ),
        ),
        (
            lambda m, c: m.generate(
                PROMPT.repeat(2, 1), attention_mask=torch.tensor([[1] * 41, [1] * 30 + [0] * 11]), max_new_tokens=2
            ),
            InputError,
            "A row of attention_mask ends in padding. Pad prompts on the left: padding_side='left'.",
        ),
        (
            lambda m, c: m(QUESTION, context=c),
            InputError,
            "A model's forward calls it past_key_values, not context. Use model(..., past_key_values=...).",
        ),
        (
            lambda m, c: m(PROMPT, ratio=4),
            InputError,
            "A model's forward calls it beacon_ratio, not ratio. Use model(..., beacon_ratio=...).",
        ),
        (
            lambda m, c: m.compress("a text"),
            InputError,
            "Texts are read as token ids; got a string. Give tokenizer(text), or its input_ids.",
        ),
        (lambda m, c: c.row(1), InputError, "There is no row 1 in a batch of 1."),
    ],
)
def test_what_new_users_get_wrong_is_answered_in_one_line(model, context, call, error, message):
    with pytest.raises(error) as caught:
        call(model, context)
    assert str(caught.value) == message


def test_compress_takes_what_a_tokenizer_returns(model):
    ids, mask = random_ids(20, 4, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    whole = model.compress({"input_ids": ids, "attention_mask": mask}, ratio=4)
    assert [row.tokens_seen for row in whole.rows] == [20, 13]
    lists = model.compress({"input_ids": ids.tolist(), "attention_mask": mask.tolist()}, ratio=4)
    assert lists.rows == whole.rows
    assert torch.equal(lists.token_ids, whole.token_ids)
    assert model.compress({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}).tokens_seen == 3
    assert model.compress({"input_ids": [[5, 6, 7]]}).tokens_seen == 3


def test_rows_count_from_the_end_too(model):
    contexts = model.compress([[5, 6, 7], [8, 9]], ratio=4)
    assert contexts.row(-1).token_ids.tolist() == [[8, 9]]


# --- models with a `generate` of their own ---------------------------------------------------------------------------------


def test_a_models_own_generate_may_take_its_arguments_in_another_order():
    """Janus's has the mask where transformers' has the configuration."""

    class Own(LlamaForCausalLM):
        def generate(self, inputs=None, attention_mask=None, **kwargs):
            assert attention_mask is None or isinstance(attention_mask, torch.Tensor)
            return super().generate(inputs, attention_mask=attention_mask, **kwargs)

    plain, own = tiny("llama"), tiny("llama")
    own.__class__ = Own
    settings = GenerationConfig(max_new_tokens=5, do_sample=False)
    for model in (plain, own):
        attach(model, CONFIG)
    for prompt in (PROMPT, PROMPT[:, :7]):
        assert torch.equal(own.generate(prompt, settings), plain.generate(prompt, settings))
        with own.beacon_disabled(), plain.beacon_disabled():
            assert torch.equal(own.generate(prompt, settings), plain.generate(prompt, settings))
    context = own.compress(TEXT, ratio=4)
    expected = plain.generate(PROMPT[:, :7], settings, context=plain.compress(TEXT, ratio=4))
    assert torch.equal(own.generate(PROMPT[:, :7], settings, context=context), expected)


# --- rows that end before others ----------------------------------------------------------------------------------------


def end_of_the_first(model, prompts, **options):
    """A token of the first of two answers that it has not before and the other has not at all, and its place; never the last."""
    first, other = model.generate(prompts, max_new_tokens=SHORT, **greedy(), **options)[:, prompts.shape[1] :].tolist()
    return next(
        (token, place) for place, token in enumerate(first[:-1]) if place and token not in [*first[:place], *other]
    )


@pytest.mark.parametrize("kind", ["short", "context", "long"])
@torch.no_grad()
def test_a_row_that_has_ended_goes_on_as_it_does_alone(model, kind):
    texts = {"short": (random_ids(6, 1), random_ids(6, 4)), "long": (PROMPT, random_ids(41, 9))}
    prompts = torch.cat(texts.get(kind, (QUESTION, random_ids(3, 5))))
    context = model.compress(TEXT, ratio=4) if kind == "context" else None
    options = {"beacon_ratio": 4} if kind == "long" else {}
    end, place = end_of_the_first(model, prompts, context=context, **options)
    options |= {"eos_token_id": end, "pad_token_id": 0, "max_new_tokens": SHORT, "return_dict_in_generate": True}
    both = model.generate(prompts, context=context, **options, **greedy())
    follow_up = random_ids(4, 8)
    whole = torch.cat((both.sequences, follow_up.expand(2, -1)), dim=1)
    mask = torch.ones_like(whole)
    mask[0, prompts.shape[1] + place + 1 : both.sequences.shape[1]] = 0  # padding behind the end
    grown = both.past_key_values
    assert [row.tokens_seen for row in grown.rows] == [
        (38 if context is not None else 0) + prompts.shape[1] + count for count in (place, SHORT - 1)
    ]
    answers = model.generate(
        whole, attention_mask=mask, past_key_values=grown, max_new_tokens=4, eos_token_id=None, **greedy()
    )
    for row in range(2):
        alone = model.generate(prompts[row : row + 1], context=context, **options, **greedy())
        ids = torch.cat((alone.sequences, follow_up), dim=1)
        last = model.generate(
            ids, past_key_values=alone.past_key_values, max_new_tokens=4, eos_token_id=None, **greedy()
        )
        assert torch.equal(answers[row, whole.shape[1] :], last[0, ids.shape[1] :])


@torch.no_grad()
def test_padding_that_has_closed_a_chunk_stays_and_is_told(model, caplog):
    prompts = torch.cat((random_ids(6, 1), random_ids(6, 4)))
    end, place = end_of_the_first(model, prompts)
    options = {"eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(prompts, max_new_tokens=30, **options, **greedy())
    assert [row.tokens_seen for row in out.past_key_values.rows] == [35, 35]
    assert f"Row 0 ended {29 - place} tokens before others" in caplog.text


@torch.no_grad()
def test_where_rows_go_on_though_a_criterion_has_ended_one_they_keep_what_they_wrote(model):
    class EndsTheFirst(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 8, False])

    prompts = torch.cat((random_ids(6, 1), random_ids(6, 4)))
    out = model.generate(
        prompts, max_new_tokens=SHORT, stopping_criteria=[EndsTheFirst()], return_dict_in_generate=True, **greedy()
    )
    assert torch.equal(out.past_key_values.token_ids, out.sequences[:, :-1])


# --- embeddings ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_short_prompts_of_embeddings_are_the_bases(model):
    base, ids = base_of(), random_ids(8)
    embedded = base.get_input_embeddings()(ids)
    expected = base.generate(inputs_embeds=embedded, max_new_tokens=20, **greedy())
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=20, **greedy()), expected)
    both = model.generate(ids, inputs_embeds=embedded, max_new_tokens=20, **greedy())
    assert torch.equal(both, base.generate(ids, inputs_embeds=embedded, max_new_tokens=20, **greedy()))
    with model.beacon_disabled():
        assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=20, **greedy()), expected)


@torch.no_grad()
def test_embeddings_are_refused_where_they_would_be_compressed(model, context):
    embedded = model.get_input_embeddings()(PROMPT)
    with pytest.raises(UnsupportedError, match="got inputs_embeds of 41 tokens, more than a chunk"):
        model.generate(inputs_embeds=embedded)
    for held in ({"context": context}, {"past_key_values": context.fork()}, {"beacon_ratio": 4}):
        with pytest.raises(UnsupportedError, match="Compressing needs input_ids"):
            model.generate(QUESTION, inputs_embeds=embedded[:, :3], **held)


@torch.no_grad()
def test_states_of_a_compressed_prompt_are_there_for_every_sequence(model):
    options = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    out = model.generate(PROMPT, num_beams=2, max_new_tokens=3, beacon_ratio=4, **options)
    assert {states[-1].shape[0] for states in (*out.hidden_states, *out.attentions)} == {2}


def test_a_list_of_ratios_names_every_chunk_of_the_prompt(model):
    with pytest.raises(RatioError, match="names 1 chunk, but the text of 41 tokens closes 2"):
        model.generate(PROMPT, beacon_ratio=[2], max_new_tokens=3)
    out = model.generate(PROMPT, beacon_ratio=[2, 4], max_new_tokens=20, return_dict_in_generate=True)
    assert out.past_key_values.ratios == (2, 4, 4)


@pytest.mark.parametrize("family", ["phi3", "llama"])
@pytest.mark.parametrize("kind", ["prompt", "context"])
@torch.no_grad()
def test_steps_read_one_token_each_whatever_a_family_thinks_of_the_length_of_the_text(family, kind):
    model = with_beacons(family, CONFIG, **shape_of(family), original_max_position_embeddings=32)
    options = {"max_new_tokens": SHORT, **greedy()}
    context = model.compress(TEXT, ratio=4) if kind == "context" else None
    prompt = random_ids(33, 2) if kind == "context" else PROMPT
    named = {"context": context} if kind == "context" else {"beacon_ratio": 4}
    seen = widths(model, lambda: model.generate(prompt, **named, **options))
    assert seen[-SHORT + 1 :] == [1] * (SHORT - 1)


@pytest.mark.parametrize(
    ("named", "ids"),
    [(None, set()), (0, {0}), ([2, 5], {2, 5}), ((2,), {2}), (torch.tensor(7), {7}), (torch.tensor([7, 1]), {1, 7})],
)
def test_end_tokens_are_read_in_every_form_that_transformers_knows(named, ids):
    assert end_ids(named) == ids
