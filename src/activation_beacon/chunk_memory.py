"""What a pass that closes chunks is lent of a cache, and a layer of the cache after it."""

from collections.abc import Callable, Sequence

import torch
from transformers import Cache

from activation_beacon.cache import BeaconCache
from activation_beacon.entries import BeaconLayer, ChunkLayer, Quantized, merge, take
from activation_beacon.resuming import ChunkRows

# B batch · K kv heads · m entries before the chunks · n entries that a chunk leaves · D head dim


def memory_view(cache: BeaconCache, members: Sequence[int], length: int, rows: ChunkRows | None) -> Cache:
    """What some rows hold, as the cache of a chunk's pass: their memory, and what `rows` says is held of the chunk."""
    num_held, num_repeated = (0, 0) if rows is None else (rows.num_held, rows.num_repeated)
    ends = [end + num_held for end in cache.memory_ends(members)]
    held = lent(cache, members, ends, length + num_held)
    return Cache(
        layers=[
            ChunkLayer(each, length, num_held=num_held, num_repeated=num_repeated)
            if layer.has_entries
            else layer.at_chunk(is_first=not length)
            for layer, each in zip(cache.layers, held, strict=True)
        ]
    )


def lent(
    cache: BeaconCache, members: Sequence[int], ends: Sequence[int], length: int
) -> list[Callable[[], tuple[torch.Tensor, torch.Tensor]] | None]:
    """For each layer what cuts out of it, when it is needed, the `length` slots before each row's of `ends`; None for none."""

    def lend(layer: BeaconLayer) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def cut() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = layer.entries()
            return take(keys, members, ends, length, dim=2), take(values, members, ends, length, dim=2)

        return cut

    return [lend(layer) if length else None for layer in cache.layers]


def joined_layer(
    layer: BeaconLayer,
    chunk: ChunkLayer,
    keys: torch.Tensor,
    values: torch.Tensor,
    members: Sequence[int],
    others: Sequence[int],
    longest_other: int,
) -> BeaconLayer:
    """One layer after a chunk has been closed: memory and kept entries of `members`, all entries of the others."""
    if layer.stored is not None and not others and chunk.length in (0, layer.stored_length):
        # Nothing is lent where the text is read anew: what was stored goes.
        held = [part.map(lambda codes: codes[:, :, : chunk.length]) for part in layer.stored]
        parts = [part.joined(Quantized.of(new, part.bits)) for part, new in zip(held, (keys, values), strict=True)]
        return BeaconLayer.of(keys[:, :, :0], values[:, :, :0], (parts[0], parts[1]))
    if chunk.held is not None:
        held_keys, held_values = chunk.memory()
        keys, values = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
    if not others:
        return BeaconLayer.of(keys, values)
    if layer.keys is None:
        rest_keys, rest_values = (t.new_zeros((len(others), *t.shape[1:2], 0, t.shape[3])) for t in (keys, values))
    else:
        ends = [layer.get_seq_length()] * len(others)
        rest_keys, rest_values = (take(t, others, ends, longest_other, dim=2) for t in layer.entries())
    return BeaconLayer.of(
        merge([(members, keys), (others, rest_keys)], dim=2), merge([(members, values), (others, rest_values)], dim=2)
    )
