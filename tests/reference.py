"""The slow reference: the semantics of compression written out plainly, to compare the package with.

No cache, no hooks, no planning code of the package: a text is laid out from its first token for each length asked for,
one dense forward over all slots of all passes is made on a copy of the base model, and the dense mask says who sees whom.

A beacon's key stands at two places. Slots of its own chunk see it where it was read; later slots see it where it is held.
So attention gets every key twice, once for each place, and the mask picks.
"""

import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

# N slots of all passes · T raw tokens · S held entries · K kv heads · D head dim · M model dim · V vocabulary

NAME = "beacon_reference"


@dataclass
class Layout:
    """Every slot of every pass over a text, in order of reading; lists of N."""

    token: list[int | None] = field(default_factory=list)  # the text's token at a slot; None for a beacon
    chunk: list[int] = field(default_factory=list)  # the pass that a slot belongs to; the tail's is the last
    read_at: list[int] = field(default_factory=list)  # position at which a slot is read
    held_at: list[int | None] = field(default_factory=list)  # position at which it is held for later chunks, if it is
    anchor: list[int] = field(default_factory=list)  # slot of the last token that a beacon stands for; a token's own

    def add(self, token: int | None, chunk: int, read_at: int) -> int:
        self.token.append(token)
        self.chunk.append(chunk)
        self.read_at.append(read_at)
        self.held_at.append(None)
        self.anchor.append(len(self.anchor))
        return len(self.token) - 1


def lay_out(
    length: int,
    *,
    chunk_size: int,
    ratios: Sequence[int],
    num_sinks: int = 0,
    placement: str = "interleave",
    local_tokens: int = 0,
    raw: Sequence[tuple[int, int]] = (),
    ids: Sequence[int] = (),
    exact_ids: Sequence[int] = (),
) -> Layout:
    """Lay out a text of `length` tokens.

    Args:
        ratios: one for each chunk.
        ids: the text, where `exact_ids` are to be held token by token, in chunks without raw spans.
        raw: spans (start, stop) of tokens that are kept raw; a beacon is dropped if all of its unit is.
    """
    layout = Layout()
    is_raw = [any(start <= token < stop for start, stop in raw) for token in range(length)]
    num_chunks = 0  # a chunk is closed when a token has to be read for which the tail has no more room
    while length - num_chunks * chunk_size > chunk_size + local_tokens:
        num_chunks += 1
    held = 0
    for chunk in range(num_chunks):
        sinks, kept, slot_of, closed = [], [], {}, 0
        first, size = chunk * chunk_size, chunk_size // ratios[chunk]
        is_even = not exact_ids or any(is_raw[first : first + chunk_size])
        anchors = None if is_even else exact_anchors(ids[first : first + chunk_size], size, exact_ids)
        for offset, unit in enumerate(read_order(chunk * chunk_size, chunk_size, ratios[chunk], placement)):
            token = unit if isinstance(unit, int) else None
            slot = layout.add(token, chunk, held + offset)
            if token is None:
                layout.anchor[slot] = slot_of[unit[-1] if anchors is None else first + anchors[closed]]
                closed += 1
            else:
                slot_of[token] = slot
            if token is not None and token < num_sinks:
                sinks.append(slot)
            elif is_raw[token] if token is not None else not all(is_raw[member] for member in unit):
                kept.append(slot)
        for slot in sinks + kept:
            layout.held_at[slot] = held
            held += 1
    for offset, token in enumerate(range(num_chunks * chunk_size, length)):
        layout.add(token, num_chunks, held + offset)
    return layout


def exact_anchors(ids: Sequence[int], num_beacons: int, exact_ids: Sequence[int]) -> list[int]:
    """Tokens that a chunk's beacons begin as: those within two of an exact one, if all of them fit half; the rest evenly."""
    near = [any(other in exact_ids for other in ids[max(0, place - 2) : place + 3]) for place in range(len(ids))]
    places = list(range(len(ids)))
    runs = [list(run) for is_near, run in itertools.groupby(places, key=lambda place: near[place]) if is_near]
    room = num_beacons // 2
    runs = [run for run in runs if len(run) <= room]
    total = sum(map(len, runs))
    chosen: list[int] = []
    owed = Fraction(0)
    for run in runs:
        owed += len(run) if total <= room else Fraction(room * len(run), total)
        if len(run) <= owed and len(chosen) + len(run) <= room:
            owed -= len(run)
            chosen += run
    for run in runs:
        if run[0] not in chosen and len(chosen) + len(run) <= room:
            chosen += run
    others = [place for place in places if place not in chosen]
    missing = num_beacons - len(chosen)
    return sorted(chosen + [others[(number + 1) * len(others) // missing - 1] for number in range(missing)])


def read_order(first: int, chunk_size: int, ratio: int, placement: str) -> list[int | range]:
    """A chunk's slots: a token by its number, a beacon by the unit of tokens that it closes."""
    units = [range(start, start + ratio) for start in range(first, first + chunk_size, ratio)]
    if placement == "append":
        return [*range(first, first + chunk_size), *units]
    return [slot for unit in units for slot in (*unit, unit)]


@dataclass
class Result:
    """What the reference makes of a text.

    Attributes:
        logits: (T, V) of the raw tokens, each from the pass that read it last.
        keys, values: for each place of a cache (K, S, D), what attention makes of all that is held at the end: sinks, beacons, tail;
            None of those that hold none.
        unrotated_keys: the keys before rotary embedding.
        states: for each place of a cache that holds a state, what that is after the last token, and after the last closed chunk.
    """

    logits: torch.Tensor
    keys: list[torch.Tensor | None]
    values: list[torch.Tensor | None]
    unrotated_keys: list[torch.Tensor | None]
    states: dict[int, list[list[torch.Tensor]]]


class TwoBranches(nn.Module):
    """A projection with a beacon copy; both project every slot, and one is chosen."""

    def __init__(
        self, base: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.base, self.weight, self.bias, self.gate = base, weight, bias, gate
        self.is_beacon = torch.zeros(0, dtype=torch.bool)
        self.anchor = torch.zeros(0, dtype=torch.long)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        source = hidden if self.gate is None else hidden[:, self.anchor] + self.gate * hidden
        beacon = nn.functional.linear(source, self.weight, self.bias)
        return torch.where(self.is_beacon[:, None], beacon, self.base(hidden))


class Reference:
    """A base model with beacons, computed slowly.

    Args:
        base: without beacons; copied.
        beacons: beacon weights by their names in an adapter's file ("embedding", "layers.0.q.weight", ...). Gradients
            flow to them.
        settings: `chunk_size`, `num_sinks`, `placement`, `local_tokens`, `exact_ids`. Beacons with gates are anchored.
    """

    def __init__(self, base: PreTrainedModel, beacons: Mapping[str, torch.Tensor], **settings: Any) -> None:
        self.model = copy.deepcopy(base).eval()
        self.config = self.model.config.get_text_config(decoder=True)
        self.config._attn_implementation = NAME
        self.beacons, self.settings = beacons, settings
        self.decoder = self.model.get_decoder()
        self.branches: list[TwoBranches] = []
        for index, layer in enumerate(self.decoder.layers):
            if is_recurrent(self.config, index):
                mixer = next(getattr(layer, name) for name in RECURRENT_NAMES if getattr(layer, name, None) is not None)
                mixer.forward = functools.partial(self.carry, index, mixer, mixer.forward)
                if _layer_type(self.config, index) != "hybrid":
                    continue
            if _layer_type(self.config, index) in ("mlp", "moe"):
                continue
            attention = next(
                getattr(layer, name) for name in ("self_attn", "attention", "mixer") if hasattr(layer, name)
            )
            attention.reference = self
            attention.reference_layer = index
            for letter, names in PROJECTION_NAMES.items():
                weight = beacons.get(f"layers.{index}.{letter}.weight")
                if weight is not None:
                    name = next(name for name in names if getattr(attention, name, None) is not None)
                    own = [beacons.get(f"layers.{index}.{letter}.{what}") for what in ("bias", "gate")]
                    branch = TwoBranches(getattr(attention, name), weight, *own)
                    setattr(attention, name, branch)
                    self.branches.append(branch)

    def __call__(
        self, ids: torch.Tensor | Sequence[int], ratio: int | Sequence[int], *, raw: Sequence[tuple[int, int]] = ()
    ) -> Result:
        """Read one text from its first token.

        Args:
            ids: (T,) or (1, T).
            ratio: for all chunks, or one for each.
            raw: spans that are kept raw.
        """
        ids = torch.as_tensor(ids).reshape(-1)
        num_chunks = len(ids) // self.settings["chunk_size"]
        ratios = [ratio] * num_chunks if isinstance(ratio, int) else list(ratio)
        layout = lay_out(len(ids), ratios=ratios, raw=raw, ids=ids.tolist(), **self.settings)
        is_beacon = torch.tensor([token is None for token in layout.token])
        for branch in self.branches:
            branch.is_beacon = is_beacon
            branch.anchor = torch.tensor(layout.anchor)
        embedded = self.model.get_input_embeddings()(ids)
        if self.config.model_type == "falcon_h1":
            embedded = embedded * self.config.embedding_multiplier
        slots = [self.beacons["embedding"] if token is None else embedded[token] for token in layout.token]
        self.layout = layout
        self.read_at = torch.tensor(layout.read_at)
        self.held_at = torch.tensor([-1 if at is None else at for at in layout.held_at])
        self.collected: dict[int, tuple[torch.Tensor, ...]] = {}
        self.states: dict[int, list[list[torch.Tensor]]] = {}
        self.masks: dict[int | None, torch.Tensor] = {}
        logits = self.model(
            inputs_embeds=torch.stack(slots)[None],
            position_ids=self.read_at[None],
            use_cache=False,
            **self.layer_embeddings([self.config.pad_token_id if at is None else int(ids[at]) for at in layout.token]),
        ).logits[0]
        return self._result(logits)

    def _result(self, logits: torch.Tensor) -> Result:
        layout = self.layout
        last = layout.chunk[-1]
        raw_slots = [slot for slot, token in enumerate(layout.token) if token is not None]
        memory = sorted((at, slot) for slot, at in enumerate(layout.held_at) if at is not None)
        tail = [slot for slot, chunk in enumerate(layout.chunk) if chunk == last]
        order = [slot for _, slot in memory]
        keys, values, unrotated = [], [], []
        for index in sorted({*range(len(self.decoder.layers)), *self.states}):
            if index not in self.collected:
                for each in (keys, values, unrotated):
                    each.append(None)
                continue
            read, held, plain, value = self.collected[index]
            keys.append(torch.cat((held[:, order], read[:, tail]), dim=1))
            values.append(value[:, order + tail])
            unrotated.append(plain[:, order + tail])
        return Result(logits[raw_slots], keys, values, unrotated, self.states)

    def layer_embeddings(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """What layers are given of the token ids, where they are; beacons are padding there."""
        if not getattr(self.config, "hidden_size_per_layer_input", 0):
            return {}
        found = self.decoder.embed_tokens_per_layer(torch.tensor([ids]))
        return {"per_layer_inputs": found.unflatten(-1, (len(self.decoder.layers), -1))}

    # --- states ---

    def carry(self, index: int, mixer: nn.Module, forward: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """A layer that carries a state: over all tokens; and over those up to a chunk's end with the chunk's beacons behind them."""
        chunk = torch.tensor(self.layout.chunk)
        is_beacon = torch.tensor([token is None for token in self.layout.token])
        output = torch.zeros_like(hidden_states)
        output[:, ~is_beacon] = forward(hidden_states[:, ~is_beacon])
        for number in chunk[is_beacon].unique():
            before, own = ~is_beacon & (chunk <= number), is_beacon & (chunk == number)
            rows = torch.cat((hidden_states[:, before], hidden_states[:, own]), dim=1)
            output[:, own] = forward(rows)[:, -int(own.sum()) :]
        name = next(
            name for name in ("cache_params", "past_key_values") if name in inspect.signature(forward).parameters
        )
        # Beside attention, a state has a place of its own behind all layers.
        is_beside = _layer_type(self.config, index) == "hybrid"
        states = self.states[len(self.decoder.layers) + index if is_beside else index] = []
        for last in (chunk.max(), chunk.max() - 1):
            cache, tokens = DynamicCache(config=self.config), ~is_beacon & (chunk <= last)
            if tokens.any():
                forward(hidden_states[:, tokens], **{name: cache})
            held = (*cache.layers[index].conv_states.values(), *cache.layers[index].recurrent_states.values())
            states.append([state for state in held if state is not None])
        return output

    # --- attention ---

    def attend(
        self, attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> Any:
        """The family's eager attention over every key at both of its places."""
        plain, held = self._moved(attention, key)
        if not getattr(attention, "is_kv_shared_layer", False):
            self.collected[attention.reference_layer] = (key[0], held[0], plain[0], value[0])
        window = kwargs.get("sliding_window")
        config = self.config
        if config.model_type in WINDOWS_IN_MASKS and self._layer_type(attention) != "full_attention":
            window = config.sliding_window
        if window not in self.masks:
            self.masks[window] = self._mask(window)[None, None]
        return sys.modules[type(attention).__module__].eager_attention_forward(
            attention,
            query,
            torch.cat((key, held), dim=2),
            torch.cat((value, value), dim=2),
            self.masks[window],
            **kwargs,
        )

    def _layer_type(self, attention: nn.Module) -> str | None:
        layer_types = getattr(self.config, "layer_types", None)
        return layer_types[attention.reference_layer] if layer_types else None

    def _moved(self, attention: nn.Module, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (1, K, N, D) without rotation, and rotated for the positions where they are held."""
        index, config = attention.reference_layer, self.config
        if has_no_positions(config, index):
            return key, key
        if is_latent(attention):
            return self._moved_in_part(attention, key)
        rotary = next(getattr(self.decoder, name) for name in ("rotary_emb", "pos_emb") if hasattr(self.decoder, name))
        takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
        layer_type = (config.layer_types[index],) if takes_type else ()
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        if config.model_type.startswith(("gemma3n", "gemma4")):
            rotate = functools.partial(rotated_one_by_one, rotate)
        if config.model_type in ROTATED_IN_PART:
            rotate = functools.partial(rotated_in_part, rotate)
        axes = (3, 1, -1) if hasattr(rotary, "mrope_section") else (1, -1)
        cos, sin = rotary(key, self.read_at.expand(axes), *layer_type)
        size = cos.square() + sin.square()  # the square of the attention scaling, 1 where there is none
        plain = rotate(key, key, cos / size, -sin / size)[1]
        cos, sin = rotary(key, self.held_at.clamp(min=0).expand(axes), *layer_type)
        return plain, rotate(plain, plain, cos, sin)[1]

    def _moved_in_part(self, attention: nn.Module, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the keys of latent attention, of which the last dims are rotated, as complex numbers."""
        rest, turned = key.split([key.shape[-1] - attention.qk_rope_head_dim, attention.qk_rope_head_dim], dim=-1)
        in_pairs = self.config.model_type == "deepseek_v2"
        number = torch.complex(*((turned[..., 0::2], turned[..., 1::2]) if in_pairs else turned.chunk(2, dim=-1)))
        plain = number / self._turn(key, self.read_at, in_pairs)
        both = []
        for each in (plain, plain * self._turn(key, self.held_at.clamp(min=0), in_pairs)):
            parts = (each.real, each.imag)
            both.append(
                torch.cat((rest, torch.stack(parts, -1).flatten(-2) if in_pairs else torch.cat(parts, -1)), dim=-1)
            )
        return both[0], both[1]

    def _turn(self, like: torch.Tensor, positions: torch.Tensor, is_complex: bool) -> torch.Tensor:
        """Complex numbers (1, 1, N, F) that keys at these positions have been multiplied by."""
        found = self.decoder.rotary_emb(like, positions[None])
        if is_complex:
            return found[:, None]
        cos, sin = (each[:, None, :, : each.shape[-1] // 2] for each in found)
        return torch.complex(cos, sin)

    def _mask(self, window: int | None) -> torch.Tensor:
        """Additive mask (N, 2N): keys where they were read, then keys where they are held."""
        chunk = torch.tensor(self.layout.chunk)
        order = torch.arange(len(chunk))
        own = (chunk[:, None] == chunk[None]) & (order[:, None] >= order[None])
        earlier = (chunk[:, None] > chunk[None]) & (self.held_at >= 0)[None]
        if window is not None:
            own &= self.read_at[:, None] - self.read_at[None] < window
            earlier &= self.read_at[:, None] - self.held_at[None] < window
        seen = torch.cat((own, earlier), dim=1)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def is_latent(attention: nn.Module) -> bool:
    """Whether keys and values are made of latents, which are what a cache holds."""
    return hasattr(attention, "kv_a_proj_with_mqa")


def is_recurrent(config: Any, index: int) -> bool:
    """Whether a layer carries a state."""
    return _layer_type(config, index) in ("linear_attention", "conv", "hybrid")


def _layer_type(config: Any, index: int) -> str:
    return (getattr(config, "layer_types", None) or {index: ""})[index]


def has_no_positions(config: Any, index: int) -> bool:
    """Whether a layer does not rotate its keys, as its family's code in transformers has it."""
    if config.model_type in ("kimi_linear", "granitemoehybrid", "nemotron_h"):
        return True
    if config.model_type == "smollm3":
        return not config.no_rope_layers[index]
    return config.model_type in WITHOUT_POSITIONS and config.layer_types[index] == "full_attention"


def rotated_in_part(rotate: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Rotate the first dims of keys alone, as the attention of some families does by itself."""
    first, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
    return query, torch.cat((rotate(first, first, cos, sin)[1], rest), dim=-1)


def rotated_one_by_one(
    rotate: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Any:
    """What the rotation of one tensor makes of queries and keys."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


RECURRENT_NAMES = ("linear_attn", "conv", "mamba", "mixer", "self_attn")
WINDOWS_IN_MASKS = ("phimoe", "qwen2_moe")  # whose attention is not told of them
ROTATED_IN_PART = ("phi", "persimmon", "stablelm")
# Families whose layers have rotary embeddings where they have a window, and only there.
WITHOUT_POSITIONS = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1")
PROJECTION_NAMES = {
    "q": ("q_proj", "q_a_proj"),
    "kv": ("kv_a_proj_with_mqa",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "dense", "out_proj"),
    "qkv": ("qkv_proj", "query_key_value"),
}


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **kwargs: Any
) -> Any:
    return module.reference.attend(module, query, key, value, **kwargs)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
