"""Rendered rooms as tensors, and as the batches that are trained on."""

from __future__ import annotations

import os

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import SIZE

COLUMNS = ("image", "segmentation", "instance")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def load_arrays(split: str, num_scenes: int, cache_dir: str | None = None) -> dict[str, Tensor]:
    """Return image (N, 3, H, W), instance (N, H, W) and label (N, 16), the class of each instance id; all uint8."""
    rows = scenes.load_scenes(split, num_scenes, SIZE, cache_dir=cache_dir, num_proc=os.cpu_count(), columns=COLUMNS)
    arrays = {"image": [], "instance": [], "label": []}
    for batch in rows.with_format("numpy").iter(256):
        instance = np.stack(list(batch["instance"])).astype(np.uint8)
        segmentation = np.stack(list(batch["segmentation"]))
        label = np.stack([((instance == i) * segmentation).max((1, 2)) for i in range(16)], 1)
        arrays["image"].append(np.stack(list(batch["image"])).transpose(0, 3, 1, 2))
        arrays["instance"].append(instance)
        arrays["label"].append(label.astype(np.uint8))
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()}


def normalize(images: Tensor) -> Tensor:
    """Map RGB in [0, 1] (B, 3, H, W) to the statistics of the image processor."""
    return (images - MEAN) / STD


def augment(images: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, zoom into and recolour a batch.

    Args:
        images: (B, 3, H, W) uint8.
        instances: (B, H, W) uint8.

    Returns:
        Images (B, 3, H, W) in [0, 1] and instances (B, H, W) int64.
    """
    batch = len(images)
    zoom = 1 - 0.4 * torch.rand(batch) * (torch.rand(batch) < 0.7)
    flip = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
    theta[:, :, 2] = (torch.rand(batch, 2) * 2 - 1) * (1 - zoom)[:, None]
    grid = F.affine_grid(theta, [batch, 1, *images.shape[-2:]], align_corners=False)
    images = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    instances = F.grid_sample(instances[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    gain = torch.empty(batch, 3, 1, 1).uniform_(0.85, 1.15) * torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.2)
    images = (images * gain).clamp(0, 1) ** torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.25)
    # What an instance is does not depend on its colour, so any order of the channels is a plausible scene.
    order = torch.rand(batch, 3).argsort(1)[:, :, None, None].expand_as(images)
    shuffled = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.gather(1, order), images)
    return shuffled, instances
