"""One more token of several texts in one pass, each on a cache of its own.

The rows of one tensor need padding to one length, and copies when one of them joins, leaves or closes a chunk. Here caches
stay apart: projections, MLPs and the head are computed for all rows together, since they read the same weights; attention is
computed row by row, to the row's own entries where these stand. As in `causal`, a mask says so: it passes through the base's
own forward and is understood where attention is computed. States are of one size, and are put together for the pass.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from activation_beacon.batch import NewTokens
from activation_beacon.cache import BeaconCache
from activation_beacon.causal import ToldEntries, without_cudnn
from activation_beacon.chunk_inputs import ReadingModel
from activation_beacon.constants import constant, sent
from activation_beacon.entries import BeaconLayer
from activation_beacon.forward import read
from activation_beacon.readout import Wanted
from activation_beacon.recurrent import StateLayer
from activation_beacon.sites import DecoderSite, LayerSite, understands_told_masks

# B rows · H query heads · K kv heads · S entries of a row · D head dim · V vocabulary


class OwnEntries(ToldEntries):
    """A mask that says "each row, all of its own entries": keys and values (1, K, S, D) of each row."""

    def attended_to(
        self, query: torch.Tensor, entries: Sequence[tuple[torch.Tensor, torch.Tensor]], *, scale: float | None
    ) -> torch.Tensor:
        """Attention (B, H, 1, D) of queries (B, H, 1, D), one of each row, to the row's own keys and values.

        The query heads that share a kv head stand as queries of it: nothing is repeated.
        """
        outputs = []
        for row, (keys, values) in zip(query, entries, strict=True):
            shared = row.reshape(1, keys.shape[1], -1, row.shape[-1])
            outputs.append(nn.functional.scaled_dot_product_attention(shared, keys, values, scale=scale))
        return torch.cat([output.reshape(1, query.shape[1], 1, -1) for output in outputs])


class RowsLayer(DynamicLayer):
    """One layer of several caches during a pass that reads one token in each.

    Args:
        rows: the layer in each cache; appended to in place.
        mask: told of the rows' entries when the layer is reached.
        site: which layer it is.
        lent_as: its number, if other layers attend to the same.
    """

    has_entries = True

    def __init__(self, rows: Sequence[BeaconLayer], mask: OwnEntries, site: LayerSite, lent_as: int | None) -> None:
        super().__init__()
        self.rows = rows
        self.mask = mask
        self.site = site
        self.lent_as = lent_as
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one entry (B, K, 1, D) to each row; returns the new entries, which nobody attends to."""
        first = 0 if self.site.window is None else -self.site.window
        entries = []
        for row, keys, values in zip(self.rows, key_states.split(1), value_states.split(1), strict=True):
            held_keys, held_values = row.update(keys, values)
            entries.append(self.site.attended(held_keys[:, :, first:], held_values[:, :, first:]))
        self.mask.told(entries, self.lent_as)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Entries of the longest row."""
        return max(row.get_seq_length() for row in self.rows)


def read_next(model: ReadingModel, site: DecoderSite, caches: Sequence[BeaconCache], ids: torch.Tensor) -> torch.Tensor:
    """Read one token in each of several caches of one row, in place; on an error they stay as they were.

    Those that close a chunk are read one after another, and all of them where the mask would not be understood.

    Args:
        model: the attached model.
        site: its layers and positions.
        caches: no two the same.
        ids: (B,), one token for each cache.

    Returns:
        Logits (B, V).

    Raises:
        RatioError, CapacityError: from the plan, before anything is read.
    """
    can_append = [_can_append(site, cache) for cache in caches]
    if not understands_told_masks(model, site) or sum(can_append) < 2:
        can_append = [False] * len(caches)
    together = [row for row, can in enumerate(can_append) if can]
    apart = [row for row, can in enumerate(can_append) if not can]
    before = {row: caches[row].fork() for row in apart}
    num_slots = {row: caches[row].num_slots for row in together}  # what they are cut to again: no fork for each token
    logits: dict[int, torch.Tensor] = {}
    after: list[tuple[torch.Tensor, list[Any]]] = []
    try:
        for row in apart:
            new = NewTokens(ids[row, None, None], [0], [1])
            readout = read(model, site, caches[row], new, Wanted(first_column=0))
            assert readout.logits is not None, "they were wanted"
            logits[row] = readout.logits[0, -1]
        if together:
            tokens = ids.index_select(0, constant(tuple(together), ids.device))[:, None]
            rows, after = _append(model, site, [caches[row] for row in together], tokens)
            logits |= dict(zip(together, rows, strict=True))
        stacked = torch.stack([logits[row] for row in range(len(caches))])
    except BaseException:
        for row, own in before.items():
            caches[row].adopt(own)
        for row, count in num_slots.items():
            caches[row].truncate(count)
        raise
    for row, (token_ids, layers) in zip(together, after, strict=True):
        caches[row].token_ids, caches[row].layers = token_ids, layers
        caches[row].rows = (caches[row].rows[0].after_reading(1),)
    return stacked


def _can_append(site: DecoderSite, cache: BeaconCache) -> bool:
    """Whether the next token is just appended to what a cache of one row holds."""
    reading = cache.planner(site.max_positions).plan(cache.rows[0], 1)
    return cache.num_slots > 0 and not reading.closings and not reading.restart


def _append(
    model: ReadingModel, site: DecoderSite, caches: Sequence[BeaconCache], ids: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, list[Any]]]]:
    """Read ids (B, 1) that close no chunk in one pass; logits (B, V), and for each cache the ids (1, T) seen then, and its layers.

    The caches have the new entries; that they have read something is not noted yet, nor in states.
    """
    mask = OwnEntries.on(ids.device)
    lengths = [cache.num_slots for cache in caches]
    held = [[cache.layers[index] for cache in caches] for index in range(len(site.layers))]
    layers = [
        RowsLayer(rows, mask, layer, site.lent_as(index)) if layer.has_entries else StateLayer.begun_together(rows)
        for index, (rows, layer) in enumerate(zip(held, site.layers, strict=True))
    ]
    is_compressed = any(row.chunks for cache in caches for row in cache.rows)
    with model.fast_products(len(caches)) if is_compressed else nullcontext(), without_cudnn(ids.device):
        output = model.base_forward(
            input_ids=ids,
            position_ids=sent(lengths, ids.device)[:, None],
            attention_mask=mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=1,
        )
    token_ids = [
        torch.cat((cache.token_ids.to(token.device), token), dim=1)
        for cache, token in zip(caches, ids.split(1), strict=True)
    ]
    after = [
        [
            rows[row] if layer.has_entries else layer.of_row(row, rows[row])
            for layer, rows in zip(layers, held, strict=True)
        ]
        for row in range(len(caches))
    ]
    return output.logits[:, -1], list(zip(token_ids, after, strict=True))
