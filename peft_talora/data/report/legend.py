"""What the colours of a task's labels mean: classes with their names, or a scale with its ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...drawing import class_entries, draw, scale_ends
from .summary import TaskSummary

# The height of a line, and of what is painted in it, in pixels.
LINE, _BOX = 15, 10


def legend(
    summaries: Sequence[TaskSummary], value_range: tuple[float, float] | None, width: int
) -> Image.Image | None:
    """A picture of what the colours mean; None where neither names nor a scale can say it.

    Args:
        summaries: The task in every split: the classes that are seen in any of them are shown, the most frequent first.
        value_range: The ends of the colour scale, of a task that has one.
        width: In pixels.
    """
    spec = summaries[0].spec
    if spec.task_kind.has_classes:
        return _classes(summaries, width)
    scale = scale_ends(spec, value_range)
    if scale is None:
        return None
    limits, unit = scale
    steps = np.tile(np.linspace(*limits, width), (1, _BOX, 1))
    picture, pen = _paper(2, width)
    picture.paste(Image.fromarray(draw(spec, steps, limits)), (0, 0))
    low, high = f"{limits[0]:.3g}", f"{limits[1]:.3g} {unit}"
    pen.text((0, LINE), low, "black")
    pen.text((width, LINE), high, "black", anchor="ra")
    return picture


def _classes(summaries: Sequence[TaskSummary], width: int) -> Image.Image:
    counts = sum((summary.counts for summary in summaries), Counter[int]())
    entries = class_entries(summaries[0].spec, [number for number, _ in counts.most_common()])
    picture, pen = _paper(len(entries), width)
    for line, (color, name) in enumerate(entries):
        top = line * LINE
        if color is not None:
            pen.rectangle((0, top + 2, _BOX, top + 2 + _BOX), tuple(color.tolist()), "dimgrey")
        pen.text((_BOX + 5, top), name, "black")
    return picture


def _paper(lines: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, max(1, lines * LINE)), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(12)
    return picture, pen
