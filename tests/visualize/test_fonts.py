"""Names in scripts that the usual font lacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from gn_detect.visualize import fonts
from gn_detect.visualize.canvas import Canvas
from gn_detect.visualize.objects import draw_labels


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Nothing is known yet, neither in a test nor after it."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    fonts._family_of.cache_clear()
    fonts._installed.cache_clear()
    fonts._warn_once.cache_clear()


def draw(*labels: str) -> list[str]:
    """The texts as they are drawn; whatever warns fails."""
    canvas = Canvas.over(np.zeros((400, 400, 3), np.uint8))
    boxes = np.array([[20.0, 40 + 120 * i, 300, 120 + 120 * i] for i in range(len(labels))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_labels(canvas, boxes, labels, ["red"] * len(labels))
        canvas.flatten()
    return [text.get_text() for text in canvas.figure.texts]


def only_in(family: str) -> str:
    """A character of this font that the usual one has not."""
    usual, other = (
        get_font(findfont(FontProperties(family=f, weight=fonts.WEIGHT))) for f in (fonts.USUAL, family)
    )
    return next(chr(code) for code in other.get_charmap() if code > 128 and not usual.get_char_index(code))


def test_an_installed_font_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """STIX comes with matplotlib, as the usual font does; the families that are absent are not mentioned."""
    monkeypatch.setattr(fonts, "FALLBACKS", ("Nobody's Font", "STIXNonUnicode"))
    name = f"cat {only_in('STIXNonUnicode')}"
    with caplog.at_level(logging.INFO):
        assert draw(name) == [name]
    assert fonts.drawable(name) == (name, [fonts.USUAL, "STIXNonUnicode"])
    assert fonts.drawable("cat") == ("cat", [fonts.USUAL])
    assert not caplog.records


def test_what_no_font_has_can_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "FALLBACKS", ())
    shown = draw("人 98 %", "猫 98 %")
    assert sorted(shown) == [r"\u4eba 98 %", r"\u732b 98 %"]
    draw("犬")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "no installed font has some" in messages[0]
    assert "Noto Sans CJK" in messages[0]


@pytest.mark.parametrize("text", ["personne à vélo", "Ζ и ü ß", "a" * 60])
def test_the_usual_font_is_enough_for(text: str) -> None:
    assert fonts.drawable(text) == (text, [fonts.USUAL])


@pytest.mark.parametrize(("text", "shown"), [("a\x00b", r"a\x00b"), ("\ud800", r"\ud800"), ("", "")])
def test_what_is_no_letter(text: str, shown: str) -> None:
    assert fonts.drawable(text) == (shown, [fonts.USUAL])


@pytest.mark.skipif(
    not any(name in fontManager.get_font_names() for name in fonts.FALLBACKS),
    reason="no such font is installed",
)
def test_the_fonts_of_this_computer() -> None:
    assert fonts.drawable("人")[0] == "人"
