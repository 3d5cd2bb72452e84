import pytest

from activation_beacon.base_models import load_pretrained_base
from activation_beacon.books import DEMO_ANSWERS, DEMO_BOOK_AUTHOR, DEMO_BOOK_TITLE, DEMO_QUESTIONS, read_demo_book


def test_the_demo_book_opens_with_its_title_and_author():
    assert read_demo_book().startswith(f"{DEMO_BOOK_TITLE.upper()}\n\nby {DEMO_BOOK_AUTHOR}\n")


def test_the_demo_book_is_a_whole_and_plain_text():
    text = read_demo_book()
    assert text.endswith("the Tin Woodman was very careful not to stand up in the boat again.\n")
    assert text.isascii()
    assert len(text) == 59_412
    assert "gutenberg" not in text.lower()


def test_every_demo_question_has_an_answer_that_stands_in_the_book():
    text = read_demo_book()
    assert len(DEMO_QUESTIONS) == len(DEMO_ANSWERS) == 3
    for answer in DEMO_ANSWERS:
        for words in answer.replace(" and ", ", ").split(", "):
            assert words in text, words


@pytest.mark.default_model
def test_the_demo_book_is_longer_than_the_default_model_can_read():
    model, tokenizer = load_pretrained_base("default")
    num_tokens = len(tokenizer(read_demo_book()).input_ids)
    assert num_tokens == 14_591
    assert num_tokens > model.config.max_position_embeddings
