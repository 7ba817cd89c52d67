"""Masks: saliency, edges, anything that a pixel is or is not."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import BinaryConfusionMatrix

from .kind import Numbers, Range, TaskKind
from .painting import fractions, grey

# A thin structure (an edge map has about 2 % positives) would otherwise be won by predicting nothing; without an upper
# bound a single positive pixel would outweigh the whole rest of the batch.
MIN_POSITIVE_WEIGHT = 1.0
MAX_POSITIVE_WEIGHT = 20.0

# The structure loss: side of the neighbourhood, and how much more a pixel counts that differs from all of it.
STRUCTURE_WINDOW = 31
STRUCTURE_CONTRAST = 5.0

_MIN_MEAN_WEIGHT = 1e-6
# What unlabelled pixels of a file become; any negative label is unlabelled.
_UNLABELLED = -1
# What a white pixel of an 8-bit picture is.
_WHITE = 255


def labelled_binary(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels (..., H, W) of a mask (..., 1, H, W) that are finite, not negative and not ``ignore_index``."""
    return (torch.isfinite(labels) & (labels != ignore_index) & (labels >= 0)).all(dim=-3)


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
    return (cross_entropies / mean_weight.clamp(min=_MIN_MEAN_WEIGHT) + iou_loss)[:, 0]


class BinaryMetrics(BinaryConfusionMatrix):
    """``iou`` of the positives, in [0, 1], of probabilities against masks, both cut at 0.5.

    Where neither the truth nor the prediction has a positive, nothing is missed and the IoU is 1. It is computed in float64,
    where torchmetrics' Jaccard index has float32.
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


def draw_probability(probability: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Mask or probability (1, H, W) in [0, 1]: black to white, whatever ``value_range`` is."""
    return grey(fractions(probability[0], labelled, (0.0, 1.0)))


def mask_from_numbers(values: np.ndarray, numbers: Numbers, num_channels: int) -> np.ndarray:
    """A file's numbers (1, H, W) as a mask of 0 and 1, int64 (H, W)."""
    values = values[0].astype(np.float64)
    ignored = numbers.is_ignored(values) | ~np.isfinite(values)
    if numbers.threshold is not None:
        return np.where(ignored, _UNLABELLED, values >= numbers.threshold).astype(np.int64)
    white = values == _WHITE
    if white.any() and not numbers.ignore and not (values == 1).any():
        raise ValueError(
            f"a mask with {_WHITE}, which means unlabelled, and without 1: say `threshold: 128` where white is what is "
            f"to be found, `ignore: {_WHITE}` where it is unlabelled"
        )
    if (values == -1).any() and (values == 1).any() and not ((values == 0) | numbers.is_ignored(values)).any():
        raise ValueError(
            "a mask of -1 and 1, where -1 means unlabelled, so that nothing in it is negative: say `threshold: 0` where -1 is "
            "what is not to be found, `ignore: -1` where it is unlabelled"
        )
    ignored |= (values < 0) | (white & (not numbers.ignore))
    odd = values[~ignored & (values != 0) & (values != 1)]
    if odd.size:
        raise ValueError(
            f"a mask holds 0 and 1, this one {odd[0]:g}: say `threshold` for other masks"
            + (", such as 0.5 for probabilities" if odd.max() < 1 else "")
        )
    return np.where(ignored, _UNLABELLED, values).astype(np.int64)


def doubt_mask(label: Tensor, ignore_index: int) -> str | None:
    """What is odd in a mask (1, H, W): it is black and white, and white means unlabelled."""
    white = label == _WHITE
    if ignore_index != _WHITE or not white.any() or white.all() or (label[~white] != 0).any():
        return None
    return (
        "a mask holds 0 and 255 alone. 255 means unlabelled, so that nothing in it is positive: where white is what is "
        "to be found, divide by 255 (for the files of a folder: `threshold: 128`)."
    )


TASK_KINDS = {
    "binary": TaskKind(
        channels=1,
        layout="channels",
        labelled=labelled_binary,
        pixel_loss=balanced_bce,
        metrics=lambda num_channels: BinaryMetrics(),
        activation=lambda logits: logits[:, 0].sigmoid(),
        draw=draw_probability,
        resample="cover",
        padding=None,
        largest_label=lambda num_channels: 1,
        other_losses={"structure": structure_loss},
        doubt=doubt_mask,
        higher_is_better={"iou": True},
        unit="probability",
        limits=(0.0, 1.0),
        file_fields=("threshold", "ignore"),
        from_numbers=mask_from_numbers,
    )
}
