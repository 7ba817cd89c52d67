"""Any values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection

from .kind import Numbers, Range, TaskKind
from .painting import fractions, grey


def labelled_values(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a map (..., C, H, W) that are finite in every channel."""
    return torch.isfinite(labels).all(dim=-3)


def absolute_error(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """L1 distance per pixel (B, H, W), the mean over the channels."""
    return (logits - labels).abs().mean(dim=1)


class MeanErrors(MetricCollection):
    """Mean errors under the given names, summed in float64. ``update`` takes values of equal shape (P, ...)."""

    def __init__(self, **metrics: Metric) -> None:
        super().__init__(metrics, compute_groups=False)
        self.set_dtype(torch.float64)


def regression_metrics() -> Metric | MetricCollection:
    """``mae`` in the labels' unit."""
    return MeanErrors(mae=MeanAbsoluteError())


def draw_regression(values: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Values (C, H, W): grey for one channel, else the first three (or two) as red, green and blue."""
    values = values[:3]
    shares = fractions(values, np.broadcast_to(labelled, values.shape), value_range)
    if len(shares) == 1:
        return grey(shares[0])
    missing = np.zeros((3 - len(shares), *shares.shape[1:]))
    return np.moveaxis(255 * np.concatenate([shares, missing]), 0, -1)


def values_from_numbers(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """A file's numbers (C, H, W) as values, float32, NaN where nothing is known."""
    scaled = numbers.scale * values.astype(np.float64) + numbers.offset
    return np.where(numbers.is_ignored(values), np.nan, scaled).astype(np.float32)


def _channels(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(channel) is int and channel >= 0 for channel in value):
        raise ValueError("expected a list of channels, counted from 0")
    return tuple(value)


TASK_KINDS = {
    "regression": TaskKind(
        channels=None,
        layout="channels",
        labelled=labelled_values,
        pixel_loss=absolute_error,
        metrics=lambda num_channels: regression_metrics(),
        activation=lambda logits: logits,
        draw=draw_regression,
        resample="mean",
        padding=math.nan,
        higher_is_better={"mae": False},
        unit="value",
        file_fields=("num_channels", "scale", "offset", "ignore"),
        own_fields={"mirrored": _channels},
        from_numbers=values_from_numbers,
    )
}
