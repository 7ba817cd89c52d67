"""Names of classes and files in any script."""

import warnings

import numpy as np
import plotting
import pytest
from contact_sheet import save_sheet
from matplotlib import font_manager

import peft_talora as pt


@pytest.fixture
def fonts(monkeypatch):
    """Fonts that are added are forgotten."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_: [])
    plotting.families_for.cache_clear()
    yield
    plotting.families_for.cache_clear()


def make_font(path, characters):
    """A font that has squares for these characters and nothing else."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = {ord(character): f"uni{ord(character):04X}" for character in characters}
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf(dict.fromkeys([".notdef", *names.values()], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (900, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def sheet(path, names):
    tasks = {"semantic": pt.TaskSpec("semantic", num_channels=len(names), class_names=names)}
    maps = {"semantic": np.arange(len(names)).repeat(4).reshape(-1, 4)}
    image = np.zeros((*maps["semantic"].shape, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sheet([("旅行 $1", image, maps)] * 3, tasks, path)


@pytest.mark.usefixtures("fonts")
def test_characters_without_a_font_are_noted_once(tmp_path, capsys):
    for _ in range(2):
        sheet(tmp_path / "sheet.png", ["道路", "é ж λ", "x"])
    told = capsys.readouterr().err
    assert told.count("no installed font has the characters") == 1
    assert all(character in told for character in "旅行道路") and not set("éжλx$1") & set(told.split("'")[1])
    assert "fonts-noto-cjk" in told


@pytest.mark.usefixtures("fonts")
def test_a_font_that_was_installed_later_is_found(tmp_path, capsys, monkeypatch):
    file = make_font(tmp_path / "squares.ttf", "旅行道路")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_: [file])
    with plotting.fonts_for(["道路 x"]):
        assert plotting.plt.rcParams["font.family"] == ["DejaVu Sans", "Squares"]
    sheet(tmp_path / "sheet.png", ["道路", "x"])
    assert capsys.readouterr().err == ""
    with plotting.fonts_for(["é"]):
        assert plotting.plt.rcParams["font.family"] == ["DejaVu Sans"]
