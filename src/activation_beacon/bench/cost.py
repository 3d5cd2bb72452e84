"""Operations and bytes on paper: what reading and writing cost with full attention, and with beacons. Integers, no torch.

Counted are multiplications and additions of matrix products: 2 for each weight and token, and 4 for each query, key and
feature in attention, in layers with a sliding window those within it. Norms, rotations and softmax are left out.
Operations are those of one text; bytes and what fits are those of a batch of texts of one length.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from activation_beacon.config import BeaconConfig, Placement
from activation_beacon.errors import ConfigError, UnsupportedError
from activation_beacon.families import is_recurrent
from activation_beacon.layouts import ROWS_TOGETHER_ON_CUDA, chunks_closed, within


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        num_layers: decoder layers.
        hidden_size: features of a token.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: features of a head.
        intermediate_size: of the gated feed-forward part; of experts, of all that a token is sent to.
        vocab_size: of the head.
        is_tied: whether the head is the token embedding.
        max_positions: that it was made for; None where it has no limit.
        num_windowed: layers with a sliding window.
        window: entries that a token sees in these, its own the last.
        shared_weights: in matrices of all layers, those that every token goes through; None where a layer is attention and one
            gated feed-forward part.
        expert_weights: of all experts of all layers.
        num_experts: of a layer.
        experts_per_token: that each token is sent to.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool = False
    max_positions: int | None = None
    num_windowed: int = 0
    window: int | None = None
    shared_weights: int | None = None
    expert_weights: int = 0
    num_experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def of(cls, config: Any, windows: Mapping[int, int]) -> "ModelShape":
        """The shape of a transformers config.

        Args:
            config: of the decoder.
            windows: of the layers that have one (`DecoderSite.windows`), which is the same for all.

        Raises:
            UnsupportedError: for latent attention, recurrent layers, and layers that share keys and values: their products are not
                those that are counted.
        """
        uncounted = {
            "latent attention": getattr(config, "kv_lora_rank", None),
            "recurrent layers": is_recurrent(config),
            "layers that share keys and values": getattr(config, "num_kv_shared_layers", None),
        }
        if what := next((what for what, is_there in uncounted.items() if is_there), None):
            raise UnsupportedError(
                f"The operations of {what} ({config.model_type}) are not counted here, so it cannot be planned for or "
                "measured beside its bound. Time model.compress and model.generate yourself."
            )
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
            max_positions=getattr(config, "max_position_embeddings", None),
            num_windowed=len(windows),
            window=next(iter(windows.values()), None),
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
        return self.weights_for(self.num_experts) + embeddings

    def weights_for(self, num_tokens: int) -> int:
        """Of all layers, those that so many tokens go through at most: each token may be sent to experts of its own."""
        shared = self.num_layers * self.layer_weights if self.shared_weights is None else self.shared_weights
        taken = min(self.num_experts, num_tokens * self.experts_per_token)
        return shared + self.expert_weights * taken // self.num_experts

    @property
    def beacon_weights(self) -> int:
        """Of an adapter with projections q, k and v."""
        rows = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * self.hidden_size * rows + self.hidden_size

    def token_flops(self, num_tokens: int) -> int:
        """Of all layers' weights, for so many tokens."""
        return 2 * num_tokens * self.weights_for(1)

    def head_flops(self, num_tokens: int) -> int:
        """Of the head."""
        return 2 * num_tokens * self.vocab_size * self.hidden_size

    def attention_flops(self, num_pairs: int, num_in_window: int = 0) -> int:
        """Of attention in all layers, for so many pairs of a query and a key it sees, and so many in a layer with a window."""
        return 4 * self._in_all_layers(num_pairs, num_in_window) * self.num_heads * self.head_dim

    def cache_bytes(self, num_entries: int, element_bytes: int, num_in_window: int = 0) -> int:
        """Keys and values of all layers, which hold so many entries, those with a window so many."""
        numbers = self._in_all_layers(num_entries, num_in_window)
        return 2 * numbers * self.num_kv_heads * self.head_dim * element_bytes

    def _in_all_layers(self, number: int, num_in_window: int) -> int:
        return (self.num_layers - self.num_windowed) * number + self.num_windowed * num_in_window


DEFAULT_SHAPE = "smollm2-135m"

# From the models' own configurations; Qwen2-7B's is that of the instructed model, the paper's base.
SHAPES = {
    DEFAULT_SHAPE: ModelShape(30, 576, 9, 3, 64, 1536, 49_152, is_tied=True, max_positions=8192),
    "llama-2-7b": ModelShape(32, 4096, 32, 32, 128, 11_008, 32_000, max_positions=4096),
    "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256, max_positions=8192),
    "qwen2-7b": ModelShape(28, 3584, 28, 4, 128, 18_944, 152_064, max_positions=32_768),
    "qwen3-30b-a3b": ModelShape(
        *(48, 2048, 32, 4, 128, 8 * 768, 151_936),
        max_positions=40_960,
        shared_weights=918_552_576,
        expert_weights=28_991_029_248,
        num_experts=128,
        experts_per_token=8,
    ),
    "gemma-3-1b": ModelShape(
        26, 1152, 4, 1, 256, 6912, 262_144, is_tied=True, max_positions=32_768, num_windowed=22, window=512
    ),
    "gemma-3-4b": ModelShape(
        34, 2560, 8, 4, 256, 10_240, 262_208, is_tied=True, max_positions=131_072, num_windowed=29, window=1024
    ),
}


class Run(NamedTuple):
    """Rows of a pass of which each sees more than the one before.

    Attributes:
        rows: how many.
        held: entries before the first.
        step: entries that each row sees more, the first than what is held.
    """

    rows: int
    held: int
    step: int = 1

    def pairs(self, window: int | None) -> int:
        """Pairs of a row and an entry that it sees, of which there are `window` at most."""
        if window is None:
            return self.rows * self.held + self.step * self.rows * (self.rows + 1) // 2
        free = min(self.rows, max(0, (window - self.held) // self.step))
        return free * self.held + self.step * free * (free + 1) // 2 + (self.rows - free) * window


class Pass(NamedTuple):
    """One pass of the model over a part of a text.

    Attributes:
        held: entries before the part.
        runs: tokens and beacons that are computed.
    """

    held: int
    runs: tuple[Run, ...]

    @classmethod
    def causal(cls, rows: int, held: int) -> "Pass":
        """Each row sees what is held, and the rows up to itself."""
        return cls(held, (Run(rows, held),))

    @property
    def rows(self) -> int:
        """Tokens and beacons that are computed."""
        return sum(run.rows for run in self.runs)


@dataclass(frozen=True)
class Compression:
    """How a text is compressed; no ratio for full attention.

    Attributes:
        ratio: raw tokens per beacon.
        chunk_size: tokens of a chunk.
        num_sinks: first tokens kept raw.
        placement: beacons that stand at the chunk's end ("append") are all that is computed of a chunk read before,
        anchored: and the tokens that they begin as.
        local_tokens: raw tokens that the tail keeps at least; they are read again, behind its beacons, when a chunk is closed.
    """

    ratio: int | None
    chunk_size: int = 1024
    num_sinks: int = 0
    placement: Placement = "interleave"
    anchored: bool = False
    local_tokens: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and (self.ratio < 2 or self.chunk_size % self.ratio):
            raise ConfigError(
                f"chunk_size ({self.chunk_size}) must be divisible by ratio ({self.ratio}), which is 2 or more."
            )

    @classmethod
    def of(cls, config: BeaconConfig, ratio: int | None) -> "Compression":
        """As an adapter's settings have it."""
        return cls(ratio, config.chunk_size, config.num_sinks, config.placement, config.anchored, config.local_tokens)

    @property
    def closing_slots(self) -> int:
        """Slots of the pass that closes a chunk: its tokens and its beacons."""
        return self.chunk_size + (0 if self.ratio is None else self.chunk_size // self.ratio)

    def num_closed(self, num_tokens: int) -> int:
        """Chunks that are closed once so many tokens have been read."""
        return 0 if self.ratio is None else chunks_closed(num_tokens, self.chunk_size, self.local_tokens)

    def held_before(self, chunk: int) -> int:
        """Entries held before a chunk (from 0) is read."""
        if self.ratio is None or not chunk:
            return 0
        return self.num_sinks + chunk * (self.chunk_size // self.ratio)

    def entries(self, num_tokens: int, window: int | None = None) -> int:
        """Entries that a layer with this window holds after so many tokens: of a text to be compressed, all of the tail."""
        if self.ratio is None:
            return within(num_tokens, window)
        closed = self.num_closed(num_tokens)
        return within(self.held_before(closed), window) + num_tokens - closed * self.chunk_size

    def peak_entries(self, num_tokens: int, num_new: int = 0, window: int | None = None) -> int:
        """Entries held at most while a text is read and written on: the last closed chunk's slots, or the tail."""
        stop = num_tokens + num_new
        closed = self.num_closed(stop)
        if not closed:
            return self.entries(stop, window)
        before = within(self.held_before(closed - 1), window)
        peak = max(self.entries(stop, window), before + self.closing_slots)
        if closed == self.num_closed(num_tokens):
            return peak
        longest_tail = self.entries(self.longest_raw(closed - 1), window)
        return max(peak, longest_tail)  # writing closed it

    def longest_raw(self, num_closed: int) -> int:
        """Tokens of the longest text of which no more chunks than these are closed."""
        return (num_closed + 1) * self.chunk_size + self.local_tokens

    def closings(self, start: int, stop: int) -> Iterator[Pass]:
        """Each pass that closes a chunk while a text grows from `start` to `stop` tokens, none of the chunk read before."""
        for chunk in range(self.num_closed(start), self.num_closed(stop)):
            yield Pass.causal(self.closing_slots, self.held_before(chunk))

    def resumed_closings(self, start: int, stop: int) -> Iterator[Pass]:
        """The same passes where all of each chunk has been read before, as in writing, token by token."""
        for anew in self.closings(start, stop):
            beacons = self.closing_slots - self.chunk_size
            if self.placement != "append":
                yield anew
                continue
            runs = [Run(beacons, anew.held + self.chunk_size)]
            if self.anchored:  # evenly spaced: the last token of each unit
                runs.append(Run(beacons, anew.held, self.chunk_size // beacons))
            yield Pass(anew.held, tuple(runs))

    def tails_read_again(self, start: int, stop: int) -> Iterator[Pass]:
        """Each pass over the local tokens behind a chunk that is closed in writing: they stand at other positions then."""
        if self.local_tokens:
            for chunk in range(self.num_closed(start), self.num_closed(stop)):
                yield Pass.causal(self.local_tokens, self.held_before(chunk + 1))

    def prefill_rows(self, num_tokens: int) -> int:
        """Tokens and beacons that are computed to read a text."""
        closed = self.num_closed(num_tokens)
        return closed * self.closing_slots + num_tokens - closed * self.chunk_size

    def prefill_pairs(self, num_tokens: int, window: int | None) -> int:
        """Pairs of a row and an entry that it sees in a layer with this window, to read a text; not one by one: it may be long."""
        closed, rows = self.num_closed(num_tokens), self.closing_slots
        tail = Run(num_tokens - closed * self.chunk_size, self.held_before(closed)).pairs(window)
        if not closed:
            return tail
        kept = self.chunk_size // (self.ratio or 1)  # of each chunk
        if window is None:
            held = (closed - 1) * self.num_sinks + kept * closed * (closed - 1) // 2
            return tail + rows * held + closed * rows * (rows + 1) // 2
        few = min(closed, 1 + max(0, window - self.num_sinks) // kept)  # chunks until what is held fills the window
        begun = sum(Run(rows, self.held_before(chunk)).pairs(window) for chunk in range(few))
        return tail + begun + (closed - few) * rows * window

    def widest_pass(self, num_tokens: int, num_new: int = 0, *, most_together: int = 0) -> int:
        """Slots of the widest pass of reading a text and writing on.

        Args:
            num_tokens: of the text.
            num_new: tokens written on.
            most_together: slots that several chunks may have in one pass, in reading.
        """
        closed = self.num_closed(num_tokens)
        tail = num_tokens - closed * self.chunk_size
        if not self.num_closed(num_tokens + num_new):
            return tail
        num_together = min(closed, most_together // self.closing_slots)
        return max(tail, self.closing_slots * max(1, num_together), self.local_tokens + 1)


FULL_ATTENTION = Compression(None)


# --- operations ------------------------------------------------------------------------------------------------------


def prefill_flops(shape: ModelShape, num_tokens: int, how: Compression) -> int:
    """Operations of reading a text, and of the head once at its end."""
    pairs = (how.prefill_pairs(num_tokens, window) for window in (None, shape.window))
    return shape.head_flops(1) + shape.token_flops(how.prefill_rows(num_tokens)) + shape.attention_flops(*pairs)


def decode_flops(shape: ModelShape, num_tokens: int, num_new: int, how: Compression) -> int:
    """Operations of writing `num_new` tokens behind a text of `num_tokens`, chunks closed on the way included."""
    stop = num_tokens + num_new
    total = num_new * (shape.token_flops(1) + shape.head_flops(1))
    held = [how.entries(length) for length in range(num_tokens + 1, stop + 1)]
    total += shape.attention_flops(sum(held), sum(min(each, shape.window or each) for each in held))
    closings = (*how.resumed_closings(num_tokens, stop), *how.tails_read_again(num_tokens, stop))
    return total + sum(pass_flops(shape, each) for each in closings)


def pass_flops(shape: ModelShape, each: Pass) -> int:
    """Operations of all layers in one pass."""
    pairs = (sum(run.pairs(window) for run in each.runs) for window in (None, shape.window))
    return shape.token_flops(each.rows) + shape.attention_flops(*pairs)


def end_to_end_speedup(shape: ModelShape, num_tokens: int, num_new: int, how: Compression) -> float:
    """How many times fewer operations than full attention needs for reading and writing."""
    full = prefill_flops(shape, num_tokens, FULL_ATTENTION) + decode_flops(shape, num_tokens, num_new, FULL_ATTENTION)
    return full / (prefill_flops(shape, num_tokens, how) + decode_flops(shape, num_tokens, num_new, how))


def break_even(shape: ModelShape, how: Compression, *, num_new: int = 0, limit: int = 1 << 22) -> int | None:
    """The shortest text from which on every text takes fewer operations; None if there is none up to `limit`.

    With the length, what is saved grows but for two kinds of drops: one token behind whole chunks and local tokens, where reading
    closes one more, and where writing comes to close one. Over the drops of one kind it is convex and starts with a loss, so that it
    turns once.
    """

    def gains(num_tokens: int) -> bool:
        return end_to_end_speedup(shape, num_tokens, num_new, how) > 1

    last_loss = 0
    for first in {1 + how.local_tokens % how.chunk_size, 1 + (how.local_tokens - num_new) % how.chunk_size}:
        drops = range(first, limit + 1, how.chunk_size)
        turn = bisect_left(drops, True, key=gains)
        if turn == len(drops):
            return None
        last_loss = max(last_loss, drops[turn - 1] if turn else 0)
    rest = range(last_loss + 1, last_loss + how.chunk_size + 1)
    return rest[bisect_left(rest, True, key=gains)]


# --- bytes, and what fits --------------------------------------------------------------------------------------------


def cache_bytes(shape: ModelShape, num_tokens: int, how: Compression, element_bytes: int) -> int:
    """Bytes of the cache after so many tokens."""
    return shape.cache_bytes(how.entries(num_tokens), element_bytes, how.entries(num_tokens, shape.window))


def decode_bytes(
    shape: ModelShape, num_tokens: int, how: Compression, element_bytes: int, *, batch_size: int = 1
) -> int:
    """Bytes that writing one token to each text reads: the weights but the token embedding's table, and the caches.

    Of experts those that the texts' tokens may be sent to, no two to the same while there are others.
    """
    weights = (shape.weights_for(batch_size) + shape.vocab_size * shape.hidden_size) * element_bytes
    return weights + batch_size * cache_bytes(shape, num_tokens, how, element_bytes)


def memory_bytes(
    shape: ModelShape,
    num_tokens: int,
    how: Compression,
    element_bytes: int,
    *,
    batch_size: int = 1,
    num_new: int = 0,
) -> int:
    """Bytes on a GPU of weights, adapter and caches at their largest, and of the widest pass's activations.

    These are the feed-forward part's: the gate, what it is multiplied by, and the product. Of one layer the entries are
    held twice, when new ones join them.
    """
    adapter = 0 if how.ratio is None else shape.beacon_weights
    weights = (shape.num_weights + adapter) * element_bytes
    slots = how.widest_pass(num_tokens, num_new, most_together=ROWS_TOGETHER_ON_CUDA // batch_size)
    activations = slots * (3 * shape.intermediate_size + 4 * shape.hidden_size) * element_bytes
    entries, in_window = (how.peak_entries(num_tokens, num_new, window) for window in (None, shape.window))
    caches = shape.cache_bytes(entries, element_bytes, in_window)
    widest = entries if shape.num_windowed < shape.num_layers else in_window
    joined = 2 * widest * shape.num_kv_heads * shape.head_dim * element_bytes
    return weights + batch_size * (activations + caches + joined)


Obstacle = Literal["positions", "memory"]


def obstacle(
    shape: ModelShape,
    num_tokens: int,
    how: Compression,
    element_bytes: int,
    *,
    gpu_bytes: int | None = None,
    batch_size: int = 1,
    num_new: int = 0,
) -> Obstacle | None:
    """What a text is too long for: the base's positions, or else a GPU's memory; None if it fits."""
    if shape.max_positions is not None and how.peak_entries(num_tokens, num_new) > shape.max_positions:
        return "positions"
    needed = memory_bytes(shape, num_tokens, how, element_bytes, batch_size=batch_size, num_new=num_new)
    return "memory" if gpu_bytes is not None and needed > gpu_bytes else None


def longest_text(
    shape: ModelShape,
    how: Compression,
    element_bytes: int,
    *,
    gpu_bytes: int | None = None,
    batch_size: int = 1,
    num_new: int = 0,
    limit: int = 1 << 24,
) -> tuple[int, Obstacle | None]:
    """Tokens of the longest text that fits, 0 if not even one token does, and what stops a longer one; at most `limit`."""

    def stops(num_tokens: int) -> Obstacle | None:
        return obstacle(
            shape, num_tokens, how, element_bytes, gpu_bytes=gpu_bytes, batch_size=batch_size, num_new=num_new
        )

    def first(num_closed: int) -> int:
        return how.longest_raw(num_closed - 1) + 1 if num_closed else 1

    def num_fitting(lengths: Sequence[int], length_of: Callable[[int], int] = int) -> int:
        return bisect_left(lengths, True, key=lambda each: stops(length_of(each)) is not None)

    # A text that has one chunk more closed may need less, as less of it is raw; from there to the next such text, needs grow.
    most_closed = how.num_closed(limit)
    number = num_fitting(range(most_closed + 1), first)
    if not number:
        return 0, stops(1)
    start, stop = first(number - 1), limit + 1 if number > most_closed else first(number)
    fitting = start - 1 + num_fitting(range(start, stop))
    return fitting, None if fitting == limit else stops(fitting + 1)
