"""Colours: what the pictures of several kinds share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .kind import Range

UNLABELLED = np.array([128, 128, 128], dtype=np.uint8)

# Candidates for class colours: a grid over the colour cube, without what could be taken for unlabelled.
_GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 7)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
_CANDIDATES = _GRID[np.linalg.norm(_GRID - UNLABELLED, axis=1) > 80]


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


def fractions(values: np.ndarray, labelled: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Values of any shape as fractions of the range, in [0, 1], and 0 where unlabelled (or where there is no range)."""
    low, high = value_range or (0.0, 1.0)
    return np.clip((np.where(labelled, values, low) - low) / max(high - low, 1e-12), 0.0, 1.0)


def grey(shares: np.ndarray) -> np.ndarray:
    """Fractions (H, W) as RGB (H, W, 3), black to white."""
    return np.repeat(255 * shares[..., None], 3, axis=-1)
