"""Losses of dense prediction tasks: one value per pixel for each kind of task, and one way of averaging them.

The functions called ``labelled_*`` say which pixels of a label map count; the metrics and the pictures go by them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .msam.tasks import TaskSpec

# A thin structure (an edge map has about 2 % positives) would otherwise be won by predicting nothing; without an upper
# bound a single positive pixel would outweigh the whole rest of the batch.
MIN_POSITIVE_WEIGHT = 1.0
MAX_POSITIVE_WEIGHT = 20.0

# The structure loss: side of the neighbourhood, and how much more a pixel counts that differs from all of it.
STRUCTURE_WINDOW = 31
STRUCTURE_CONTRAST = 5.0

# Keeps the gradient of the direction finite where the predicted vector is (almost) zero.
_NORM_EPS = 1e-6


def labelled_classes(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a class map (..., H, W) that are neither ``ignore_index`` nor negative."""
    return (labels != ignore_index) & (labels >= 0)


def labelled_binary(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a mask (..., 1, H, W) that are finite, not negative and not ``ignore_index``."""
    return (torch.isfinite(labels) & (labels != ignore_index) & (labels >= 0)).all(dim=-3)


def labelled_depth(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a depth map (..., 1, H, W) that are finite and above zero."""
    return (torch.isfinite(labels) & (labels > 0)).all(dim=-3)


def labelled_normals(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of normals (..., 3, H, W) that are finite and not the zero vector."""
    return torch.isfinite(labels).all(dim=-3) & (labels != 0).any(dim=-3)


def labelled_values(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a map (..., C, H, W) that are finite in every channel."""
    return torch.isfinite(labels).all(dim=-3)


def cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Cross entropy per pixel (B, H, W) of logits (B, N, H, W) and classes (B, H, W)."""
    return F.cross_entropy(logits, labels, reduction="none")


def balanced_bce(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Binary cross entropy per pixel (B, H, W), the positives weighted by their rarity in the image.

    The weight is the image's number of labelled negatives over that of its positives, clamped to [1, 20]: rare
    positives count more, frequent ones never less than the negatives.
    """
    positives = (labels * labelled[:, None]).sum(dim=(1, 2, 3), keepdim=True)
    negatives = labelled.sum(dim=(1, 2))[:, None, None, None] - positives
    weight = (negatives / positives.clamp(min=1)).clamp(MIN_POSITIVE_WEIGHT, MAX_POSITIVE_WEIGHT)
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")[:, 0]


def structure_loss(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Weighted cross entropy plus weighted IoU of a mask per pixel (B, H, W); the loss of Conv-LoRA's binary tasks.

    From F3Net (arXiv 1911.11445, section 3.3), used by arXiv 2401.17868. A pixel's weight is 1 + 5 |mean - mask|, with the mean
    of the mask over 31 x 31 pixels: a pixel near an outline counts up to six times. Unlabelled pixels count as background
    in that mean, as what lies beyond the image does, and not at all otherwise. The IoU is one number per image: every one of
    its pixels has it, so that the mean over the labelled pixels is the published loss of the image.
    """
    padding = STRUCTURE_WINDOW // 2
    mean = F.avg_pool2d(labels, (STRUCTURE_WINDOW, 1), stride=1, padding=(padding, 0))
    mean = F.avg_pool2d(mean, (1, STRUCTURE_WINDOW), stride=1, padding=(0, padding))
    weight = (1 + STRUCTURE_CONTRAST * (mean - labels).abs()) * labelled[:, None]
    cross_entropies = weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    mean_weight = weight.sum(dim=(1, 2, 3), keepdim=True) / labelled.sum(dim=(1, 2))[:, None, None, None].clamp(min=1)
    probability = logits.sigmoid()
    intersection = (weight * probability * labels).sum(dim=(1, 2, 3), keepdim=True)
    union = (weight * (probability + labels)).sum(dim=(1, 2, 3), keepdim=True) - intersection
    iou_loss = 1 - (intersection + 1) / (union + 1)
    return (cross_entropies / mean_weight.clamp(min=_NORM_EPS) + iou_loss)[:, 0]


def absolute_error(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """L1 distance per pixel (B, H, W), the mean over the channels."""
    return (logits - labels).abs().mean(dim=1)


def cosine_distance(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """One minus the cosine of the angle between two vectors per pixel (B, H, W); neither needs to have unit length."""
    return 1 - (F.normalize(logits, dim=1, eps=_NORM_EPS) * F.normalize(labels, dim=1, eps=_NORM_EPS)).sum(dim=1)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, N, h, w) at ``size`` (H, W), bilinear, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def mean_over_images(pixels: Tensor, labelled: Tensor) -> Tensor:
    """Mean over the labelled images of the mean over their labelled pixels; 0 where nothing is labelled.

    Args:
        pixels: One value per pixel, (B, H, W).
        labelled: Which of them count, bool (B, H, W).
    """
    counts = labelled.sum(dim=(1, 2))
    images = torch.where(labelled, pixels, 0).sum(dim=(1, 2)) / counts.clamp(min=1)
    return images.sum() / (counts > 0).sum().clamp(min=1)


def task_loss(spec: TaskSpec, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of one task: the mean over its labelled images of the mean over their labelled pixels.

    It is exactly 0, with zero gradients, where nothing is labelled, whatever the logits and the labels hold there.

    Args:
        spec: The task, which says the loss of a pixel and which pixels are labelled.
        logits: (B, N, h, w); they are resized (bilinear) to the resolution of the labels.
        labels: (B, H, W) int for class maps, (B, C, H, W) otherwise. See [`check_labels`].

    Returns:
        A 0-dim tensor in float32, or float64 for float64 logits, not weighted by ``spec.weight``.
    """
    kind = spec.task_kind
    labelled = kind.labelled(labels, spec.ignore_index)
    logits = resize_logits(logits, labels.shape[-2:])
    # Replaced before any arithmetic: a NaN multiplied by 0 afterwards is still a NaN, in the loss or its gradient.
    logits = torch.where(labelled[:, None], logits, 0)
    if kind.layout == "map":
        labels = torch.where(labelled, labels, 0).long()
    else:
        labels = torch.where(labelled[:, None], labels, 0).to(logits.dtype)
    return mean_over_images(spec.pixel_loss(logits, labels, labelled), labelled)


def check_labels(name: str, spec: TaskSpec, labels: Tensor, batch_size: int, rows: Tensor | None = None) -> None:
    """Check that labels fit their task.

    Values are looked at only on the CPU and outside of compiled graphs, where that costs no synchronisation.

    Args:
        name: The task's name, for the message.
        spec: The task.
        labels: What was given as its labels.
        batch_size: Number of images B.
        rows: The images whose values count; default: all.

    Raises:
        ValueError: If ``labels`` is no tensor of the shape and type that the kind asks for, or holds a value that is
            neither allowed nor a mark of unlabelled pixels.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels[{name!r}]: expected a tensor, got {type(labels).__name__}")
    is_map = spec.task_kind.layout == "map"
    shape = tuple(labels.shape)
    leading = (batch_size,) if is_map else (batch_size, spec.num_channels)
    if shape[:-2] != leading or 0 in shape[-2:]:
        expected = ", ".join(str(size) for size in (*leading, "H", "W"))
        raise ValueError(f"labels[{name!r}]: a {spec.kind} task needs shape ({expected}), got {shape}")
    if is_map and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise ValueError(f"labels[{name!r}]: a {spec.kind} task needs integer classes, got {labels.dtype}")
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        _check_values(name, spec, labels if rows is None else labels[rows.cpu()])


def _check_values(name: str, spec: TaskSpec, labels: Tensor) -> None:
    largest_allowed = spec.task_kind.largest_label(spec.num_channels)
    if largest_allowed is None:
        return
    wrong = labels[(labels > largest_allowed) & (labels != spec.ignore_index) & torch.isfinite(labels)]
    if wrong.numel():
        raise ValueError(
            f"labels[{name!r}]: {wrong[0].item():g} is neither ignore_index ({spec.ignore_index}) nor at most "
            f"{largest_allowed}, the largest label of a {spec.kind} task with {spec.num_channels} channel(s)"
        )
