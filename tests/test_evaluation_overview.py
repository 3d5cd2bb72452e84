"""The overview: one table of all tasks, with the numbers of the records."""

from activation_beacon.evaluation.blocks import Paragraph
from activation_beacon.evaluation.metrics import FEW
from activation_beacon.evaluation.overview import overview
from activation_beacon.evaluation.results import Key, Results


def results_of(folder, lines):
    results = Results(folder, {"base_model": "tiny"})
    for task, quality in (("lm", "nats"), ("needles", "score")):
        results.open_task(task, {}, quality)
    for task, method, ratio, length, sample, fields in lines:
        results.add(Key(task, method, ratio, length, sample), fields)
    return results


def test_every_task_and_length_is_a_column_and_every_method_and_ratio_a_row(tmp_path):
    lines = [
        ("lm", "full", None, 100, "a", {"nats": 2.0}),
        ("lm", "full", None, 100, "b", {"nats": 2.0}),
        ("lm", "beacons", 8, 100, "a", {"nats": 2.5}),
        ("lm", "beacons", 8, 100, "b", {"nats": 2.5}),
        ("needles", "full", None, 100, "a", {"score": 1.0}),
        ("needles", "recent", 8, 100, "a", {"score": 0.25}),
        ("needles", "full", None, 1000, "a", {"score": 0.5}),
        ("needles", "full", None, 1000, "b", {"score": 0.5}),
        ("needles", "beacons", 8, 1000, "a", {"refused": "it does not fit"}),
        ("needles", "recent", 8, 1000, "a", {"score": 0.0}),
        ("needles", "recent", 8, 1000, "b", {"score": 0.0}),
        ("needles", "recent", 4, 1000, "b", {"score": 0.0}),
    ]
    *_, table, few = overview(results_of(tmp_path, lines))
    assert few == Paragraph(FEW)
    assert table.header == ["method", "lm 100, n=2", "needles 100, n=1", "needles 1,000, n=2"]
    assert table.rows == [
        ["full", "2.000", "1.000", "0.500"],
        ["beacons x8", "2.500", "-", "-"],
        ["recent x4", "-", "-", "0.000 (n=1)"],
        ["recent x8", "-", "0.250", "0.000"],
    ]


def test_where_all_columns_have_samples_enough_all_have_intervals(tmp_path):
    lines = [("lm", "full", None, length, str(n), {"nats": 2.0 + n}) for length in (100, 200) for n in range(8)]
    table = overview(results_of(tmp_path, lines))[-1]
    assert table.header == ["method", "lm 100, n=8", "lm 200, n=8"]
    assert [cell.startswith("5.500 [") for cell in table.rows[0]] == [False, True, True]


def test_a_folder_of_one_column_needs_none(tmp_path):
    assert overview(results_of(tmp_path, [("lm", "full", None, 100, "a", {"nats": 2.0})])) == []
    assert overview(results_of(tmp_path / "empty", [])) == []
