"""Boxes, points and masks that ask for an instance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import SIZE

MIN_AREA = 40  # pixels; smaller instances are not prompted


def choose_instances(instances: Tensor, per_image: int) -> tuple[Tensor, Tensor]:
    """Draw instances of at least `MIN_AREA` pixels, with repetition, uniformly within an image.

    Args:
        instances: (B, H, W) int64.
        per_image: How many to draw from each image.

    Returns:
        The images' indices (N,) and boolean masks (N, H, W), N = B * per_image.
    """
    batch, height, width = instances.shape
    area = torch.zeros(batch, 16).scatter_add_(1, instances.flatten(1), torch.ones(batch, height * width))
    weight = (area >= MIN_AREA).float() + 1e-9 * area
    weight[:, 0] = 1e-12
    chosen = torch.multinomial(weight, per_image, replacement=True)
    owner = torch.arange(batch).repeat_interleave(per_image)
    return owner, instances[owner] == chosen.flatten()[:, None, None]


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the tight boxes (N, 4) of boolean masks (N, H, W): x1, y1, x2, y2, inclusive pixel indices."""
    columns, rows = masks.any(1).float(), masks.any(2).float()
    x1, y1 = columns.argmax(1), rows.argmax(1)
    x2, y2 = columns.shape[1] - 1 - columns.flip(1).argmax(1), rows.shape[1] - 1 - rows.flip(1).argmax(1)
    return torch.stack([x1, y1, x2, y2], 1).float()


def jitter_boxes(boxes: Tensor) -> Tensor:
    """Move the corners of boxes (N, 4) by noise of 5 % of the sides, at most 8 pixels: users draw boxes by hand."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = (torch.randn_like(boxes) * 0.05 * sides).clamp(-8, 8)
    return (boxes + noise).clamp(0, SIZE - 1)


def sample_points(masks: Tensor, count: int) -> Tensor:
    """Draw `count` pixels (N, count, 2), as x and y, uniformly from boolean masks (N, H, W), with repetition."""
    flat = masks.flatten(1).float()
    # An empty mask has no pixel to offer: draw from the whole image there.
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, torch.ones_like(flat))
    index = torch.multinomial(flat, count, replacement=True)
    return torch.stack([index % masks.shape[2], index // masks.shape[2]], -1).float()


def center_points(masks: Tensor) -> Tensor:
    """Return the pixel (N, 1, 2) of each boolean mask (N, H, W) farthest from its border, in chessboard distance."""
    inside, depth = F.pad(masks[:, None].float(), (1, 1, 1, 1)), torch.zeros_like(masks, dtype=torch.float32)
    while inside.any():
        depth += inside[:, 0, 1:-1, 1:-1]
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)
        inside = F.pad(inside[:, :, 1:-1, 1:-1], (1, 1, 1, 1))
    index = depth.flatten(1).argmax(1)
    return torch.stack([index % masks.shape[2], index // masks.shape[2]], -1)[:, None].float()


def draw_prompts(masks: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the prompts of masks (N, H, W) as keyword arguments of the model, one prompt for each batch element.

    Args:
        masks: Boolean instances.
        kind: "box", "point", "box+point" or "points" (two or three inside and one outside).
    """
    prompts = {}
    if "box" in kind:
        prompts["input_boxes"] = jitter_boxes(mask_boxes(masks))[:, None]
    if "point" in kind:
        points = sample_points(masks, int(torch.randint(2, 4, ())) if kind == "points" else 1)
        labels = torch.ones(points.shape[:2], dtype=torch.long)
        if kind == "points":
            points = torch.cat([points, sample_points(~masks, 1)], 1)
            labels = torch.cat([labels, torch.zeros(len(masks), 1, dtype=torch.long)], 1)
        prompts |= {"input_points": points[:, None], "input_labels": labels[:, None]}
    return prompts


def corrective_prompts(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return SAM's second round: the first round's logits (N, 1, h, w) as a mask and a point in its error region."""
    found = F.interpolate(logits, masks.shape[-2:], mode="bilinear")[:, 0] > 0
    points = sample_points(found != masks, 1)
    x, y = points[:, 0].long().unbind(1)
    labels = masks[torch.arange(len(masks)), y, x].long()
    return {"input_masks": logits, "input_points": points[:, None], "input_labels": labels[:, None, None]}
