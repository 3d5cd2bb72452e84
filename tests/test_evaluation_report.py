"""Summaries against plain sums, and reports that say what the records hold."""

import json
import math
import random
import re
import shutil
import subprocess
import sys

import pytest

from activation_beacon.errors import InputError, StorageError
from activation_beacon.evaluation import plots, summary
from activation_beacon.evaluation.blocks import Heading, Paragraph, Picture, Table, markdown_of, page_of
from activation_beacon.evaluation.metrics import FEW, Estimate, mean
from activation_beacon.evaluation.report import INTERVALS, rows_as_json, tables, write_report
from activation_beacon.evaluation.results import Key, Results
from activation_beacon.evaluation.summary import Way

MODEL = {"name": "tiny", "adapter": "0123", "chunk_size": 32, "is_trained": True}
LM_LOSS = {"full": 2.0, "alone": 2.4, "beacons": 2.1}


def lm_record(method, ratio, sample, nats, **more):
    key = Key("lm", method, ratio, 96, sample)._asdict()
    sizes = {"cache_length": 96, "cache_bytes": 2**21 // (ratio or 1), "seconds": 1.5}
    return {**key, "nats": nats, "tokens": 60, "by_position": [[1, 2, nats, 2], [2, 4, nats + 1, 4]], **sizes, **more}


def lm_records(samples=4):
    rng = random.Random(0)
    records = []
    for number in range(samples):
        hard = rng.gauss(0, 1)
        for method, ratio in (("beacons", 8), ("alone", None), ("beacons", 2), ("full", None)):
            loss = LM_LOSS[method] + 0.02 * (ratio or 0)
            records.append(lm_record(method, ratio, f"doc{number}", hard + loss))
    return records


def needle_records(lengths=(64, 128)):
    records = []
    for length in lengths:
        for method, ratio, score in (("full", None, 1.0), ("beacons", 4, 0.0), ("shuffled", None, 0.0)):
            for step, kind in ((0, "number"), (0, "uuid"), (1, "number"), (1, "uuid")):
                key = Key("needles", method, ratio, length, f"{kind}-{step}")._asdict()
                value = 1.0 if method == "beacons" and kind == "number" else score
                fields = {"score": value, "scores": [value], "kind": kind, "depth": float(step), "read_seconds": 2.0}
                records.append({**key, **fields, "answer_seconds": [0.5], "cache_length": 9, "cache_bytes": 2**20})
    return records


def turn_records():
    fields = {"scores": [1.0, 0.0, 1.0], "score": 2 / 3, "read_seconds": 2.0, "is_conversation": True}
    sizes = {"answer_seconds": [0.5, 0.25, 0.75], "cache_length": 9, "cache_bytes": 2**20}
    return [{**Key("multi-turn", "beacons", 4, 64, name)._asdict(), **fields, **sizes} for name in ("0", "1")]


@pytest.fixture
def folder(tmp_path):
    results = Results(tmp_path / "out", MODEL)
    results.open_task("lm", {"documents": ["a.jsonl"]}, "nats")
    results.open_task("needles", {"seed": 0}, "score")
    results.open_task("multi-turn", {}, "score")
    for record in [*lm_records(), *needle_records(), *turn_records()]:
        key = Key(*(record.pop(name) for name in Key._fields))
        results.add(key, record)
    results.add(Key("lm", "beacons", 2, 96, "long"), {"refused": "Too long: use ratio 8."})
    return tmp_path / "out"


# --- summary ---------------------------------------------------------------------------------------------------------


def test_ways_stand_in_order():
    assert summary.ways_of(lm_records()) == [
        Way("full", None), Way("alone", None), Way("beacons", 2), Way("beacons", 8)
    ]  # fmt: skip


def test_a_row_has_the_mean_the_gap_the_sizes_and_the_count():
    rows = {row.way.label: row for row in summary.rows_of(lm_records(), "nats")}
    own = [record["nats"] for record in lm_records() if record["method"] == "beacons" and record["ratio"] == 8]
    row = rows["beacons x8"]
    assert row.quality.value == pytest.approx(sum(own) / 4)
    assert row.quality.count == 4
    assert row.against.value == pytest.approx((2.4 - 2.26) / (2.4 - 2.0))
    assert (row.cache_bytes, row.seconds, row.num_refused) == (2**18, 1.5, 0)
    assert rows["full"].against is None


def test_the_gap_is_taken_over_documents_that_all_have():
    records = [*lm_records(3), lm_record("beacons", 8, "only-here", 100.0)]
    row = next(row for row in summary.rows_of(records, "nats") if row.way == Way("beacons", 8))
    assert row.quality.count == 4
    assert row.against.count == 3
    assert row.against.value == pytest.approx(0.35)


def test_there_is_no_gap_to_close_where_the_full_context_is_worse_than_nothing():
    losses = (("full", None, 6.0), ("alone", None, 3.0), ("beacons", 4, 2.9))
    records = [lm_record(method, ratio, "a", nats) for method, ratio, nats in losses]
    assert [row.against for row in summary.rows_of(records, "nats")] == [None, None, None]


def test_scores_are_compared_with_the_full_context():
    rows = {row.way.label: row for row in summary.rows_of(needle_records((64,)), "score")}
    assert rows["beacons x4"].quality.value == 0.5
    assert rows["beacons x4"].against.value == -0.5
    assert rows["beacons x4"].share.value == 0.5
    assert (rows["full"].against, rows["full"].share) == (None, None)


def test_refused_samples_are_counted_and_not_averaged():
    records = [*lm_records(), {**Key("lm", "beacons", 2, 96, "long")._asdict(), "refused": "no"}]
    row = next(row for row in summary.rows_of(records, "nats") if row.way == Way("beacons", 2))
    assert (row.num_refused, row.quality.count) == (1, 4)


def test_positions_are_weighted_by_their_tokens():
    one, other = lm_record("full", None, "a", 2.0), lm_record("full", None, "b", 4.0)
    other["by_position"] = [[1, 2, 5.0, 6], [2, 4, None, 0]]
    assert summary.by_position([one, other]) == [(1, 2, pytest.approx((2 * 2 + 5 * 6) / 8)), (2, 4, 3.0)]


def test_a_grid_has_depths_for_rows_and_lengths_for_columns():
    records = summary.select(needle_records(), method="beacons")
    records = [r for r in records if (r["length"], r["sample"]) != (128, "uuid-1")]
    grid = summary.grid(records, [0.0, 1.0, 2.0], [64, 128], "depth", "length")
    assert [[cell and (cell.value, cell.count) for cell in line] for line in grid] == [
        [(0.5, 2), (0.5, 2)],
        [(0.5, 2), (1.0, 1)],
        [None, None],
    ]


def test_the_first_turn_pays_for_reading():
    turns = summary.turns_of(turn_records())
    assert [(score.value, seconds) for score, seconds in turns] == [(1.0, 2.5), (0.0, 0.25), (1.0, 0.75)]


def test_a_row_has_the_score_of_each_kind_with_its_samples():
    records = summary.select(needle_records((64,)), method="beacons")
    [row] = summary.rows_of([r for r in records if r["sample"] != "uuid-0"], "score")
    assert [(kind, found.value, found.count) for kind, found in row.kinds.items()] == [("number", 1, 2), ("uuid", 0, 1)]
    assert row.turns == []


def test_in_language_modelling_a_row_has_the_gap_closed_of_each_kind(tmp_path):
    nats = {"full": (2.0, 3.0, 2.0), "alone": (3.0, 5.0, 1.5), "beacons": (2.25, 3.5, 1.7)}
    kinds = ("book", "book", "code")
    records = [
        lm_record(method, 8 if method == "beacons" else None, f"doc{number}", value, kind=kinds[number])
        for method, values in nats.items()
        for number, value in enumerate(values)
    ]
    full, alone, beacons = summary.rows_of(records, "nats")
    assert full.kinds == alone.kinds == {}
    assert {kind: (found.value, found.count) for kind, found in beacons.kinds.items()} == {
        "book": (pytest.approx((1.5 + 0.75) / 3), 2)  # code's full context is worse than nothing
    }
    results = Results(tmp_path / "out", MODEL)
    results.open_task("lm", {}, "nats")
    for record in records:
        results.add(Key(*(record.pop(name) for name in Key._fields)), record)
    [table] = [block for block in tables(results) if isinstance(block, Table) and "by kind" in block.header[0]]
    assert (table.header, table.rows) == (["gap closed by kind", "book, n=2"], [["beacons x8", "0.750"]])


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_has_every_task_length_method_and_picture(folder):
    pytest.importorskip("matplotlib")
    markdown, page = write_report(folder)
    text = markdown.read_text()
    assert re.findall("^#+ .*$", text, re.M) == [
        "# Evaluation", "## Overview",
        "## lm", "### 96 tokens", "## needles", "### 64 tokens", "### 128 tokens", "## multi-turn", "### 64 tokens"
    ]  # fmt: skip
    assert "| beacons x8 |" in text
    assert "| beacons x4 | 1.000 | 0.000 |" in text
    assert "| score by kind | number, n=2 | uuid, n=2 |" in text
    assert "| beacons x4 | 2 | 1.000 / 2.50 s | 0.000 / 0.25 s | 1.000 / 0.75 s |" in text
    assert text.count(FEW) == 5  # of the overview, and of each task and length
    assert "Do not fit: Too long: use ratio 8." in text
    pictures = re.findall(r"\]\(plots/(.*?)\)", text)
    assert pictures == [
        *("lm-ratio.png", "lm-bytes.png", "lm-gap.png", "lm-positions.png"),
        *("needles-ratio.png", "needles-bytes.png", "needles-heat.png", "multi-turn-ratio.png", "multi-turn-bytes.png"),
    ]
    for name in pictures:
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert page.read_text().count("data:image/png;base64,") == len(pictures)
    assert page.read_text().count("<table>") == text.count("| --- |")


def kinds_without(*left_out):
    """The table by kind of the needles, without these lines; from a way to its cells."""

    def of(folder):
        results = Results(folder)
        for method, ratio, sample in left_out:
            del results.records[Key("needles", method, ratio, 64, sample)]
        by_kind = next(
            block for block in tables(results, "needles") if block.__class__ is Table and "kind" in block.header[0]
        )
        return by_kind.header, {row[0]: row[1:] for row in by_kind.rows}

    return of


def test_a_count_that_is_not_that_of_the_column_stands_in_the_cell(folder):
    header, cells = kinds_without(("beacons", 4, "uuid-0"), ("shuffled", None, "uuid-0"), ("shuffled", None, "uuid-1"))(
        folder
    )
    assert header == ["score by kind", "number, n=2", "uuid, n=2"]
    assert cells["full"][1] == "1.000"
    assert cells["beacons x4"][1] == "0.000 (n=1)"
    assert cells["shuffled"][1] == "-"


def test_a_comparison_over_fewer_samples_says_so(folder):
    results = Results(folder)
    del results.records[Key("needles", "full", None, 64, "uuid-0")]
    [_, table, *_] = tables(results, "needles")
    row = next(row for row in table.rows if row[0] == "beacons x4")
    assert row[1:4] == ["0.500", "4", "-0.333 (n=3)"]


def many_needles(count):
    """The needles of one length, each so many times."""
    return [
        {**record, "sample": f"{record['sample']}-{number}"}
        for number in range(count)
        for record in needle_records((64,))
    ]


def blocks_of(folder, records):
    results = Results(folder, MODEL)
    results.open_task("needles", {"seed": 0}, "score")
    for record in records:
        results.add(Key(*(record[name] for name in Key._fields)), record)
    return tables(results)


def test_scores_of_0_and_1_have_wilson_s_intervals_and_differences_a_bootstrap_s(tmp_path):
    _, table, kinds = blocks_of(tmp_path, many_needles(8))
    rows = {row[0]: row for row in table.rows}
    assert rows["full"][1:5] == ["1.000 [0.893, 1.000]", "32", "-", "-"]
    assert re.fullmatch(r"0\.500 \[0\.336, 0\.664\]", rows["beacons x4"][1])
    assert re.fullmatch(r"-0\.500 \[-0\.6.., -0\.3..\]", rows["beacons x4"][3])
    assert rows["shuffled"][1:5] == ["0.000 [0.000, 0.107]", "32", "-1.000", "0.000"]
    assert [row[1:] for row in kinds.rows if row[0] == "full"] == [["1.000 [0.806, 1.000]"] * 2]


@pytest.mark.parametrize(("count", "is_said"), [(3, True), (4, False)])
def test_why_there_is_no_interval_stands_below_the_tables(tmp_path, count, is_said):
    found = blocks_of(tmp_path, many_needles(count))
    by_kind = next(row for row in found[2].rows if row[0] == "full")
    assert ("[" in by_kind[1]) is not is_said  # 6 or 8 of each kind; 12 or 16 in all
    assert "[" in found[1].rows[0][1]
    assert (found[-1] == Paragraph(FEW)) is is_said


def test_a_point_without_an_interval_has_no_bar(monkeypatch, tmp_path):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, path, format: drawn.append(self) or path.touch())
    points = [plots.Point(4, mean([0.0, 1.0] * 4)), plots.Point(8, mean([0.0, 1.0]))]
    panel = plots.Panel("", {"beacons": points}, {"full": mean([1.0, 1.0]), "alone": mean([0.0] * 8)})
    plots.draw_lines(tmp_path / "lines.png", [panel], x_label="", y_label="")
    [axis] = drawn[0].axes
    [container] = axis.containers
    _, caps, [bars] = container
    lengths = [[segment[0][1], segment[1][1]] for segment in bars.get_segments() if len(segment)]
    assert lengths == [pytest.approx([points[0].quality.low, points[0].quality.high])]
    assert [sum(not math.isnan(y) for y in cap.get_ydata()) for cap in caps] == [1, 1]
    assert len(axis.patches) == 1  # the level that has an interval


def test_json_rows_have_what_the_tables_of_kinds_and_turns_have(folder):
    rows = {(row["task"], row["length"], row["method"], row["ratio"]): row for row in rows_as_json(Results(folder))}
    certain = {"value": 1.0, "low": None, "high": None, "count": 2}
    assert rows["needles", 64, "beacons", 4]["kinds"] == {
        "number": certain, "uuid": {"value": 0.0, "low": None, "high": None, "count": 2}
    }  # fmt: skip
    turns = rows["multi-turn", 64, "beacons", 4]["turns"]
    assert (turns[0], [turn["seconds"] for turn in turns]) == ({"score": certain, "seconds": 2.5}, [2.5, 0.25, 0.75])
    assert (rows["lm", 96, "full", None]["kinds"], rows["needles", 64, "full", None]["turns"]) == ({}, [])


@pytest.mark.parametrize(
    ("counts", "title", "texts"),
    [
        ([[2, 2], [2, None]], "beacons x4 (n=2 in each cell)", [".50", ".50", ".50"]),
        ([[2, 4], [2, None]], "beacons x4 (n in brackets)", [".50 (2)", ".50 (4)", ".50 (2)"]),
        ([[None, None], [None, None]], "beacons x4", []),
    ],
)
def test_a_heat_map_says_how_many_samples_a_cell_has(monkeypatch, tmp_path, counts, title, texts):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, path, format: drawn.append(self) or path.touch())
    grid = [[n and mean([0.0, 1.0] * (n // 2)) for n in line] for line in counts]
    plots.draw_heat_maps(tmp_path / "heat.png", {"beacons x4": grid}, columns=[64, 128], rows=[0.0, 1.0])
    axis = drawn[0].axes[0]
    assert (axis.get_title(), [text.get_text() for text in axis.texts]) == (title, texts)


def test_the_order_of_the_lines_does_not_matter(folder, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    path.write_text("".join(lines))
    one, other = write_report(folder)[0].read_text(), write_report(tmp_path / "other")[0].read_text()
    assert one == other


@pytest.mark.parametrize("is_trained", [True, False])
def test_an_untrained_adapter_is_named_one(tmp_path, is_trained):
    pytest.importorskip("matplotlib")
    results = Results(tmp_path, {**MODEL, "is_trained": is_trained})
    results.open_task("lm", {}, "nats")
    results.add(Key("lm", "full", None, 96, "a"), {"nats": 2.0, "cache_length": 1, "cache_bytes": 1, "seconds": 1.0})
    assert ("**Untrained**" in write_report(tmp_path)[0].read_text()) is not is_trained


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        ({}, "Model mine, runs/mine, activation-beacon 0.1.0; samples of 2026-05-01 to 2026-05-03."),
        ({"models": []}, "activation-beacon 0.1.0; samples of 2026-05-01 to 2026-05-03."),
        ({"last": "2026-05-01"}, "Model mine, runs/mine, activation-beacon 0.1.0; samples of 2026-05-01."),
        ({"first": None}, "0.1.0; samples of up to 2026-05-03, the first from before dates were noted."),
        (None, None),
    ],
)
def test_a_report_says_who_ran_the_samples_and_when_where_that_is_known(folder, origin, text):
    pytest.importorskip("matplotlib")
    run = json.loads((folder / "run.json").read_text())
    known = {"models": ["mine", "runs/mine"], "versions": ["0.1.0"], "first": "2026-05-01", "last": "2026-05-03"}
    run["origin"] = known | (origin or {})
    if origin is None:
        del run["origin"]
    (folder / "run.json").write_text(json.dumps(run))
    second, third = write_report(folder)[0].read_text().split("\n\n")[2:4]
    if text is None:
        assert second == INTERVALS
    else:
        assert second.endswith(text)
        assert third == INTERVALS


def test_a_folder_without_results_has_no_report(tmp_path):
    with pytest.raises(StorageError, match="holds no results"):
        write_report(tmp_path)
    Results(tmp_path, MODEL)
    with pytest.raises(InputError) as error:
        write_report(tmp_path)
    assert str(error.value) == f"{tmp_path} has no finished sample yet. Run `beacon eval` on, then ask for the report."


def test_blocks_are_escaped(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    blocks = [
        Heading(2, "a<b"),
        Paragraph("**c** & d"),
        Table(["m", "n"], [["x|y", "<1>"]]),
        Picture("a.png", 'say "e"'),
    ]
    assert markdown_of(blocks) == (
        '## a<b\n\n**c** & d\n\n| m | n |\n| --- | ---: |\n| x\\|y | <1> |\n\n![say "e"](plots/a.png)\n'
    )
    page = page_of(blocks, tmp_path)
    assert "<h2>a&lt;b</h2>" in page
    assert "<p><b>c</b> &amp; d</p>" in page
    assert "<td>x|y</td><td>&lt;1&gt;</td>" in page
    assert '<img alt="say &quot;e&quot;" src="data:image/png;base64,eA==">' in page


def test_a_number_that_is_none_is_a_dash(tmp_path):
    pytest.importorskip("matplotlib")
    results = Results(tmp_path, MODEL)
    results.open_task("lm", {}, "nats")
    for method, ratio in (("full", None), ("alone", None), ("beacons", 2)):
        fields = {"nats": 2.0, "cache_length": 1, "cache_bytes": 2**20, "seconds": 1.0}
        results.add(Key("lm", method, ratio, 96, "a"), fields)
    text = write_report(tmp_path)[0].read_text()
    assert "| beacons x2 | 2.000 | 1 | - | 1 | 1.00 | 1.00 |" in text
    assert not math.isnan(summary.rows_of(list(results.records.values()), "nats")[0].quality.value)


def test_a_ratio_has_one_colour_in_all_methods_and_others_have_others():
    names = ["full", *(f"beacons x{ratio}" for ratio in (2, 8, 16)), "recent x8", "recent x16", "shuffled x8"]
    shades = {name: plots._shade(name, names) for name in names}
    assert shades["recent x8"] == shades["beacons x8"]
    assert shades["recent x16"] == shades["beacons x16"]
    assert len({shades[name] for name in names}) == 5


def test_the_picture_of_positions_is_as_high_as_what_reads_the_text_and_tells_local_tokens_apart(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, axes: drawn.extend(axes))
    lines = {"full": [2.5, 2.4], "alone": [9.0, 3.0], "beacons x8": [3.5, 2.5], "beacons-local128 x8": [2.6, 2.5]}
    panels = {"8,192 tokens": {name: [(1, 2, high), (2, 4, low)] for name, (high, low) in lines.items()}}
    plots.draw_positions(tmp_path / "x.png", panels, y_label="nats per token")
    low, high = drawn[0].get_ylim()
    assert low < 2.4
    assert 3.5 < high < 4
    styles = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in drawn[0].lines}
    assert len(set(styles.values())) == len(lines)
    plots.draw_positions(tmp_path / "x.png", {"t": {"alone": [(1, 2, 9.0)]}}, y_label="nats per token")


def test_ways_at_one_ratio_stand_side_by_side_in_the_middle_of_the_picture(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, axes: drawn.extend(axes))
    ways = {name: [plots.Point(8, Estimate(0.5, 0.4, 0.6, 9))] for name in ("beacons", "recent", "head-tail")}
    plots.draw_lines(tmp_path / "x.png", [plots.Panel("t", ways, {})], x_label="ratio", y_label="score")
    assert drawn[0].get_xlim() == (4, 16)


def test_records_are_summed_up_without_torch():
    source = "import sys, activation_beacon.evaluation.summary\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
