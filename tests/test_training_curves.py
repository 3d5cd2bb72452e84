import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from activation_beacon.training import curves


def lines(count: int, *, dev: bool) -> list[dict]:
    measured = {"2": 4.0, "4": 4.5}
    found = [
        {
            "step": step, "stage": 0, "tokens": 100 * step, "loss": 3.0, "loss_by_ratio": {"2": 3.0 - step / 100},
            "learning_rate": 1e-3, "gradient_norm": 1.0,
        }
        for step in range(1, count + 1)
    ]  # fmt: skip
    if dev:
        found[-1] |= {"dev": measured}
        found.insert(0, {"step": 0, "stage": 0, "tokens": 0, "seconds": 0.0, "dev": measured})
    return found


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the axes of losses."""
    figures = []

    def keep(**kwargs):
        figures.append(Figure(**kwargs))
        return figures[-1]

    monkeypatch.setattr(curves, "Figure", keep)

    def draw(metrics):
        curves.draw_curves(metrics, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes[0]

    return draw


@pytest.mark.parametrize(("count", "is_line"), [(1, False), (29, False), (30, True), (80, True)])
def test_a_short_run_is_drawn_as_points_and_a_long_one_as_smoothed_lines(drawn, count, is_line):
    axes = drawn(lines(count, dev=False))
    [losses] = [line for line in axes.lines if line.get_label() == "x2"]
    assert (losses.get_linestyle(), losses.get_marker()) == (("-", "None") if is_line else ("None", "x"))
    assert axes.get_title() == ("Loss (mean of the last 30 updates)" if is_line else "Loss (each update)")
    ys = [3.0 - step / 100 for step in range(1, count + 1)]
    assert list(losses.get_ydata()) == pytest.approx(curves.smoothed(ys) if is_line else ys)


@pytest.mark.parametrize("dev", [False, True])
def test_the_legend_says_whose_ratio_it_is_and_what_dots_are(drawn, dev):
    axes = drawn(lines(3, dev=dev))
    title = axes.get_legend().get_title().get_text().replace("\n", " ")
    assert title == "ratio of the preceding chunk" + ("; dots: dev texts" if dev else "")


def test_dev_texts_are_drawn_from_before_the_first_step(drawn):
    axes = drawn(lines(3, dev=True))
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[0, 300], [0, 300]]
