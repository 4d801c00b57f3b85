"""The shared colours can be read: contrasts of WCAG 2.2, level AA, in both themes."""

import re
from dataclasses import asdict

import pytest

from xattn.pictures.design import DARK, LIGHT, VARIABLES

TEXT = 4.5  # the least contrast of text


def luminance(colour):
    """Relative luminance of ``#rrggbb`` as WCAG defines it."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "panel"])
@pytest.mark.parametrize(
    "name, least",
    [
        ("text", 7.0),
        ("quiet", TEXT),
        ("link", TEXT),
        ("accent", TEXT),
        ("good", TEXT),
        ("wrong", TEXT),
    ],
)
def test_text_stands_out_from_what_is_behind_it(colours, ground, name, least):
    assert contrast(getattr(colours, name), getattr(colours, ground)) >= least


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_on_a_pressed_or_chosen_thing_stands_out(colours):
    assert contrast(colours.on_accent, colours.accent) >= TEXT


def test_the_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_pages_get_every_colour_in_both_themes():
    for name, value in asdict(LIGHT).items():
        pair = f"--{name.replace('_', '-')}:light-dark({value},{asdict(DARK)[name]})"
        assert pair in VARIABLES
        assert re.fullmatch("#[0-9a-f]{6}", value) and re.fullmatch(
            "#[0-9a-f]{6}", asdict(DARK)[name]
        )
