import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from activation_beacon import BeaconConfig, BeaconModel, detach, grouped, matmul
from activation_beacon.bench import measure, report, shapes
from activation_beacon.bench.cost import FULL_ATTENTION, Compression, ModelShape, decode_bytes, end_to_end_speedup
from activation_beacon.bench.measure import Cell
from activation_beacon.bench.records import FILE, Records
from activation_beacon.bench.timing import Run
from activation_beacon.cli import app
from activation_beacon.errors import CapacityError, MismatchError
from activation_beacon.evaluation.contexts import base_cache_bytes
from activation_beacon.room import Room
from evaluation_models import beacon_model, byte_tokenizer
from families import with_beacons

CHUNK = 16
CONFIG = BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8))
TINY = ModelShape(2, 8, 2, 1, 4, 16, 10)


def model(**overrides):
    return with_beacons("llama", CONFIG, attention="sdpa", **overrides)


def made(total_s, *, step_s=1.0, cache_bytes=100):
    return Run(total_s / 2, step_s, 2 * step_s, total_s, cache_bytes, 1000)


def test_cells_put_full_attention_beside_each_ratio():
    found = list(measure.cells([8, 16], [1, 2], [2, 4], 5))
    assert found[:3] == [Cell(8, 1, None, 5), Cell(8, 1, 2, 5), Cell(8, 1, 4, 5)]
    assert [(cell.length, cell.batch_size) for cell in found[::3]] == [(8, 1), (8, 2), (16, 1), (16, 2)]


def test_presses_stand_beside_the_beacons_of_their_ratio():
    found = list(measure.cells([8], [1], [2, 4], 0, ["snapkv", "knorm"]))
    assert [(cell.ratio, cell.press) for cell in found] == [
        (None, None),
        *((ratio, press) for ratio in (2, 4) for press in (None, "snapkv", "knorm")),
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_both_ways_are_run_to_the_same_end(batch_size):
    attached = model()
    full = measure.run(attached, Cell(5 * CHUNK, batch_size, None, 0), 3)
    beacons = measure.run(attached, Cell(5 * CHUNK, batch_size, 4, 0), 3)
    per_entry = ModelShape.of(attached.config, {}).cache_bytes(1, 4)
    assert full.cache_bytes == batch_size * (5 * CHUNK + 3) * per_entry
    assert beacons.cache_bytes == batch_size * (5 * CHUNK // 4 + 3) * per_entry
    for run in (full, beacons):
        assert 0 < run.step_s <= run.slowest_step_s < run.total_s
        assert run.first_token_s < run.total_s
        assert run.peak_bytes is None or run.peak_bytes > run.cache_bytes


@pytest.mark.parametrize("is_tuned", [False, True])
def test_full_attention_holds_what_layers_with_a_window_need(is_tuned):
    attached = with_beacons("gemma3_text", BeaconConfig(chunk_size=CHUNK, ratios=(2, 4, 8)), attention="sdpa")
    full = measure.run(attached, Cell(5 * CHUNK, 1, None, 0, is_tuned=is_tuned), 3)
    with attached.beacon_disabled():
        read = attached(torch.zeros((1, 5 * CHUNK + 3), dtype=torch.long), use_cache=True)
    assert full.cache_bytes == base_cache_bytes(read.past_key_values)
    assert full.cache_bytes < (5 * CHUNK + 3) * ModelShape.of(attached.config, {}).cache_bytes(1, 4)


def test_tuned_full_attention_has_what_beacons_have_besides_beacons(monkeypatch):
    attached, rows, appended = model(), [], []
    attached.cpu_matmul = "onednn" if matmul.is_offered() else "auto"
    multiply, append = matmul.linear, Room.append
    monkeypatch.setattr(matmul, "linear", lambda x, *rest: rows.append(x.shape[1]) or multiply(x, *rest))
    monkeypatch.setattr(Room, "append", lambda room, *new: appended.append(new[0].shape[2]) or append(room, *new))
    plain = measure.run(attached, Cell(5 * CHUNK, 1, None, 0), 3)
    assert rows == appended == []
    tuned = measure.run(attached, Cell(5 * CHUNK, 1, None, 0, is_tuned=True), 3)
    assert set(rows) == ({5 * CHUNK, 1} if matmul.is_offered() else set())
    num_layers = attached.config.num_hidden_layers
    assert appended == [5 * CHUNK, 1] * num_layers + [1] * 2 * num_layers  # room is made once, and filled
    assert tuned.cache_bytes == plain.cache_bytes


def test_a_text_that_does_not_fit_is_refused_before_it_is_read():
    with pytest.raises(CapacityError, match="the base model has 64"):
        measure.run(model(max_position_embeddings=64), Cell(40 * CHUNK, 1, 8, 0), 3)


@pytest.mark.parametrize("local_tokens", [0, 5, 20])
def test_each_chunk_of_a_long_text_is_timed(local_tokens):
    attached = with_beacons("llama", BeaconConfig(CHUNK, (2, 4, 8), local_tokens=local_tokens), attention="sdpa")
    rows = []
    attached.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    seconds = measure.chunk_seconds(attached, 6, 4)
    assert len(seconds) == 6
    assert min(seconds) > 0
    assert [number for number in rows if number > 1] == [CHUNK + CHUNK // 4] * 6  # each reads its chunk whole


def test_chunks_that_fill_a_pass_are_not_timed_together(monkeypatch):
    monkeypatch.setattr(grouped, "ROWS_TOGETHER", 2 * (CHUNK + CHUNK // 4) - 1)
    assert measure.seconds_in_one_call(model(), 3, 4) is None


def test_pairs_of_bare_and_attached_leave_the_model_attached():
    attached = model()
    pairs = measure.idle_pairs(attached, 5, 3, 2)
    assert len(pairs) == 2 * measure.TIMES_EACH
    assert pairs[0][0].cache_bytes == pairs[0][1].cache_bytes
    assert isinstance(attached, BeaconModel)
    assert measure.median_factor([(made(4), made(2)), (made(1), made(3)), (made(1), made(1))], "total_s") == 1


def test_factors_are_taken_pair_by_pair_and_bounds_stand_beside_them():
    runs = {
        Cell(64, 1, None, 0): made(8, cache_bytes=800),
        Cell(64, 1, 4, 0): made(4),
        Cell(64, 1, None, 1): made(90, cache_bytes=800),  # a slow spell, which both ways meet
        Cell(64, 1, 4, 1): made(30),
        Cell(64, 1, 4, 2): made(1),
        Cell(128, 1, 4, 0): made(4),
    }
    full, beacons, alone = report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2)
    assert (full.ratio, full.repeats, full.total_s, full.total_speedup, full.total_bound) == (None, 2, 49, 1, 1)
    assert (beacons.ratio, beacons.repeats, beacons.total_s, beacons.total_speedup) == (4, 3, 4, 2.5)
    assert beacons.cache_factor == 8
    assert beacons.total_bound == end_to_end_speedup(TINY, 64, 3, Compression(4, 16))
    by_bytes = decode_bytes(TINY, 64, FULL_ATTENTION, 2) / decode_bytes(TINY, 64, Compression(4, 16), 2)
    assert beacons.step_bound == pytest.approx(by_bytes)
    assert (alone.length, alone.total_speedup, alone.peak_bytes) == (128, None, 1000)


def test_the_table_has_a_line_for_each_way():
    runs = {Cell(64, 1, None, 0): made(8), Cell(64, 1, 4, 0): made(4, step_s=0.375)}
    head, full, beacons = report.table(report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2))
    columns = (
        "tokens",
        "texts",
        "way",
        "first token",
        "per token",
        "slowest token",
        "total",
        "of tuned",
        "bound",
        "cache",
        "peak",
    )
    assert head.split() == " ".join(columns).split()
    assert full.split()[:10] == ["64", "1", "full", "4.00", "s", "1.00x", "1.00", "s", "1.00x", "2.00"]
    assert beacons.split()[:11] == ["64", "1", "x4", "2.00", "s", "2.00x", "375.0", "ms", "2.67x", "750.0", "ms"]
    assert head.index("slowest token") + len("slowest token") == beacons.index("750.0 ms") + len("750.0 ms")


def test_kvpress_is_compared_with_full_attention_too_and_has_no_bound():
    runs = {Cell(64, 1, None, 0): made(8), Cell(64, 1, 4, 0): made(4), Cell(64, 1, 4, 0, "knorm"): made(16)}
    rows = report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2)
    assert [(row.way, row.total_speedup) for row in rows] == [("full", 1), ("x4", 2), ("knorm x4", 0.5)]
    assert (rows[2].first_token_bound, rows[2].step_bound, rows[2].total_bound) == (None, None, None)
    assert report.table(rows)[3].split()[2:4] == ["knorm", "x4"]


def test_tuned_full_attention_stands_beside_the_other_and_is_compared_with_too():
    full, tuned, beacons = Cell(64, 1, None, 0), Cell(64, 1, None, 0, is_tuned=True), Cell(64, 1, 4, 0)
    runs = {full: made(8), tuned: made(6), beacons: made(4)}
    rows = report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2)
    found = [(row.way, row.total_speedup, row.total_speedup_of_tuned) for row in rows]
    assert found == [("full", 1, 0.75), ("full, tuned", 8 / 6, 1), ("x4", 2, 1.5)]
    assert rows[1].first_token_bound == rows[0].first_token_bound


def test_a_picture_is_drawn(tmp_path):
    runs = {Cell(n, 1, ratio, 0): made(n * (1 if ratio else 2)) for n in (32, 64) for ratio in (None, 4)}
    runs |= {cell._replace(press="knorm"): made(9) for cell in runs if cell.ratio}
    report.draw(tmp_path / "speed.png", report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2))
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("title", "label"),
    [("first token", "x4, by operations"), ("per token", "x4, by bytes read"), ("total", "x4, by operations")],
)
def test_a_bound_is_named_for_what_it_counts(tmp_path, monkeypatch, title, label):
    drawn = []
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    monkeypatch.setattr(canvas, "print_png", lambda self, path: drawn.append(self.figure) or Path(path).touch())
    runs = {Cell(n, 1, ratio, 0): made(n) for n in (32, 64) for ratio in (None, 4)}
    report.draw(tmp_path / "speed.png", report.summary(runs, TINY, num_new=3, config=CONFIG, element_bytes=2))
    [axis] = [axis for axis in drawn[0].axes if axis.get_title() == title]
    assert [line.get_label() for line in axis.lines if line.get_linestyle() == "--"] == [label]


# --- records -----------------------------------------------------------------------------------------------------------


def test_finished_runs_are_found_again_and_a_line_cut_short_is_dropped(tmp_path):
    records = Records(tmp_path, {"model": "a"})
    records.add(Cell(8, 1, None, 0), made(3))
    records.add(Cell(8, 1, 2, 0), made(2))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"cell": {"len')
    again = Records(tmp_path, {"model": "a"})
    assert again.runs == records.runs
    again.add(Cell(8, 1, 4, 0), made(1))
    assert Records(tmp_path, {"model": "a"}).runs == again.runs


def test_runs_of_another_setting_are_not_mixed_in(tmp_path):
    Records(tmp_path, {"model": "a", "threads": 2})
    with pytest.raises(MismatchError, match=r"holds runs with threads 2; this one has 4\. Choose another --output"):
        Records(tmp_path, {"model": "a", "threads": 4})


# --- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    attached = beacon_model()
    attached.save_pretrained(folder / "adapter")
    detach(attached).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return ["--model", str(folder / "adapter"), "--base", str(folder / "base"), "--device", "cpu"]


def invoke(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_speed_prints_a_table_and_one_json_line_and_goes_on_where_it_stood(options, tmp_path):
    args = ["speed", *options, "--lengths", "96,64", "--ratios", "4", "--new-tokens", "2", "-o", tmp_path]
    result = invoke(*args, "--repeats", "1")
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.splitlines()
    ways = ("full", "full,", "x4")
    assert [row.split()[:3] for row in table[1:]] == [[n, "1", way] for n in ("64", "96") for way in ways]
    values = json.loads(line)
    ratios = [4 if way == "x4" else None for way in ways]
    assert [(row["length"], row["ratio"]) for row in values["rows"]] == [(n, r) for n in (64, 96) for r in ratios]
    assert values["threads"] == torch.get_num_threads()
    assert (tmp_path / "speed.png").exists()
    before = (tmp_path / FILE).read_text()
    again = json.loads(invoke(*args, "--repeats", "2", "--json").stdout)
    assert [row["repeats"] for row in again["rows"]] == [2] * 2 * len(ways)
    assert (tmp_path / FILE).read_text().startswith(before)


def test_speed_leaves_full_attention_out_where_it_takes_too_long(options):
    args = ["--lengths", "64,96", "--ratios", "4", "--new-tokens", "1", "--repeats", "5", "--enough", "0"]
    values = json.loads(
        invoke("speed", *options, *args, "--full-up-to", "64", "--cpu-matmul", "torch", "--json").stdout
    )
    assert [(row["length"], row["ratio"], row["repeats"]) for row in values["rows"]] == [
        (64, None, 1),
        (64, None, 1),
        (64, 4, 1),
        (96, 4, 1),
    ]


@pytest.mark.parametrize("model", [["--shape", "smollm2-135m"], []])
def test_a_device_that_cannot_be_used_is_one_line(model):
    result = invoke("speed", *model, "--device", "nowhere", "--lengths", "64")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith('Error: Device "nowhere" cannot be used: ')


def test_enough_counts_the_seconds_of_runs_on_record(options, tmp_path):
    args = ["--lengths", "64", "--ratios", "4", "--new-tokens", "1", "--repeats", "3", "--json", "-o", tmp_path]
    seconds = 1 + max(run["total_s"] for run in json.loads(invoke("speed", *options, *args).stdout)["rows"])
    path = tmp_path / FILE
    setting, *lines = path.read_text().splitlines()
    first = [json.loads(line) for line in lines if json.loads(line)["cell"]["repeat"] == 0]
    for line in first:
        line["run"]["total_s"] = seconds
    path.write_text("".join(f"{line}\n" for line in [setting, *map(json.dumps, first)]))
    for enough, repeats in ((seconds, 1), (100 * seconds, 3)):
        again = json.loads(invoke("speed", *options, *args, "--enough", str(enough)).stdout)
        assert {row["repeats"] for row in again["rows"]} == {repeats}


def test_speed_with_other_local_tokens_than_the_adapters(options):
    args = ["--lengths", "64", "--ratios", "4", "--new-tokens", "1", "--repeats", "1", "--full-up-to", "0", "--json"]
    own, more = (
        json.loads(invoke("speed", *options, *args, *others).stdout) for others in ([], ["--local-tokens", "20"])
    )
    assert (own["local_tokens"], more["local_tokens"]) == (0, 20)
    assert own["rows"][0]["cache_bytes"] < more["rows"][0]["cache_bytes"]


def test_speed_goes_on_after_a_text_that_does_not_fit_the_gpu(options, tmp_path, monkeypatch):
    whole = measure.run

    def run(model, cell, num_new):
        if cell.length == 96 and cell.ratio is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, cell, num_new)

    monkeypatch.setattr(measure, "run", run)
    args = ["--lengths", "64,96", "--ratios", "4", "--new-tokens", "1", "--repeats", "1", "--json", "-o", tmp_path]
    result = invoke("speed", *options, *args, "--no-full-tuned")
    assert "96 tokens, full attention: does not fit the GPU's memory" in result.stderr
    assert [(row["length"], row["ratio"]) for row in json.loads(result.stdout)["rows"]] == [
        (64, None),
        (64, 4),
        (96, 4),
    ]


def test_chunks_and_idle_print_their_numbers(options):
    result = invoke("chunks", *options, "--chunks", "9", "--ratio", "4")
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.splitlines()
    assert [row.split()[0] for row in table[1:]] == ["1", "8", "9", "in"]
    assert table[-1].startswith("in one call, several chunks a pass: ")
    measured = json.loads(line)
    assert len(measured["seconds"]) == 9
    assert measured["seconds_in_one_call"] > 0
    values = json.loads(
        invoke("idle", *options, "--length", "8", "--new-tokens", "2", "--repeats", "1", "--json").stdout
    )
    assert set(values["of_base"]) == {"first_token_s", "step_s"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["speed", "--shape", "gpt-5"], "--shape must be one of smollm2-135m, llama-2-7b, llama-3-8b, qwen2-7b"),
        (
            ["speed", "--peers", "snapkv,kvzip"],
            "--peers must be some of snapkv, expected-attention, pyramidkv, knorm; got 'kvzip'.",
        ),
        (["speed", "--batch-sizes", "0"], "--batch-sizes must be ints of at least 1, such as"),
        (
            ["speed", "--lengths", "many"],
            "--lengths must be ints of at least 1, such as 8192 or 2048,4096; got 'many'.",
        ),
    ],
)
def test_bad_options_are_refused(args, message):
    result = invoke(*args)
    assert result.exit_code == 1
    assert message in result.stderr


def test_graphs_are_refused_on_a_cpu(options):
    result = invoke("speed", *options, "--device", "cpu", "--cuda-graphs")
    assert result.exit_code == 1
    assert "--cuda-graphs needs a GPU; the model is on cpu. Add --device cuda." in result.stderr


def test_idle_refuses_a_text_that_would_be_compressed(options):
    result = invoke("idle", *options, "--length", "40")
    assert result.exit_code == 1
    assert "--length and --new-tokens (72) must not exceed 32: longer texts are compressed." in result.stderr


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2-7b"])
def test_a_random_model_has_the_shape_that_it_is_named_for(name, monkeypatch):
    known = shapes.SHAPES[name]
    few = {
        "num_layers": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
        "hidden_size": 4 * known.num_heads,
        "head_dim": 4,
        "max_positions": shapes.MANY_POSITIONS,
    }
    small = ModelShape(**{**vars(known), **few})
    monkeypatch.setitem(shapes.SHAPES, name, small)
    attached = shapes.random_model(name, chunk_size=64, device="cpu", dtype=torch.bfloat16)
    assert ModelShape.of(attached.config, {}) == small
    assert attached.dtype == torch.bfloat16
    context = attached.compress(torch.randint(0, 50, (1, 200)), ratio=8)
    assert (context.num_sinks, context.num_beacons, context.tail_length) == (4, 8, 136)
