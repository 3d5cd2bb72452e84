"""Layers that carry a state from token to token in the place of keys and values: linear attention, state spaces, short convolutions.

A state has a fixed size, and there is nothing in it to compress. It runs over the raw tokens alone, each of them once and in
their order, as in the base. Beacons stand at the end of their chunk: they read the state that the chunk has left, and what they
write is dropped. A chunk is read from the state at the end of the one before it, so that a cache keeps two of each layer:
that one, and the one after the last token.

The base's own module is called for either kind of row, tokens and beacons, by hooks on it; no code of it is copied.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

# B batch · T slots of a pass · M model dim · n states of a kind that a layer has

CACHE_NAMES = ("cache_params", "past_key_values")  # by which modules are handed a cache
SETTLED = "settled."  # before the names of a state at a chunk's end

Runs = tuple[tuple[int, int], ...]
Shapes = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class State:
    """What a layer carries, (B, ...) each; None where nothing has been read, or the layer has no state of the kind.

    Attributes:
        conv: (n,), the last inputs of its convolutions.
        recurrent: (n,), what is summed up of all tokens.
    """

    conv: tuple[torch.Tensor | None, ...]
    recurrent: tuple[torch.Tensor | None, ...]

    @classmethod
    def empty(cls, num_states: int) -> "State":
        """Before the first token."""
        return cls((None,) * num_states, (None,) * num_states)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "State":
        """The same change made to every tensor."""
        conv, recurrent = (
            tuple(None if each is None else change(each) for each in kind) for kind in (self.conv, self.recurrent)
        )
        return State(conv, recurrent)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names in a file."""
        for kind in ("conv", "recurrent"):
            for number, tensor in enumerate(getattr(self, kind)):
                if tensor is not None:
                    yield f"{kind}.{number}", tensor

    @classmethod
    def of_named(cls, tensors: Mapping[str, torch.Tensor], num_states: int) -> "State":
        """The state that `named_tensors` was called on."""
        conv, recurrent = (
            tuple(tensors.get(f"{kind}.{n}") for n in range(num_states)) for kind in ("conv", "recurrent")
        )
        return cls(conv, recurrent)

    @property
    def shapes(self) -> Shapes:
        """Of each tensor, without its rows."""
        return tuple(None if each is None else tuple(each.shape[1:]) for each in (*self.conv, *self.recurrent))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.named_tensors())


def stacked(states: Sequence[State], counts: Sequence[int]) -> State:
    """States of several batches, of so many texts each, as one; a state that is empty is zero, as modules take it to be."""

    def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        filled = [
            like.new_zeros((count, *like.shape[1:])) if part is None else part
            for part, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(filled)

    return State(
        tuple(joined(parts) for parts in zip(*(state.conv for state in states), strict=True)),
        tuple(joined(parts) for parts in zip(*(state.recurrent for state in states), strict=True)),
    )


class StateLayer(LinearAttentionLayer):
    """The states of one layer, as transformers hands them to modules: that after the last token, and `settled` beside it.

    Modules may write over the tensors of a state: a pass is given copies (`begun`), and a fork shares what is held. Without any state
    it stands for a layer that keeps nothing.

    Attributes:
        settled: the state at the end of the last closed chunk; empty before the first.
    """

    has_entries = False
    stored = room = keys = values = window = None
    stored_length = dropped = 0

    def __init__(self, num_states: int) -> None:
        super().__init__(number_of_states=num_states)
        self.settled = State.empty(num_states)

    @classmethod
    def of(cls, state: State, settled: State) -> "StateLayer":
        """A layer that holds these, not copies of them."""
        layer = cls(len(state.conv))
        for number, (conv, recurrent) in enumerate(zip(state.conv, state.recurrent, strict=True)):
            layer.conv_states[number], layer.recurrent_states[number] = conv, recurrent
            layer.is_conv_states_initialized[number] = conv is not None
            layer.is_recurrent_states_initialized[number] = recurrent is not None
            layer.has_previous_state[number] = conv is not None or recurrent is not None
            layer.conv_kernel_size[number] = None if conv is None else conv.shape[-1]
        first = next((tensor for _, tensor in state.named_tensors()), None)
        if first is not None:
            layer.dtype, layer.device = first.dtype, first.device
        layer.settled = settled
        return layer

    @property
    def state(self) -> State:
        """After the last token."""
        return State(tuple(self.conv_states.values()), tuple(self.recurrent_states.values()))

    # --- what modules call ---

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """As transformers', on a tensor that nobody else holds, and that gradients flow through."""
        held = self.conv_states[state_idx]
        if held is not None:
            self.conv_states[state_idx] = held.clone()
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        """Hold a state: not a copy, which gradients would not flow through."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return recurrent_states

    # --- passes ---

    def begun(self) -> "StateLayer":
        """The layer for a pass over what follows."""
        return StateLayer.of(self.state.map(torch.clone), self.settled)

    def at_chunk(self, *, is_first: bool) -> "StateLayer":
        """The layer for a pass over the next chunk."""
        settled = State.empty(self.number_of_states) if is_first else self.settled
        return StateLayer.of(settled.map(torch.clone), settled)

    def closed(self) -> "StateLayer":
        """The layer after the pass that has closed a chunk: what stood behind it is to be read again."""
        return StateLayer.of(self.state, self.state)

    # --- what a cache asks of its layers ---

    def copy(self) -> "StateLayer":
        """A layer of its own that shares the tensors."""
        return StateLayer.of(self.state, self.settled)

    def emptied(self) -> "StateLayer":
        """A layer of the kind before the first token."""
        return StateLayer(self.number_of_states)

    def dense(self) -> "StateLayer":
        """Itself: states are not quantised."""
        return self

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StateLayer":
        """The same change made to every tensor: it may select rows, or move them to a device."""
        return StateLayer.of(self.state.map(change), self.settled.map(change))

    def taken(self, *_args: Any, **_kwargs: Any) -> "StateLayer":
        """Itself: it has no slots."""
        return self

    def truncate(self, _num_slots: int) -> None:
        """Nothing: it has no slots."""

    def cut(self, _num_slots: int) -> "StateLayer":
        """The layer as it is: it has no slots."""
        return self.copy()

    def at_chunk_end(self, _num_slots: int) -> "StateLayer":
        """The layer as it was when the last chunk was closed."""
        return StateLayer.of(self.settled, self.settled.map(torch.clone))

    def with_dtype(self, dtype: torch.dtype) -> "StateLayer":
        """The same in another float dtype, but for sums, which keep the precision that modules make them in."""

        def converted(state: State) -> State:
            return State(tuple(None if each is None else each.to(dtype) for each in state.conv), state.recurrent)

        return StateLayer.of(converted(self.state), converted(self.settled))

    @staticmethod
    def stack(layers: Sequence["StateLayer"]) -> "StateLayer":
        """One layer of a batch out of those of several, all of which have read something."""
        counts = [layer.num_rows for layer in layers]
        return StateLayer.of(
            stacked([layer.state for layer in layers], counts), stacked([layer.settled for layer in layers], counts)
        )

    @property
    def num_rows(self) -> int:
        """Texts whose states it carries; 1 before the first token."""
        return next((tensor.shape[0] for _, tensor in self.state.named_tensors()), 1)

    @staticmethod
    def begun_together(layers: Sequence["StateLayer"]) -> "StateLayer":
        """One layer for a pass over what follows in several texts; those at a chunk's end stay where they are."""
        state = stacked([layer.state for layer in layers], [layer.num_rows for layer in layers])
        return StateLayer.of(state, State.empty(len(state.conv)))

    def of_row(self, row: int, before: "StateLayer") -> "StateLayer":
        """The layer of one of these texts after the pass: a view."""
        return StateLayer.of(self.state.map(lambda tensor: tensor[row : row + 1]), before.settled)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by the names that they have in a file."""
        yield from self.state.named_tensors()
        yield from ((SETTLED + name, tensor) for name, tensor in self.settled.named_tensors())

    @classmethod
    def of_named(cls, tensors: Mapping[str, torch.Tensor], num_states: int) -> "StateLayer":
        """The layer that `named_tensors` was called on."""
        settled = {name.removeprefix(SETTLED): t for name, t in tensors.items() if name.startswith(SETTLED)}
        return cls.of(State.of_named(tensors, num_states), State.of_named(settled, num_states))

    @property
    def is_consistent(self) -> bool:
        """Whether both states are of floats, and of the same shapes where there are both."""
        tensors = [tensor for _, tensor in self.named_tensors()]
        are_floats = all(tensor.is_floating_point() and tensor.dim() > 1 for tensor in tensors)
        return are_floats and (not any(self.settled.shapes) or self.settled.shapes == self.state.shapes)

    @property
    def num_bytes(self) -> int:
        """Bytes of both states."""
        return self.state.num_bytes + self.settled.num_bytes


class OneLayerCache(Cache):
    """A cache of one layer, which a module finds at whatever place it looks for it."""

    def __init__(self, layer: StateLayer, index: int) -> None:
        super().__init__(layers=[layer] * (index + 1))


@functools.cache
def cache_name(module: type) -> str:
    """The argument by which modules of a class are handed the cache; "" where there is none."""
    known = inspect.signature(module.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in CACHE_NAMES if name in known), "")


def takes_cache(module: type) -> bool:
    """Whether modules of a class are handed a cache."""
    return bool(cache_name(module))


def hand_on_tokens(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of a recurrent layer's module: of a pass with beacons it is given the first run of tokens.

    Some modules (Mamba's) write over the state in a step of one row, so that gradients cannot be had of it: where these are kept,
    what the step gives comes of a pass of two. The state that it leaves has none: of several steps, gradients reach the last.
    """
    state = mixer.beacon_state
    state.hidden = state.before = None  # of a pass that was interrupted, which calls no hooks
    given = dict(kwargs)
    if args:
        given["hidden_states"] = args[0]
    assert len(args) <= 1, "whatever follows is given by name"
    name = cache_name(mixer.__class__)
    layer = _layer_of(mixer, given.get(name))
    if state.runs is None:
        _note_step(mixer, given["hidden_states"], layer)
        if layer is None or mixer.beacon_index == mixer.layer_idx:
            return None
        given[name] = OneLayerCache(layer, mixer.layer_idx)
        return (), given
    state.hidden = given["hidden_states"]
    given["hidden_states"] = state.hidden[:, : state.runs[0][0]]
    given["attention_mask"] = None  # texts of such a pass are of one length
    layer = StateLayer(mixer.beacon_num_states) if layer is None else layer
    given[name] = OneLayerCache(
        layer, mixer.layer_idx
    )  # some modules ask the last layer of a cache whether there is a state
    return (), given


def read_beacons(
    mixer: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor | None:
    """Forward hook of the same: reads what is left of the pass (B, T, M), beacons on a copy of the state."""
    state = mixer.beacon_state
    hidden, state.hidden = state.hidden, None
    if hidden is None:
        return None
    name, index = cache_name(mixer.__class__), mixer.layer_idx
    if state.runs is None:
        layer, state.before = state.before, None
        return _of_one_row(mixer, kwargs, hidden, layer)
    layer = kwargs[name].layers[index]
    outputs, start = [output], 0

    def read(count: int, on: StateLayer, *, is_last: bool) -> None:
        rows = hidden[:, start : start + count]
        if count == 1 and is_last and torch.is_grad_enabled():
            outputs.append(_of_one_row(mixer, kwargs, rows, on))
        else:
            outputs.append(mixer.forward(**{**kwargs, "hidden_states": rows, name: OneLayerCache(on, index)}))

    for number, (num_tokens, num_beacons) in enumerate(state.runs):
        if number:
            read(num_tokens, layer, is_last=number == len(state.runs) - 1)
        start += num_tokens
        if num_beacons:
            read(num_beacons, layer.begun(), is_last=True)
        start += num_beacons
    return torch.cat(outputs, dim=1)


def _layer_of(mixer: Any, cache: Any) -> StateLayer | None:
    """Where a cache of ours keeps what a module carries: at the layer's place, or at one of its own beside attention."""
    layers = [] if cache is None else cache.layers
    layer = layers[mixer.beacon_index] if mixer.beacon_index < len(layers) else None
    return layer if isinstance(layer, StateLayer) else None


def _note_step(mixer: Any, hidden: torch.Tensor, layer: StateLayer | None) -> None:
    """Note what a step of one row on a state is made of, if gradients are kept, before the module writes over that."""
    if torch.is_grad_enabled() and hidden.shape[1] == 1 and layer is not None and any(layer.state.shapes):
        mixer.beacon_state.hidden, mixer.beacon_state.before = hidden, layer.begun()


def _of_one_row(mixer: Any, kwargs: dict[str, Any], row: torch.Tensor, layer: StateLayer) -> torch.Tensor:
    """What a module makes of one row (B, 1, M) on a state that is not wanted afterwards, gradients included."""
    name, rows = cache_name(mixer.__class__), torch.cat((row, row), dim=1)
    cache = OneLayerCache(layer, mixer.layer_idx)
    return mixer.forward(**{**kwargs, "hidden_states": rows, name: cache})[:, :1]
