"""matplotlib as the pictures here use it: no window, names without math, and a font for every character that one is there for."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import matplotlib

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

__all__ = ["fonts_for", "plt"]

# a dollar in the name of a file or a class is one
matplotlib.rcParams["text.parse_math"] = False
# matplotlib's own, which has Latin, Greek and Cyrillic
FONT = "DejaVu Sans"
# a font of boxes, which has everything and shows nothing
BOXES = "Last Resort"


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Draw these texts with installed fonts that have their characters; the first time that there is none, a note says so."""
    families = families_for(frozenset("".join(texts)))
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": [FONT, *families]}):
        # one warning for every character, picture and row
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        yield


@functools.lru_cache
def families_for(characters: frozenset[str]) -> tuple[str, ...]:
    missing = {character for character in characters if character.isprintable()}
    missing -= _characters(font_manager.findfont(FONT), missing)
    families = _families_having(missing)
    if missing and _add_new_fonts():
        families += _families_having(missing)
    if missing:
        shown = "".join(sorted(missing)[:10])
        print(
            f"no installed font has the characters {shown!r}: they are drawn as boxes. A font that has them, such as "
            "Noto Sans CJK (Debian: fonts-noto-cjk), is found once it is installed.",
            file=sys.stderr,
        )
    return tuple(families)


def _families_having(missing: set[str]) -> list[str]:
    """Families of fonts that have these characters; those that are found are taken out."""
    families = []
    for entry in font_manager.fontManager.ttflist:
        if not missing:
            break
        if entry.style == "normal" and not entry.name.startswith((BOXES, ".")):
            found = _characters(entry.fname, missing)
            if found:
                families.append(entry.name)
                missing -= found
    return families


def _add_new_fonts() -> bool:
    """Tell matplotlib of fonts that were installed after it made its list, which it keeps on disk; whether there are any."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    new = set(font_manager.findSystemFonts()) - known
    for file in sorted(new):
        # a file that cannot be read is none
        with suppress(OSError, RuntimeError):
            font_manager.fontManager.addfont(file)
    return bool(new)


def _characters(file: str, wanted: set[str]) -> set[str]:
    """Which of these characters a font has."""
    try:
        font = font_manager.get_font(file)
    except (OSError, RuntimeError):
        return set()
    return {character for character in wanted if font.get_char_index(ord(character))}
