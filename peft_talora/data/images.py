"""Image files as arrays: pictures for people as 8-bit RGB, and the numbers of label maps as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..msam.processing import image_array

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIX = ".npy"


def read_image(path: str | Path) -> np.ndarray:
    """A picture as a person would see it, uint8 (H, W, 3).

    The EXIF orientation is respected, what is transparent becomes white, grey becomes RGB, 16 bits become 8. An
    ``.npy`` file holds uint8 (H, W, 3), or floats in [0, 1].

    Raises:
        ValueError: If the file cannot be read, or is no picture. The message names it.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ARRAY_SUFFIX:
            return np.ascontiguousarray(image_array(np.load(path, allow_pickle=False)))
        with Image.open(path) as image:
            return np.array(_eight_bit_rgb(ImageOps.exif_transpose(image)))
    # Pillow's readers raise nearly anything at a damaged file
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture: {_reason(error)}") from error


def read_values(path: str | Path) -> np.ndarray:
    """The numbers of a label file, (H, W) or as the file has them: no colours are looked up and nothing is scaled.

    Raises:
        ValueError: If the file cannot be read. The message names it.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ARRAY_SUFFIX:
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            return np.array(image)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a label map: {_reason(error)}") from error


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # convert("RGB") would cut everything above 255 off
        values = np.asarray(image).astype(np.float64)
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise ValueError(f"values from {values.min():g} to {values.max():g} are no grey of 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(image_array(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
