"""What goes into a pass that closes chunks: tokens with beacons among them, and which tokens these begin as."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from activation_beacon import decoder_inputs
from activation_beacon.config import BeaconConfig
from activation_beacon.constants import constant
from activation_beacon.exact import anchor_tokens
from activation_beacon.layouts import ChunkLayout, GroupLayout

# B batch · w tokens of a chunk · T slots of its pass · n beacons · M model dim

Inputs = dict[str, torch.Tensor]


class ReadingModel(Protocol):
    """What reading needs of an attached model."""

    training: bool
    cuda_graphs: bool

    @property
    def config(self) -> Any:
        """The base's configuration."""

    @property
    def beacon_embedding(self) -> torch.Tensor:
        """The input (M,) of every beacon."""

    def is_by_onednn(self, num_rows: int) -> bool:
        """Whether matrix products of so many rows go through oneDNN."""

    def fast_products(self, num_rows: int) -> AbstractContextManager[None]:
        """A block for a pass of so many rows."""

    def base_forward(self, **kwargs: Any) -> Any:
        """The base's own forward, with its language modelling head."""

    def get_decoder(self) -> Any:
        """The base without its head."""

    def get_input_embeddings(self) -> Any:
        """The token embedding."""


def interleave(model: ReadingModel, ids: torch.Tensor, layout: ChunkLayout) -> Inputs:
    """What the base is given for a chunk: its tokens (B, w) with the beacon's embedding between them.

    Returns:
        Arguments of the base's forward by their names, (B, T, ...) each: embeddings (B, T, M), and what layers are given besides.
    """
    tokens = decoder_inputs.embeddings(model, ids)
    is_beacon = constant(layout.beacon_mask, ids.device, torch.bool)
    token_of_slot = constant(layout.token_of_slot, ids.device)
    spread = tokens.index_select(1, token_of_slot)
    embeddings = torch.where(is_beacon[:, None], model.beacon_embedding.to(tokens.dtype), spread)
    besides = decoder_inputs.layer_embeddings_of_slots(
        model.get_decoder(), ids.index_select(1, token_of_slot), is_beacon
    )
    return {"inputs_embeds": embeddings, **besides}


def plain(model: ReadingModel, ids: torch.Tensor) -> Inputs:
    """The same of tokens (B, T) alone."""
    return {
        "inputs_embeds": decoder_inputs.embeddings(model, ids),
        **decoder_inputs.layer_embeddings(model.get_decoder(), ids),
    }


def laid_end_to_end(pieces: Sequence[Inputs]) -> Inputs:
    """Inputs of several chunks as those of one pass."""
    return {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}


def anchor_slots(config: BeaconConfig, layout: ChunkLayout, ids: torch.Tensor) -> torch.Tensor:
    """Slots of the tokens that the beacons of a chunk (B, w) begin as: the layout's (n,), or each text's own (B, n).

    Args:
        config: of the adapter; its exact ids are held token by token.
        layout: of the chunk; one with raw runs is cut evenly.
        ids: on the host; not looked at where nothing is exact.
    """
    if not config.exact or layout.has_raw_runs:
        return torch.tensor(layout.anchor_slots, device="cpu")
    chosen = [anchor_tokens(row, len(layout.beacon_slots), config.exact) for row in ids.tolist()]
    return torch.tensor([[layout.raw_slots[token] for token in row] for row in chosen], device="cpu")


def anchors_of_all(anchors: Sequence[torch.Tensor], group: GroupLayout) -> torch.Tensor:
    """The anchors of a group's chunks, (n,) or (B, n) each in slots of the chunk, together in slots of the group."""
    moved = [slots + first for slots, first in zip(anchors, group.first_slots, strict=False)]
    batch = torch.broadcast_shapes(*(slots.shape[:-1] for slots in moved))
    return torch.cat([slots.expand(*batch, -1) for slots in moved], dim=-1)
