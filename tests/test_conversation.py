"""Questions and answers in words: against the same conversation read in one piece."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from activation_beacon import BeaconCache, ChatPrompt, Conversation, load
from activation_beacon.conversation import is_circle
from activation_beacon.errors import InputError, MismatchError
from saved_models import byte_tokenizer, save_adapter, save_base

torch.set_num_threads(1)  # threads that wait for one another make models as small as these slower

TEXT = "The lion said nothing at all to the tiger, and went to sleep under a tree.\n" * 12
PROMPT = ChatPrompt(byte_tokenizer())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("conversation")
    save_base(root / "base", seed=0)
    save_adapter(root / "adapter", root / "base", seed=2)
    save_adapter(root / "other", root / "base", seed=3)
    return root


@pytest.fixture
def model(files):
    return load(files / "adapter")[0]  # its generation config is changed here and there


@pytest.fixture
def start(model):
    return model.compress(PROMPT.opening(TEXT), ratio=4)


def begin(model, context=None):
    return Conversation(model, byte_tokenizer(), context)


def greedy(model, context, ids, count):
    """Text and ids of the answer."""
    out = model.generate(torch.tensor([ids]), context=context, max_new_tokens=count, do_sample=False)[0, len(ids) :]
    return byte_tokenizer().decode(out, skip_special_tokens=True).strip(), out.tolist()


def test_each_turn_is_what_the_whole_conversation_gives(model, start):
    conversation = begin(model, start)
    ids = PROMPT.question("Who?")
    for turn, text in enumerate(("Who?", "Why?", "Where?"), 1):
        expected, written = greedy(model, start, ids, 6)
        reply = conversation.ask(text, max_new_tokens=6)
        assert (str(reply), reply.num_tokens, conversation.num_turns) == (expected, 6, turn)
        ids = [*ids, *written, *PROMPT.follow_up(("Why?", "Where?", "")[turn - 1])]
    whole = conversation.whole_context()
    assert whole.token_ids[0].tolist() == [*start.token_ids[0].tolist(), *ids[: len(ids) - len(PROMPT.follow_up(""))]]
    assert whole.tokens_seen == conversation.context.tokens_seen + len(conversation.unread)


def test_the_context_that_it_begins_with_stays_as_it_was(model, start):
    before, seen = start.layers[0].keys.clone(), start.tokens_seen
    conversation = begin(model, start)
    first = conversation.ask("Who?", max_new_tokens=40)
    conversation.reset()
    assert (conversation.num_turns, conversation.unread, conversation.context.tokens_seen) == (0, [], seen)
    assert conversation.ask("Who?", max_new_tokens=40).text == first.text
    assert start.tokens_seen == seen
    assert torch.equal(start.layers[0].keys, before)


def test_it_needs_no_text_and_goes_on_from_what_another_left(model, tmp_path):
    whole = begin(model)
    said = [whole.ask(text, max_new_tokens=6).text for text in ("Hello.", "Who?", "Why?")]
    half = begin(model)
    assert [half.ask(text, max_new_tokens=6).text for text in ("Hello.", "Who?")] == said[:2]
    half.whole_context().save(tmp_path / "half.beacon")
    other = begin(model, BeaconCache.load(tmp_path / "half.beacon", model))
    assert other.ask("Why?", max_new_tokens=6).text == said[2]
    assert said[0] == greedy(model, None, PROMPT.message("Hello."), 6)[0]


def test_an_ended_answer_is_not_ended_twice(model, start):
    """The end-of-turn token that closes an answer comes with the next message's template."""
    ids = PROMPT.question("Who?")
    written = greedy(model, start, ids, 6)[1]
    model.generation_config.eos_token_id = written[-1]  # as if the model had ended its answer there
    conversation = begin(model, start)
    reply = conversation.ask("Who?", max_new_tokens=6)
    assert reply.is_complete
    assert conversation.unread == []
    conversation.ask("Why?", max_new_tokens=6)
    said = conversation.context.token_ids[0].tolist()[start.tokens_seen :]
    whole = [*ids, *written[: reply.num_tokens - 1], *PROMPT.follow_up("Why?")]
    assert said[: len(whole)] == whole


def test_pieces_come_as_they_are_written_and_it_stops_when_told(model, start):
    pieces, asked = [], []

    def should_stop():
        asked.append(len(pieces))
        return len(asked) == 4

    reply = begin(model, start).ask("Who?", write=pieces.append, should_stop=should_stop, max_new_tokens=9)
    assert (reply.num_tokens, len(asked)) == (4, 4)
    assert "".join(pieces).strip() == reply.text == greedy(model, start, PROMPT.question("Who?"), 4)[0]
    assert not reply.is_complete


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((1,), input_ids.shape[1] == len(PROMPT.question("Who?")) + 3)


def test_options_are_those_of_generate(model, start):
    conversation = begin(model, start)
    assert conversation.ask("Who?", stopping_criteria=[AfterThree()]).num_tokens == 3
    torch.manual_seed(0)
    drawn = begin(model, start).ask("Who?", max_new_tokens=12, do_sample=True, temperature=2.0).text
    torch.manual_seed(0)
    ids = torch.tensor([PROMPT.question("Who?")])
    out = model.generate(ids, context=start, max_new_tokens=12, do_sample=True, temperature=2.0)
    assert drawn == byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_generation_config_is_kept_to_and_what_it_leaves_open_is_greedy(model, start):
    conversation = begin(model, start)
    shorter = conversation.ask("Who?", generation_config=GenerationConfig(max_new_tokens=5))
    assert shorter.num_tokens == 5
    assert str(shorter) == greedy(model, start, PROMPT.question("Who?"), 5)[0]
    drawn = set()
    for seed in range(4):
        torch.manual_seed(seed)
        conversation.reset()
        config = GenerationConfig(do_sample=True, temperature=9.0, max_new_tokens=12)
        drawn.add(str(conversation.ask("Who?", generation_config=config)))
    assert len(drawn) > 1
    conversation.reset()
    assert conversation.ask("Who?", generation_config=config, do_sample=False).num_tokens == 12


def test_with_beams_it_goes_on_from_the_answer_that_was_given(model, start):
    conversation = begin(model, start)
    reply = conversation.ask("Who?", num_beams=3, max_new_tokens=6)
    ids = torch.tensor([PROMPT.question("Who?")])
    out = model.generate(ids, context=start, num_beams=3, max_new_tokens=6, do_sample=False)
    whole = conversation.whole_context()
    assert whole.batch_size == 1
    assert whole.token_ids[0].tolist() == [*start.token_ids[0].tolist(), *out[0, : ids.shape[1] + 6].tolist()]
    expected, _ = greedy(model, whole, PROMPT.follow_up("Why?"), 6)
    assert str(reply) == byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert str(conversation.ask("Why?", max_new_tokens=6)) == expected


def test_several_answers_to_one_question_are_refused_and_change_nothing(model, start):
    conversation = begin(model, start)
    with pytest.raises(InputError, match="num_return_sequences=2"):
        conversation.ask("Who?", num_return_sequences=2, do_sample=True)
    assert (conversation.num_turns, conversation.context.tokens_seen) == (0, start.tokens_seen)


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_an_answer_is_complete_by_the_end_tokens_of_its_own_call(model, start, where):
    ends = list(range(3, 250))
    if where == "model":
        model.generation_config.eos_token_id = ends
    options = {"call": {"eos_token_id": ends}, "config": {"generation_config": GenerationConfig(eos_token_id=ends)}}
    reply = begin(model, start).ask("Who?", **options.get(where, {}))
    assert reply.is_complete
    assert reply.unread == []


def test_an_answer_that_goes_round_in_a_circle_is_ended_unless_it_is_drawn(model, start, monkeypatch):
    monkeypatch.setattr("activation_beacon.conversation.is_circle", lambda ids: len(ids) == 5)
    reply = begin(model, start).ask("Who?")
    assert (reply.num_tokens, reply.is_repeating, reply.is_complete) == (5, True, False)
    drawn = begin(model, start).ask("Who?", do_sample=True, max_new_tokens=7)
    assert (drawn.num_tokens, drawn.is_repeating) == (7, False)


@pytest.mark.parametrize(
    ("ids", "is_one"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        ([1, 2, *range(3, 19), *range(3, 19), *range(3, 19)], True),
        ([1, 2, *range(3, 19), *range(3, 19), *range(3, 18)], False),
        (list(range(60)) * 3, True),
        (list(range(60)) * 2, False),
        ([1, 2, 3] * 10, False),
        ([1, 2, 3] * 11, True),
        ([], False),
    ],
)
def test_a_circle_is_the_same_three_times_and_at_some_length(ids, is_one):
    assert is_circle(ids) is is_one


def test_a_message_that_cannot_be_answered_changes_nothing(model, start):
    conversation = begin(model, start)
    conversation.ask("Who?", max_new_tokens=6)
    before = (conversation.context, list(conversation.unread), conversation.num_turns)
    with pytest.raises(
        InputError, match=r"^The question has 1,\d+ tokens; the base model reads 640 at once\. Put what is long"
    ):
        conversation.ask("long " * 200)
    assert (conversation.context, conversation.unread, conversation.num_turns) == before


def test_what_no_conversation_can_be_about_is_refused(files, model, start):
    batch = model.compress([PROMPT.opening(TEXT), PROMPT.opening("The lion.")], ratio=4)
    plain = model.compress([byte_tokenizer()(TEXT)["input_ids"]], ratio=4)
    other = load(files / "other")[0]
    for wrong, error, text in (
        (
            batch,
            InputError,
            "A conversation is about one context; this is a batch of 2. Use one of them: context.row(0).",
        ),
        (plain, InputError, "The context does not open with this model's chat template"),
        (other.compress(PROMPT.opening(TEXT), ratio=4), MismatchError, "adapter"),
    ):
        with pytest.raises(error) as caught:
            begin(model, wrong)
        assert text in str(caught.value)
    assert (
        begin(model, batch.row(0)).ask("Who?", max_new_tokens=6).text
        == begin(model, start).ask("Who?", max_new_tokens=6).text
    )
