"""Every example runs; the README's code is what an example or a test runs too."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from activation_beacon import load
from activation_beacon.persistence import load_adapter_tensors
from saved_models import save_adapter, save_base

ROOT = Path(__file__).parents[1]
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_attach_to_your_model_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "attach_to_your_model.py"))
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.default_model
@pytest.mark.slow
def test_the_readmes_first_lines_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("activation_beacon.books.read_demo_book", lambda: short_book())
    exec(compile(README_BLOCKS[0], "README.md", "exec"), {})
    assert "tokens seen" in capsys.readouterr().out
    assert (tmp_path / "book.beacon").exists()


def short_book() -> str:
    """A book of a few chunks, so that the test takes seconds."""
    text = (ROOT / "src" / "activation_beacon" / "books" / "little-wizard-stories-of-oz.txt").read_text(
        encoding="utf-8"
    )
    return text[:12_000]


def test_the_readmes_first_lines_are_the_example():
    example = (ROOT / "examples" / "ask_a_book.py").read_text(encoding="utf-8")
    assert README_BLOCKS[0].strip() in example


def test_all_further_python_in_the_readme_compiles():
    for block in README_BLOCKS:
        compile(block, "README.md", "exec")


def test_the_mean_of_two_adapters_is_an_adapter(tmp_path):
    save_base(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(
            tmp_path / str(seed), tmp_path / "base", seed=seed, training={"steps": seed, "tokens": 10, "minutes": 0.5}
        )
    example = runpy.run_path(str(ROOT / "examples" / "average_adapters.py"))
    example["average"](*(str(tmp_path / name) for name in ("1", "2", "mean")))
    one, two, mean = (load_adapter_tensors(tmp_path / name) for name in ("1", "2", "mean"))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    model, _ = load(tmp_path / "mean")
    assert model.beacon_config.training["steps"] == 3
