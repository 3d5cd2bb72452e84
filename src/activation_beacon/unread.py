"""What of a prompt a cache has not seen: transformers' `past_key_values` go with all ids, or with the new ones alone."""

import torch

from activation_beacon.batch import left_padded
from activation_beacon.cache import BeaconCache
from activation_beacon.errors import InputError

LEAST_REPEATED = 16  # tokens: what templates put before every message is shorter than most texts


def unread(
    prompt: torch.Tensor, mask: torch.Tensor | None, cache: BeaconCache
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What of a prompt (B, T) the cache has not seen, padded on the left; padding between the turns of a row is left out.

    All of it, unless each row opens with the text seen: the whole of it, or what came after the context that an earlier
    `generate` was given, which is what that call returned.
    """
    if cache.token_ids.shape[1] == 0:
        return prompt, mask
    width = prompt.shape[1]
    valid = torch.ones_like(prompt) if mask is None else mask[:, -width:].to(prompt.device)
    columns = [valid[b].nonzero()[:, 0] for b in range(len(valid))]
    repeated = [_num_repeated(b, prompt[b, columns[b]], cache) for b in range(len(valid))]
    if not any(repeated):  # None, or 0 where nothing came after the context: that says nothing
        return prompt, mask
    if None in repeated:
        raise InputError(
            f"Row {repeated.index(None)} of the prompt does not open with the text that was read, and others do. "
            "Give the whole text in each row, or only what follows it in each."
        )
    texts = [prompt[b, columns[b][number:]] for b, number in enumerate(repeated)]
    return left_padded(texts, device=prompt.device)


def _num_repeated(number: int, prompt: torch.Tensor, cache: BeaconCache) -> int | None:
    """How many tokens that a row of the cache has seen a prompt (T,) opens with; None where it only says what follows them.

    0 where that and what an earlier `generate` returned are the same.

    Raises:
        InputError: if it repeats most of them, and not all.
    """
    row = cache.rows[number]
    counts = (row.tokens_seen, row.tokens_seen - cache.context_lengths[number])
    texts = [
        cache.token_ids[number, cache.token_ids.shape[1] - count :].to(prompt.device) for count in counts if count > 0
    ]
    for seen in texts:
        if len(prompt) > len(seen) and torch.equal(prompt[: len(seen)], seen):
            return len(seen)
    for seen in texts:
        _refuse_another_beginning(number, prompt, seen)
    return None if all(count > 0 for count in counts) else 0


def _refuse_another_beginning(row: int, prompt: torch.Tensor, seen: torch.Tensor) -> None:
    """Refuse a prompt that repeats most of what was read and then differs, such as a chat rendered anew: it would be read twice.

    Raises:
        InputError: saying where they part.
    """
    length = min(len(prompt), len(seen))
    differs = (prompt[:length] != seen[:length]).nonzero()
    num_same = int(differs[0]) if len(differs) else length
    if 2 * num_same > len(seen) and num_same >= LEAST_REPEATED:
        raise InputError(
            f"Row {row} of the prompt repeats the first {num_same} of the {len(seen)} tokens that were read, and then "
            f"{'differs' if num_same < len(prompt) else 'ends'}. Give the text as it was read and what follows it, or only that."
        )
