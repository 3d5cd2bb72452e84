"""All chunks of a text in one pass: the base's forward over the slots of every chunk and of the tail, laid end to end.

Layer l of a chunk needs only layer l-1 of the chunks before it, so that a pass over all of them is exact. What is particular
happens in attention: each chunk's queries see the kept entries of earlier chunks, their keys moved to where they are held,
and causally their own chunk. So no cache is needed, gradients flow through all chunks, and gradient checkpointing works.

Attention is the base's own: a function of ours is registered in transformers beside it, hands each chunk to it, and hands
everything to it in passes that are not of this kind.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from activation_beacon.causal import TOLD_WITH_GRADIENTS, LowerRight
from activation_beacon.chunk_inputs import (
    ReadingModel,
    anchor_slots,
    anchors_of_all,
    interleave,
    laid_end_to_end,
    plain,
)
from activation_beacon.config import BeaconConfig
from activation_beacon.constants import sent
from activation_beacon.errors import UnsupportedError
from activation_beacon.layouts import ChunkLayout, GroupLayout
from activation_beacon.rope import KeyMover
from activation_beacon.sites import AT_ONCE, DecoderSite

# B batch · T tokens of a text · N slots of all chunks and the tail · H query heads · K kv heads · D head dim · M model dim

WITH_MASKS = ("eager", "sdpa")  # attention that takes the mask that it is given


class Chunks:
    """How a pass over several chunks is cut: where each begins, what it leaves behind, and how far its keys are moved.

    Args:
        site: the base's layers.
        layouts: of the chunks that are closed, in order.
        tail_length: raw tokens after them.
        device: of the masks and indices.
        anchors: for each chunk the slots (n,) or (B, n) of the tokens that its beacons begin as.
        named_window: that the base's configuration names, whether anybody heeds it or not.
    """

    def __init__(
        self,
        site: DecoderSite,
        layouts: Sequence[ChunkLayout],
        tail_length: int,
        device: torch.device,
        anchors: Sequence[torch.Tensor],
        named_window: int | None = None,
    ) -> None:
        self.layer_of = {layer.attention: index for index, layer in enumerate(site.layers)}
        self.windows = [layer.window for layer in site.layers] if site.is_known else None
        self.named_window = named_window
        group = GroupLayout(tuple(layouts))
        first, held = group.first_slots[-1], group.num_kept[-1]  # of the tail
        sizes = (*group.sizes, tail_length)
        self.spans = list(zip(sizes, group.num_kept, strict=True))  # slots, entries held before them
        positions = (*group.positions, *range(held, held + tail_length))
        raw = (*group.raw_slots, *range(first, first + tail_length))
        self.mover = KeyMover(site.ropes, sent(group.shifts, device))
        self.kept_slots = sent(group.kept_slots, device)  # (entries held at the end,)
        self.position_ids = sent(positions, device)[None]  # (1, N)
        self.raw_slots = sent(raw, device)  # (T,)
        self.runs = (*group.runs, (tail_length, 0))
        self.beacon_slots = sent(group.beacon_slots, device)
        # (n,) or (B, n) of all chunks
        self.anchor_slots = sent(anchors_of_all(anchors, group), device) if layouts else self.beacon_slots
        self._masks: dict[tuple[Any, ...], torch.Tensor | None] = {}

    def attend(
        self,
        attention: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask_dtype: torch.dtype | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention output (B, N, H, D) of queries (B, H, N, D) over keys and values (B, K, N, D), chunk by chunk.

        Args:
            attention: the base's own attention function.
            module: the attention module that calls.
            query: rotated where they are read, as the keys are.
            key: as above.
            value: as above.
            mask_dtype: of additive masks; None for boolean ones.
            kwargs: the base's further arguments.
        """
        kept = self.kept_slots.to(key.device)  # layers may be on several GPUs
        held_keys = self.mover.move(key.index_select(2, kept), self.layer_of[module])
        held_values = value.index_select(2, kept)
        # Not every family tells its attention of the window that is in its masks.
        window = kwargs.get("sliding_window") if self.windows is None else self.windows[self.layer_of[module]]
        outputs = []
        sizes = [size for size, _ in self.spans]
        parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
        for (size, held), (queries, keys, values) in zip(self.spans, parts, strict=True):
            if self.windows is None and "sliding_window" not in kwargs:
                self._refuse_unclear_window(module, held + size)
            if held:
                keys = torch.cat((held_keys[:, :, :held], keys), dim=2)
                values = torch.cat((held_values[:, :, :held], values), dim=2)
            mask = self._mask(size, held, window, mask_dtype, key.device)
            outputs.append(attention(module, queries, keys, values, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1)

    def _refuse_unclear_window(self, module: nn.Module, num_entries: int) -> None:
        if self.named_window is not None and num_entries > self.named_window:
            raise UnsupportedError(
                f"The configuration names a window of {self.named_window:,} tokens, and {type(module).__name__} is not told whether "
                "it has one: longer texts cannot be read in one pass. Read chunk by chunk, in a loop of your own: "
                "model(input_ids, labels=labels, beacon_ratio=...) is differentiable."
            )

    def _mask(
        self, size: int, held: int, window: int | None, dtype: torch.dtype | None, device: torch.device
    ) -> torch.Tensor | None:
        """Mask (1, 1, size, held + size), or one that is told: causal from the lower right, within a sliding window if any."""
        if window is not None and held + size <= window:
            window = None
        kind = (size, held, window, dtype, device)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(size, held, window, dtype, device)
        return self._masks[kind]

    def _make_mask(
        self, size: int, held: int, window: int | None, dtype: torch.dtype | None, device: torch.device
    ) -> torch.Tensor | None:
        if dtype is None and window is None and (not held or size == 1):
            return None  # sdpa's own causal kernel, or one query that sees all
        if dtype is None and window is None and device.type in TOLD_WITH_GRADIENTS:
            return LowerRight.on(device)
        queries = torch.arange(held, held + size, device=device)[:, None]
        keys = torch.arange(held + size, device=device)[None]
        seen = keys <= queries
        if window is not None:
            seen &= queries - keys < window
        if dtype is None:
            return seen[None, None]
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@contextlib.contextmanager
def chunks_at_once(model: Any) -> Iterator[None]:
    """Within the block, `read_at_once` can be called on an attached model. Backward passes belong into the block as well.

    Every other call of the model gives what it gives without the block.

    Raises:
        UnsupportedError: if the attention that the model is set to cannot be handed one chunk at a time.
    """
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before not in WITH_MASKS:
        raise UnsupportedError(
            f"attn_implementation ({before}) cannot read all chunks in one pass. Use one of {', '.join(WITH_MASKS)}, "
            "or read chunk by chunk."
        )
    _register(before)
    config._attn_implementation = AT_ONCE + before
    try:
        yield
    finally:
        config._attn_implementation = before


def read_at_once(
    model: ReadingModel, site: DecoderSite, config: BeaconConfig, ids: torch.Tensor, layouts: Sequence[ChunkLayout]
) -> torch.Tensor:
    """Hidden states (B, T, M) of the raw tokens, before the base's head, equal to those of reading chunk by chunk.

    Call it in a block of `chunks_at_once`.

    Args:
        model: the attached model.
        site: its layers.
        config: of the adapter.
        ids: (B, T) texts of one length that share their layouts; shorter ones are padded on the right, in the tail.
        layouts: of the chunks that are closed; what is left of T is the tail, and not empty.

    Raises:
        UnsupportedError: of an unknown family whose attention is not told of a window that its configuration names, beyond it; and
            with gradient checkpointing, where layers keep what they are told and could not be computed again.
    """
    told = [layer for layer in site.layers if layer.num_states != 0]  # others make nothing of it
    if any(layer.told is not layer.attention and _is_checkpointed(layer.told) for layer in told):
        raise UnsupportedError(
            f"Layers of {type(model).__name__} do not hand keyword arguments on to their attention, and cannot be computed again "
            "in the backward pass. Leave gradient checkpointing off; shorter texts save memory, too."
        )
    chunk_size = len(layouts[0].raw_slots) if layouts else 0
    tail_length = ids.shape[1] - len(layouts) * chunk_size
    assert tail_length > 0, "closing is lazy: a tail is left"
    texts = ids[:, : len(layouts) * chunk_size].split(chunk_size, dim=1) if layouts else ()
    seen = torch.cat(texts, dim=1).cpu().split(chunk_size, dim=1) if layouts and config.exact else texts
    anchors = [anchor_slots(config, layout, text) for layout, text in zip(layouts, seen, strict=True)]
    named_window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    chunks = Chunks(site, layouts, tail_length, ids.device, anchors, named_window or None)
    pieces = [interleave(model, text, layout) for text, layout in zip(texts, layouts, strict=True)]
    pieces.append(plain(model, ids[:, len(layouts) * chunk_size :]))
    output = model.get_decoder()(
        position_ids=chunks.position_ids,
        attention_mask=ids.new_ones((1, 1, 1, 1), dtype=torch.bool),  # "prepared by the caller": none is made of it
        use_cache=False,
        beacon_slots=chunks.beacon_slots,
        beacon_anchor_slots=chunks.anchor_slots,
        beacon_chunks=chunks,
        beacon_runs=chunks.runs,
        **laid_end_to_end(pieces),
    )
    return output.last_hidden_state.index_select(1, chunks.raw_slots)


def _is_checkpointed(layer: nn.Module) -> bool:
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def _register(implementation: str) -> None:
    """Register our attention over the base's own, with the base's own masks for all other passes."""
    name = AT_ONCE + implementation

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        own = _own_attention(module, implementation)
        chunks = getattr(getattr(module, "beacon_state", None), "chunks", None)
        if chunks is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        output = chunks.attend(
            own,
            module,
            query,
            key,
            value,
            mask_dtype=query.dtype if implementation == "eager" else None,
            **kwargs,
        )
        return output, None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[implementation])


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation == "eager":
        own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return own
    return AttentionInterface()[implementation]
