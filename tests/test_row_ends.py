"""What padding a row is given, and what is told where it has closed a chunk."""

import pytest
import torch

from activation_beacon import BeaconConfig
from activation_beacon.row_ends import RowEnds
from families import random_ids, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4), local_tokens=5)


class End:
    eos_token_id = 2

    def __call__(self, *_, **__):
        raise AssertionError("not asked here")


@pytest.mark.parametrize(
    ("tokens_seen", "count", "taken", "told"),
    [
        (40, 2, 2, None),  # one chunk is closed at 22 tokens, two at 38
        (38, 1, 1, "these have closed a chunk: its tail is shorter than where it is alone"),
        (40, 8, 8, "these have closed a chunk: its tail is shorter than where it is alone"),
        (40, 9, 0, "these have closed a chunk: its context holds padding"),
    ],
)
@torch.no_grad()
def test_padding_that_has_closed_a_chunk_is_told_of(tokens_seen, count, taken, told, caplog):
    cache = with_beacons("llama", CONFIG).compress(random_ids(tokens_seen), ratio=4)
    assert len(cache.ratios) == 2
    ends = RowEnds([End()])
    ends.longest, ends.lengths = tokens_seen + 1, torch.tensor([tokens_seen + 1 - count])
    assert ends.padding(cache) == [taken]
    assert bool(caplog.text) == (told is not None)
    assert (told or "") in caplog.text
