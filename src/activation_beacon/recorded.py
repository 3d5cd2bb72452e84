"""One token more by a step that is recorded once and replayed: a CUDA graph.

A step of decoding is some hundreds of small kernels, which a GPU finishes before Python has launched them. Recorded, they are
launched together. A recording runs on the same addresses each time: the ids, and the slot that their entries go to, are
written into two tensors before; keys and values stand in the cache's room, all of which is attended to under a mask of what
is filled. So a recording serves until the room is full or a chunk is closed, and then another one is made.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from activation_beacon.cache import BeaconCache
from activation_beacon.causal import ToldEntries, without_cudnn
from activation_beacon.chunk_inputs import ReadingModel
from activation_beacon.errors import UnsupportedError, reason
from activation_beacon.recurrent import StateLayer
from activation_beacon.room import MOST_PARTS, Room
from activation_beacon.sites import DecoderSite, LayerSite, understands_told_masks

# B batch · H query heads · K kv heads · C slots of the room · D head dim · V vocabulary

LEAST_PART = 256  # slots
ONE_AT_A_TIME = threading.Lock()  # threads record on one stream, and a process may make one graph at a time

Recorder = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]


def record_on_cuda(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record a step that may run more than once.

    Returns:
        What replays it, and the tensor that its result is then in.
    """
    outside, own = torch.cuda.current_stream(), _recording_stream(torch.cuda.current_device())
    with ONE_AT_A_TIME:
        own.wait_stream(outside)
        with torch.cuda.stream(own):
            step()  # libraries make their workspaces at the first call, which a recording could not
        outside.wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        failed: BaseException | None = None
        try:
            with torch.cuda.graph(
                graph, stream=own, capture_error_mode="thread_local"
            ):  # others may use the GPU meanwhile
                try:
                    result = step()
                except BaseException as error:
                    failed = error
                    raise
        except RuntimeError as error:  # a graph whose step has failed cannot be ended: then that is all that is told
            raise (failed or error) from None
        finally:
            torch.cuda.set_stream(outside)  # which it has not gone back to then
    return graph.replay, result


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The stream on which all steps of a GPU are recorded: libraries keep a workspace for each that they were called on."""
    return torch.cuda.Stream(device)


RECORDERS: dict[str, Recorder] = {"cuda": record_on_cuda}  # by type of device; on others nothing is gained


class FilledEntries(ToldEntries):
    """A mask that says "all that is filled of these": keys and values (B, K, C, D), and which slots are, (B, 1, 1, C)."""

    def attended_to(self, query: torch.Tensor, entries: Sequence[torch.Tensor], *, scale: float | None) -> torch.Tensor:
        """Attention (B, H, 1, D) of queries (B, H, 1, D); those that share a kv head stand as queries of it.

        As two products of which the second is cut into parts. The kernels of torch that take a mask would walk through
        all slots of a head in one block, which leaves most of a GPU idle where few texts are decoded.
        """
        keys, values, filled = entries
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        precise = torch.float64 if query.dtype is torch.float64 else torch.float32
        shared = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])  # (B, K, H / K, D)
        scores = (shared * scale @ keys.transpose(2, 3)).to(precise).masked_fill(~filled, -torch.inf)
        parts = num_parts(keys.shape[2])
        weights = scores.softmax(-1).to(values.dtype).unflatten(-1, (parts, -1)).transpose(2, 3)
        attended = (weights @ values.unflatten(2, (parts, -1))).to(precise).sum(2)
        return attended.to(query.dtype).reshape(*query.shape[:-1], -1)


def num_parts(num_slots: int) -> int:
    """Parts of one size that a room is cut into: a power of two, none shorter than `LEAST_PART`."""
    parts = math.gcd(num_slots, MOST_PARTS)
    while parts > 1 and num_slots // parts < LEAST_PART:
        parts //= 2
    return parts


class StepLayer(DynamicLayer):
    """One layer during a recorded step: puts the new entry into its slot of the room, and tells the mask.

    Args:
        room: what the layer caches, (B, K, C, D) each.
        slot: (1,), where the new entry goes.
        filled: (B, 1, 1, C), the slots that are seen.
        mask: that the pass is given.
        site: which layer it is.
        lent_as: its number, if other layers attend to the same.
    """

    def __init__(
        self,
        room: Room,
        slot: torch.Tensor,
        filled: torch.Tensor,
        mask: FilledEntries,
        site: LayerSite,
        lent_as: int | None,
    ) -> None:
        super().__init__()
        self.site = site
        self.lent_as = lent_as
        self.room = room
        self.slot = slot
        self.filled = filled
        self.mask = mask
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter one entry (B, K, 1, D) of each row; returns it, which nobody attends to."""
        for whole, new in zip(self.room.whole, (key_states, value_states), strict=True):
            whole.index_copy_(2, self.slot, new)
        self.mask.told([*self.site.attended(*self.room.whole), self.filled], self.lent_as)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Slots that are filled: nothing of a recording may depend on it, but a model may ask."""
        return self.room.filled[0].shape[2]


class RecordedStep:
    """A step of decoding on the rooms of a cache.

    Args:
        model: whose `base_forward` is recorded.
        site: its layers.
        cache: of B rows, with room for a token; nothing of it changes.

    Raises:
        UnsupportedError: if the step cannot be recorded, with the reason.
    """

    def __init__(self, model: ReadingModel, site: DecoderSite, cache: BeaconCache) -> None:
        self.rooms = [room for layer in _with_entries(cache) if (room := layer.room) is not None]
        for room in self.rooms:
            room.clear()
        self.padding = _padding(cache)
        self.weights = _weights(model)
        # Kept, so that no other weights come to stand where these did: a model that has moved is known by their place.
        self._embeddings = model.get_input_embeddings().weight.detach()
        device = cache.token_ids.device
        num_slots = cache.num_slots
        with torch.inference_mode(False):  # where they are made there, they are written nowhere else
            ids = torch.zeros((cache.batch_size, 1), dtype=torch.long, device=device)
            slot = torch.full((1,), num_slots, dtype=torch.long, device=device)
        first = torch.tensor(self.padding, device=device)[:, None]
        # Not through `self`, which keeps the step: a circle would hold the rooms until Python looks for it.
        numbers = [number for number, layer in enumerate(site.layers) if layer.has_entries]
        rooms = dict(zip(numbers, self.rooms, strict=True))
        kinds = {
            number: (room.num_slots, cache.layers[number].dropped, site.layers[number].window)
            for number, room in rooms.items()
        }

        def step() -> torch.Tensor:
            filled = {kind: _filled(slot, first, *kind) for kind in set(kinds.values())}
            slots = {dropped: slot - dropped for _, dropped, _ in filled}
            mask = FilledEntries.on(device)
            layers = [
                StepLayer(
                    rooms[number], slots[kinds[number][1]], filled[kinds[number]], mask, layer, site.lent_as(number)
                )
                if number in rooms
                else StateLayer(0)
                for number, layer in enumerate(site.layers)
            ]
            return model.base_forward(
                input_ids=ids,
                position_ids=slot - first,
                attention_mask=mask,
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=1,
            ).logits

        self.ids, self.slot = ids, slot
        self._step = step  # a replay reads what this closes over: it has to stay where it is
        try:
            with _on(device), without_cudnn(device):
                self._replay, self._logits = RECORDERS[device.type](step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                f"A step of this model cannot be recorded as a CUDA graph ({reason(error)}). "
                "Set model.cuda_graphs = False."
            ) from error

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return (type(None), ())  # a copied or pickled cache goes without, and has its own made

    def serves(self, model: ReadingModel, cache: BeaconCache) -> bool:
        """Whether the model is where it was, and the cache still stands in these rooms and has a place for a token."""
        return (
            self.weights == _weights(model)
            and self.padding == _padding(cache)
            and all(
                layer.room is room and layer.has_room(1)
                for layer, room in zip(_with_entries(cache), self.rooms, strict=True)
            )
        )

    def run(self, cache: BeaconCache, ids: torch.Tensor) -> torch.Tensor:
        """Enter the entries of ids (B, 1) into the cache's layers; its rows are the caller's to note.

        Returns:
            Logits (B, 1, V).
        """
        self.ids.copy_(ids)
        self.slot.fill_(cache.num_slots)
        with _on(self.ids.device):
            self._replay()
        for layer in _with_entries(cache):
            layer.fill_next()
        return self._logits.clone()


def _filled(slot: torch.Tensor, first: torch.Tensor, num_slots: int, dropped: int, window: int | None) -> torch.Tensor:
    """Which slots (B, 1, 1, C) of a layer's room the token at `slot` (1,) sees, of rows that begin at `first` (B, 1).

    Args:
        num_slots: C.
        dropped: slots before the room's first.
        window: of the layer.
    """
    places = torch.arange(dropped, dropped + num_slots, device=slot.device)[None]
    seen = (places >= first) & (places <= slot)
    return (seen if window is None else seen & (places > slot - window))[:, None, None]


def recorded_step(model: ReadingModel, site: DecoderSite, cache: BeaconCache) -> RecordedStep | None:
    """The step that appends one token to each row of a cache, recorded if it has not been; None where it must not be.

    The cache keeps it. There has to be room, which the first token makes that an ordinary pass appends.

    Raises:
        UnsupportedError: if the step cannot be recorded, with the reason.
    """
    held: RecordedStep | None = cache.recorded
    if held is not None and not held.serves(model, cache):
        held = cache.recorded = None  # what it holds of a room is free before another is made
    if not _can_be_recorded(model, site, cache):
        return None
    if held is None:
        held = cache.recorded = RecordedStep(model, site, cache)
    return held


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A block in which streams and graphs are those of the model's GPU, whichever is the current one outside."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _can_be_recorded(model: ReadingModel, site: DecoderSite, cache: BeaconCache) -> bool:
    device = cache.token_ids.device
    return (
        device.type in RECORDERS
        and not site.is_recurrent  # states have other addresses after each step
        and understands_told_masks(model, site)
        and not model.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)
        and all(layer.stored is None and layer.device == device and layer.has_room(1) for layer in _with_entries(cache))
    )


def _with_entries(cache: BeaconCache) -> list[Any]:
    """The layers that keep keys and values."""
    return [layer for layer in cache.layers if layer.has_entries]


def _padding(cache: BeaconCache) -> tuple[int, ...]:
    """Slots of padding before each row."""
    longest = cache.num_slots
    return tuple(longest - row.cache_length for row in cache.rows)


def _weights(model: ReadingModel) -> tuple[int, int]:
    """Which model it is, and where its weights are: they move together."""
    return id(model), model.get_input_embeddings().weight.data_ptr()
