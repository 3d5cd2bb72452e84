"""A conversation to train on is what the template makes of it; its targets are the answers and what ends them."""

import pytest

from activation_beacon.errors import InputError
from activation_beacon.training.conversations import Conversations, Turn
from training_texts import MARKED, UNMARKED, answers_of, letter_tokenizer, text_of

TURNS = [Turn("Who?", "Ann."), Turn("Where?", "Here, of course."), Turn("When?", "Now")]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_conversation_is_what_the_template_makes_of_it(count):
    tokenizer = letter_tokenizer(MARKED)
    sample = Conversations(tokenizer).sample("A story.", TURNS[:count])
    messages = [{"role": "user", "content": f"A story.\n\n{TURNS[0].question}"}]
    for turn, following in zip(TURNS[:count], [*TURNS[1:count], None], strict=True):
        messages.append({"role": "assistant", "content": turn.answer})
        messages += [{"role": "user", "content": following.question}] if following else []
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text_of(sample.ids.tolist()) == rendered.removesuffix("\n")
    assert answers_of(sample) == [f"{turn.answer}<|end|>" for turn in TURNS[:count]]


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_ends_an_answer_with_a_blank_and_the_end_of_text_ends_it_once():
    sample = Conversations(letter_tokenizer(LLAMA_2)).sample("A story.", TURNS[:2])
    assert text_of(sample.ids.tolist()) == (
        "[INST] A story.\n\nWho? [/INST]Ann.<|eos|>[INST] Where? [/INST]Here, of course.<|eos|>"
    )
    assert answers_of(sample) == ["Ann.<|eos|>", "Here, of course.<|eos|>"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (UNMARKED, "<|user|>A story.\n\nWho?\n<|bot|>Ann.<|eos|>\n<|user|>Where?\n<|bot|>Here, of course.<|eos|>"),
        (
            None,
            "A story.\n\nQuestion: Who?\nAnswer: Ann.<|eos|>\n\nQuestion: Where?\nAnswer: Here, of course.<|eos|>",
        ),
    ],
)
def test_where_the_template_ends_no_answer_the_end_of_text_does(template, text):
    sample = Conversations(letter_tokenizer(template)).sample("A story.", TURNS[:2])
    assert text_of(sample.ids.tolist()) == text
    assert [answer.strip() for answer in answers_of(sample)] == ["Ann.<|eos|>", "Here, of course.<|eos|>"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, LLAMA_2, None])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sample_is_as_long_as_its_parts_and_the_overheads(template, count):
    made = Conversations(letter_tokenizer(template))
    parts = made.lengths([text for turn in TURNS[:count] for text in turn])
    length = len(made.sample("A story.", TURNS[:count]).ids)
    assert length <= made.overhead + len("A story.") + sum(parts) + count * made.turn_overhead
    assert made.lengths([]) == []


def test_an_answer_ends_once_whatever_is_written_in_it():
    conversations = Conversations(letter_tokenizer(MARKED))
    sample = conversations.sample("On <|end|> marks.", [Turn("Which?", "This one: <|end|>."), Turn("And?", "<|user|>")])
    targets = sample.ids[sample.is_target].tolist()
    assert targets.count(conversations.end) == 2
    assert targets[-1] == conversations.end
    texts = ["plain", "This one: <|end|>."]
    assert conversations.lengths(texts) == [len(conversations.ids(text)) for text in texts]


def test_a_tokenizer_that_cannot_end_an_answer_is_refused():
    assert Conversations(letter_tokenizer(MARKED, eos=None)).end is not None
    with pytest.raises(InputError) as caught:
        Conversations(letter_tokenizer(UNMARKED, eos=None))
    assert str(caught.value) == (
        "The tokenizer has no eos_token, so that no answer could end. Set tokenizer.eos_token."
    )
