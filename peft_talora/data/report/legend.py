"""What the colours of a task's labels mean: classes with their names, or a scale with its ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...drawing import draw, palette
from .summary import TaskSummary

# The height of a line in pixels, and how many classes are named.
LINE, MOST_CLASSES = 15, 24
_BOX = 10


def legend(
    summaries: Sequence[TaskSummary], value_range: tuple[float, float] | None, width: int
) -> Image.Image | None:
    """A picture of what the colours mean; None where neither names nor a scale can say it.

    Args:
        summaries: The task in every split: the classes that are seen in any of them are shown, the most frequent first.
        value_range: The ends of the colour scale, of a task that has one.
        width: In pixels.
    """
    kind, spec = summaries[0].spec.task_kind, summaries[0].spec
    if kind.has_classes:
        return _classes(summaries, width)
    limits = kind.limits or value_range
    if kind.unit is None or limits is None or spec.num_channels > 1:
        return None
    steps = np.tile(np.linspace(*limits, width), (1, _BOX, 1))
    picture, pen = _paper(2, width)
    picture.paste(Image.fromarray(draw(spec, steps, limits)), (0, 0))
    low, high = f"{limits[0]:.3g}", f"{limits[1]:.3g} {kind.unit}"
    pen.text((0, LINE), low, "black")
    pen.text((width, LINE), high, "black", anchor="ra")
    return picture


def _classes(summaries: Sequence[TaskSummary], width: int) -> Image.Image:
    counts = sum((summary.counts for summary in summaries), Counter[int]())
    seen = [number for number, _ in counts.most_common()]
    shown, colors = seen[:MOST_CLASSES], palette(summaries[0].spec.num_channels)
    more = [f"and {len(seen) - MOST_CLASSES} more"] if len(seen) > MOST_CLASSES else []
    picture, pen = _paper(len(shown) + len(more), width)
    for line, number in enumerate(shown):
        top = line * LINE
        pen.rectangle((0, top + 2, _BOX, top + 2 + _BOX), tuple(colors[number].tolist()), "dimgrey")
        pen.text((_BOX + 5, top), summaries[0].class_name(number), "black")
    for text in more:
        pen.text((_BOX + 5, MOST_CLASSES * LINE), text, "black")
    return picture


def _paper(lines: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, max(1, lines * LINE)), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(12)
    return picture, pen
