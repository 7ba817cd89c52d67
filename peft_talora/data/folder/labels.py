"""Label files as label maps: numbers become classes, masks, metres, unit normals or values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..images import read_values
from .description import TaskFiles


def read_label(path: Path, task: TaskFiles, size: tuple[int, int] | None, where: str) -> np.ndarray:
    """One image's label map, as rows of a dataset have it.

    Args:
        path: The label file.
        task: What its numbers mean.
        size: (H, W) of the image; None where it does not matter.
        where: The task's place in the description, for messages.

    Returns:
        int64 (H, W) for classes and masks with -1 where unlabelled; float32 (1, H, W) metres, 0 where unlabelled;
        (3, H, W) unit normals, zero where unlabelled; (C, H, W) values, NaN where unlabelled.

    Raises:
        ValueError: If the file cannot be read, has another size than the image, or holds numbers that are not possible.
            The message names the file and the field.
    """
    values = read_values(path)
    try:
        kind, num_channels = task.spec.task_kind, task.spec.num_channels
        values = _checked_shape(values, 1 if kind.layout == "map" else num_channels, size)
        return kind.from_numbers(values, task, num_channels)
    except ValueError as error:
        raise ValueError(f"{path} ({where}): {error}") from error


def _checked_shape(values: np.ndarray, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """(C, H, W) from (H, W), (H, W, C) or (C, H, W)."""
    shape = values.shape
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and shape[-1] == channels and shape[0] != channels:
        values = np.moveaxis(values, -1, 0)
    if values.ndim != 3 or values.shape[0] != channels:
        wanted = "one number" if channels == 1 else f"{channels} numbers"
        raise ValueError(f"expected {wanted} for each pixel, got an array of shape {shape}")
    if size is not None and values.shape[1:] != tuple(size):
        height, width = values.shape[1:]
        raise ValueError(f"the label is {width} x {height} pixels, its image {size[1]} x {size[0]}")
    return values
