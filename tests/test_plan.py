"""What to read and what to keep, in integers: layouts by hand, lazy closing, ratio policies, capacity."""

import contextlib
import itertools
import re
import subprocess
import sys

import pytest

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import BeaconError, CapacityError, RatioError
from activation_beacon.layouts import ClosedChunk, RawRun, chunk_layout
from activation_beacon.plan import Row, RowReading, TextPlanner, closing_rounds
from activation_beacon.ratios import RatioPolicy, Span, as_policy, check_ratio, revised

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8))


def planner(ratio="auto", *, config=CONFIG, max_positions=None, budget=None, spans=()) -> TextPlanner:
    return TextPlanner(config, as_policy(config, ratio, budget=budget, spans=spans), max_positions)


def row_after(plan: TextPlanner, *pieces: int, row: Row | None = None) -> Row:
    """A row that has read pieces of a text one after the other, behind what it had read before."""
    row = row or Row(plan.config.chunk_size)
    for piece in pieces:
        reading = plan.plan(row, piece)
        if reading.restart:
            row = Row(plan.config.chunk_size)
        for layout in reading.closings:
            row = row.after_closing(layout)
        row = row.after_reading(reading.stop - row.tokens_seen)
    return row


def test_planning_needs_no_torch():
    code = """
import sys, types
package = types.ModuleType("activation_beacon")
package.__path__ = [sys.argv[1]]
sys.modules["activation_beacon"] = package
import activation_beacon.plan
assert "torch" not in sys.modules
"""
    folder = sys.modules["activation_beacon"].__path__[0]
    subprocess.run([sys.executable, "-c", code, folder], check=True)


# --- what a caller may ask for -----------------------------------------------------------------------------------------

KNOWN = "Use 2, 4, 8."
NOT_A_RATIO = "A compression ratio is an int of at least 2 (raw tokens per beacon); got {}. " + KNOWN


class Index:
    """An integer of another library."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


class Array:
    """A tensor, as far as a policy asks."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def tolist(self):
        return self.values


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ("auto", "auto"),
        (2, 2),
        (8, 8),
        (Index(4), 4),
        ([2, 8, 4], (2, 8, 4)),
        ((4,), (4,)),
        ((), ()),
        (range(2, 5, 2), (2, 4)),
        (Array([8, 2]), (8, 2)),
        (Array(4), 4),  # a tensor of no dimension
    ],
)
def test_good_ratios(ratio, expected):
    policy = as_policy(CONFIG, ratio)
    assert policy.ratio == expected
    assert policy == RatioPolicy(expected)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (7, "ratio (7) must divide chunk_size (16). " + KNOWN),
        (0, NOT_A_RATIO.format("0")),
        (1, NOT_A_RATIO.format("1")),
        (-2, NOT_A_RATIO.format("-2")),
        (True, NOT_A_RATIO.format("True")),
        (2.5, NOT_A_RATIO.format("2.5")),
        (4.0, NOT_A_RATIO.format("4.0")),
        (None, NOT_A_RATIO.format("None")),
        (32, "ratio (32) must not exceed chunk_size (16). " + KNOWN),
        (16, "ratio (16) is not one that this adapter knows. " + KNOWN),
        ("x", "ratio must be an int, a sequence of ints, or \"auto\"; got 'x'."),
        ("4", "ratio must be an int, a sequence of ints, or \"auto\"; got '4'."),
        (b"4", "ratio (52) must not exceed chunk_size (16). " + KNOWN),
        ([2, 7], "ratio (7) must divide chunk_size (16). " + KNOWN),
        ([2, "auto"], NOT_A_RATIO.format("'auto'")),
        (
            [[2]],
            (
                "ratio names one for each chunk of a text, and the same ones for each text of a batch; got [2] among them. "
                "For ratios of their own compress texts one by one, and join them with BeaconCache.stack."
            ),
        ),
    ],
)
def test_bad_ratios_are_refused_with_the_known_ones(ratio, message):
    with pytest.raises(RatioError) as caught:
        as_policy(CONFIG, ratio)
    assert str(caught.value) == message
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("named", "ratio", "budget", "spans"),
    [
        ({}, 8, None, ((0, 4, None),)),
        ({"ratio": 4}, 4, None, ((0, 4, None),)),
        ({"ratio": "auto"}, "auto", None, ((0, 4, None),)),
        ({"budget": 60}, "auto", 60, ((0, 4, None),)),
        ({"spans": [(0, 4, None), (8, 9, 2)]}, 8, None, ((0, 4, None), (8, 9, 2))),
    ],
)
def test_a_policy_keeps_what_is_not_named(named, ratio, budget, spans):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8))
    policy = revised(config, as_policy(config, 8, spans=[(0, 4, None)]), **named)
    assert (policy.ratio, policy.budget, policy.spans) == (ratio, budget, spans)


def test_a_budget_stays_with_auto_and_ends_with_a_ratio():
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8))
    policy = as_policy(config, budget=60)
    assert revised(config, policy, spans=[(0, 4, None)]).budget == 60
    assert revised(config, policy, ratio="auto").budget == 60
    assert revised(config, policy, ratio=8) == RatioPolicy(8)
    with pytest.raises(RatioError, match=r'A budget .60. chooses the ratio by itself and needs ratio="auto"; got 8'):
        revised(config, policy, ratio=8, budget=60)


def test_a_ratio_is_an_int_afterwards():
    assert type(check_ratio(CONFIG, Index(4))) is int


@pytest.mark.parametrize(
    ("ratio", "budget", "message"),
    [
        (4, 100, 'A budget (100) chooses the ratio by itself and needs ratio="auto"; got 4.'),
        ((2, 4), 100, 'A budget (100) chooses the ratio by itself and needs ratio="auto"; got (2, 4).'),
        (
            "auto",
            20,
            "budget must be at least 21 cache entries (1 sinks, 18 raw tokens, 2 beacons of one chunk at ratio 8); got 20.",
        ),
        (
            "auto",
            99.5,
            "budget must be at least 21 cache entries (1 sinks, 18 raw tokens, 2 beacons of one chunk at ratio 8); got 99.5.",
        ),
        (
            "auto",
            "all",
            "budget must be at least 21 cache entries (1 sinks, 18 raw tokens, 2 beacons of one chunk at ratio 8); got 'all'.",
        ),
    ],
)
def test_bad_budgets_are_refused(ratio, budget, message):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=1, local_tokens=2)
    with pytest.raises(RatioError) as caught:
        as_policy(config, ratio, budget=budget)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((1, 2), "A span is (start, stop, ratio), with None for ratio to keep it raw; got (1, 2)."),
        ((4, 4, None), "A span needs 0 <= start < stop, counted in tokens of the text; got 4, 4."),
        ((-1, 4, 2), "A span needs 0 <= start < stop, counted in tokens of the text; got -1, 4."),
        ((0.0, 4, 2), "A span needs 0 <= start < stop, counted in tokens of the text; got 0.0, 4."),
        ((0, None, 2), "A span needs 0 <= start < stop, counted in tokens of the text; got 0, None."),
        ((0, 4, 16), "ratio (16) is not one that this adapter knows. " + KNOWN),
        ((0, 4, 0), NOT_A_RATIO.format("0")),
    ],
)
def test_bad_spans_are_refused(span, message):
    with pytest.raises(RatioError) as caught:
        as_policy(CONFIG, 4, spans=[(0, 1, None), span])
    assert str(caught.value) == message


def test_spans_are_kept_as_asked():
    assert as_policy(CONFIG, 8, spans=[[3, 9, None], (20, 21, 2)]).spans == (Span(3, 9, None), Span(20, 21, 2))


# --- one chunk ---------------------------------------------------------------------------------------------------------


def test_interleaved_layout_by_hand():
    layout = chunk_layout(8, 4, "interleave")  # t t t t b t t t t b
    assert layout.raw_slots == (0, 1, 2, 3, 5, 6, 7, 8)
    assert layout.beacon_slots == layout.kept_slots == (4, 9)
    assert (layout.num_slots, layout.num_sinks, layout.num_beacons, layout.num_raw) == (10, 0, 2, 0)
    assert layout.shifts == (-4, -8)


def test_appended_layout_by_hand():
    layout = chunk_layout(8, 4, "append")  # t t t t t t t t b b
    assert layout.raw_slots == tuple(range(8))
    assert layout.beacon_slots == layout.kept_slots == (8, 9)
    assert layout.shifts == (-8, -8)


def test_layout_with_sinks_by_hand():
    layout = chunk_layout(8, 4, "interleave", 6)  # sinks at slots 0 1 2 3 5 6, beacons at 4 and 9
    assert layout.kept_slots == (0, 1, 2, 3, 5, 6, 4, 9)
    assert (layout.num_sinks, layout.num_beacons, layout.num_raw) == (6, 2, 0)
    assert layout.shifts == (0, 0, 0, 0, -1, -1, 2, -2)


def test_layout_with_raw_runs_by_hand():
    # t0 t1 b0 t2 t3 b1 t4 t5 b2 t6 t7 b3: tokens 1..4 raw; unit 1 (t2 t3) is wholly raw and needs no beacon.
    layout = chunk_layout(8, 2, "interleave", 0, (RawRun(1, 5),))
    assert layout.beacon_slots == (2, 5, 8, 11)
    assert layout.kept_slots == (1, 2, 3, 4, 6, 8, 11)
    assert (layout.num_beacons, layout.num_raw) == (3, 4)
    assert layout.shifts == (-1, -1, -1, -1, -2, -3, -5)


def test_a_chunk_that_is_wholly_raw_keeps_its_tokens_only():
    layout = chunk_layout(8, 4, "interleave", 0, (RawRun(0, 3), RawRun(2, 8)))  # runs may overlap
    assert layout.kept_slots == layout.raw_slots
    assert (layout.num_beacons, layout.num_raw) == (0, 8)


def test_sinks_inside_a_raw_run_are_kept_once():
    layout = chunk_layout(8, 4, "interleave", 2, (RawRun(0, 3),))
    assert layout.kept_slots == (0, 1, 2, 4, 9)
    assert (layout.num_sinks, layout.num_raw, layout.num_beacons) == (2, 1, 2)


@pytest.mark.parametrize("placement", ["interleave", "append"])
@pytest.mark.parametrize(("size", "ratio"), [(16, 2), (16, 8), (12, 3), (6, 6)])
@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("runs", [(), (RawRun(2, 5),), (RawRun(0, 1), RawRun(4, 6))])
def test_every_layout_is_whole(size, ratio, placement, num_sinks, runs):
    layout = chunk_layout(size, ratio, placement, num_sinks, runs)
    assert (
        sorted(layout.raw_slots + layout.beacon_slots)
        == list(range(size + size // ratio))
        == list(range(layout.num_slots))
    )
    assert len(set(layout.kept_slots)) == len(layout.kept_slots)
    assert len(layout.kept_slots) == layout.num_sinks + layout.num_beacons + layout.num_raw
    assert [slot + shift for slot, shift in zip(layout.kept_slots, layout.shifts, strict=True)] == list(
        range(len(layout.kept_slots))
    )
    for unit, slot in enumerate(layout.beacon_slots):  # each beacon sees the whole of its unit
        assert max(layout.raw_slots[unit * ratio : (unit + 1) * ratio]) < slot


# --- lazy closing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "closed"), [(1, 0), (15, 0), (16, 0), (17, 1), (32, 1), (33, 2), (48, 2), (49, 3)]
)
def test_a_chunk_is_closed_when_a_further_token_is_read(num_tokens, closed):
    assert planner(4).num_closed(num_tokens) == closed
    row = row_after(planner(4), num_tokens)
    assert len(row.chunks) == closed
    assert 1 <= row.tail_length <= 16
    assert row.cache_length == closed * 4 + num_tokens - 16 * closed


@pytest.mark.parametrize(("num_tokens", "closed"), [(16, 0), (19, 0), (20, 1), (35, 1), (36, 2)])
def test_local_tokens_stay_raw_after_a_chunk_is_closed(num_tokens, closed):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), local_tokens=3)
    plan = planner(4, config=config)
    assert plan.num_closed(num_tokens) == closed
    row = row_after(plan, num_tokens)
    assert len(row.chunks) == closed
    assert row.tail_length <= 16 + 3
    assert row.tail_length > 3 or not closed


@pytest.mark.parametrize("ratio", [2, (8, 4, 2, 4, 8), "auto"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("local", [0, 5, 20])
def test_cutting_a_text_anywhere_leads_to_the_same_row(ratio, sinks, local):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=sinks, local_tokens=local)
    plan = planner(ratio, config=config, max_positions=64)
    for length in (1, 16, 17, 60, 81):
        whole = row_after(plan, length)
        assert row_after(plan, *[1] * length) == whole
        for first in range(1, length, 7):
            assert row_after(plan, first, length - first) == whole


def test_a_reading_by_hand():
    plan = planner((2, 8), config=BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=1))
    first = chunk_layout(16, 2, "interleave", 1)
    second = chunk_layout(16, 8, "interleave")
    assert plan.plan(Row(16), 16) == RowReading(False, (), 0, 16)
    assert plan.plan(Row(16), 40) == RowReading(False, (first, second), 32, 40)
    row = row_after(plan, 20)
    assert row == Row(16, 20, 1, (ClosedChunk(2, 8, 0),))
    assert (row.num_beacons, row.memory_length, row.tail_length, row.cache_length) == (8, 9, 4, 13)
    assert plan.plan(row, 12) == RowReading(False, (), 20, 32)
    assert plan.plan(row, 13) == RowReading(False, (second,), 32, 33)


def test_reading_nothing_closes_nothing():
    row = row_after(planner(4), 40)
    assert planner(4).plan(row, 0) == RowReading(False, (), 40, 40)


# --- sequences of ratios -----------------------------------------------------------------------------------------------


def test_a_sequence_names_each_chunk_and_its_last_goes_on():
    assert [layout.ratio for layout in planner((2, 8, 4)).layouts(100)] == [2, 8, 4, 4, 4, 4]
    assert [layout.ratio for layout in planner((2, 8, 4)).layouts(33)] == [2, 8]


def test_a_sequence_that_is_too_short_for_the_text_is_refused_where_asked():
    plan = planner((2, 8))
    plan.check_names_every_chunk(48)
    planner(2).check_names_every_chunk(1000)
    planner("auto").check_names_every_chunk(1000)
    with pytest.raises(RatioError) as caught:
        plan.check_names_every_chunk(49)
    assert str(caught.value) == (
        "ratio names 2 chunks, but the text of 49 tokens closes 3. "
        "Give one ratio for each chunk of the whole text, or one int for all."
    )


def test_an_empty_sequence_is_enough_for_a_text_that_closes_nothing():
    assert planner(()).layouts(16) == []
    with pytest.raises(RatioError, match=r"^ratio names no chunk, but the text of 17 tokens closes 1\.$"):
        planner(()).layouts(17)


# --- auto --------------------------------------------------------------------------------------------------------------


def most_positions(ratio: int, num_closed: int, *, sinks: int = 0, local: int = 0) -> int:
    """By hand: the most positions that a text needs until its next chunk is closed."""
    units = 16 // ratio
    held = (sinks + num_closed * units) if num_closed else 0
    closing = held - units + 16 + units if num_closed > 1 else (16 + units) * num_closed
    return max(held + 16 + local, closing)


@pytest.mark.parametrize(("sinks", "local"), [(0, 0), (3, 0), (2, 6)])
def test_auto_is_the_smallest_ratio_that_fits_and_never_goes_down(sinks, local):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=sinks, local_tokens=local)
    plan = planner("auto", config=config, max_positions=64)
    last = 2
    for length in itertools.count(1):
        num_closed = plan.num_closed(length)
        fitting = [r for r in config.ratios if most_positions(r, num_closed, sinks=sinks, local=local) <= 64]
        if not fitting:
            with pytest.raises(CapacityError):
                plan.plan(Row(16), length)
            break
        ratios = {layout.ratio for layout in plan.layouts(length)}
        assert ratios <= {fitting[0]}
        assert fitting[0] >= last
        last = fitting[0]
        row = row_after(plan, length)
        assert row.cache_length <= 64
    assert last == 8


def test_auto_without_a_limit_is_the_smallest_ratio():
    assert {layout.ratio for layout in planner("auto").layouts(10_000)} == {2}


def test_auto_reads_anew_when_its_ratio_changes():
    plan = planner("auto", max_positions=48)
    row = row_after(plan, 60)
    assert {chunk.ratio for chunk in row.chunks} == {2}
    assert not plan.plan(row, 20).restart
    reading = plan.plan(row, 21)
    assert reading.restart
    assert [layout.ratio for layout in reading.closings] == [4] * 5


def test_a_fixed_ratio_never_reads_anew():
    row = row_after(planner(2), 40)
    reading = planner(8).plan(row, 20)
    assert not reading.restart
    assert [layout.ratio for layout in reading.closings] == [8]


# --- budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("budget", [40, 64, 100])
def test_a_budget_is_never_exceeded_at_any_length(sinks, budget):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=sinks)
    plan = planner("auto", config=config, budget=budget)
    row = Row(16)
    for length in itertools.count(1):
        try:
            reading = plan.plan(row, 1)
        except CapacityError as error:
            longest = int(re.search(r"Read at most (\d+) tokens", str(error))[1])
            assert longest == length - 1
            break
        row = row_after(plan, length)
        assert row.cache_length <= budget
        assert reading.stop == length
    assert row.chunks[0].ratio == 8


def test_the_least_budget_holds_a_chunk_and_its_beacons():
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=1, local_tokens=2)
    plan = planner("auto", config=config, budget=21)
    assert row_after(plan, 2 * 16 + 2).cache_length == 21


# --- spans -------------------------------------------------------------------------------------------------------------


def test_a_span_lowers_the_ratio_of_the_chunks_that_it_touches():
    spans = [(31, 33, 2), (50, 51, 4), (60, 61, 8)]
    assert [layout.ratio for layout in planner(8, spans=spans).layouts(100)] == [8, 2, 2, 4, 8, 8]
    assert [layout.ratio for layout in planner(4, spans=spans).layouts(100)] == [4, 2, 2, 4, 4, 4]


def test_a_raw_span_is_kept_beside_the_beacons_of_its_chunks():
    plan = planner(8, spans=[(12, 20, None)])
    first, second, third = plan.layouts(49)
    assert (first.num_raw, first.num_beacons, second.num_raw, second.num_beacons) == (4, 2, 4, 2)
    assert (third.num_raw, third.num_beacons) == (0, 2)
    row = row_after(plan, 49)
    assert row.memory_length == 6 + 8
    assert row.num_beacons == 6


def test_a_span_beyond_the_text_changes_nothing():
    assert planner(8, spans=[(100, 200, None)]).layouts(49) == planner(8).layouts(49)


def test_auto_counts_what_spans_keep():
    plain = planner("auto", max_positions=48).layouts(65)
    spanned = planner("auto", max_positions=48, spans=[(0, 16, None)]).layouts(65)
    assert {layout.ratio for layout in plain} == {2}
    assert {layout.ratio for layout in spanned} == {4}


# --- capacity ----------------------------------------------------------------------------------------------------------


def test_a_fixed_ratio_that_does_not_fit_names_one_that_does():
    plan = planner(2, max_positions=48)
    with pytest.raises(CapacityError) as caught:
        plan.plan(Row(16), 100)
    assert str(caught.value) == (
        "A text of 100 tokens needs 64 positions at ratio 2; the base model has 48. Use ratio 4."
    )
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, ValueError)
    assert row_after(planner(4, max_positions=48), 100).cache_length == 28


@pytest.mark.parametrize("ratio", [2, 4, 8, (2, 4, 8)])
@pytest.mark.parametrize("sinks", [0, 3])
def test_following_a_suggestion_always_works(ratio, sinks):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=sinks)
    refused = 0
    for length in range(1, 400):
        try:
            row_after(planner(ratio, config=config, max_positions=56), length)
        except CapacityError as error:
            refused += 1
            text = str(error)
            if way := re.search(r"Use ratio (\d+)\.$", text):
                row_after(planner(int(way[1]), config=config, max_positions=56), length)
            else:
                longest = int(re.search(r"No ratio fits: read at most (\d+) tokens at the largest\.$", text)[1])
                assert longest < length
                row_after(planner(8, config=config, max_positions=56), longest)
                row_after(planner("auto", config=config, max_positions=56), longest)
    assert refused


def test_a_text_that_no_ratio_fits_is_refused_with_the_longest_that_does():
    with pytest.raises(CapacityError) as caught:
        planner("auto", max_positions=32).plan(Row(16), 1000)
    assert str(caught.value) == (
        "A text of 1,000 tokens needs 140 cache entries at ratio 8, the largest that this adapter knows; "
        "the base model has 32. Read at most 144 tokens."
    )
    assert row_after(planner("auto", max_positions=32), 144).cache_length == 32
    with pytest.raises(CapacityError):
        planner("auto", max_positions=32).plan(Row(16), 145)


@pytest.mark.parametrize("ratio", ["auto", 2, (2, 4)])
def test_a_text_of_any_length_is_refused_at_once(ratio):
    # a layout for each of its chunks would take hours
    with pytest.raises(
        CapacityError, match=r"^A text of 1,000,000,000,000 tokens needs [\d,]+ cache entries .* 32\. Read at most 144"
    ):
        planner(ratio, max_positions=32).plan(Row(16), 10**12)


def test_the_budget_is_named_where_it_is_the_limit():
    with pytest.raises(CapacityError, match=r"; the budget is 30\. Read at most 128 tokens\.$"):
        planner("auto", budget=30, max_positions=64).plan(Row(16), 1000)
    with pytest.raises(CapacityError, match=r"; the base model has 64\. Read at most 400 tokens\.$"):
        planner("auto", budget=1000, max_positions=64).plan(Row(16), 1000)


def test_the_pass_that_closes_a_chunk_must_fit_too():
    # The chunk's 16 tokens and 8 beacons take 24 positions, though 8 + 1 entries are held afterwards.
    with pytest.raises(CapacityError, match=r"needs 24 positions at ratio 2; the base model has 20\. Use ratio 4\.$"):
        planner(2, max_positions=20).plan(Row(16), 17)
    assert row_after(planner(4, max_positions=20), 17).cache_length == 5


def test_a_context_that_has_grown_to_the_limit_is_told_how_to_go_on():
    row = row_after(planner(2, max_positions=48), 80)
    assert row.cache_length == 48
    with pytest.raises(CapacityError) as caught:
        planner(2, max_positions=48).plan(row, 1)
    text = str(caught.value)
    assert text == (
        "A text of 81 tokens needs 56 positions at ratio 2; the base model has 48. "
        'Compress it anew at ratio 4, or go on with ratio "auto".'
    )
    assert row_after(planner(4, max_positions=48), 81).cache_length <= 48
    assert planner("auto", max_positions=48).plan(row, 1).restart


@pytest.mark.parametrize("limit", [{"max_positions": 40}, {"budget": 40}])
def test_auto_reads_anew_where_the_tail_outgrows_what_chunks_of_another_ratio_leave(limit):
    row = row_after(planner(2), 70)  # 32 beacons, 6 in the tail
    plan = planner("auto", **limit)
    assert not plan.plan(row, 2).restart
    reading = plan.plan(row, 3)
    assert reading.restart
    assert [layout.ratio for layout in reading.closings] == [4] * 4
    assert (reading.raw_start, reading.stop) == (64, 73)


# --- a batch -----------------------------------------------------------------------------------------------------------


def test_rounds_take_each_row_in_turn_and_rows_of_one_layout_together():
    two, four, eight = (chunk_layout(16, ratio, "interleave") for ratio in (2, 4, 8))
    readings = [
        RowReading(False, (two, four), 32, 40),
        RowReading(False, (), 0, 9),
        RowReading(True, (two, two, eight), 48, 50),
        RowReading(False, (four,), 16, 17),
    ]
    assert list(closing_rounds(readings)) == [
        ((0, 2), two),
        ((3,), four),
        ((0,), four),
        ((2,), two),
        ((2,), eight),
    ]


@pytest.mark.parametrize("readings", [[], [RowReading(False, (), 0, 3)]])
def test_nothing_to_close_is_no_round(readings):
    assert list(closing_rounds(readings)) == []


def test_every_chunk_of_a_batch_is_closed_once_and_in_order():
    plans = [planner((2, 4, 8, 2, 4, 8)), planner(8), planner(2), planner((8, 2, 8))]
    readings = [plan.plan(Row(16), length) for plan, length in zip(plans, (97, 60, 16, 64), strict=True)]
    closed = [[] for _ in readings]
    for rows, layout in closing_rounds(readings):
        assert list(rows) == sorted(set(rows))
        for row in rows:
            closed[row].append(layout)
    assert [tuple(layouts) for layouts in closed] == [reading.closings for reading in readings]


def test_auto_reads_anew_when_spans_kept_raw_before_no_longer_fit():
    config = BeaconConfig(chunk_size=16, ratios=(2, 4))
    spans = ((0, 16, None),)
    before = TextPlanner(config, as_policy(config, "auto", spans=spans), None)
    row = Row(16)
    for layout in before.plan(row, 33).closings:
        row = row.after_closing(layout)
    assert [chunk.num_raw for chunk in row.chunks] == [16, 0]
    reading = TextPlanner(config, as_policy(config, "auto"), 33).plan(row.after_reading(1), 9)
    assert reading.restart
    assert (len(reading.closings), reading.raw_start, reading.stop) == (2, 32, 42)


@pytest.mark.parametrize("local_tokens", [0, 3, 9, 20])
@pytest.mark.parametrize("ratio", [2, 4, 8, "auto"])
def test_a_text_that_grows_fits_if_it_does_after_each_of_its_tokens(ratio, local_tokens):
    config = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=2, local_tokens=local_tokens)
    plan, ends = planner(ratio, config=config, max_positions=56), set()
    for held, num_prompt in itertools.product((0, 10, 30, 47, 60), (1, 7, 16, 21)):
        try:
            row = row_after(plan, *([held] if held else []))
            written = row_after(plan, num_prompt, row=row)
        except CapacityError:
            continue
        most = 0
        with contextlib.suppress(CapacityError):
            while True:
                written, most = row_after(plan, 1, row=written), most + 1
        for num_more in range(most + 1):
            plan.check_grows(row, num_prompt, num_more)
        for num_more in range(most + 1, most + 40):
            with pytest.raises(CapacityError):
                plan.check_grows(row, num_prompt, num_more)
        ends.add(held + num_prompt + most)
    assert len(ends) == 1
