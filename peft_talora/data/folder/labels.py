"""Label files as label maps: numbers become classes, masks, metres, unit normals or values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ...kinds import doubts
from ..images import read_header, read_label_values
from .description import ImageReading, TaskFiles
from .fields import packed_colors

# Blocks of JPEG are this large, with colours at half the resolution.
_JPEG_BLOCK = 16
_AS_A_PERSON_SEES_IT = ImageReading()


def read_label(
    path: Path,
    task: TaskFiles,
    size: tuple[int, int] | None,
    where: str,
    image: str | None = None,
    reading: ImageReading = _AS_A_PERSON_SEES_IT,
) -> np.ndarray:
    """One image's label map, as rows of a dataset have it.

    Args:
        path: The label file.
        task: What its numbers mean.
        size: (H, W) of the image; None where it does not matter.
        where: The task's place in the description, for messages.
        image: The image's file, for messages.
        reading: How the folder's files are read.

    Returns:
        int64 (H, W) for classes and masks with -1 where unlabelled; float32 (1, H, W) metres, 0 where unlabelled;
        (3, H, W) unit normals, zero where unlabelled; (C, H, W) values, NaN where unlabelled.

    Raises:
        ValueError: If the file cannot be read, has another size than the image, or holds numbers that are not possible.
            The message names the file and the field.
    """
    kind, num_channels = task.spec.task_kind, task.spec.num_channels
    channels = 1 if kind.layout == "map" else num_channels
    content = read_label_values(path, task.by_color, reading.upright, reading.max_megapixels, channels)
    try:
        if content.lossy:
            _refuse_lossy(task, content.lossy)
        if content.narrowed and not (task.by_color or kind.is_direction):
            raise ValueError("it has 16 bits in several channels, of which 8 would be read: save it as .npy")
        values = packed_colors(content.values)[None] if task.by_color else content.values
        values = _checked_shape(values, channels)
        if size is not None and values.shape[1:] != tuple(size):
            raise ValueError(_other_size(values.shape[1:], size, image))
        label = kind.from_numbers(values, task, num_channels)
        if content.lossy and kind.is_direction:
            label = _without_borders(label)
    except ValueError as error:
        raise ValueError(f"{path} ({where}): {error}") from error
    doubt = _doubt(values, label, task)
    if doubt is not None:
        doubts.tell(where, doubt, place=str(path))
    return label


def _doubt(values: np.ndarray, label: np.ndarray, task: TaskFiles) -> str | None:
    """What is odd in a file's numbers (C, H, W), given what became of them."""
    if task.class_map is not None:
        if (label < 0).all() and not task.is_ignored(values).all():
            return f"no pixel has one of the {'colours' if task.by_color else 'numbers'} of the {len(task.class_map)} classes"
        return None
    largest, smallest = values.max(initial=0), values.min(initial=0)
    if task.threshold is not None and 0 < largest < task.threshold:
        return f"`threshold: {task.threshold:g}` is above every number in it, the largest one is {largest:g}"
    if task.threshold is not None and smallest < largest and values.min() >= task.threshold:
        return f"`threshold: {task.threshold:g}` is below every number in it, the smallest one is {values.min():g}"
    if task.spec.task_kind.has_classes and largest == 255 in task.ignore and not ((values > 0) & (values < 255)).any():
        return "it holds 0 and 255 alone, and 255 means unlabelled: where white is a class, say `class_map: {0: 0, 255: 1}`"
    return None


def _refuse_lossy(task: TaskFiles, compression: str) -> None:
    kind = task.spec.task_kind
    if kind.has_classes or (kind.largest_label(1) == 1 and task.threshold is None):
        what = "colours" if task.by_color else "numbers"
        cure = "" if kind.has_classes else ", or say `threshold: 128` for a black and white mask"
        raise ValueError(
            f"{compression} changes {what}, so that there is no telling which one was meant: save it as PNG{cure}"
        )


def _checked_shape(values: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) from (H, W), (H, W, C) or (C, H, W)."""
    shape = values.shape
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and shape[-1] == channels and shape[0] != channels:
        values = np.moveaxis(values, -1, 0)
    if values.ndim != 3 or values.shape[0] != channels:
        expected = "one number" if channels == 1 else f"{channels} numbers"
        colors = (
            "; where its colours are classes, say `colors: {class: [r, g, b]}`" if shape[-1:] in ((3,), (4,)) else ""
        )
        raise ValueError(f"expected {expected} for each pixel, got an array of shape {shape}{colors}")
    return values


def _other_size(label: tuple[int, ...], size: tuple[int, int], image: str | None) -> str:
    message = f"the label is {label[1]} x {label[0]} pixels, its image {size[1]} x {size[0]}"
    header = None if image is None else read_header(image, np.inf)
    if header is not None and header.orientation >= 5 and header.size == tuple(label):
        message += (
            f": the image was turned as its EXIF orientation ({header.orientation}) says, and the label was not. Turn the label, "
            "or say `exif: false` where labels belong to the pixels as they are stored"
        )
    return message


def _without_borders(normals: np.ndarray) -> np.ndarray:
    """Normals of a JPEG without those that share a block with a hole: the colours of both have run into each other."""
    holes = Image.fromarray((normals == 0).all(axis=0).astype(np.uint8))
    if holes.getextrema()[1]:
        near = np.asarray(holes.filter(ImageFilter.MaxFilter(2 * (_JPEG_BLOCK // 4) + 1)))
        normals[:, near > 0] = 0
    return normals
