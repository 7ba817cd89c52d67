"""Surface normals: unit vectors, x right, y down, z away from the camera."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from .kind import Numbers, Range, TaskKind

# Degrees; the names carry the whole part, as the literature's tables do.
ANGLE_THRESHOLDS = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}

# Keeps the gradient of the direction finite where the predicted vector is (almost) zero.
_NORM_EPS = 1e-6
# A normal that is shorter in its file says nothing: 8 bits leave unit vectors far above.
_SHORTEST_NORMAL = 0.5


def labelled_normals(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of normals (..., 3, H, W) that are finite and not the zero vector."""
    return torch.isfinite(labels).all(dim=-3) & (labels != 0).any(dim=-3)


def cosine_distance(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """One minus the cosine of the angle between two vectors per pixel (B, H, W); neither needs to have unit length."""
    return 1 - (F.normalize(logits, dim=1, eps=_NORM_EPS) * F.normalize(labels, dim=1, eps=_NORM_EPS)).sum(dim=1)


def unit_vectors(logits: Tensor) -> Tensor:
    """Vectors (B, 3, H, W) at unit length; as ``F.normalize``, but ten times as fast on the CPU."""
    return logits / logits.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def angle_degrees(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between the vectors in the last dimension, exact for small angles too (acos is not)."""
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)).rad2deg()


class NormalMetrics(Metric):
    """Angles between predicted and true normals: ``mean_angle`` and ``median_angle`` in degrees, and ``within_11``,
    ``within_22``, ``within_30``: the share of pixels, in [0, 1], below 11.25, 22.5 and 30 degrees.

    The median is the middle of a bin of 0.0001 degrees (for an even number, the mean of the two middle pixels' bins):
    that takes the same memory for any number of pixels.
    """

    full_state_update = False
    bins_per_degree = 10_000

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(ANGLE_THRESHOLDS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(180 * self.bins_per_degree, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add pixels: vectors (P, 3) of any length but zero."""
        angles = angle_degrees(preds, target)
        self.total += angles.sum(dtype=torch.float64)
        self.count += angles.numel()
        self.within += torch.stack([(angles < threshold).sum() for threshold in ANGLE_THRESHOLDS.values()])
        # A prediction that is not finite makes the mean NaN, and counts as the largest angle here.
        bins = (angles.nan_to_num(180.0) * self.bins_per_degree).long().clamp(max=self.histogram.numel() - 1)
        self.histogram += torch.bincount(bins, minlength=self.histogram.numel())

    def compute(self) -> dict[str, Tensor]:
        """The five metrics; NaN before any pixel was seen."""
        within = self.within.double() / self.count
        shares = {name: within[position] for position, name in enumerate(ANGLE_THRESHOLDS)}
        return {"mean_angle": self.total / self.count, "median_angle": self._median(), **shares}

    def _median(self) -> Tensor:
        ranks = torch.stack([(self.count - 1) // 2, self.count // 2]) + 1
        bins = torch.searchsorted(self.histogram.cumsum(dim=0), ranks)
        median = (bins.double() + 0.5).mean() / self.bins_per_degree
        return torch.where(self.count > 0, median, torch.nan)


def draw_normals(normals: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Normals (3, H, W): red is right, green is up, blue faces the camera. ``value_range`` has no meaning here."""
    normals = np.where(labelled, normals, 0)
    length = np.sqrt(np.einsum("chw,chw->hw", normals, normals))
    normals = normals * (127.5 / np.maximum(length, 1e-12)) * np.array([1, -1, -1], normals.dtype)[:, None, None]
    return np.moveaxis(127.5 + normals, 0, -1)


def normals_from_numbers(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """A file's numbers (3, H, W) as unit vectors, float32, zero where nothing is known."""
    normals = values.astype(np.float64)
    if values.dtype == np.uint8:
        normals = np.where((values == 0).all(axis=0), 0.0, normals * 2 / 255 - 1)
    length = np.linalg.norm(normals, axis=0)
    known = np.isfinite(length) & (length >= _SHORTEST_NORMAL)
    unit = np.where(known, normals, 0.0) / np.where(known, length, 1.0)
    return (unit * np.array(numbers.axes)[:, None, None]).astype(np.float32)


TASK_KINDS = {
    "normals": TaskKind(
        channels=3,
        layout="channels",
        labelled=labelled_normals,
        pixel_loss=cosine_distance,
        metrics=lambda num_channels: NormalMetrics(),
        activation=unit_vectors,
        draw=draw_normals,
        resample="mean",
        padding=0.0,
        is_direction=True,
        higher_is_better={
            "mean_angle": False,
            "median_angle": False,
            "within_11": True,
            "within_22": True,
            "within_30": True,
        },
        negated_by_flip=(0,),
        file_fields=("axes",),
        from_numbers=normals_from_numbers,
    )
}
