"""Pictures of labels and predictions: what is unlabelled is neutral grey in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .kinds import TaskSpec
from .kinds.binary import draw_probability
from .kinds.classes import draw_classes
from .kinds.depth import draw_depth
from .kinds.normals import draw_normals
from .kinds.painting import UNLABELLED, palette
from .kinds.regression import draw_regression

__all__ = [
    "UNLABELLED",
    "class_entries",
    "color_range",
    "draw",
    "draw_classes",
    "draw_depth",
    "draw_normals",
    "draw_probability",
    "draw_regression",
    "palette",
    "scale_ends",
]

# So many classes of a picture have their names beside it.
_NAMED_CLASSES = 24

# A map is drawn in strips of about this many pixels: what is computed on the way is many times larger than the picture.
_STRIP_PIXELS = 1 << 18

# Percentiles are those of about this many pixels, evenly taken from all.
_SAMPLED_PIXELS = 1 << 20

# Values that differ by less, for their size, are all but equal: their differences must not be spread over all colours.
_LEAST_SPREAD = 0.01
_LEAST_RANGE = 1e-6


def draw(spec: TaskSpec, values: Any, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Picture of one image's label or prediction.

    Args:
        spec: The task, whose kind says how it is drawn.
        values: Array or tensor: (H, W) or (1, H, W) for classes, probabilities and depth; (C, H, W) otherwise.
        value_range: (lowest, highest) value of the colour scale of depth and regression; give the same one to a label
            and its prediction to compare them. Default: the range of the labelled values.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: If the shape does not fit the kind.
    """
    values = _checked_map(spec, values)
    if value_range is None:
        value_range = color_range(spec, [values], (0, 100))
    height, width = values.shape[-2:]
    picture = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        strip = values[..., top : top + rows, :]
        strip = strip.astype(_working_type(spec, strip), copy=False)
        labelled = _labelled(spec, strip)
        colors = picture[top : top + rows]
        drawn = spec.task_kind.draw(strip, labelled, value_range)
        colors[...] = drawn if drawn.dtype == np.uint8 else np.rint(drawn)
        if not labelled.all():
            colors[~labelled] = UNLABELLED
    return picture


def color_range(
    spec: TaskSpec, maps: Sequence[Any], percentiles: tuple[float, float] = (2, 98)
) -> tuple[float, float] | None:
    """One colour scale for several maps: where their labelled values begin and end.

    Args:
        spec: The task.
        maps: Labels, predictions or both, as [`draw`] takes them.
        percentiles: Which of the values are the ends. Few stray pixels would make everything else one colour.

    Returns:
        (lowest, highest) value, always apart; None for kinds whose colours have a fixed meaning, and where nothing is
        labelled.
    """
    if spec.task_kind.unit is None or spec.task_kind.limits is not None:
        return None
    maps = [_checked_map(spec, values) for values in maps]
    if percentiles != (0, 100):
        step = max(1, round(math.sqrt(sum(values[0].size for values in maps) / _SAMPLED_PIXELS)))
        maps = [values[:, ::step, ::step] for values in maps]
    values = np.concatenate([np.moveaxis(values, 0, -1)[_labelled(spec, values)].ravel() for values in maps])
    if not values.size:
        return None
    low, high = (float(value) for value in np.percentile(values, percentiles))
    missing = max(_LEAST_SPREAD * max(abs(low), abs(high)), _LEAST_RANGE) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def class_entries(spec: TaskSpec, classes: Sequence[int]) -> list[tuple[np.ndarray | None, str]]:
    """What a legend says of these classes, in this order.

    Args:
        spec: A task with classes.
        classes: Their numbers.

    Returns:
        (colour, name) of each, and without a colour how many are left out at the end.
    """
    names = spec.class_names or [f"class {index}" for index in range(spec.num_channels)]
    colors = palette(spec.num_channels)
    entries = [(colors[index], names[index]) for index in classes[:_NAMED_CLASSES]]
    if len(classes) > _NAMED_CLASSES:
        entries.append((None, f"and {len(classes) - _NAMED_CLASSES} more"))
    return entries


def scale_ends(spec: TaskSpec, value_range: tuple[float, float] | None) -> tuple[tuple[float, float], str] | None:
    """The ends of a colour scale and what it measures; None where a scale cannot say what the colours mean.

    Args:
        spec: The task.
        value_range: As [`draw`] takes it.
    """
    limits = spec.task_kind.limits or value_range
    if spec.task_kind.unit is None or limits is None or spec.num_channels > 1:
        return None
    return limits, spec.task_kind.unit


def _checked_map(spec: TaskSpec, values: Any) -> np.ndarray:
    """(H, W) for a class map, (C, H, W) otherwise."""
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    shape = values.shape
    is_map = spec.task_kind.layout == "map"
    if is_map and values.ndim == 3 and shape[0] == 1:
        values = values[0]
    if not is_map and values.ndim == 2 and spec.num_channels == 1:
        values = values[None]
    if values.shape[:-2] != (() if is_map else (spec.num_channels,)) or values.ndim < 2:
        expected = "(H, W)" if is_map else f"({spec.num_channels}, H, W)"
        raise ValueError(f"a picture of a {spec.kind} task needs shape {expected}, got {shape}")
    return values


def _working_type(spec: TaskSpec, values: np.ndarray) -> type:
    """What a map is drawn in: half precision could not hold it, and unsigned classes cannot be compared with -1."""
    if spec.task_kind.layout == "map":
        return np.int64
    return np.float32 if values.dtype in (np.float16, np.float32) else np.float64


def _labelled(spec: TaskSpec, values: np.ndarray) -> np.ndarray:
    """Which pixels of a map count, bool (H, W)."""
    return spec.task_kind.labelled(torch.from_numpy(np.ascontiguousarray(values)), spec.ignore_index).numpy()
