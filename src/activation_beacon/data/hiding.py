"""Hiding a statement in a text, between two of its sentences."""

import re

CLOSING = "\"'”’)]"
BOUNDARY = re.compile(rf"(?<=[.!?])[{re.escape(CLOSING)}]*\s+|\n[ \t]*\n\s*")  # a sentence's end, or a blank line


def hide(text: str, needle: str, depth: float) -> str:
    """The text with a statement at the sentence boundary that is nearest to `depth` (0 its beginning, 1 its end).

    Args:
        text: to hide it in; nothing of it is changed.
        needle: the statement.
        depth: from 0 to 1.
    """
    target = depth * len(text)
    inner = ((match.end(), match.group()) for match in BOUNDARY.finditer(text) if match.end() < len(text))
    place, gap = min([(0, " "), (len(text), " "), *inner], key=lambda found: abs(found[0] - target))
    if place == len(text):
        return f"{text} {needle}" if text else needle
    return f"{text[:place]}{needle}{gap.lstrip(CLOSING)}{text[place:]}"
