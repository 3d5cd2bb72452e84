"""Every example runs; the README's code is what an example or a test runs too; so does the code of the docs."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_beacon import load
from activation_beacon.persistence import load_adapter_tensors
from saved_models import save_adapter, save_base

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


README_BLOCKS = python_blocks(ROOT / "README.md")


def test_attach_to_your_model_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "attach_to_your_model.py"))
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.default_model
@pytest.mark.slow
def test_the_readmes_first_lines_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("activation_beacon.books.read_demo_book", lambda: short_book()[:6_000])
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_python_in_the_readme_and_the_docs_compiles(page):
    for block in python_blocks(page):
        compile(block, page.name, "exec")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # Trainer's, on a CPU
def test_the_page_on_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With tiny models in place of the default one and of my/decoder."""
    for name in ("default", "my/decoder"):
        config = save_base(tmp_path / name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    save_adapter(tmp_path / "adapter", tmp_path / "default", seed=1)
    (tmp_path / "report.txt").write_text(short_book(), encoding="utf-8")
    (tmp_path / "appendix.txt").write_text(short_book()[:500], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("activation_beacon.load", lambda name: load_tiny(name, tmp_path / "adapter"))
    script = "\n".join(python_blocks(ROOT / "docs" / "python.md"))
    names: dict[str, Any] = {}
    exec(compile(script, "python.md", "exec"), names)
    model, context = names["model"], names["context"]
    assert names["mixed"].ratios == (2, *context.ratios[1:])
    assert names["small"].cache_length <= len(names["document"]) // 2
    assert names["exact"].cache_length > context.cache_length
    assert names["longer"].tokens_seen == context.tokens_seen + 500
    assert [{chunk.ratio for chunk in row.chunks} for row in names["contexts"].rows] == [{2}, {8}]
    assert names["out"].past_key_values.tokens_seen > context.tokens_seen
    assert model.untouched_length == 32
    checkpoint = load("trainer-run/checkpoint-2")[0]
    assert checkpoint.adapter_fingerprint == names["own_model"].adapter_fingerprint
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        names["trainer"].train(resume_from_checkpoint=True)


def test_a_loop_of_ones_own_runs_as_the_page_on_training_has_it(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", seed=1)
    (tmp_path / "my-text.txt").write_text(short_book()[:300], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("activation_beacon.load", lambda name: load_tiny(name, tmp_path / "adapter"))
    names: dict[str, Any] = {}
    exec(compile("\n".join(python_blocks(ROOT / "docs" / "training.md")), "training.md", "exec"), names)
    assert len(names["ratios"]) > 1
    assert load("my-adapter")[0].adapter_fingerprint == names["model"].adapter_fingerprint
    assert load("adapter")[0].adapter_fingerprint != names["model"].adapter_fingerprint


def load_tiny(name: str, default: Path) -> tuple[Any, Any]:
    model, tokenizer = load(default if name == "default" else name)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_in_the_readme_and_the_docs_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http:", "https:")):
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
