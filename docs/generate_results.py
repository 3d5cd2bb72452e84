"""Writes docs/results.md from the stored results of `beacon eval` in docs/results.

`python docs/generate_results.py` writes the page and its pictures; with `--check` it writes nothing and exits 1 when the page is
stale. It measures nothing: the commands that do stand on the page.
"""

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("results")
TARGET = Path(__file__).with_name("results.md")
INTRODUCTION = FOLDER / "introduction.md"
HEADER = "<!-- Written by docs/generate_results.py (`make docs`) from docs/results; do not edit. -->\n\n"


def main() -> int:
    """Writes or checks the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/results.md from docs/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when docs/results.md is stale")
    check = parser.parse_args().check
    if not check:
        from activation_beacon.evaluation.report import write_report

        for path in write_report(FOLDER):
            path.unlink()  # its tables stand on the page, which links to the plots
        TARGET.write_text(page(), encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == page():
        return 0
    print(f"docs/{TARGET.name} is stale: run `make docs`.", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    from activation_beacon.evaluation.blocks import Heading, markdown_of
    from activation_beacon.evaluation.report import INTERVALS, tables
    from activation_beacon.evaluation.results import Results

    results = Results(FOLDER)
    parts = [HEADER + INTRODUCTION.read_text(encoding="utf-8").rstrip(), INTERVALS]
    for name in results.run["tasks"]:
        blocks = tables(results, name)
        if blocks:
            parts += [markdown_of([Heading(2, name), *blocks]).rstrip(), *pictures(name)]
    return "\n\n".join(parts) + "\n"


def pictures(task: str) -> list[str]:
    """Links to the pictures of a task."""
    found = sorted((FOLDER / "plots").glob(f"{task}-*.png"))
    return [f"![{path.stem.replace('-', ' ')}](results/plots/{path.name})" for path in found]


if __name__ == "__main__":
    sys.exit(main())
