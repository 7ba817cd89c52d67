"""Metrics of dense prediction tasks over the labelled pixels of a whole data set, and one number to compare runs by.

All are torchmetrics metrics, so that in a distributed run ``compute`` covers what every process has seen. Errors are
summed in float64: a test set has some 10^8 pixels, which float32 cannot count.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix

from .losses import check_labels, resize_logits

if TYPE_CHECKING:
    from .msam.tasks import TaskSpec

TaskResults = Mapping[str, float | None]

HIGHER_IS_BETTER: dict[str, bool] = {
    "miou": True,
    "pixel_accuracy": True,
    "iou": True,
    "abs_err": False,
    "rel_err": False,
    "rmse": False,
    "mean_angle": False,
    "median_angle": False,
    "within_11": True,
    "within_22": True,
    "within_30": True,
    "mae": False,
}

# Degrees; the names carry the whole part, as the literature's tables do.
ANGLE_THRESHOLDS = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}


class ClassMetrics(MulticlassConfusionMatrix):
    """``miou`` and ``pixel_accuracy`` of class maps, both in [0, 1].

    The mIoU is the mean over the classes that occur in the truth or in the prediction.

    Args:
        num_classes: Number of classes N.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, validate_args=False)

    def compute(self) -> dict[str, Tensor]:
        """The two metrics; NaN before any pixel was seen."""
        counts = self.confmat.double()
        correct = counts.diagonal()
        union = counts.sum(dim=0) + counts.sum(dim=1) - correct
        present = union > 0
        return {"miou": (correct[present] / union[present]).mean(), "pixel_accuracy": correct.sum() / counts.sum()}


class BinaryMetrics(BinaryConfusionMatrix):
    """``iou`` of the positives, in [0, 1], of probabilities against masks, both cut at 0.5.

    Where neither the truth nor the prediction has a positive, nothing is missed and the IoU is 1.
    """

    def __init__(self) -> None:
        super().__init__(threshold=0.5, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count pixels: probabilities (P,) and masks (P,)."""
        super().update(preds, (target > 0.5).long())

    def compute(self) -> dict[str, Tensor]:
        """The metric."""
        counts = self.confmat.double()
        union = counts[0, 1] + counts[1, 0] + counts[1, 1]
        return {"iou": torch.where(union > 0, counts[1, 1] / union, 1.0)}


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


class MeanErrors(MetricCollection):
    """Mean errors under the given names, summed in float64. ``update`` takes values of equal shape (P, ...)."""

    def __init__(self, **metrics: Metric) -> None:
        super().__init__(metrics, compute_groups=False)
        self.set_dtype(torch.float64)


def depth_metrics() -> Metric | MetricCollection:
    """``abs_err`` and ``rmse`` in the labels' unit (metres), ``rel_err`` as a fraction of the true depth."""
    return MeanErrors(
        abs_err=MeanAbsoluteError(), rel_err=MeanAbsolutePercentageError(), rmse=MeanSquaredError(squared=False)
    )


def regression_metrics() -> Metric | MetricCollection:
    """``mae`` in the labels' unit."""
    return MeanErrors(mae=MeanAbsoluteError())


def angle_degrees(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between the vectors in the last dimension, exact for small angles too (acos is not)."""
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)).rad2deg()


class TaskMetrics(nn.Module):
    """The metrics of one task, fed with a model's logits.

    Args:
        spec: The task; its kind fixes the metrics.
        name: The task's name, for messages; the kind's if left out.
    """

    def __init__(self, spec: TaskSpec, name: str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.name = spec.kind if name is None else name
        self.metrics = spec.task_kind.metrics(spec.num_channels)
        self.pixels = _PixelCount()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the labelled pixels of a batch.

        Args:
            logits: (B, N, h, w); resized (bilinear) to the labels before the kind's activation.
            labels: (B, H, W) int for class maps, (B, C, H, W) otherwise.

        Raises:
            ValueError: If the labels do not fit the task or the logits.
        """
        check_labels(self.name, self.spec, labels, logits.shape[0])
        kind = self.spec.task_kind
        # Apple's MPS has no float64; everywhere else the sums stay on the device, where NCCL can reduce them.
        device = torch.device("cpu") if logits.device.type == "mps" else logits.device
        logits, labels = logits.to(device), labels.to(device)
        self.to(device)
        labelled = kind.labelled(labels, self.spec.ignore_index)
        self.pixels.update(labelled.sum())
        if labelled.any():
            prediction = kind.activation(resize_logits(logits, labels.shape[-2:]))
            self.metrics.update(_select(prediction, labelled), _select(labels, labelled))

    def compute(self) -> dict[str, float | None]:
        """``{metric: value}`` over everything seen by all processes; every value is None if nothing was labelled."""
        with warnings.catch_warnings():
            # A task without a label is no mistake, and the metric is asked either way: the processes compute together.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            seen = self.pixels.compute() > 0
            values = self.metrics.compute()
        return {name: float(value) if seen else None for name, value in values.items()}

    def reset(self) -> None:
        """Forget everything seen."""
        self.pixels.reset()
        self.metrics.reset()


class MultiTaskMetrics(nn.Module):
    """The metrics of several tasks.

    Args:
        specs: ``{name: TaskSpec}``.
    """

    def __init__(self, specs: Mapping[str, TaskSpec]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict({name: TaskMetrics(spec, name) for name, spec in specs.items()})

    def update(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        """Add a batch: ``{task: logits}`` and ``{task: labels}``; a task that is missing in either is left out."""
        for name, metrics in self.tasks.items():
            if logits.get(name) is not None and labels.get(name) is not None:
                metrics.update(logits[name], labels[name])

    def compute(self) -> dict[str, dict[str, float | None]]:
        """``{task: {metric: value or None}}``."""
        return {name: metrics.compute() for name, metrics in self.tasks.items()}

    def reset(self) -> None:
        """Forget everything seen."""
        for metrics in self.tasks.values():
            metrics.reset()


def delta_b(results: Mapping[str, TaskResults], baseline: Mapping[str, TaskResults]) -> float | None:
    """Overall improvement over a baseline in percent, LibMTL's definition.

    The mean over the tasks of the mean over the task's metrics of the relative change, signed so that better is
    positive. Left out are metrics that are absent or None on either side, that [`HIGHER_IS_BETTER`] does not know, or
    whose baseline is 0 (a change relative to 0 has no size), and tasks of which no metric is left.

    Args:
        results: ``{task: {metric: value or None}}`` of the run to judge.
        baseline: The same of the run to compare with.

    Returns:
        Percent, or None where nothing can be compared.

    Raises:
        ValueError: If the two have no task in common.
    """
    common = [task for task in results if task in baseline]
    if not common:
        raise ValueError(f"no task to compare: the results have {list(results)}, the baseline has {list(baseline)}")
    changes = [_relative_changes(results[task], baseline[task]) for task in common]
    means = [sum(values) / len(values) for values in changes if values]
    return 100 * sum(means) / len(means) if means else None


def _relative_changes(results: TaskResults, baseline: TaskResults) -> list[float]:
    changes = []
    for metric, higher_is_better in HIGHER_IS_BETTER.items():
        value, reference = results.get(metric), baseline.get(metric)
        if value is not None and reference:
            changes.append((1 if higher_is_better else -1) * (value - reference) / reference)
    return changes


class _PixelCount(Metric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, count: Tensor) -> None:
        self.count += count

    def compute(self) -> Tensor:
        return self.count


def _select(values: Tensor, labelled: Tensor) -> Tensor:
    """The labelled pixels of (B, H, W) as (P,), of (B, 1, H, W) as (P,), of (B, C, H, W) as (P, C)."""
    if values.ndim == labelled.ndim:
        return values[labelled]
    return values.movedim(1, -1)[labelled].squeeze(-1)
