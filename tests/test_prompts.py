"""Where a document and a question meet: cut anywhere, the pieces are the whole message."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from activation_beacon import ChatPrompt
from activation_beacon.errors import InputError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<system>Be kind.</>\n{% endif %}" + CHATML
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def tokenizer_of(template: str | None = None, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One id for each letter; `^` opens a text."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", LETTERS.index("^"))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="^", clean_up_tokenization_spaces=False, model_max_length=50
    )
    fast.chat_template = template
    return fast


def text_of(ids: list[int]) -> str:
    return "".join(LETTERS[number] for number in ids)


def rendered(tokenizer, messages: list[tuple[str, str]]) -> str:
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT_SYSTEM])
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_the_pieces_are_the_message_that_the_template_makes(template, system):
    tokenizer = tokenizer_of(template)
    prompt = ChatPrompt(tokenizer, system=system)
    opening = [("system", system)] if system else []
    pieces = text_of(prompt.opening("The book.") + prompt.question("Who?"))
    assert pieces == rendered(tokenizer, [*opening, ("user", "The book.\n\nWho?")])
    assert pieces.endswith("<user>The book.\n\nWho?</>\n<assistant>")
    longer = pieces + "Me." + text_of(prompt.follow_up("And you?"))
    turns = [("user", "The book.\n\nWho?"), ("assistant", "Me."), ("user", "And you?")]
    assert longer == rendered(tokenizer, [*opening, *turns])
    assert text_of(prompt.message("Hello?")) == rendered(tokenizer, [*opening, ("user", "Hello?")])


def test_a_template_writes_its_own_bos_and_the_tokenizer_adds_none():
    prompt = ChatPrompt(tokenizer_of(CHATML, adds_bos=True))
    assert text_of(prompt.opening("x")) == "^<user>x"
    assert text_of(prompt.message("x")).count("^") == 1
    assert text_of(prompt.question("x") + prompt.follow_up("y")).count("^") == 0


def test_without_a_template_a_question_is_plain():
    prompt = ChatPrompt(tokenizer_of(adds_bos=True))
    assert not prompt.has_template
    assert text_of(prompt.opening("The book.")) == "^The book."
    assert text_of(prompt.question("Who?")) == "\n\nQuestion: Who?\nAnswer:"
    assert text_of(prompt.follow_up("And you?")) == "\n\nQuestion: And you?\nAnswer:"
    assert text_of(prompt.message("Hello?")) == "^Question: Hello?\nAnswer:"


def test_a_document_of_any_length_and_content_is_read_as_it_is():
    prompt = ChatPrompt(tokenizer_of(CHATML))
    for document in ("", " spaces ", "x" * 500, "{{ bos_token }} {% for %}", "[[the-question]] [[the-document]]"):
        assert text_of(prompt.opening(document)) == "^<user>" + document
        assert text_of(prompt.question(document)) == "\n\n" + document + "</>\n<assistant>"


def test_a_template_that_swallows_the_text_is_refused():
    with pytest.raises(InputError) as caught:
        ChatPrompt(tokenizer_of("{{ bos_token }}<assistant>"))
    assert str(caught.value) == (
        "The tokenizer's chat template drops or changes the message's text ([[the-document]] is not in it)."
    )


def test_a_template_that_changes_the_text_is_refused():
    with pytest.raises(InputError, match=r"drops or changes the message's text \(\[\[the-document\]\] is not in it\)"):
        ChatPrompt(tokenizer_of("{% for m in messages %}{{ m.content | upper }}{% endfor %}"))
