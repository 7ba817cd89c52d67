"""Class maps: "semantic", and "parts" of objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from ..tuner.checks import is_int
from .kind import Numbers, Range, TaskKind
from .painting import palette

# What unlabelled pixels of a file become; any negative label is unlabelled.
_NO_CLASS = -1


def labelled_classes(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a class map (..., H, W) that are neither ``ignore_index`` nor negative."""
    return (labels != ignore_index) & (labels >= 0)


def cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Cross entropy per pixel (B, H, W) of logits (B, N, H, W) and classes (B, H, W)."""
    return F.cross_entropy(logits, labels, reduction="none")


class ClassMetrics(MulticlassConfusionMatrix):
    """``miou`` and ``pixel_accuracy`` of class maps, both in [0, 1].

    The mIoU is the mean over the classes that occur in the truth or in the prediction. Both are computed in float64, where
    torchmetrics' Jaccard index and accuracy have float32.

    Args:
        num_classes: Number of classes N.

    Attributes:
        class_ious: The IoU of each class (N,), NaN for one that occurs in neither; there once `compute` was called.
    """

    class_ious: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, validate_args=False)

    def compute(self) -> dict[str, Tensor]:
        """The two metrics; NaN before any pixel was seen."""
        counts = self.confmat.double()
        correct = counts.diagonal()
        union = counts.sum(dim=0) + counts.sum(dim=1) - correct
        present = union > 0
        self.class_ious = correct / union
        return {"miou": (correct[present] / union[present]).mean(), "pixel_accuracy": correct.sum() / counts.sum()}


def draw_classes(classes: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Class map (H, W): one fixed colour per class. ``value_range`` has no meaning here."""
    classes = np.where(labelled, classes, 0).astype(np.int64)
    return palette(int(classes.max(initial=0)) + 1)[classes]


def classes_from_numbers(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """A file's numbers (1, H, W) as classes, int64 (H, W)."""
    values = values[0]
    ignored = numbers.is_ignored(values)
    if np.issubdtype(values.dtype, np.floating):
        ignored |= ~np.isfinite(values)
        values = _whole_numbers(values)
    classes = values.astype(np.int64)
    if numbers.class_map is not None:
        return np.where(ignored, _NO_CLASS, _mapped(classes, numbers.class_map))
    classes[ignored | (values < 0)] = _NO_CLASS
    first = numbers.own.get("first_class", 0)
    if first:
        classes = np.where(classes < first, _NO_CLASS, classes - first)
    largest = classes.max(initial=_NO_CLASS)
    if largest >= num_channels:
        raise ValueError(
            f"class id {largest + first} is beyond the {num_channels} classes ({first} to {num_channels - 1 + first}); "
            "numbers that mean no class belong into `ignore`" + _advice(classes, num_channels, first)
        )
    return classes


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    soft = known & (values != np.floor(values))
    if soft.any():
        raise ValueError(
            f"class ids are whole numbers, this map holds {values[soft][0]:g}: of probabilities save the largest one's class"
        )
    return np.where(known, values, _NO_CLASS)


def _mapped(classes: np.ndarray, class_map: Mapping[int, int]) -> np.ndarray:
    """Numbers through ``{number: class}``; what it does not have is unlabelled."""
    known = np.array(sorted(class_map))
    labels = np.array([class_map[number] for number in known.tolist()] + [_NO_CLASS])
    place = np.searchsorted(known, classes)
    place[known[place.clip(max=len(known) - 1)] != classes] = len(known)
    return labels[place]


def _advice(classes: np.ndarray, num_channels: int, first: int) -> str:
    """What a class that is too large may come from."""
    known = classes[classes >= 0]
    smallest, largest = known.min(), known.max()
    if not first and largest == num_channels and smallest > 0:
        return "; where they are counted from 1, say `first_class: 1`"
    if largest in (254, 65535):
        return f", as in `ignore: [{largest}]`"
    if largest > 255:
        return "; are these ids of instances, or class x 1000 + instance?"
    return ""


def _first_class(value: Any) -> int:
    if not is_int(value, 0) or value >= 2**31:
        raise ValueError("expected the number of the first class, an integer >= 0")
    return value


_CLASSES = TaskKind(
    channels=None,
    layout="map",
    labelled=labelled_classes,
    pixel_loss=cross_entropy,
    metrics=ClassMetrics,
    # three times as fast as argmax, on the CPU
    activation=lambda logits: logits.max(dim=1).indices,
    draw=draw_classes,
    resample="nearest",
    padding=None,
    has_classes=True,
    largest_label=lambda num_channels: num_channels - 1,
    higher_is_better={"miou": True, "pixel_accuracy": True},
    file_fields=("class_names", "num_classes", "class_map", "ignore"),
    own_fields={"first_class": _first_class},
    from_numbers=classes_from_numbers,
)

TASK_KINDS = {"semantic": _CLASSES, "parts": _CLASSES}
