"""Predictions of several pictures side by side, with what the colours mean below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import matplotlib
import numpy as np
from picture_files import MARK

from peft_talora import TaskSpec
from peft_talora.drawing import color_range, draw, palette

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

# a dollar in the name of a file or a class is one
matplotlib.rcParams["text.parse_math"] = False

COLUMN_INCHES, LEGEND_LINE_INCHES, DPI = 2.6, 0.15, 110
MAX_CLASSES = 24


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
    legend = max([0.55, *(LEGEND_LINE_INCHES * (min(len(ids), MAX_CLASSES + 1) + 1) for ids in shown.values())])
    if any(shows_directions(spec) for spec in tasks.values()):
        legend = max(legend, 1.1)
    size = (COLUMN_INCHES * (len(tasks) + 1), sum(heights) + 0.22 * len(rows) + legend + 0.2)
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
        _draw_legend(axis, spec, shown[name], ranges[name])
    figure.savefig(path, dpi=DPI, metadata={"Software": MARK})
    plt.close(figure)


def _show(axis, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8, pad=2)
    # a frame, since a map may be as white as the page
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="0.6", linewidth=0.5)


def classes_shown(spec: TaskSpec, maps: Sequence[np.ndarray]) -> list[int]:
    """The classes that are seen, the most frequent first."""
    if not spec.task_kind.has_classes:
        return []
    counts = sum(np.bincount(values.ravel(), minlength=spec.num_channels) for values in maps)
    return [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]


def class_entries(spec: TaskSpec, classes: Sequence[int]) -> list[tuple[np.ndarray | None, str]]:
    """A legend of these classes: (colour, name) of each, and without a colour how many are left out at the end."""
    names = spec.class_names or [f"class {index}" for index in range(spec.num_channels)]
    colors = palette(spec.num_channels)
    entries = [(colors[index], names[index]) for index in classes[:MAX_CLASSES]]
    if len(classes) > MAX_CLASSES:
        entries.append((None, f"and {len(classes) - MAX_CLASSES} more"))
    return entries


def bar_scale(spec: TaskSpec, value_range: tuple[float, float] | None) -> tuple[tuple[float, float], str] | None:
    """The ends of a colour bar and what it measures; None where a bar cannot say what the colours mean."""
    limits = spec.task_kind.limits or value_range
    if spec.task_kind.unit is None or limits is None or spec.num_channels > 1:
        return None
    return limits, spec.task_kind.unit


def shows_directions(spec: TaskSpec) -> bool:
    """Whether the colours are those of directions in space, which a ball explains."""
    return spec.task_kind.is_direction and spec.num_channels == 3


def _draw_legend(axis, spec: TaskSpec, classes: list[int], value_range: tuple[float, float] | None) -> None:
    axis.set_axis_off()
    if spec.task_kind.has_classes:
        _class_legend(axis, spec, classes)
    elif shows_directions(spec):
        _normals_legend(axis)
    elif (scale := bar_scale(spec, value_range)) is not None:
        _bar(axis, spec, *scale)


def _class_legend(axis, spec: TaskSpec, classes: list[int]) -> None:
    patches = [
        # a legend leaves out what begins with an underscore
        Patch(facecolor="none", label=f" {name}")
        if color is None
        else Patch(facecolor=color / 255, edgecolor="0.4", linewidth=0.5, label=f" {name}")
        for color, name in class_entries(spec, classes)
    ]
    axis.legend(
        handles=patches, loc="upper left", fontsize=7, frameon=False, borderaxespad=0, labelspacing=0.3,
        handlelength=1.2, ncols=2 if len(patches) > 4 and max(len(patch.get_label()) for patch in patches) < 20 else 1,
    )  # fmt: skip


def _bar(axis, spec: TaskSpec, limits: tuple[float, float], label: str) -> None:
    steps = np.linspace(*limits, 256)[None]
    inset = axis.inset_axes((0.04, 0.0, 0.92, 1.0))
    inset.set_anchor("N")
    inset.imshow(
        draw(spec, steps, limits), extent=(*limits, 0, 0.06 * (limits[1] - limits[0])), interpolation="bilinear"
    )
    inset.set_yticks([])
    inset.tick_params(labelsize=7, length=2, pad=1)
    inset.set_xlabel(label, fontsize=7, labelpad=1)


def normals_ball() -> np.ndarray:
    """A ball, seen from the camera: the colour of every direction that can be seen. uint8 (128, 128, 3)."""
    x, y = np.meshgrid(np.linspace(-1.05, 1.05, 128), np.linspace(-1.05, 1.05, 128))
    depth = 1 - x**2 - y**2
    normals = np.where(depth > 0, np.stack([x, y, -np.sqrt(np.maximum(depth, 0))]), 0.0)
    ball = draw(TaskSpec("normals"), normals)
    return np.where((depth > 0)[..., None], ball, 255).astype(np.uint8)


def _normals_legend(axis) -> None:
    inset = axis.inset_axes((0.0, 0.14, 1.0, 0.72))
    inset.imshow(normals_ball())
    inset.set_axis_off()
    for place, text in (
        ((0.5, 1.02), "faces up"),
        ((0.5, -0.14), "down"),
        ((-0.28, 0.45), "left"),
        ((1.06, 0.45), "right"),
    ):
        inset.text(*place, text, transform=inset.transAxes, fontsize=7, ha="center" if place[0] == 0.5 else "left")
