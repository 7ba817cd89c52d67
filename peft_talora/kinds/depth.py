"""Depth in metres."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, Metric, MetricCollection

from .kind import Numbers, Range, TaskKind
from .painting import fractions
from .regression import MeanErrors, absolute_error

# From near (dark violet) to far (light yellow); lightness grows steadily, so that it also reads in grey.
_ANCHORS = np.array(
    [[24, 8, 48], [64, 22, 110], [118, 34, 122], [176, 50, 100], [222, 88, 64], [246, 150, 52], [252, 236, 164]],
    dtype=np.float64,
)
_POSITIONS = np.linspace(0, 1, 1021)
_COLORS = np.rint(
    np.stack([np.interp(_POSITIONS, np.linspace(0, 1, len(_ANCHORS)), channel) for channel in _ANCHORS.T], axis=-1)
).astype(np.uint8)

# No camera sees that far in metres; in millimetres it is half a metre.
_FARTHEST_MEDIAN = 500.0


def labelled_depth(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a depth map (..., 1, H, W) that are finite and above zero."""
    return (torch.isfinite(labels) & (labels > 0)).all(dim=-3)


def depth_metrics() -> Metric | MetricCollection:
    """``abs_err`` and ``rmse`` in the labels' unit (metres), ``rel_err`` as a fraction of the true depth."""
    return MeanErrors(
        abs_err=MeanAbsoluteError(), rel_err=MeanAbsolutePercentageError(), rmse=MeanSquaredError(squared=False)
    )


def draw_depth(depth: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Depth (1, H, W): dark is near, light is far."""
    shares = fractions(depth[0], labelled, value_range)
    # looked up: to interpolate for every pixel takes ten times as long
    return _COLORS.take(np.rint(shares * (len(_COLORS) - 1)).astype(np.int64), axis=0)


def depth_from_numbers(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """A file's numbers (1, H, W) as metres, float32, 0 where nothing is known."""
    values = values.astype(np.float64)
    metres = numbers.scale * values + numbers.offset
    # 0 stands for "not measured" in every depth file that is known
    known = np.isfinite(metres) & (metres > 0) & (values != 0) & ~numbers.is_ignored(values)
    if numbers.disparity is not None:
        metres = numbers.disparity / np.where(known, metres, 1.0)
    return np.where(known, metres, 0.0).astype(np.float32)


def doubt_depth(label: Tensor, ignore_index: int) -> str | None:
    """What is odd in a depth map (1, H, W): the median of its labelled pixels cannot be metres."""
    labelled = labelled_depth(label, ignore_index)
    # cheaper than a median, which every map of a data set would pay for
    if 2 * ((label[0] > _FARTHEST_MEDIAN) & labelled).sum() <= labelled.sum():
        return None
    return (
        f"the median depth is {label[0][labelled].median().item():g}. Depth is expected in metres: divide millimetres by "
        "1000 (for the files of a folder: `scale: 0.001`)."
    )


TASK_KINDS = {
    "depth": TaskKind(
        channels=1,
        layout="channels",
        labelled=labelled_depth,
        pixel_loss=absolute_error,
        metrics=lambda num_channels: depth_metrics(),
        activation=lambda logits: logits[:, 0].clamp(min=0),
        draw=draw_depth,
        resample="mean",
        padding=0.0,
        is_distance=True,
        doubt=doubt_depth,
        higher_is_better={"abs_err": False, "rel_err": False, "rmse": False},
        unit="metres",
        file_fields=("scale", "offset", "disparity", "ignore"),
        from_numbers=depth_from_numbers,
    )
}
