"""What the colours of a map mean: classes, a scale, the directions of a ball."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Patch

from peft_talora import TaskSpec
from peft_talora.drawing import class_entries, draw, scale_ends

LINE_INCHES, LEAST_INCHES, BALL_INCHES = 0.15, 0.55, 1.1


def classes_shown(spec: TaskSpec, maps: Sequence[np.ndarray]) -> list[int]:
    """The classes that are seen, the most frequent first; what is unlabelled is none."""
    if not spec.task_kind.has_classes:
        return []
    known = [values[(values >= 0) & (values < spec.num_channels)] for values in maps]
    counts = sum(np.bincount(values, minlength=spec.num_channels) for values in known)
    return [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]


def shows_directions(spec: TaskSpec) -> bool:
    """Whether the colours are those of directions in space, which a ball explains."""
    return spec.task_kind.is_direction and spec.num_channels == 3


def legend_inches(spec: TaskSpec, classes: Sequence[int]) -> float:
    """How high a legend is."""
    names = [name for _, name in class_entries(spec, classes)]
    lines = LINE_INCHES * (math.ceil(len(names) / _columns(names)) + 1)
    return max(LEAST_INCHES, lines, BALL_INCHES if shows_directions(spec) else 0.0)


def _columns(names: Sequence[str]) -> int:
    """How many columns of classes a legend has."""
    return 2 if len(names) > 4 and max(map(len, names)) < 19 else 1


def draw_legend(axis, spec: TaskSpec, classes: Sequence[int], value_range: tuple[float, float] | None) -> None:
    """Fill an axis with a legend.

    Args:
        axis: matplotlib's, of [`legend_inches`].
        spec: The task.
        classes: Those that are seen, of a task that has classes.
        value_range: The ends of the colour scale, of a task that has one.
    """
    axis.set_axis_off()
    if spec.task_kind.has_classes:
        _class_legend(axis, spec, classes)
    elif shows_directions(spec):
        _normals_legend(axis)
    elif (scale := scale_ends(spec, value_range)) is not None:
        _bar(axis, spec, *scale)


def _class_legend(axis, spec: TaskSpec, classes: list[int]) -> None:
    entries = class_entries(spec, classes)
    patches = [
        # a legend leaves out what begins with an underscore
        Patch(facecolor="none", label=f" {name}")
        if color is None
        else Patch(facecolor=color / 255, edgecolor="0.4", linewidth=0.5, label=f" {name}")
        for color, name in entries
    ]
    axis.legend(
        handles=patches, loc="upper left", fontsize=7, frameon=False, borderaxespad=0, labelspacing=0.3,
        handlelength=1.2, ncols=_columns([name for _, name in entries]),
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
