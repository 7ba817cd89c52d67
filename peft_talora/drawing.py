"""Pictures of labels and predictions: what is unlabelled is neutral grey in all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .msam.tasks import TaskSpec

UNLABELLED = np.array([128, 128, 128], dtype=np.uint8)

# From near (dark violet) to far (light yellow); lightness grows steadily, so that it also reads in grey.
_DEPTH_ANCHORS = np.array(
    [[24, 8, 48], [64, 22, 110], [118, 34, 122], [176, 50, 100], [222, 88, 64], [246, 150, 52], [252, 236, 164]],
    dtype=np.float64,
)

# Candidates for class colours: a grid over the colour cube, without what could be taken for unlabelled.
_GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 7)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
_CANDIDATES = _GRID[np.linalg.norm(_GRID - UNLABELLED, axis=1) > 80]


def draw(spec: TaskSpec, values: Any, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Picture of one image's label or prediction.

    Args:
        spec: The task, whose kind says how it is drawn.
        values: Array or tensor: (H, W) or (1, H, W) for classes, probabilities and depth; (C, H, W) otherwise.
        value_range: (lowest, highest) value of the colour scale of depth and regression; give the same one to a label
            and its prediction to compare them. Default: the range of the labelled values.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: If the shape does not fit the kind.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    values = np.asarray(values)
    if values.ndim not in (2, 3):
        raise ValueError(f"a picture of a {spec.kind} task needs (H, W) or (C, H, W), got shape {values.shape}")
    return spec.task_kind.draw(values, spec.ignore_index, value_range)


def palette(num_colors: int) -> np.ndarray:
    """Fixed, well distinguishable colours for classes, uint8 (num_colors, 3); the first ones never change."""
    colors = _ordered_colors()
    return colors[np.arange(num_colors) % len(colors)]


@lru_cache(maxsize=1)
def _ordered_colors() -> np.ndarray:
    """The candidates, each one as far as possible from all before it."""
    chosen = np.array([_CANDIDATES[0]])
    distance = np.linalg.norm(_CANDIDATES - chosen[0], axis=1)
    for _ in range(len(_CANDIDATES) - 1):
        color = _CANDIDATES[distance.argmax()]
        chosen = np.concatenate([chosen, color[None]])
        distance = np.minimum(distance, np.linalg.norm(_CANDIDATES - color, axis=1))
    return np.rint(chosen).astype(np.uint8)


def draw_classes(values: np.ndarray, ignore_index: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Class map (H, W): one fixed colour per class. ``value_range`` has no meaning here."""
    classes = _single_channel(values)
    labelled = (classes >= 0) & (classes != ignore_index)
    classes = np.where(labelled, classes, 0).astype(np.int64)
    return _finish(palette(int(classes.max()) + 1)[classes], labelled)


def draw_probability(values: np.ndarray, ignore_index: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Mask or probability (H, W) in [0, 1]: black to white."""
    probability = _single_channel(values).astype(np.float64)
    labelled = np.isfinite(probability) & (probability >= 0) & (probability != ignore_index)
    return _finish(_grey(_scale(probability, labelled, (0.0, 1.0))), labelled)


def draw_depth(values: np.ndarray, ignore_index: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Depth (H, W): dark is near, light is far; not above zero is unlabelled."""
    depth = _single_channel(values).astype(np.float64)
    labelled = np.isfinite(depth) & (depth > 0)
    return _finish(_colormap(_scale(depth, labelled, value_range)), labelled)


def draw_normals(values: np.ndarray, ignore_index: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Normals (3, H, W), x right, y down, z away from the camera: red is right, green is up, blue faces the camera."""
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"a picture of normals needs shape (3, H, W), got {values.shape}")
    normals = values.astype(np.float64)
    labelled = np.isfinite(normals).all(axis=0) & (normals != 0).any(axis=0)
    normals = np.where(labelled, normals, 0.0)
    normals = normals / np.maximum(np.linalg.norm(normals, axis=0), 1e-12)
    return _finish(_channels_last(255 * (0.5 + 0.5 * normals * np.array([1, -1, -1])[:, None, None])), labelled)


def draw_regression(values: np.ndarray, ignore_index: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """Values (C, H, W): grey for one channel, else the first three (or two) as red, green and blue."""
    values = (values[None] if values.ndim == 2 else values)[:3].astype(np.float64)
    labelled = np.isfinite(values).all(axis=0)
    scaled = _scale(values, np.broadcast_to(labelled, values.shape), value_range)
    if len(scaled) == 1:
        return _finish(_grey(scaled[0]), labelled)
    missing = np.zeros((3 - len(scaled), *scaled.shape[1:]))
    return _finish(_channels_last(255 * np.concatenate([scaled, missing])), labelled)


def _single_channel(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3:
        if values.shape[0] != 1:
            raise ValueError(f"this picture needs shape (H, W) or (1, H, W), got {values.shape}")
        return values[0]
    return values


def _scale(values: np.ndarray, labelled: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Values as fractions of the range, 0 where unlabelled."""
    if value_range is None:
        chosen = values[labelled]
        value_range = (chosen.min(), chosen.max()) if chosen.size else (0.0, 1.0)
    low, high = value_range
    return np.clip((np.where(labelled, values, low) - low) / max(high - low, 1e-12), 0.0, 1.0)


def _grey(fractions: np.ndarray) -> np.ndarray:
    return np.repeat(255 * fractions[..., None], 3, axis=-1)


def _colormap(fractions: np.ndarray) -> np.ndarray:
    positions = np.linspace(0.0, 1.0, len(_DEPTH_ANCHORS))
    return np.stack([np.interp(fractions, positions, channel) for channel in _DEPTH_ANCHORS.T], axis=-1)


def _channels_last(picture: np.ndarray) -> np.ndarray:
    return np.moveaxis(picture, 0, -1)


def _finish(picture: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    return np.where(labelled[..., None], np.rint(picture).astype(np.uint8), UNLABELLED)
