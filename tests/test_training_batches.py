import pytest
import torch

from activation_beacon.training.batches import micro_batches, step_batches
from activation_beacon.training.sampling import Sample
from activation_beacon.training.settings import Stage

CHUNK, TEXTS = 8, 12
RATIOS = (2, 4, 8)


class Numbered:
    """Texts of three lengths, each of its own number over and over."""

    def __init__(self):
        self.made = []

    def sample(self, index):
        self.made.append(index)
        length = CHUNK * (2 + index * index % 3)
        return Sample(torch.full((length,), index), torch.arange(length) >= CHUNK)


class Alike(Numbered):
    """The same, of one length."""

    def sample(self, index):
        return Sample(torch.full((3 * CHUNK,), index), torch.arange(3 * CHUNK) >= CHUNK)


def read(size, *, rank=0, num_processes=1, step=1, sampler=None, **options):
    stage = Stage(batch_size=TEXTS, micro_batch_size=size)
    return step_batches(
        stage, sampler or Numbered(), step, chunk_size=CHUNK, ratios=RATIOS, seed=3, rank=rank,
        num_processes=num_processes, **options,
    )  # fmt: skip


def texts_with_ratios(batches):
    """Which texts are read together, and at which ratios."""
    return [(tuple(batch.ids[:, 0].tolist()), batch.ratios) for batch in batches if batch.num_targets]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("sampler", [Numbered, Alike])
def test_any_number_of_processes_reads_the_micro_batches_of_one_at_the_same_ratios(size, sampler):
    alone = texts_with_ratios(read(size, sampler=sampler()))
    assert sorted(index for texts, _ in alone for index in texts) == list(range(TEXTS, 2 * TEXTS))
    for count in (2, 3, 4, 12):
        shares = [texts_with_ratios(read(size, rank=r, num_processes=count, sampler=sampler())) for r in range(count)]
        assert sorted(text for share in shares for text in share) == sorted(alone)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_texts_one_by_one_are_dealt_in_turn_and_each_process_makes_its_own_only():
    for rank in range(3):
        sampler = Numbered()
        batches = read(1, rank=rank, num_processes=3, sampler=sampler)
        own = list(range(TEXTS + rank, 2 * TEXTS, 3))
        assert sorted(sampler.made) == own
        assert sorted(int(batch.ids[0, 0]) for batch in batches) == own
        lengths = [batch.ids.shape[1] for batch in batches]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [(0,), (1,), (2,), (3,), (4,)]),
        (2, [(0, 2), (1, 3), (4,)]),
        (3, [(0, 2, 4), (1, 3)]),
        (9, [(0, 2, 4), (1, 3)]),
    ],
)
def test_texts_are_read_together_that_have_as_many_chunks(size, expected):
    assert micro_batches(range(5), lambda index: index % 2, size) == expected


def test_micro_batches_stand_in_the_order_of_their_first_texts_whatever_their_chunks():
    assert micro_batches(range(5), lambda index: 9 - index // 3, 2) == [(0, 1), (2,), (3, 4)]


@pytest.mark.parametrize("size", [4, 12])
def test_a_process_that_no_micro_batch_is_left_for_waits_with_a_text_that_counts_for_nothing(size):
    waiting = [read(size, rank=rank, num_processes=12, sampler=Alike()) for rank in range(TEXTS // size, 12)]
    for batches in waiting:
        assert [(batch.num_targets, batch.num_tokens) for batch in batches] == [(0, 0)]
        assert batches[0].ids.shape == (1, 3 * CHUNK)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("count", [2, 5, 12])
def test_processes_that_gather_shards_together_read_as_many_batches_each(size, count):
    shares = [read(size, rank=rank, num_processes=count, is_even=True) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    assert sum(batch.num_tokens for share in shares for batch in share) == sum(b.num_tokens for b in read(size))
    assert sum(batch.num_targets for share in shares for batch in share) == sum(b.num_targets for b in read(size))
