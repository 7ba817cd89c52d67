"""Tasks of an mSAM: what kinds there are, and what is known about one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from .. import drawing, losses, metrics
from ..routing.names import validate_task_names
from .label_doubts import doubt_depth, doubt_mask


@dataclass(frozen=True)
class TaskKind:
    """Everything that the kind of a task fixes. A new kind is one more entry of [`KINDS`].

    Args:
        channels: Number of output channels, or None where the task says it.
        layout: Labels are class maps (B, H, W) of integers ("map"), or values (B, C, H, W) ("channels").
        labelled: (labels, ignore_index) -> bool (B, H, W).
        pixel_loss: (logits, labels, labelled), all at one resolution -> loss of each pixel (B, H, W).
        metrics: num_channels -> a metric whose ``compute`` gives ``{name: value}``; it is updated with the predictions
            and labels of labelled pixels, (P,) or (P, C).
        activation: Logits (B, N, H, W) -> predictions, (B, H, W) where one value per pixel is predicted.
        draw: (label or prediction of one image, ignore_index, value_range) -> uint8 (H, W, 3).
        resample: How a label map changes its resolution: "nearest", or the mean over labelled pixels.
        padding: The value of unlabelled pixels, or None where that is the task's ignore_index.
        is_direction: Values are unit vectors (x, y, z): a mean is normalised again, a flip negates x.
        is_distance: Values are distances: enlarging an image by z divides them by z.
        has_classes: Channels are classes, numbered from 0.
        largest_label: num_channels -> the largest label allowed, or None where there is no bound.
        other_losses: {name: as pixel_loss}, what a task can choose instead.
        doubt: (label of one image, ignore_index) -> what is odd in a label that is possible, for a warning, or None.
    """

    channels: int | None
    layout: Literal["map", "channels"]
    labelled: Callable[[Tensor, int], Tensor]
    pixel_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    metrics: Callable[[int], Metric | MetricCollection]
    activation: Callable[[Tensor], Tensor]
    draw: Callable[[np.ndarray, int, tuple[float, float] | None], np.ndarray]
    resample: Literal["nearest", "mean"]
    padding: float | None
    is_direction: bool = False
    is_distance: bool = False
    has_classes: bool = False
    largest_label: Callable[[int], int | None] = lambda num_channels: None
    other_losses: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=dict)
    doubt: Callable[[Tensor, int], str | None] = lambda label, ignore_index: None


_CLASSES = TaskKind(
    channels=None,
    layout="map",
    labelled=losses.labelled_classes,
    pixel_loss=losses.cross_entropy,
    metrics=metrics.ClassMetrics,
    activation=lambda logits: logits.argmax(dim=1),
    draw=drawing.draw_classes,
    resample="nearest",
    padding=None,
    has_classes=True,
    largest_label=lambda num_channels: num_channels - 1,
)

KINDS: dict[str, TaskKind] = {
    "semantic": _CLASSES,
    "parts": _CLASSES,
    "binary": TaskKind(
        channels=1,
        layout="channels",
        labelled=losses.labelled_binary,
        pixel_loss=losses.balanced_bce,
        metrics=lambda num_channels: metrics.BinaryMetrics(),
        activation=lambda logits: logits[:, 0].sigmoid(),
        draw=drawing.draw_probability,
        resample="nearest",
        padding=None,
        largest_label=lambda num_channels: 1,
        other_losses={"structure": losses.structure_loss},
        doubt=doubt_mask,
    ),
    "depth": TaskKind(
        channels=1,
        layout="channels",
        labelled=losses.labelled_depth,
        pixel_loss=losses.absolute_error,
        metrics=lambda num_channels: metrics.depth_metrics(),
        activation=lambda logits: logits[:, 0].clamp(min=0),
        draw=drawing.draw_depth,
        resample="mean",
        padding=0.0,
        is_distance=True,
        doubt=doubt_depth,
    ),
    "normals": TaskKind(
        channels=3,
        layout="channels",
        labelled=losses.labelled_normals,
        pixel_loss=losses.cosine_distance,
        metrics=lambda num_channels: metrics.NormalMetrics(),
        activation=lambda logits: F.normalize(logits, dim=1),
        draw=drawing.draw_normals,
        resample="mean",
        padding=0.0,
        is_direction=True,
    ),
    "regression": TaskKind(
        channels=None,
        layout="channels",
        labelled=losses.labelled_values,
        pixel_loss=losses.absolute_error,
        metrics=lambda num_channels: metrics.regression_metrics(),
        activation=lambda logits: logits,
        draw=drawing.draw_regression,
        resample="mean",
        padding=math.nan,
    ),
}


@dataclass
class TaskSpec:
    """One task of an mSAM.

    Args:
        kind: "semantic" or "parts" (classes), "binary" (a mask; saliency and edges too), "depth" (metres), "normals"
            (unit vectors) or "regression" (any values). It fixes the loss, the metrics, the activation and the
            picture.
        num_channels: Output channels N: the classes of "semantic" and "parts" or the values of "regression", required
            there; 1 for "binary" and "depth" and 3 for "normals".
        weight: Factor of the task's loss.
        ignore_index: Label of unlabelled pixels of "semantic", "parts" and "binary"; negative ones are unlabelled too.
        class_names: Names of the channels.
        loss: Another loss than the kind's own: "structure" (weighted cross entropy and IoU) for "binary".

    Raises:
        ValueError: If the values are not possible or contradict each other.
    """

    kind: str
    num_channels: int | None = None
    weight: float = 1.0
    ignore_index: int = 255
    class_names: list[str] | None = None
    loss: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown task kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        self.num_channels = self._checked_channels()
        if not _is_number(self.weight) or not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"weight must be a finite number >= 0, got {self.weight!r}")
        if not _is_integer(self.ignore_index):
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        self.class_names = self._checked_class_names()
        if self.loss is not None and self.loss not in self.task_kind.other_losses:
            known = [None, *self.task_kind.other_losses]
            raise ValueError(f"the loss of a {self.kind} task must be one of {known}, got {self.loss!r}")

    @property
    def task_kind(self) -> TaskKind:
        """What the kind fixes."""
        return KINDS[self.kind]

    @property
    def pixel_loss(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss of a pixel, see [`TaskKind`]."""
        return self.task_kind.pixel_loss if self.loss is None else self.task_kind.other_losses[self.loss]

    @property
    def padding(self) -> float:
        """The value that marks unlabelled pixels of a label map."""
        return self.ignore_index if self.task_kind.padding is None else self.task_kind.padding

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them; `loss` only where it is not the kind's own."""
        return {name: value for name, value in asdict(self).items() if name != "loss" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """The task with these fields; ValueError for one that does not exist, and for what the constructor refuses."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown task fields {unknown}, expected some of {known}")
        if "kind" not in values:
            raise ValueError(f"a task needs a 'kind', one of {', '.join(KINDS)}; got only {list(values)}")
        return cls(**values)

    def _checked_channels(self) -> int:
        fixed = self.task_kind.channels
        if self.num_channels is None:
            if fixed is None:
                raise ValueError(f"a {self.kind} task needs num_channels")
            return fixed
        if not _is_integer(self.num_channels) or self.num_channels < 1:
            raise ValueError(f"num_channels must be an integer >= 1, got {self.num_channels!r}")
        if fixed is not None and self.num_channels != fixed:
            raise ValueError(f"a {self.kind} task has num_channels={fixed}, got {self.num_channels}")
        return self.num_channels

    def _checked_class_names(self) -> list[str] | None:
        if self.class_names is None:
            return None
        names = self.class_names
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a list of strings, got {names!r}")
        if len(names) != self.num_channels:
            raise ValueError(f"got {len(names)} class_names for num_channels={self.num_channels}")
        return list(names)


Tasks = Mapping[str, TaskSpec | Mapping[str, Any]] | Iterable[Mapping[str, Any]]


def parse_tasks(tasks: Tasks) -> dict[str, TaskSpec]:
    """Tasks as a dict in their order.

    Args:
        tasks: ``{name: TaskSpec or its fields}``, or the list of ``{"name": name, **fields}`` that files hold.

    Raises:
        ValueError: If a name or a task is not possible; the message says which.
    """
    pairs = list(tasks.items()) if isinstance(tasks, Mapping) else [_named_task(entry) for entry in tasks]
    validate_task_names(name for name, _ in pairs)
    return {name: _parse_task(name, value) for name, value in pairs}


def tasks_to_list(tasks: Mapping[str, TaskSpec]) -> list[dict[str, Any]]:
    """The list of ``{"name": name, **fields}`` that files hold: JSON writers sort the keys of a dict."""
    return [{"name": name, **spec.to_dict()} for name, spec in tasks.items()]


def _named_task(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a list of tasks holds dicts with a 'name', got {entry!r}")
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _parse_task(name: str, value: TaskSpec | Mapping[str, Any]) -> TaskSpec:
    if isinstance(value, TaskSpec):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"task {name!r}: expected a TaskSpec or a dict of its fields, got {value!r}")
    try:
        return TaskSpec.from_dict(value)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
