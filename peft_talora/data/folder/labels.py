"""Label files as label maps: numbers become classes, masks, metres, unit normals or values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..columns import IGNORE_INDEX
from ..images import read_values
from .description import TaskFiles

UNLABELLED_CLASS = -1
# A normal that is shorter in its file says nothing: 8 bits leave unit vectors far above.
_SHORTEST_NORMAL = 0.5


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
        values = _checked_shape(values, task.spec.num_channels if _has_channels(task) else 1, size)
        return _CONVERT[task.spec.kind](values, task)
    except ValueError as error:
        raise ValueError(f"{path} ({where}): {error}") from error


def _has_channels(task: TaskFiles) -> bool:
    return task.spec.kind in ("normals", "regression")


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


def _classes(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    values = values[0]
    ignored = _is_ignored(values, task) | (values < 0)
    numbers = np.nan_to_num(values, nan=UNLABELLED_CLASS).astype(np.int64)
    numbers[ignored] = UNLABELLED_CLASS
    if task.class_map is not None:
        mapped = np.full(numbers.shape, UNLABELLED_CLASS)
        for number, label in task.class_map.items():
            mapped[(numbers == number) & ~ignored] = label
        return mapped
    largest = numbers.max(initial=UNLABELLED_CLASS)
    if largest >= task.spec.num_channels:
        raise ValueError(
            f"class id {largest} is beyond the {task.spec.num_channels} classes (0 to {task.spec.num_channels - 1}); "
            "numbers that mean no class belong into `ignore`"
        )
    return numbers


def _mask(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    values = values[0].astype(np.float64)
    ignored = _is_ignored(values, task) | ~np.isfinite(values)
    if task.threshold is not None:
        return np.where(ignored, UNLABELLED_CLASS, values >= task.threshold).astype(np.int64)
    white = values == IGNORE_INDEX
    if white.any() and not task.ignore and not (values == 1).any():
        raise ValueError(
            f"a mask with {IGNORE_INDEX}, which means unlabelled, and without 1: say `threshold: 128` where white is what is "
            f"to be found, `ignore: {IGNORE_INDEX}` where it is unlabelled"
        )
    ignored |= (values < 0) | (white & (not task.ignore))
    odd = values[~ignored & (values != 0) & (values != 1)]
    if odd.size:
        raise ValueError(f"a mask holds 0 and 1, this one {odd[0]:g}: say `threshold` for other masks")
    return np.where(ignored, UNLABELLED_CLASS, values).astype(np.int64)


def _depth(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    numbers = values.astype(np.float64)
    metres = task.scale * numbers + task.offset
    # 0 stands for "not measured" in every depth file that is known
    known = np.isfinite(metres) & (metres > 0) & (numbers != 0) & ~_is_ignored(numbers, task)
    if task.disparity is not None:
        metres = task.disparity / np.where(known, metres, 1.0)
    return np.where(known, metres, 0.0).astype(np.float32)


def _normals(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    normals = values.astype(np.float64)
    if values.dtype == np.uint8:
        normals = np.where((values == 0).all(axis=0), 0.0, normals * 2 / 255 - 1)
    length = np.linalg.norm(normals, axis=0)
    known = np.isfinite(length) & (length >= _SHORTEST_NORMAL)
    unit = np.where(known, normals, 0.0) / np.where(known, length, 1.0)
    return (unit * np.array(task.axes)[:, None, None]).astype(np.float32)


def _regression(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    scaled = task.scale * values.astype(np.float64) + task.offset
    return np.where(_is_ignored(values, task), np.nan, scaled).astype(np.float32)


def _is_ignored(values: np.ndarray, task: TaskFiles) -> np.ndarray:
    return np.isin(values, task.ignore) if task.ignore else np.zeros(values.shape, dtype=bool)


_CONVERT = {
    "semantic": _classes,
    "parts": _classes,
    "binary": _mask,
    "depth": _depth,
    "normals": _normals,
    "regression": _regression,
}
