"""A few rows of each split as a picture, labels drawn over them: what the model will see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...drawing import color_range, draw
from ...kinds import TaskSpec, doubts
from ..columns import IMAGE_COLUMN, task_column
from ..rows import array_rows, column_names, place_of, read_row
from .legend import legend
from .report import DataReport

SIDE, MARGIN, TITLE = 224, 6, 18
# How much of a label covers its image.
_COVER = 0.6


def save_check_sheet(splits: Mapping[str, Any], report: DataReport, path: str | Path, rows_per_split: int = 4) -> Path:
    """Draw some rows of each split with their labels, and below them what the colours mean.

    Args:
        splits: What [`check_dataset`] gave.
        report: Its report.
        path: The PNG.
        rows_per_split: How many rows of each split.

    Returns:
        The path.
    """
    shown = []
    for split, rows in splits.items():
        columns = [task_column(name) for name in report.tasks if task_column(name) in column_names(rows)]
        reader = array_rows(rows, [IMAGE_COLUMN, *columns])
        with doubts.collected():  # the report has them
            for index in _examples(report, split, len(rows), rows_per_split):
                shown.append((f"{split}: {place_of(rows, index)}", *read_row(reader[index], report.tasks)))
    # One colour scale for all rows, so that one legend can say what it means.
    ranges = {
        name: color_range(spec, [labels[name] for _, _, labels in shown], (0, 100)) if shown else None
        for name, spec in report.tasks.items()
    }
    lines = [
        (title, [image, *(_over(image, spec, labels[name], ranges[name]) for name, spec in report.tasks.items())])
        for title, image, labels in shown
    ]
    legends = [
        legend([split.tasks[name] for split in report.splits.values()], ranges[name], SIDE) for name in report.tasks
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _pasted(lines, ["image", *report.tasks], [None, *legends]).save(path)
    return path


def _examples(report: DataReport, split: str, number: int, most: int) -> list[int]:
    """Rows evenly taken from those that can be read."""
    summary = report.splits[split]
    # where rows were left out already, the others are those that can be read
    readable = [index for index in range(number) if number < summary.rows or index not in summary.errors]
    return readable[:: max(1, len(readable) // most)][:most]


def _over(image: np.ndarray, spec: TaskSpec, label: Any, value_range: Any) -> np.ndarray:
    """A label drawn over its image; the image alone where nothing is labelled."""
    labelled = spec.task_kind.labelled(label, spec.ignore_index).numpy()[..., None]
    drawn = _COVER * draw(spec, label, value_range) + (1 - _COVER) * image
    return np.where(labelled, drawn, image).round().astype(np.uint8)


def _pasted(
    lines: list[tuple[str, list[np.ndarray]]], columns: list[str], legends: list[Image.Image | None]
) -> Image.Image:
    font, step = ImageFont.load_default(12), SIDE + MARGIN
    rows = [
        (title, [ImageOps.contain(Image.fromarray(each), (SIDE, SIDE)) for each in pictures])
        for title, pictures in lines
    ]
    heights = [TITLE + max(picture.height for picture in pictures) + MARGIN for _, pictures in rows]
    bottom = max((found.height + MARGIN for found in legends if found), default=0)
    sheet = Image.new("RGB", (MARGIN + step * len(columns), TITLE + sum(heights) + bottom), "white")
    pen, top = ImageDraw.Draw(sheet), TITLE
    for column, name in enumerate(columns):
        pen.text((MARGIN + step * column, 2), name, "black", font)
    for (title, pictures), height in zip(rows, heights, strict=True):
        pen.text((MARGIN, top + 2), title[-110:], "dimgrey", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (MARGIN + step * column, top + TITLE))
        top += height
    for column, found in enumerate(legends):
        if found:
            sheet.paste(found, (MARGIN + step * column, top))
    return sheet
