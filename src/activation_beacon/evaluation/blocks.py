"""Headings, paragraphs, tables and pictures, written as Markdown or as one HTML page that needs no other file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = "plots"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}"
    "img{max-width:100%}"
)


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; two asterisks around a word make it bold."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; its first column holds names, all others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of plots, and what it shows."""

    name: str
    caption: str


Block = Heading | Paragraph | Table | Picture


def markdown_of(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; pictures are named by their place in the folder of plots."""
    return "\n\n".join(_as_markdown(block) for block in blocks) + "\n"


def page_of(blocks: Sequence[Block], pictures: Path) -> str:
    """The blocks as one page, with the pictures of a folder inside it."""
    body = "\n".join(_as_html(block, pictures) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _as_markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Picture(name, caption):
            return f"![{caption}]({PICTURES}/{name})"
        case Table(header, rows):
            rule = ["---", *["---:"] * (len(header) - 1)]
            return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (header, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _as_html(block: Block, pictures: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            parts = html.escape(text).split("**")
            return "<p>" + "".join(f"<b>{part}</b>" if n % 2 else part for n, part in enumerate(parts)) + "</p>"
        case Picture(name, caption):
            data = base64.b64encode((pictures / name).read_bytes()).decode()
            text = html.escape(caption)
            return (
                f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
            )
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
