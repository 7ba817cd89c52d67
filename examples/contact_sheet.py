"""Predictions of several pictures side by side, with what the colours mean below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from legends import classes_shown, draw_legend, legend_inches
from picture_files import MARK
from plotting import fonts_for, plt

from peft_talora import TaskSpec
from peft_talora.drawing import color_range, draw

COLUMN_INCHES, DPI = 2.6, 110


def save_sheet(
    rows: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray]]],
    tasks: Mapping[str, TaskSpec],
    path: Path,
    ranges: Mapping[str, tuple[float, float] | None] | None = None,
) -> None:
    """Draw one row per picture: the picture and its maps, and below each column a legend.

    Args:
        rows: (title, uint8 (H, W, 3), {task: map}) of each picture; the maps may be smaller than it.
        tasks: The tasks, in the order of the columns.
        path: The PNG.
        ranges: {task: colour scale}; default: one that all rows share.
    """
    if ranges is None:
        ranges = {name: color_range(spec, [maps[name] for _, _, maps in rows]) for name, spec in tasks.items()}
    heights = [COLUMN_INCHES * image.shape[0] / image.shape[1] for _, image, _ in rows]
    shown = {name: classes_shown(spec, [maps[name] for *_, maps in rows]) for name, spec in tasks.items()}
    legend = max(legend_inches(spec, shown[name]) for name, spec in tasks.items())
    size = (COLUMN_INCHES * (len(tasks) + 1), sum(heights) + 0.22 * len(rows) + legend + 0.2)
    texts = [title for title, *_ in rows] + [name for spec in tasks.values() for name in spec.class_names or ()]
    with fonts_for([*texts, *tasks]):
        figure, axes = plt.subplots(
            len(rows) + 1, len(tasks) + 1, figsize=size, squeeze=False, layout="constrained",
            gridspec_kw={"height_ratios": [*heights, legend]},
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        for line, (title, image, maps) in zip(axes, rows, strict=False):
            _show(line[0], image, shorten(title, 34, placeholder="...") if " " in title else title[-34:])
            for axis, (name, spec) in zip(line[1:], tasks.items(), strict=True):
                _show(axis, draw(spec, maps[name], ranges[name]), name)
        axes[-1, 0].set_axis_off()
        for axis, (name, spec) in zip(axes[-1, 1:], tasks.items(), strict=True):
            draw_legend(axis, spec, shown[name], ranges[name])
        figure.savefig(path, dpi=DPI, metadata={"Software": MARK})
        plt.close(figure)


def _show(axis, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8, pad=2)
    # a frame, since a map may be as white as the page
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="0.6", linewidth=0.5)
