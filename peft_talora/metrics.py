"""Metrics of dense prediction tasks over the labelled pixels of a whole data set, and one number to compare runs by.

Which they are, and how they are summed, is the task's kind's: see [`peft_talora.kinds`]. All are torchmetrics metrics, so
that in a distributed run ``compute`` covers what every process has seen. Errors are summed in float64: a test set has
some 10^8 pixels, which float32 cannot count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from .kinds import HIGHER_IS_BETTER, TaskSpec
from .kinds.binary import BinaryMetrics
from .kinds.classes import ClassMetrics
from .kinds.depth import depth_metrics
from .kinds.normals import ANGLE_THRESHOLDS, NormalMetrics, angle_degrees
from .kinds.regression import MeanErrors, regression_metrics
from .losses import check_labels, resize_logits

__all__ = [
    "ANGLE_THRESHOLDS",
    "HIGHER_IS_BETTER",
    "BinaryMetrics",
    "ClassMetrics",
    "MeanErrors",
    "MultiTaskMetrics",
    "NormalMetrics",
    "TaskMetrics",
    "angle_degrees",
    "delta_b",
    "depth_metrics",
    "regression_metrics",
]

TaskResults = Mapping[str, float | None]


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
        self.pixels = SumMetric().set_dtype(torch.float64)

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

    def update_images(
        self,
        logits: Mapping[str, Tensor],
        labels: Sequence[Mapping[str, Tensor]],
        restore: Callable[[Tensor, tuple[int, int]], Tensor],
    ) -> None:
        """Add a batch at the labels' own resolution, where published numbers are measured.

        Args:
            logits: ``{task: (B, N, h, w)}`` of the padded squares.
            labels: For each image ``{task: label map}``, (H, W) or (C, H, W), as large as the image.
            restore: (logits (1, N, h, w), (H, W)) -> logits (1, N, H, W) of the image: [`MSamProcessor.restore`].
        """
        for index, image in enumerate(labels):
            for name, label in image.items():
                if logits.get(name) is not None:
                    restored = restore(logits[name][index : index + 1], tuple(label.shape[-2:]))
                    self.update({name: restored}, {name: label[None]})

    def compute(self) -> dict[str, dict[str, float | None]]:
        """``{task: {metric: value or None}}``."""
        return {name: metrics.compute() for name, metrics in self.tasks.items()}

    def class_ious(self) -> dict[str, dict[str, float | None]]:
        """``{task: {class: IoU}}`` of what [`compute`] was called on last, for tasks with classes.

        A class without a name goes by its number; its IoU is None where it occurs in neither truth nor prediction.
        """
        ious = {}
        for name, metrics in self.tasks.items():
            values = getattr(metrics.metrics, "class_ious", None)
            if values is not None:
                names = metrics.spec.class_names or map(str, range(metrics.spec.num_channels))
                ious[name] = {
                    label: None if math.isnan(value) else value
                    for label, value in zip(names, values.tolist(), strict=True)
                }
        return ious

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


def _select(values: Tensor, labelled: Tensor) -> Tensor:
    """The labelled pixels of (B, H, W) as (P,), of (B, 1, H, W) as (P,), of (B, C, H, W) as (P, C)."""
    if values.ndim == labelled.ndim:
        return values[labelled]
    return values.movedim(1, -1)[labelled].squeeze(-1)
