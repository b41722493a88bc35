"""Choose fonts for names in any script from the installed ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..text import escaped, printable, shortened

logger = logging.getLogger(__name__)

USUAL = "DejaVu Sans"  # comes with matplotlib

# Tried in turn for characters that the usual font lacks: families of Linux, macOS and Windows.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "PingFang SC", "PingFang HK", "Hiragino Sans", "Hiragino Sans GB",
    "Apple SD Gothic Neo", "Heiti TC", "Microsoft YaHei", "Microsoft JhengHei", "Yu Gothic", "Meiryo",
    "Malgun Gothic", "SimHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback",
    "IPAexGothic", "IPAGothic", "NanumGothic", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil",
    "Noto Sans Thai", "Nirmala UI", "Leelawadee UI", "Arial Unicode MS", "Unifont",
)  # fmt: skip

WEIGHT = "bold"  # of labels; a font may lack in bold what it has otherwise


def add_legend(owner: Any, handles: Sequence[Any], names: Sequence[str], **settings: Any) -> None:
    """Add a legend to axes or a figure, with names drawn as they are. All names from files must come here.

    matplotlib would take ``$`` for mathematics, and leave out names that begin with ``_``.

    Args:
        owner: the axes or the figure.
        handles: lines or patches.
        names: one for each handle.
        settings: arguments of matplotlib's ``legend``.
    """
    legend = owner.legend(handles, [f"{number}" for number in range(len(names))], **settings)
    for text, name in zip(legend.get_texts(), names, strict=True):
        set_text(text, name)


def set_text(text: Any, name: str) -> None:
    """Let a matplotlib text show a name as it is: no mathematics, no TeX, in fonts that have it."""
    shown, families = drawable(name)
    text.set(text=shown, family=families, parse_math=False, usetex=False)


def drawable(text: str) -> tuple[str, list[str]]:
    r"""Return a text as it can be drawn, on one line of bounded length, and the font families for it.

    A character that no font has would be an empty box, the same for all. It is replaced by its escape, such
    as ``\u4eba``, and logged once.
    """
    text = shortened(printable(text))
    families = {character: _family_of(character) for character in text}
    missing = [character for character, family in families.items() if family is None]
    if missing:
        _warn_once()
        text = "".join(escaped(character) if character in missing else character for character in text)
    return text, list(dict.fromkeys([USUAL, *filter(None, families.values())]))


@cache
def _family_of(character: str) -> str | None:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    for family in _installed():
        path = findfont(FontProperties(family=family, weight=WEIGHT))
        if get_font(path).get_char_index(ord(character)):
            return family
    return None


@cache
def _installed() -> list[str]:
    """Return the installed families: matplotlib would warn about each other one, for each text."""
    from matplotlib.font_manager import fontManager

    names = set(fontManager.get_font_names())
    return [USUAL, *(family for family in FALLBACKS if family in names)]


@cache
def _warn_once() -> None:
    logger.warning(
        "no installed font has some characters of the labels, so pictures show their escapes; install one, "
        "as Noto Sans CJK, and remove fontlist-*.json from matplotlib.get_cachedir()"
    )
