"""The places of a decoder that beacons need: layers, their projections, how their keys are rotated, the states that some carry.

And what may be done in a pass over them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activation_beacon.dense import is_linear, tensors_of
from activation_beacon.recurrent import Shapes
from activation_beacon.rope import Rope

AT_ONCE = "beacon_chunks_with_"  # before the name of the attention that it hands chunks to, see at_once
FUSED_NAMES = {"qkv_proj": "qkv", "query_key_value": "qkv", "kv_a_proj_with_mqa": "kv"}
EXPANDS = "expand_kv"  # the method that makes keys and values of latents
OUTPUT_CAPTURING = "transformers.utils.output_capturing"  # the module of its hooks
OUTPUT_NAMES = ("o_proj", "dense", "out_proj")

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
EntryShapes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class ProjectionSite:
    """One linear layer of the base that gets a beacon branch.

    Attributes:
        name: what it projects to: q, k, v, o; qkv where they are fused; kv where it gives the latent that keys and values are made of.
        linear: the base's own layer.
    """

    name: str
    linear: nn.Module


@dataclass(frozen=True)
class LayerSite:
    """One decoder layer.

    Attributes:
        attention: its attention module, or the one that carries a state.
        told: the module that a pass's keyword arguments reach: the attention, or the whole layer where it does not hand them on.
        projections: those in it that get a beacon branch.
        rope: how its keys are rotated; None: not at all.
        window: entries that a slot sees, itself included; None for all before it, and in families that are not known.
        num_states: states of a kind that it carries in the place of keys and values; None where it keeps these, 0: nothing.
        beside: of a state that a layer carries beside keys and values: the number of that layer; None of layers themselves.
        lender: the layer whose keys and values it attends to, if it keeps none of its own; None: nobody's.
        state_shapes: theirs, rows apart; None where they are not known.
    """

    attention: nn.Module
    told: nn.Module
    projections: tuple[ProjectionSite, ...]
    rope: Rope | None
    window: int | None = None
    num_states: int | None = None
    state_shapes: Shapes | None = None
    beside: int | None = None
    lender: int | None = None

    @property
    def has_entries(self) -> bool:
        """Whether it keeps keys and values of its own."""
        return self.num_states is None

    @property
    def device(self) -> torch.device:
        """Where its weights are; layers may be on several GPUs."""
        return next(tensors_of(self.attention)).device

    @property
    def expand(self) -> Expand | None:
        """What its attention makes keys and values (B, H, n, D) with, where it caches latents; None where it caches them."""
        return getattr(self.attention, EXPANDS, None)

    def attended(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what the layer caches, (B, K, n, D) each."""
        return (keys, values) if self.expand is None else self.expand(keys, values)

    @property
    def entry_shapes(self) -> EntryShapes | None:
        """Heads and dims of the keys and of the values that it leaves in a cache; None where its projections do not tell."""
        if self.expand is not None:
            return (1, self.attention.kv_lora_rank), (1, self.attention.qk_rope_head_dim)  # type: ignore[return-value]
        if not self.has_entries:
            return None
        dim = getattr(self.attention, "head_dim", None)
        width = _projected_width(self.attention)
        return None if type(dim) is not int or not dim or width is None or width % dim else ((width // dim, dim),) * 2


@dataclass(frozen=True)
class DecoderSite:
    """A decoder as far as beacons are concerned.

    Attributes:
        layers: one site for each layer, and behind them one for each state that a layer carries beside keys and values.
        max_positions: positions that the base was made for; None where it has no limit.
        padding_leaves_traces: whether padding before a text changes states, as where what they are made of has a bias.
        is_known: whether its family is known (`families`): others may add what they like to a causal mask.
    """

    layers: tuple[LayerSite, ...]
    max_positions: int | None
    is_known: bool = False
    padding_leaves_traces: bool = False

    @functools.cached_property
    def layers_differ(self) -> bool:
        """Whether some layers see other entries than those before a slot in their own cache: windows, and those that others lend."""
        return any(layer.window is not None for layer in self.layers) or bool(self.lenders)

    @functools.cached_property
    def lenders(self) -> frozenset[int]:
        """Layers whose keys and values others attend to."""
        return frozenset(layer.lender for layer in self.layers if layer.lender is not None)

    def lent_as(self, index: int) -> int | None:
        """The number of a layer, if others attend to its keys and values."""
        return index if index in self.lenders else None

    @functools.cached_property
    def last_kept(self) -> int:
        """The last layer that leaves something in a cache; those behind it matter to outputs alone."""
        return max(index for index, layer in enumerate(self.layers) if layer.num_states != 0)

    @property
    def windows(self) -> dict[int, int]:
        """Of each layer that keeps keys and values and has a sliding window, that window."""
        return {index: layer.window for index, layer in enumerate(self.layers) if layer.has_entries and layer.window}

    @property
    def num_states(self) -> dict[int, int]:
        """Of each layer without keys and values, how many states of a kind it carries."""
        return {index: n for index, layer in enumerate(self.layers) if (n := layer.num_states) is not None}

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry states."""
        return any(layer.num_states for layer in self.layers)

    @property
    def num_copies(self) -> int:
        """As how many heads in a row transformers hands each head of keys and values to attention; 1 where layers differ."""
        counts = {getattr(layer.attention, "num_key_value_groups", 1) for layer in self.layers if layer.has_entries}
        return counts.pop() if len(counts) == 1 else 1

    @property
    def entry_shapes(self) -> tuple[EntryShapes | None, ...]:
        """Heads and dims of each layer's keys, and of its values, where they are known."""
        return tuple(layer.entry_shapes for layer in self.layers)

    def features_held(self, num_entries: Callable[[int | None], int]) -> int | None:
        """Numbers that a cache holds in all layers, given the entries of a layer with this window; None where it is not known."""
        total = 0
        for layer in self.layers:
            if layer.has_entries:
                shapes = layer.entry_shapes
                if shapes is None:
                    return None
                total += num_entries(layer.window) * sum(heads * dim for heads, dim in shapes)
        return total

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """How each layer's keys are rotated."""
        return tuple(layer.rope for layer in self.layers)


def understands_told_masks(model: Any, site: DecoderSite) -> bool:
    """Whether a `causal.ToldMask` may stand for the mask of a pass: the family is known, and it reaches torch's own attention."""
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return site.is_known and str(attention).removeprefix(AT_ONCE) == "sdpa"


def can_end_early(decoder: Any, site: DecoderSite) -> bool:
    """Whether a pass of the decoder may be left from within the last layer that keeps something, because nobody waits for its end.

    Nor for that of a layer behind it, as hooks on whole layers would.

    Hooks do (FSDP gathers and frees weights in them), and so may compiled modules and a `forward` that another library
    has put on an instance (accelerate offloads weights there). The hooks that transformers leaves on a model which was once
    asked for hidden states do not: they look at passes that are asked for some, and these are not left.
    """
    if site.layers[site.last_kept].num_states:  # a state that the pass has yet to make
        return False
    last, *behind = decoder.layers[site.last_kept : len(site.layers)]
    hooks = [hook for module in (decoder, last, *behind) for hook in module._forward_hooks.values()]
    is_waited_for = any(getattr(hook, "__module__", None) != OUTPUT_CAPTURING for hook in hooks)
    return not is_waited_for and all(
        "forward" not in vars(module) and module._compiled_call_impl is None for module in (decoder, *last.modules())
    )


def values_are_keys(attention: nn.Module) -> bool:
    """Whether one projection gives keys and values (Gemma 4)."""
    return is_linear(getattr(attention, "k_proj", None)) and getattr(attention, "v_proj", attention) is None


def _projected_width(attention: nn.Module) -> int | None:
    """Features that an attention module projects to keys, and as many to values; None where it does not tell."""
    keys, values = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
    if values_are_keys(attention):
        values = keys
    if is_linear(keys) and is_linear(values):
        return keys.out_features if keys.out_features == values.out_features else None  # type: ignore[union-attr]
    all_three = (getattr(attention, name, None) for name, to in FUSED_NAMES.items() if to == "qkv")
    fused = next((linear for linear in all_three if is_linear(linear)), None)
    output = next((linear for name in OUTPUT_NAMES if is_linear(linear := getattr(attention, name, None))), None)
    return None if fused is None or output is None else (fused.out_features - output.in_features) // 2
