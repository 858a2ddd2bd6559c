"""Names in pictures: letters of a font that has them, or their codes and a line that says so, never boxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from dualcl.results import fonts
from dualcl.results.plots import _shown, save_figure
from dualcl.results.samples import _Sheet

STIX = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
#: letters that matplotlib's own STIX has and DejaVu Sans has not
RARE = [chr(c) for c in sorted(fonts._letters(str(STIX)) - fonts._letters(str(fonts.PLAIN))) if chr(c).isalpha()]
HAN = "\N{CJK UNIFIED IDEOGRAPH-72AC}", "\N{CJK UNIFIED IDEOGRAPH-732B}"


@pytest.fixture(params=["none", "STIX"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With no font but DejaVu Sans, or with STIX beside it."""
    others = [] if request.param == "none" else [("STIXGeneral", str(STIX))]
    monkeypatch.setattr(fonts, "_others", lambda: others)
    fonts._of.cache_clear()
    yield request.param
    fonts._of.cache_clear()


def drawn(text: str) -> np.ndarray:
    sheet = _Sheet(400)
    sheet.text(0, sheet.y, text, 13, 380, 1)
    return np.asarray(sheet.done())


def test_letters_that_no_font_has_are_codes_and_said(installed: str) -> None:
    assert fonts.drawable(f"dog {HAN[0]}") == "dog [U+72AC]"
    assert not np.array_equal(drawn(HAN[0]), drawn(HAN[1]))
    assert fonts.lacking(["dog", *HAN]) == [
        f"no font here has the letters {HAN[0]} (U+72AC), {HAN[1]} (U+732B): pictures show their codes; install one "
        "that has"
    ]
    assert _shown(HAN[0]) == "[U+72AC]"


def test_letters_of_another_font_are_drawn_with_it(installed: str) -> None:
    there = installed == "STIX"
    assert len(RARE) > 20
    for letter in RARE[:5]:
        assert (fonts.drawable(letter) == letter) == there
        assert fonts.families(f"a{letter}") == ["DejaVu Sans", "STIXGeneral"][: 1 + there]
        assert fonts.file_for(letter) == str(STIX if there else fonts.PLAIN)
        assert (not fonts.lacking([letter])) == there


def test_plots_and_sheets_have_no_boxes(installed: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(_shown(f"{RARE[0]} {HAN[0]}"))
    axes.set_xticks([0, 1], [_shown(RARE[1]), _shown("caf\N{LATIN SMALL LETTER E WITH ACUTE}")])
    save_figure(figure, tmp_path / "a.png")
    assert not [str(w.message) for w in recwarn if "missing from font" in str(w.message)]
    assert not np.array_equal(drawn(RARE[0]), drawn(RARE[1]))


def test_what_dejavu_has_and_what_is_not_seen_stays_as_it_is(installed: str) -> None:
    text = "Jos\N{LATIN SMALL LETTER E WITH ACUTE} \N{CYRILLIC SMALL LETTER ZHE} ± ×\n\N{ZERO WIDTH JOINER}"
    assert fonts.drawable(text) == text
    assert fonts.families(text) == ["DejaVu Sans"]
    assert fonts.lacking([text]) == []
