"""What a kind of task is: everything that the package asks about one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Range = tuple[float, float]
PixelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the numbers in a task's label files mean, as the description of a folder says it.

    Args:
        ignore: Numbers in the file that mean "unlabelled".
        class_map: ``{number in the file: class}``; any other number is unlabelled. None: the numbers are the classes.
        threshold: Masks: what is not below is 1. None: the numbers are 0 and 1.
        scale: Depth and values: value = scale x number + offset.
        offset: See there.
        disparity: Depth: the value is a disparity, and this over it is the depth. A stereo camera's baseline in metres
            x focal length in pixels, for metres. None: the value is the depth.
        axes: Normals: factors 1 or -1 of x, y, z, where the file's do not point right, down and forward.
        own: Fields that only one kind knows, see [`TaskKind`].
    """

    ignore: tuple[float, ...] = ()
    class_map: dict[int, int] | None = None
    threshold: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    disparity: float | None = None
    axes: tuple[int, int, int] = (1, 1, 1)
    own: Mapping[str, Any] = field(default_factory=dict)

    def is_ignored(self, values: np.ndarray) -> np.ndarray:
        """Which numbers mean "unlabelled", bool of the same shape."""
        if not self.ignore:
            return np.zeros(values.shape, dtype=bool)
        # of floats as the file's type has them: -3.4028235e38 is none of 32 bits
        ignored = np.array(self.ignore, values.dtype) if values.dtype.kind == "f" else self.ignore
        return np.isin(values, ignored)


def values_as_they_are(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """Label maps whose files hold the labels themselves."""
    return values.astype(np.float32)


@dataclass(frozen=True)
class TaskKind:
    """Everything that the kind of a task fixes. A new kind is one more file of this package, with a dict ``TASK_KINDS``, {name: kind}.

    Args:
        channels: Number of output channels, or None where the task says it.
        layout: Labels are class maps (B, H, W) of integers ("map"), or values (B, C, H, W) ("channels").
        labelled: (labels, ignore_index) -> bool (B, H, W).
        pixel_loss: (logits, labels, labelled), all at one resolution -> loss of each pixel (B, H, W).
        metrics: num_channels -> a metric whose ``compute`` gives ``{name: value}``; it is updated with the predictions
            and labels of labelled pixels, (P,) or (P, C).
        activation: Logits (B, N, H, W) -> predictions, (B, H, W) where one value per pixel is predicted. Each pixel by
            itself: large images are predicted in strips.
        draw: (label or prediction of one image, which pixels count, ends of the colour scale) -> RGB (H, W, 3) from 0 to
            255, again each pixel by itself. The map is (H, W) or (C, H, W), as the layout says; the ends are None where
            ``unit`` is.
        resample: How a label map changes its resolution: "nearest", the "mean" over labelled pixels, or by what the
            positives "cover" of a pixel.
        padding: The value of unlabelled pixels in the label maps that the package makes, or None where that is the task's
            ignore_index.
        is_direction: Values are unit vectors: a mean is normalised again.
        is_distance: Values are distances: enlarging an image by z divides them by z.
        has_classes: Channels are classes, numbered from 0.
        largest_label: num_channels -> the largest label allowed, or None where there is no bound.
        other_losses: {name: as pixel_loss}, what a task can choose instead.
        doubt: (label of one image, ignore_index) -> what is odd in a label that is possible, for a warning, or None.
        higher_is_better: {metric: whether a higher value is better}.
        negated_by_flip: Channels that change their sign where an image is mirrored, left and right.
        unit: What the colours measure, for a legend. None where they have a fixed meaning that is no scale.
        limits: Ends of the colour scale; None where they are those of the values.
        file_fields: Which fields of [`Numbers`], or of the task itself, the description of a folder may have.
        own_fields: {name: check} of further fields; a check gives the value as ``Numbers.own`` has it, or a ValueError.
        from_numbers: (numbers of a file (C, H, W), what they mean, num_channels) -> label map (H, W) or (C, H, W).
    """

    channels: int | None
    layout: Literal["map", "channels"]
    labelled: Callable[[Tensor, int], Tensor]
    pixel_loss: PixelLoss
    metrics: Callable[[int], Metric | MetricCollection]
    activation: Callable[[Tensor], Tensor]
    draw: Callable[[np.ndarray, np.ndarray, Range | None], np.ndarray]
    resample: Literal["nearest", "mean", "cover"]
    padding: float | None
    is_direction: bool = False
    is_distance: bool = False
    has_classes: bool = False
    largest_label: Callable[[int], int | None] = lambda num_channels: None
    other_losses: Mapping[str, PixelLoss] = field(default_factory=dict)
    doubt: Callable[[Tensor, int], str | None] = lambda label, ignore_index: None
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    negated_by_flip: tuple[int, ...] = ()
    unit: str | None = None
    limits: Range | None = None
    file_fields: tuple[str, ...] = ()
    own_fields: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    from_numbers: Callable[[np.ndarray, Numbers, int], np.ndarray] = values_as_they_are
