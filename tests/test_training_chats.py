"""Whole conversations to train on: what the chat template makes of them, each once an epoch."""

import pytest
import torch

from activation_beacon.data.sources import Chat
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.training.chats import Chats, digest_of
from activation_beacon.training.conversations import Conversations, Turn
from activation_beacon.training.samplers import RunData, stage_samplers
from activation_beacon.training.sampling import NEIGHBOURS
from activation_beacon.training.settings import TrainingSettings
from training_texts import MARKED, UNMARKED, answers_of, letter_tokenizer, text_of

CHUNK = 16
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + MARKED
SILENT = MARKED.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
TURNS = [Turn("Who?", "Ann."), Turn("Where?", "Here, of course."), Turn("When?", "Now")]


def chat_of(number, length):
    """A conversation whose last answer brings it to so many tokens in the tokenizer of one id for each letter."""
    bare = len(Conversations(letter_tokenizer(MARKED)).chat("", [Turn(f"{number}?", "")]).ids)
    return Chat(str(number), "", ((f"{number}?", "a" * (length - bare)),))


def made(chats, *, length=6 * CHUNK, seed=0, template=MARKED):
    return Chats(chats, letter_tokenizer(template), length=length, chunk_size=CHUNK, seed=seed)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_conversation_is_what_the_template_makes_of_it(count, system):
    tokenizer = letter_tokenizer(MARKED)
    sample = Conversations(tokenizer).chat(system, TURNS[:count])
    messages = [{"role": "system", "content": system}] if system else []
    for turn in TURNS[:count]:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    assert text_of(sample.ids.tolist()) == tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert answers_of(sample) == [f"{turn.answer}<|end|>" for turn in TURNS[:count]]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (NO_SYSTEM, "<|user|>Be brief.\n\nWho?<|end|>\n<|bot|>Ann.<|end|>"),
        (SILENT, "<|user|>Be brief.\n\nWho?<|end|>\n<|bot|>Ann.<|end|>"),
        (UNMARKED, "<|bot|>Be brief.\n<|user|>Who?\n<|bot|>Ann.<|eos|>"),
        (None, "Question: Be brief.\n\nWho?\nAnswer: Ann.<|eos|>"),
    ],
)
def test_a_system_message_opens_the_question_where_the_template_has_no_place_for_it(template, text):
    sample = Conversations(letter_tokenizer(template)).chat("Be brief.", TURNS[:1])
    assert text_of(sample.ids.tolist()) == text
    assert [answer.strip() for answer in answers_of(sample)] == [text[text.index("Ann.") :]]


def test_an_epoch_has_each_conversation_once_in_another_order():
    chats = [chat_of(number, 20 + number % 70) for number in range(3 * NEIGHBOURS)]
    sampler = made(chats)
    epochs = [[tuple(sampler.sample(e * len(chats) + n).ids.tolist()) for n in range(len(chats))] for e in (0, 1)]
    assert len(sampler) == len(chats) == len(set(epochs[0]))
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    lengths = [len(ids) for ids in epochs[0]]
    assert lengths[:NEIGHBOURS] == sorted(lengths[:NEIGHBOURS])
    assert torch.equal(sampler.sample(3).ids, made(chats).sample(3).ids)
    assert any(not torch.equal(sampler.sample(n).ids, made(chats, seed=1).sample(n).ids) for n in range(5))


def test_what_is_too_long_or_within_a_chunk_is_left_out_and_counted():
    chats = [chat_of(number, length) for number, length in enumerate((CHUNK, CHUNK + 1, CHUNK + 2, 96, 97))]
    sampler = made(chats)
    assert (len(sampler), sampler.num_shorter, sampler.num_longer) == (2, 2, 1)
    assert sorted(len(sampler.sample(n).ids) for n in range(2)) == [CHUNK + 2, 96]
    with pytest.raises(InputError) as caught:
        made([chats[0], chats[4]])
    assert str(caught.value) == (
        "Conversations need more than one chunk (16 tokens), and no more than 96 tokens, to be trained on; of 2, 1 are shorter "
        "and 1 longer. Name others, or change the length or the chunk size."
    )
    with pytest.raises(ConfigError, match="must be a multiple of chunk_size"):
        made(chats, length=50)


def test_the_digest_is_of_all_that_is_said():
    chat = Chat("a", "s", (("q", "a"),))
    others = [Chat("a", "t", (("q", "a"),)), Chat("a", "s", (("q", "b"),)), Chat("a", "s", (("q", "a"), ("q", "a")))]
    assert digest_of([chat]) == digest_of([Chat("b", "s", (("q", "a"),))])
    assert len({digest_of(each) for each in ([chat], *([other] for other in others), [chat, chat])}) == 5
    assert RunData(None, None, [], [], [chat]).digests == {"chats": digest_of([chat])}


def test_a_stage_of_conversations_tells_what_it_reads():
    settings = TrainingSettings.from_dict(
        {
            "output": "x",
            "chats": ["a.jsonl"],
            "config": {"chunk_size": CHUNK, "ratios": [2]},
            "stages": [{"documents": 0, "chats": 1, "length": 96}],
        }
    )
    told = []
    data = RunData(None, None, [], [], [chat_of(0, 40), chat_of(1, 10), chat_of(2, 200)])
    [sampler] = stage_samplers(settings, data, letter_tokenizer(MARKED), told.append)
    assert len(sampler.sample(0).ids) == 40
    assert told == ["Conversations: 1 are read, 1 are longer than 96 tokens, 1 are no longer than a chunk."]
