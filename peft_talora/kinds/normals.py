"""Surface normals: unit vectors, x right, y down, z away from the camera."""

from __future__ import annotations

from typing import Any

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
# A normal that is shorter or longer in its file says nothing: 8 bits leave unit vectors near 1, and black has 1.73.
_SHORTEST_NORMAL, _LONGEST_NORMAL = 0.5, 1.5
# Most normals of a file have a length this near to 1; the shorter ones have been blurred.
_LENGTH_TOLERANCE = 0.15
# As many of a map are looked at where every map of a data set pays for it.
_LOOKED_AT = 4096
_UNSIGNED = ((0.0, 1.0), (0.0, 255.0), (0.0, 65535.0))
_RANGES = {np.uint8: (0.0, 255.0), np.uint16: (0.0, 65535.0)}


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
    """A file's numbers (3, H, W) as unit vectors, float32, zero where nothing is known.

    Unsigned numbers of 8 and 16 bits stand for -1 to 1, others for themselves, unless ``range`` says otherwise. Nothing is
    known where all three are 0 (or the lowest number of the range), and where a vector's length is far from 1.
    """
    low, high = numbers.own.get("range") or _RANGES.get(values.dtype.type, (-1.0, 1.0))
    normals = values.astype(np.float64)
    if (low, high) != (-1.0, 1.0):
        empty = (normals == low).all(axis=0) | (values == 0).all(axis=0)
        normals = np.where(empty, 0.0, (normals - low) * (2 / (high - low)) - 1)
    length = np.linalg.norm(normals, axis=0)
    if numbers.own.get("normalize"):
        known = np.isfinite(length) & (length > 0)
    else:
        known = np.isfinite(length) & (length >= _SHORTEST_NORMAL) & (length <= _LONGEST_NORMAL)
        # most likely they are not in the range that they were read as
        odd = _odd_lengths(values, length, (low, high))
        if odd is not None:
            raise ValueError(odd)
    unit = np.where(known, normals, 0.0) / np.where(known, length, 1.0)
    return (unit * np.array(numbers.axes)[:, None, None]).astype(np.float32)


def _odd_lengths(values: np.ndarray, length: np.ndarray, ends: Range) -> str | None:
    """What is wrong with the lengths of vectors (3, ...), and which field cures it; None where they are near 1."""
    given = np.isfinite(values).all(axis=0) & (values != 0).any(axis=0)
    if not given.any():
        return None
    low, high = float(values[:, given].min()), float(values[:, given].max())
    are_unit = 2 * (np.abs(length[given] - 1) <= _LENGTH_TOLERANCE).sum() >= given.sum()
    if are_unit and low < 0:
        return None
    deviation = np.median(np.abs(length[given] - 1))
    # (n + 1) / 2 has a length near 1, too: what lies nearer to it is what is meant
    other = next((unsigned for unsigned in _UNSIGNED if low >= 0 and high <= unsigned[1]), None)
    if (
        other is not None
        and other != ends
        and _deviation(values[:, given], other) < min(deviation, _LENGTH_TOLERANCE) / 2
    ):
        cure = f"they are unit vectors where these stand for -1 and 1: say `range: [{other[0]:g}, {other[1]:g}]`"
    elif are_unit:
        return None
    else:
        cure = "say `range: [lowest, highest]`, the numbers that stand for -1 and 1, or `normalize: true` where only directions count"
    return (
        f"normals are vectors of length 1, these (of numbers from {low:g} to {high:g}) have one of "
        f"{np.median(length[given]):.2f}; {cure}"
    )


def doubt_normals(label: Tensor, ignore_index: int) -> str | None:
    """What is odd in normals (3, H, W): some pixels of them are not of length 1, or stand for other numbers."""
    pixels = label.flatten(1)
    pixels = pixels[:, :: max(1, pixels.shape[1] // _LOOKED_AT)].double().numpy()
    return _odd_lengths(pixels, np.linalg.norm(pixels, axis=0), (-1.0, 1.0))


def _deviation(values: np.ndarray, ends: Range) -> float:
    """How far from 1 the lengths of vectors (3, P) are where these numbers stand for -1 and 1, in the middle."""
    length = np.linalg.norm((values - ends[0]) * (2.0 / (ends[1] - ends[0])) - 1, axis=0)
    return float(np.median(np.abs(length - 1)))


def _range(value: Any) -> Range:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(end) in (int, float) for end in value)
    if not numbers or not -np.inf < value[0] < value[1] < np.inf:
        raise ValueError("expected the two numbers that stand for -1 and 1, the lower one first")
    return float(value[0]), float(value[1])


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


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
        doubt=doubt_normals,
        negated_by_flip=(0,),
        file_fields=("axes",),
        own_fields={"range": _range, "normalize": _true_or_false},
        from_numbers=normals_from_numbers,
    )
}
