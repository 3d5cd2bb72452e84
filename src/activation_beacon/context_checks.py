"""What a right hash does not rule out: a context's file whose tensors do not belong together, to its rows, or to a model."""

from typing import Any

import torch

from activation_beacon.errors import FileFormatError


def check_contents(context: Any, num_tensors: int) -> None:
    """Refuse tensors that do not belong together, or to the rows.

    Args:
        context: a `BeaconCache`, made of a file.
        num_tensors: that the file has.

    Raises:
        FileFormatError: naming what is there and what is due.
    """
    longest = max(row.tokens_seen for row in context.rows)
    shape, dtype = tuple(context.token_ids.shape), context.token_ids.dtype
    if shape != (context.batch_size, longest) or dtype != torch.long:
        raise FileFormatError(f"ids are {shape} of {dtype} where {(context.batch_size, longest)} integers are due")
    if longest and int(context.token_ids.min()) < 0:
        raise FileFormatError(f"ids must be 0 or more; got {int(context.token_ids.min())}")
    for layer in context.layers:
        shapes = [tuple(tensor.shape) for _, tensor in layer.named_tensors()]
        num_tensors -= len(shapes)
        num_due = max(row.entries_within(layer.window) for row in context.rows)
        is_due = not layer.has_entries or (
            layer.get_seq_length() == context.num_slots and context.num_slots - layer.dropped >= num_due
        )
        if not (layer.is_consistent and is_due) or any(shape[0] != context.batch_size for shape in shapes):
            raise FileFormatError(f"a layer holds {shapes} where {num_due} entries a row are due")
    if num_tensors != 1:
        raise FileFormatError(f"{num_tensors - 1} tensors belong to no layer")


def check_fits(context: Any, site: Any, size: int) -> None:
    """Refuse what no context of a model can hold: other layers, windows, heads, dims, states or ids.

    Args:
        context: a `BeaconCache`.
        site: the `DecoderSite` of the model that is to use it.
        size: ids that it knows.

    Raises:
        FileFormatError: naming what is there and what is the model's.
    """
    try:
        _check_fits(context, site, size)
    except FileFormatError as error:
        raise FileFormatError(f"The context does not fit the model ({error}). Compress the text again.") from error


def _check_fits(context: Any, site: Any, size: int) -> None:
    numbers = {
        "num_layers": (len(context.layers), len(site.layers)),
        "num_states": (context.num_states, site.num_states),
        "windows": (context.windows or site.windows, site.windows),  # older files do not name them
    }
    for name, (found, due) in numbers.items():
        if found != due:
            raise FileFormatError(f"{name} must be the model's {due}; got {found}")
    _check_states(context, site)
    for index, (layer, shapes) in enumerate(zip(context.layers, site.entry_shapes, strict=True)):
        for tensor, wanted in zip((layer.keys, layer.values), shapes or (None, None), strict=True):
            shape = None if tensor is None else (tensor.shape[1], tensor.shape[3])
            if wanted is not None and shape not in (None, wanted):
                raise FileFormatError(f"layer {index} must have (heads, dims) {wanted} as the model; got {shape}")
    if context.token_ids.numel() and int(context.token_ids.max()) >= size:
        raise FileFormatError(f"ids must be within 0..{size - 1}; got {int(context.token_ids.max())}")


def _check_states(context: Any, site: Any) -> None:
    has_read, has_closed = context.num_slots > 0, any(row.chunks for row in context.rows)
    for index in site.num_states:
        layer, due = context.layers[index], site.layers[index].state_shapes
        for state, is_due in ((layer.state, has_read), (layer.settled, has_closed)):
            if state.shapes != due and (is_due or any(state.shapes)):
                raise FileFormatError(f"layer {index} must have states {due} as the model; got {state.shapes}")
