"""What a pass that closes chunks is lent of a cache, and a layer of the cache after it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import Cache

from activation_beacon.cache import BeaconCache
from activation_beacon.entries import BeaconLayer, ChunkLayer
from activation_beacon.layouts import within
from activation_beacon.plan import Row
from activation_beacon.quantized import Quantized
from activation_beacon.resuming import ChunkRows
from activation_beacon.rows import take

# B batch · K kv heads · n entries that a chunk leaves · D head dim

Lent = Callable[[], tuple[torch.Tensor, torch.Tensor]] | None


def memory_view(cache: BeaconCache, members: Sequence[int], length: int, rows: ChunkRows | None = None) -> Cache:
    """What some rows hold, as the cache of a chunk's pass: their memory, and what `rows` says is held of the chunk."""
    num_held, num_repeated = (0, 0) if rows is None else (rows.num_held, rows.num_repeated)
    ends = [end + num_held for end in cache.memory_ends(members)]

    def lending(layer: BeaconLayer) -> ChunkLayer:
        num_lent = within(length, layer.window)
        return ChunkLayer(
            lent(layer, members, ends, num_lent + num_held),
            length,
            lent=num_lent,
            num_held=num_held,
            num_repeated=num_repeated,
            is_sliding=layer.is_sliding,
        )

    return Cache(
        layers=[lending(layer) if layer.has_entries else layer.at_chunk(is_first=not length) for layer in cache.layers]
    )


def lent(layer: BeaconLayer, members: Sequence[int], ends: Sequence[int], length: int) -> Lent:
    """What cuts out of a layer, when it is needed, the `length` slots before each row's of `ends`; None for none."""
    if not length:
        return None

    def cut() -> tuple[torch.Tensor, torch.Tensor]:
        own_ends = [end - layer.dropped for end in ends]
        keys, values = (take(tensor, members, own_ends, length, dim=2) for tensor in layer.entries())
        return keys, values

    return cut


def joined_layer(
    layer: BeaconLayer,
    chunk: ChunkLayer,
    keys: torch.Tensor,
    values: torch.Tensor,
    members: Sequence[int],
    others: Mapping[int, Row],
) -> BeaconLayer:
    """One layer after a chunk has been closed: memory and kept entries of `members`, all entries of the others, within its window.

    Args:
        layer: before it.
        chunk: that the pass was given.
        keys: that are kept of the chunk, (B, K, n, D).
        values: as keys.
        members: the rows that have closed it.
        others: the rest.
    """
    length, num_new = chunk.length + keys.shape[2], keys.shape[2]
    num_seen = within(length, layer.window)
    num_old = max(0, num_seen - num_new)  # of the memory
    keys, values = (states[:, :, max(0, num_new - num_seen) :] for states in (keys, values))
    if layer.stored is not None and not others and chunk.length in (0, layer.dropped + layer.stored_length):
        # Nothing is lent where the text is read anew: what was stored goes.
        first = layer.stored_length - num_old
        held = [part.map(lambda codes: codes[:, :, first:]) for part in layer.stored]
        parts = [part.joined(Quantized.of(new, part.bits)) for part, new in zip(held, (keys, values), strict=True)]
        stored, no_keys, no_values = (parts[0], parts[1]), keys[:, :, :0], values[:, :, :0]
        return BeaconLayer.of(no_keys, no_values, stored, window=layer.window, dropped=length - num_seen)
    if num_old:
        memory = (states[:, :, chunk.lent - num_old :] for states in chunk.memory())
        keys, values = (torch.cat(pair, dim=2) for pair in zip(memory, (keys, values), strict=True))
    joined = BeaconLayer.of(keys, values, window=layer.window, dropped=length - num_seen)
    if not others:
        return joined
    if layer.keys is None:
        empty_keys, empty_values = (t.new_zeros((len(others), t.shape[1], 0, t.shape[3])) for t in (keys, values))
        rest = BeaconLayer.of(empty_keys, empty_values)
    else:
        rest = layer.taken(
            [layer.get_seq_length()] * len(others),
            max(row.cache_length for row in others.values()),
            rows=list(others),
            most=max(row.entries_within(layer.window) for row in others.values()),
        )
    return BeaconLayer.merged([(members, joined), (list(others), rest)])
