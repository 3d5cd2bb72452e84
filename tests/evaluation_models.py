"""A tiny model with beacons that reads bytes, for tests of evaluation."""

from activation_beacon import BeaconConfig, ChatPrompt
from families import with_beacons
from saved_models import CHUNK, byte_tokenizer

CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8))
OWN = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
STORY = "The lion said nothing at all to the tiger. It was late! Nobody knew why; the moon rose. " * 40


def beacon_model(**overrides):
    return with_beacons("llama", CONFIG, **{**OWN, "max_position_embeddings": 4096, **overrides})


def byte_prompt():
    return ChatPrompt(byte_tokenizer())


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
