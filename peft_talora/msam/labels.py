"""One image's label maps: their form, and how they change their resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..kinds import TaskSpec, doubts
from ..losses import check_labels
from .geometry import Size, reshaped_size

# Below this share of labelled pixels in the mean, what is left is rounding.
_MIN_VALID = 1e-6
_ROUNDING = 1e-4


def label_tensor(name: str, spec: TaskSpec, label: Any, size: Size) -> Tensor:
    """One image's label map in the form that losses and metrics take, every unlabelled pixel being ``spec.padding``.

    All labels come into the package here: their values are checked once, and what marks unlabelled pixels outside (a
    negative class, a depth of NaN, the mask of a masked array) is that one value from here on.

    A map that is possible, but most likely in another unit (a mask of 0 and 255, depth in millimetres), is a warning, once per
    process and task.

    Args:
        name: The task's name, for messages.
        spec: The task.
        label: Array, tensor or PIL image (H, W) or (C, H, W), or None for an unlabelled image. What a numpy masked array
            masks is unlabelled.
        size: (H, W) of the image.

    Returns:
        int64 (H, W) for class maps, float32 (C, H, W) otherwise.

    Raises:
        ValueError: If the map has another size or type, or holds a label that is not possible.
    """
    is_map = spec.task_kind.layout == "map"
    shape = tuple(size) if is_map else (spec.num_channels, *size)
    dtype = torch.int64 if is_map else torch.float32
    if label is None:
        return torch.full(shape, spec.padding, dtype=dtype)
    label = label.detach().cpu() if isinstance(label, Tensor) else torch.from_numpy(_array(label, spec))
    if label.ndim == 3 and label.shape[0] == 1 and is_map:
        label = label[0]
    if label.ndim == 2 and shape[0] == 1 and not is_map:
        label = label[None]
    if tuple(label.shape) != shape:
        raise ValueError(f"label of task {name!r}: expected shape {shape} for its image, got {tuple(label.shape)}")
    if is_map and label.is_floating_point():
        raise ValueError(f"label of task {name!r}: a {spec.kind} task needs integer classes, got {label.dtype}")
    label = label.to(dtype)
    check_labels(name, spec, label[None], batch_size=1)
    _warn_of_doubt(name, spec, label)
    return torch.where(_labelled(spec, label), label, torch.tensor(spec.padding, dtype=dtype))


def _array(label: Any, spec: TaskSpec) -> np.ndarray:
    """A copy; what a masked array masks in any channel is unlabelled."""
    values = np.array(label)
    if isinstance(label, np.ma.MaskedArray):
        is_integer = spec.task_kind.layout == "map" and np.issubdtype(values.dtype, np.integer)
        values = values.astype(np.int64 if is_integer else np.float64)
        masked = np.ma.getmaskarray(label)
        values[..., masked.any(axis=0) if values.ndim == 3 else masked] = spec.padding
    return values


def square_label(spec: TaskSpec, label: Tensor, image_size: int, to_square: bool = False) -> Tensor:
    """A label map from [`label_tensor`], resized and padded as its image is: (S, S) or (C, S, S)."""
    height, width = reshaped_size(label.shape[-2:], image_size, to_square)
    label = resize_label(spec, label, (height, width))
    return F.pad(label, (0, image_size - width, 0, image_size - height), value=spec.padding)


def resize_label(spec: TaskSpec, label: Tensor, size: Size) -> Tensor:
    """A label map from [`label_tensor`] at another resolution.

    Classes take the nearest pixel. Masks do, too, but where they shrink: see [`_cover`]. Other values are the mean (a
    triangle filter, as for the image) over the labelled pixels alone, so that holes neither bleed into their surroundings
    nor grow; a pixel without any labelled one under the filter is unlabelled. Directions are normalised again.

    Args:
        spec: The task.
        label: (H, W) or (C, H, W).
        size: The wanted (height, width).
    """
    if tuple(label.shape[-2:]) == tuple(size):
        return label
    if spec.task_kind.resample == "cover":
        return _cover(spec, label, size)
    if spec.task_kind.resample == "nearest":
        return _nearest(label, size)
    labelled = _labelled(spec, label)
    weight = _triangle(labelled.to(label.dtype)[None], size)
    mean = _triangle(torch.where(labelled, label, 0), size) / weight.clamp(min=_MIN_VALID)
    valid = weight > _MIN_VALID
    if spec.task_kind.is_direction:
        length = mean.norm(dim=0, keepdim=True)
        # Opposite directions cancel out: nothing is known there.
        valid = valid & (length > _MIN_VALID)
        mean = mean / length.clamp(min=_MIN_VALID)
    return torch.where(valid, mean, torch.tensor(spec.padding, dtype=label.dtype))


def _cover(spec: TaskSpec, mask: Tensor, size: Size) -> Tensor:
    """A mask (1, H, W) of which no line gets lost: a pixel is positive where positives cover enough of it.

    Made smaller to s times its size, a line of one pixel covers s of the pixels that it runs through, or shares that
    among two of them. Enough is s / 2, of the side that shrinks most, so that it stays; the maximum would make lines up to 1.8 times as thick, and keep
    every stray pixel. For soft masks, of numbers between 0 and 1, what is at least 0.5 is positive.
    """
    smaller = tuple(map(min, size, mask.shape[-2:]))
    if smaller != tuple(size):
        # what shrinks comes first: where one side grows, lines across the other one can still get lost
        return _nearest(_cover(spec, mask, smaller), size)
    nearest = _nearest(mask, size)
    scale = min(new / old for new, old in zip(size, mask.shape[-2:], strict=True))
    if scale == 1:
        return nearest
    positive = (_labelled(spec, mask) & (mask[0] >= 0.5)).float()
    box = Image.fromarray(positive.numpy()).resize((size[1], size[0]), Image.Resampling.BOX)
    enough = torch.from_numpy(np.array(box)) >= scale / 2 - _ROUNDING
    was_positive = _labelled(spec, nearest) & (nearest[0] >= 0.5)
    return torch.where(enough == was_positive, nearest, enough.to(mask.dtype))


def _warn_of_doubt(name: str, spec: TaskSpec, label: Tensor) -> None:
    subject = f"labels of task {name!r}"
    doubt = spec.task_kind.doubt(label, spec.ignore_index) if doubts.is_wanted(subject) else None
    if doubt is not None:
        doubts.tell(subject, doubt, stacklevel=4)


def _labelled(spec: TaskSpec, label: Tensor) -> Tensor:
    return spec.task_kind.labelled(label, spec.ignore_index)


def _nearest(label: Tensor, size: Size) -> Tensor:
    """The pixel under each new pixel's centre, as PIL has it; exact for integers."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip(size, label.shape[-2:], strict=True)
    )
    return label[..., rows[:, None], columns]


def _triangle(values: Tensor, size: Size) -> Tensor:
    return F.interpolate(values[None], size=tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]
