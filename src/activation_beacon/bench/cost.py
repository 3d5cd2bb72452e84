"""Operations and bytes on paper: what reading and writing cost with full attention, and with beacons. Integers, no torch.

Counted are multiplications and additions of matrix products: 2 for each weight and token, and 4 for each query, key and
feature in attention. Norms, rotations and softmax are left out, and so is what a base model with sliding windows saves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from activation_beacon.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        num_layers: decoder layers.
        hidden_size: features of a token.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: features of a head.
        intermediate_size: of the gated feed-forward part.
        vocab_size: of the head.
        is_tied: whether the head is the token embedding.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool = False

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """The shape of a transformers config."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def attention_weights(self) -> int:
        """Of one layer: query, key, value and output projections."""
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def layer_weights(self) -> int:
        """Of one layer."""
        return self.attention_weights + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """Of the whole model, norms and biases left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        return self.num_layers * self.layer_weights + embeddings

    @property
    def beacon_weights(self) -> int:
        """Of an adapter with projections q, k and v."""
        rows = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * self.hidden_size * rows + self.hidden_size

    def token_flops(self, num_tokens: int) -> int:
        """Of all layers' weights, for so many tokens."""
        return 2 * num_tokens * self.num_layers * self.layer_weights

    def head_flops(self, num_tokens: int) -> int:
        """Of the head."""
        return 2 * num_tokens * self.vocab_size * self.hidden_size

    def attention_flops(self, num_pairs: int) -> int:
        """Of attention in all layers, for so many pairs of a query and a key it sees."""
        return 4 * num_pairs * self.num_layers * self.num_heads * self.head_dim

    def cache_bytes(self, num_entries: int, element_bytes: int) -> int:
        """Keys and values of all layers."""
        return 2 * num_entries * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


# From the models' own configurations.
SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49_152, is_tied=True),
    "llama-2-7b": ModelShape(32, 4096, 32, 32, 128, 11_008, 32_000),
    "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256),
    "qwen2-7b": ModelShape(28, 3584, 28, 4, 128, 18_944, 152_064),
}


@dataclass(frozen=True)
class Compression:
    """How a text is compressed; no ratio for full attention.

    Attributes:
        ratio: raw tokens per beacon.
        chunk_size: tokens of a chunk.
        num_sinks: first tokens kept raw.
    """

    ratio: int | None
    chunk_size: int = 1024
    num_sinks: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and (self.ratio < 2 or self.chunk_size % self.ratio):
            raise ConfigError(
                f"chunk_size ({self.chunk_size}) must be divisible by ratio ({self.ratio}), which is 2 or more."
            )

    def num_closed(self, num_tokens: int) -> int:
        """Chunks that are closed once so many tokens have been read."""
        return 0 if self.ratio is None else max(0, (num_tokens - 1) // self.chunk_size)

    def held_before(self, chunk: int) -> int:
        """Entries held before a chunk (from 0) is read."""
        if self.ratio is None or not chunk:
            return 0
        return self.num_sinks + chunk * (self.chunk_size // self.ratio)

    def entries(self, num_tokens: int) -> int:
        """Entries that the cache holds after so many tokens."""
        closed = self.num_closed(num_tokens)
        return self.held_before(closed) + num_tokens - closed * self.chunk_size

    def peak_entries(self, num_tokens: int) -> int:
        """Entries held at most on the way: the last closed chunk's slots, or the tail."""
        closed = self.num_closed(num_tokens)
        if self.ratio is None or not closed:
            return self.entries(num_tokens)
        slots = self.chunk_size + self.chunk_size // self.ratio
        return max(self.entries(num_tokens), self.held_before(closed - 1) + slots)

    def passes(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Slots of each pass of a prefill, and the entries held before it."""
        closed = self.num_closed(num_tokens)
        for chunk in range(closed):
            assert self.ratio is not None, "without a ratio no chunk is closed"
            yield self.chunk_size + self.chunk_size // self.ratio, self.held_before(chunk)
        yield num_tokens - closed * self.chunk_size, self.held_before(closed)


FULL_ATTENTION = Compression(None)


def prefill_flops(shape: ModelShape, num_tokens: int, how: Compression) -> int:
    """Operations of reading a text, and of the head once at its end."""
    total = shape.head_flops(1)
    for slots, held in how.passes(num_tokens):
        total += shape.token_flops(slots) + shape.attention_flops(slots * held + slots * (slots + 1) // 2)
    return total


def decode_flops(shape: ModelShape, num_tokens: int, num_new: int, how: Compression) -> int:
    """Operations of writing `num_new` tokens behind a text of `num_tokens`, chunks closed on the way included."""
    total = num_new * (shape.token_flops(1) + shape.head_flops(1))
    for length in range(num_tokens + 1, num_tokens + num_new + 1):
        total += shape.attention_flops(how.entries(length))
    for chunk in range(how.num_closed(num_tokens), how.num_closed(num_tokens + num_new)):
        assert how.ratio is not None, "without a ratio no chunk is closed"
        slots = how.chunk_size + how.chunk_size // how.ratio
        pairs = slots * how.held_before(chunk) + slots * (slots + 1) // 2
        total += shape.token_flops(slots) + shape.attention_flops(pairs)
    return total


def decode_bytes(shape: ModelShape, num_tokens: int, how: Compression, element_bytes: int) -> int:
    """Bytes that writing one token reads: all weights but the token embedding's table, and the cache."""
    embedding = 0 if shape.is_tied else shape.vocab_size * shape.hidden_size
    weights = (shape.num_weights - embedding) * element_bytes
    return weights + shape.cache_bytes(how.entries(num_tokens), element_bytes)


def end_to_end_speedup(shape: ModelShape, num_tokens: int, num_new: int, how: Compression) -> float:
    """How many times fewer operations than full attention needs for reading and writing."""
    full = prefill_flops(shape, num_tokens, FULL_ATTENTION) + decode_flops(shape, num_tokens, num_new, FULL_ATTENTION)
    return full / (prefill_flops(shape, num_tokens, how) + decode_flops(shape, num_tokens, num_new, how))


def break_even(shape: ModelShape, how: Compression, *, num_new: int = 0, limit: int = 1 << 22) -> int | None:
    """The shortest text, in whole chunks and one token, that beacons read with fewer operations; None up to `limit`."""
    for num_chunks in range(1, limit // how.chunk_size):
        num_tokens = num_chunks * how.chunk_size + 1
        if end_to_end_speedup(shape, num_tokens, num_new, how) > 1:
            return num_tokens
    return None


def memory_bytes(shape: ModelShape, num_tokens: int, how: Compression, element_bytes: int) -> int:
    """Bytes of weights, adapter and cache at its largest, and of one pass's activations in the feed-forward part."""
    adapter = 0 if how.ratio is None else shape.beacon_weights
    weights = (shape.num_weights + adapter) * element_bytes
    widest = max(slots for slots, _ in how.passes(num_tokens))
    activations = widest * (2 * shape.intermediate_size + 4 * shape.hidden_size) * element_bytes
    return weights + activations + shape.cache_bytes(how.peak_entries(num_tokens), element_bytes)


def longest_text(
    shape: ModelShape, how: Compression, gpu_bytes: int, element_bytes: int, *, limit: int = 1 << 24
) -> int:
    """Tokens of the longest text that fits a GPU's memory; 0 if not even the weights do, at most `limit`."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if memory_bytes(shape, middle, how, element_bytes) <= gpu_bytes:
            low = middle
        else:
            high = middle - 1
    return low
