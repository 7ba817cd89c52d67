"""Image files as arrays: pictures for people as 8-bit RGB, and the numbers of label maps as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from ..msam.pictures import Range, grey_range, image_array

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIX = ".npy"
SUFFIXES = (*IMAGE_SUFFIXES, ARRAY_SUFFIX)
# What is unpacked from a file of few kilobytes may fill the memory.
MAX_MEGAPIXELS = 64.0

_LOSSY_FORMATS = ("JPEG", "MPO")
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "old-style-jpeg", "webp")
# how to undo what an orientation asks for
_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class LabelValues(NamedTuple):
    """What a label file holds.

    Args:
        values: Its numbers, (H, W) or with channels, as the file has them.
        lossy: The compression that has changed the numbers (JPEG, lossy WebP); None where they are exact.
        narrowed: Whether the file has more than the 8 bits per number that are read.
    """

    values: np.ndarray
    lossy: str | None = None
    narrowed: bool = False


class ImageHeader(NamedTuple):
    """What is known about an image file before it is unpacked.

    Args:
        size: (H, W) as it is stored.
        orientation: The EXIF orientation, 1 where there is none.
        mode: Pillow's mode, or the type of an array.
    """

    size: tuple[int, int]
    orientation: int
    mode: str


def read_image(
    path: str | Path,
    value_range: Range | None = None,
    upright: bool = True,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> np.ndarray:
    """A picture as a person would see it, uint8 (H, W, 3); [`image_array`] says what becomes of its kind.

    Args:
        path: An image file, or an ``.npy`` file of an array that `image_array` takes.
        value_range: The numbers that are black and white in pictures of more than 8 bits; default: what
            [`grey_range`] finds.
        upright: Whether the EXIF orientation is respected.
        max_megapixels: A file with more pixels is not unpacked.

    Raises:
        ValueError: If the file cannot be read, is no picture, or is too large. The message names it.
    """
    with _opened(path, "a picture", max_megapixels) as opened:
        if isinstance(opened, Image.Image) and not upright:
            opened = _as_stored(opened)
        return np.array(image_array(opened, value_range))


def read_values(path: str | Path, upright: bool = True, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """The numbers of a label file, see [`read_label_values`]."""
    return read_label_values(path, upright=upright, max_megapixels=max_megapixels).values


def read_label_values(
    path: str | Path,
    as_colors: bool = False,
    upright: bool = True,
    max_megapixels: float = MAX_MEGAPIXELS,
    channels: int = 1,
) -> LabelValues:
    """The numbers of a label file: no colours are looked up and nothing is scaled.

    Args:
        path: An image file or an ``.npy`` array.
        as_colors: Read the colours that are seen, uint8 (H, W, 3), of whatever mode the file is.
        upright: Whether the file's own EXIF orientation is respected.
        max_megapixels: A file with more pixels is not unpacked.
        channels: How many numbers a pixel is to have.

    Raises:
        ValueError: If the file cannot be read, is too large, or has several pages. The message names it.
    """
    with _opened(path, "a label map", max_megapixels) as opened:
        if isinstance(opened, np.ndarray):
            return LabelValues(np.array(opened))
        pages = getattr(opened, "n_frames", 1)
        if pages > 1 and opened.format not in _LOSSY_FORMATS:
            raise ValueError(f"it has {pages} pages, and there is no telling which one is meant")
        lossy, narrowed = _lossy_compression(opened, path), _is_narrowed(opened)
        opened = ImageOps.exif_transpose(opened) if upright else _as_stored(opened)
        values = np.array(opened.convert("RGB")) if as_colors else label_values(opened, channels)
        return LabelValues(values, lossy, narrowed)


def _lossy_compression(image: Image.Image, path: str | Path) -> str | None:
    """What has changed the numbers of a file that is not unpacked yet."""
    if image.format in _LOSSY_FORMATS:
        return "JPEG"
    if image.format == "TIFF" and image.info.get("compression") in _LOSSY_COMPRESSIONS:
        return "JPEG or WebP inside of a TIFF"
    if image.format == "WEBP" and "VP8 " in _webp_chunks(Path(path)):
        return "lossy WebP (lossless=True keeps them)"
    return None


def _webp_chunks(path: Path) -> list[str]:
    """The names of the chunks of a WebP file: "VP8 " is a lossy picture, "VP8L" a lossless one."""
    names = []
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            names.append(head[:4].decode("ascii", "replace"))
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, 1)
    return names


def _is_narrowed(image: Image.Image) -> bool:
    """Whether a file that is not unpacked yet has 16 bits in several channels, of which Pillow reads 8."""
    return len(image.getbands()) > 1 and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def label_values(image: Image.Image, channels: int = 1) -> np.ndarray:
    """The numbers of a label map that is a PIL image, (H, W) or with channels; a palette's numbers, not its colours.

    Where one number is wanted, grey that is stored in equal channels becomes one. Where transparency says something, that is:
    where the colours say nothing, it is the map; else nothing was drawn where all is transparent, and that is 0.

    Args:
        image: The map.
        channels: How many numbers a pixel is to have.
    """
    values = np.array(image)
    if values.ndim == 2 or values.shape[-1] == channels > 1:
        return values
    if image.mode in ("LA", "RGBA"):
        alpha, values = values[..., -1], values[..., :-1]
        if alpha.min() != alpha.max():
            if (values == values[:1, :1]).all():
                return alpha
            values = np.where(alpha[..., None] == 0, 0, values)
    if channels == 1 and image.mode != "CMYK" and (values == values[..., :1]).all():
        return values[..., 0]
    return values


def read_header(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> ImageHeader:
    """What is known of a file without unpacking it; ValueError as for [`read_image`]."""
    with _opened(path, "a picture", max_megapixels) as opened:
        if isinstance(opened, np.ndarray):
            return ImageHeader(opened.shape[:2], 1, str(opened.dtype))
        width, height = opened.size
        if isinstance(opened, TiffImagePlugin.TiffImageFile):
            # its size is that of the picture that Pillow has turned, or not, depending on its version
            width, height = opened.tag_v2[ExifTags.Base.ImageWidth], opened.tag_v2[ExifTags.Base.ImageLength]
        return ImageHeader((height, width), orientation(opened), opened.mode)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _as_stored(image: Image.Image) -> Image.Image:
    """The image without regard to its orientation."""
    turned = orientation(image)
    if image.format == "TIFF":
        # Pillow turns TIFF files when it unpacks them
        image.load()
        return image.transpose(_BACK[turned]) if turned > 1 else image
    image.getexif().pop(ExifTags.Base.Orientation, None)
    return image


def found_range(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Range | None:
    """The numbers that are black and white in a file of more than 8 bits, as far as it alone tells; None for 8 bits."""
    with _opened(path, "a picture", max_megapixels) as opened:
        values = np.asarray(opened)
        return None if values.dtype in (np.uint8, bool) else grey_range(values)


@contextmanager
def _opened(path: str | Path, what: str, max_megapixels: float) -> Iterator[Image.Image | np.ndarray]:
    """An image or array that is not unpacked yet; whatever goes wrong with it becomes an error that names the file."""
    path = Path(path)
    try:
        # a pipe would be waited for
        if not path.is_file():
            raise ValueError("there is no such file" if not path.exists() else "it is no regular file")
        if path.suffix.lower() == ARRAY_SUFFIX:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            _check_pixels(array.size // (3 if array.ndim > 2 else 1), max_megapixels)
            yield array
        else:
            with Image.open(path) as image:
                _check_pixels(image.width * image.height, max_megapixels)
                yield image
    # Pillow's readers raise nearly anything at a damaged file
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason += " PIL.Image.MAX_IMAGE_PIXELS = None lifts this limit of Pillow's."
        raise ValueError(f"{path} cannot be read as {what}: {reason}") from error


def _check_pixels(pixels: int, max_megapixels: float) -> None:
    if pixels > max_megapixels * 1e6:
        raise ValueError(
            f"it has {pixels / 1e6:.0f} megapixels, and the cap is {max_megapixels:g}: `max_megapixels` raises it"
        )
