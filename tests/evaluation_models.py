"""A tiny model with beacons and a tokenizer of one token for each byte, for tests of evaluation."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from activation_beacon import BeaconConfig, ChatPrompt
from families import with_beacons

CHUNK = 32
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8))
OWN = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
STORY = "The lion said nothing at all to the tiger. It was late! Nobody knew why; the moon rose. " * 40


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE)


def beacon_model(**overrides):
    return with_beacons("llama", CONFIG, **{**OWN, "max_position_embeddings": 4096, **overrides})


def byte_prompt():
    return ChatPrompt(byte_tokenizer())


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
