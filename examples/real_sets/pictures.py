"""Reading, tiling and shrinking pictures and their label maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image


def read_rgb(path: Path) -> np.ndarray:
    """Return a picture (H, W, 3) uint8; what is transparent is not looked at."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"))


def tiles(height: int, width: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield squares that cover a picture; the last ones end at its border. One that is too small gives what there is."""
    for top in starts(height, size):
        for left in starts(width, size):
            yield slice(top, top + size), slice(left, left + size)


def starts(length: int, size: int) -> list[int]:
    """Return where tiles of `size` begin, as evenly as may be, so that they cover `length`."""
    number = max(1, -(-length // size))
    return [round(start) for start in np.linspace(0, max(0, length - size), number)]


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 whose longest side is at most `size`."""
    height, width = shrunk_shape(image.shape[:2], size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def shrink_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the labels (h, w, ...) at the middles of the pixels of a smaller picture: nothing is mixed."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip(shape, labels.shape, strict=False)
    )
    return labels[rows[:, None], columns]


def shrunk_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Return (height, width) of a picture after `shrink`."""
    factor = min(1.0, size / max(shape))
    return tuple(max(1, round(side * factor)) for side in shape)
