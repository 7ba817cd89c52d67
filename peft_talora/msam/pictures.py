"""Pictures as arrays: one reading for files, rows of datasets, and what is handed to a processor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

# Cameras and microscopes write this many bits into 16.
_BIT_DEPTHS = (8, 10, 12, 14, 16)

Range = tuple[float, float]


def image_array(image: Any, value_range: Range | None = None) -> np.ndarray:
    """An image as a person would see it, uint8 (H, W, 3).

    The EXIF orientation of a PIL image is respected, what is transparent becomes white, grey becomes RGB. More than 8
    bits become 8: see [`grey_range`].

    Args:
        image: A PIL image, an array of uint8 or uint16 (H, W, C) or (H, W) with C of 1 (grey), 3 (RGB) or 4 (with
            transparency), or a float array or tensor (C, H, W) in [0, 1]. Either order of the dimensions is accepted for
            both types where only one fits.
        value_range: The numbers that are black and white in pictures of more than 8 bits, where they are not those of the type.

    Raises:
        ValueError: For another shape, type or range.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, value_range)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    image = np.asarray(image)
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    floating = np.issubdtype(image.dtype, np.floating)
    if not floating and image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"an image array must hold uint8 or uint16, or floats in [0, 1]; got {image.dtype}")
    image = _channels_last(image, first=floating)
    if floating and value_range is None:
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"a float image must be in [0, 1], got values from {image.min():g} to {image.max():g}")
        value_range = (0.0, 1.0)
    return _three_channels(_eight_bits(image, value_range))


def grey_range(values: np.ndarray) -> Range:
    """The numbers that are black and white in a picture of more than 8 bits.

    White is the largest number of the fewest bits, of 8, 10, 12, 14 and 16, that hold all values; for floats up to 1
    it is 1. One picture alone can be darker than its camera's range: who has several should ask for their largest.

    Raises:
        ValueError: If the values are negative or beyond 16 bits.
    """
    finite = values[np.isfinite(values)] if np.issubdtype(values.dtype, np.floating) else values
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    if np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1:
        return 0.0, 1.0
    if low < 0 or high > 65535:
        raise ValueError(
            f"values from {low:g} to {high:g} are no grey of up to 16 bits: say which numbers are black and white (for the "
            "files of a folder: `image_range: [0, 65535]`)"
        )
    return 0.0, float(next(2**bits - 1 for bits in _BIT_DEPTHS if high < 2**bits))


def _from_pil(image: Image.Image, value_range: Range | None) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        return _three_channels(_eight_bits(values[..., None], value_range or _range_found(values)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _range_found(values: np.ndarray) -> Range:
    ends = grey_range(values)
    if ends[1] not in (1.0, 65535.0):
        warnings.warn(
            f"a picture of {values.dtype} with numbers up to {np.nanmax(values):g} is read as one of 0 to {ends[1]:g}; `image_range` in "
            "the description of a folder says it for all its pictures",
            stacklevel=5,
        )
    return ends


def _eight_bits(values: np.ndarray, value_range: Range | None) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if value_range is None:
        value_range = grey_range(values)
    low, high = value_range
    shares = (np.nan_to_num(values.astype(np.float64), nan=low) - low) / (high - low)
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


def _three_channels(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) from (H, W, C) of 1, 3 or 4 channels, the fourth one being transparency."""
    if image.shape[-1] == 4:
        alpha = image[..., -1:].astype(np.uint16)
        image = ((image[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)


def _channels_last(image: np.ndarray, first: bool) -> np.ndarray:
    """(H, W, C) from (H, W), (C, H, W) or (H, W, C); ``first`` says which one is meant where both are possible."""
    if image.ndim == 2 and 0 not in image.shape:
        return image[..., None]
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"an image must have shape (H, W, 3) or (3, H, W), got {image.shape}")
    return np.moveaxis(image, _channel_axis(image.shape, first), -1)


def _channel_axis(shape: Sequence[int], first: bool) -> int:
    usual, other = (0, -1) if first else (-1, 0)
    for axis, number in ((usual, 3), (other, 3), (usual, 4), (usual, 1), (other, 1)):
        if shape[axis] == number:
            return axis
    raise ValueError(f"an image must have shape (H, W, 3) or (3, H, W), got {tuple(shape)}")
