"""A statement stands between two sentences, and nothing else of the text is changed."""

import re

import pytest

from activation_beacon.data.hiding import hide
from training_texts import text_with

PROSE = 'One is here. "Two?" he said. Three!\n\nFour (is it?) five.'


@pytest.mark.parametrize(
    ("text", "depth", "expected"),
    [
        (PROSE, 0, f"N. {PROSE}"),
        (PROSE, 1, f"{PROSE} N."),
        (PROSE, 0.2, 'One is here. N. "Two?" he said. Three!\n\nFour (is it?) five.'),
        (PROSE, 0.35, 'One is here. "Two?" N. he said. Three!\n\nFour (is it?) five.'),
        (PROSE, 0.5, 'One is here. "Two?" he said. N. Three!\n\nFour (is it?) five.'),
        (PROSE, 0.66, 'One is here. "Two?" he said. Three!\n\nN.\n\nFour (is it?) five.'),
        ("no sentence", 0.4, "N. no sentence"),
        ("no sentence", 0.6, "no sentence N."),
        ("wrapped\nlines. And\nmore", 0.5, "wrapped\nlines. N. And\nmore"),
        ("    a = 1\n    b = 2\n\n    c = 3", 0.6, "    a = 1\n    b = 2\n\n    N.\n\n    c = 3"),
        ("", 0.5, "N."),
    ],
)
def test_a_statement_stands_at_the_boundary_nearest_to_its_depth(text, depth, expected):
    assert hide(text, "N.", depth) == expected


def test_nothing_of_the_text_is_changed_and_no_boundary_is_nearer():
    text = text_with(1, 3000)
    boundaries = [0, len(text), *(match.end() for match in re.finditer(r"here\.\s+", text) if match.end() < len(text))]
    for step in range(201):
        hidden = hide(text, "NEEDLE.", step / 200)
        before, after = hidden.split("NEEDLE.")
        assert (before + after.lstrip()).strip() == text.strip()
        place = len(before) if after else len(text)
        assert abs(place - step / 200 * len(text)) == min(abs(other - step / 200 * len(text)) for other in boundaries)
