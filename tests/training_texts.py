"""What tests of training texts share: a tokenizer with one id for each letter, and stores of texts."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from activation_beacon.training.token_store import TokenStore, build_token_store

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
MARKS = ["<|user|>", "<|bot|>", "<|end|>", "<|eos|>"]
OPENING = "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{% else %}<|bot|>{% endif %}"
CLOSING = "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
MARKED = OPENING + "{{ m.content }}<|end|>\n" + CLOSING  # as ChatML: a mark of its own ends a message
UNMARKED = OPENING + "{{ m.content }}\n" + CLOSING  # nothing ends an answer


def letter_tokenizer(template: str | None = MARKED, *, eos: str | None = "<|eos|>") -> PreTrainedTokenizerFast:
    """One id for each letter and each mark."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(MARKS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False, model_max_length=50
    )
    fast.chat_template = template
    return fast


def text_of(ids) -> str:
    """The letters and marks of ids."""
    return "".join([*LETTERS, *MARKS][number] for number in ids)


def text_with(number: int, length: int) -> str:
    """Sentences that say where they stand."""
    sentences = (f"Sentence {place} of {number} is here.{' ' if place % 7 else chr(10) * 2}" for place in range(length))
    return "".join(sentences)[:length]


def answers_of(sample) -> list[str]:
    """The runs of targets, as text."""
    runs, before = [], False
    for number, is_target in zip(sample.ids.tolist(), sample.is_target.tolist(), strict=True):
        if is_target and not before:
            runs.append("")
        if is_target:
            runs[-1] += text_of([number])
        before = is_target
    return runs


def store_of_texts(folder: Path, texts: list[str]) -> TokenStore:
    """The texts, tokenised."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return build_token_store(source, letter_tokenizer(), folder / "stores")


def num_chunks(sample, chunk_size):
    """Chunks that a sample touches, its raw last one included."""
    return -(-len(sample.ids) // chunk_size)
