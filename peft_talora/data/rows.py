"""Rows of any source: what they are made of, and their labels as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..kinds import KINDS, TaskSpec
from ..msam.labels import label_tensor
from ..msam.pictures import image_array
from .columns import IMAGE_COLUMN, task_column
from .images import label_values

# Unlabelled pixels of a map of classes, whatever else may mean that.
_NO_CLASS = -1


class ListRows:
    """A list of dicts, where rows of `datasets` are expected."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise ValueError(f"rows are dicts with an {IMAGE_COLUMN!r} and label maps, got a {type(wrong).__name__}")
        self._rows = rows
        self.column_names = list(dict.fromkeys(column for row in rows for column in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]


def column_names(dataset: Any) -> list[str]:
    """The columns of rows of `datasets` or of a list of dicts."""
    return ListRows(dataset).column_names if isinstance(dataset, list | tuple) else list(dataset.column_names)


def array_rows(dataset: Any, columns: Sequence[str]) -> Any:
    """These columns of the rows, with numbers as numpy arrays and images as PIL images, whose mode says what they mean.

    Images that are stored as bytes alone, or as ``{bytes, path}`` without being declared as images, are decoded, too.

    Args:
        dataset: Rows of `datasets`, or a list of dicts.
        columns: Some of its columns.
    """
    if isinstance(dataset, list | tuple):
        return ListRows(dataset)
    if dataset.format["type"] == "custom":
        # rows that read their own files
        return dataset.select_columns(list(columns))
    dataset = dataset.select_columns(list(columns))
    encoded = [name for name, feature in dataset.features.items() if _is_encoded(feature)]
    if encoded:
        import datasets

        for name in encoded:
            dataset = dataset.cast_column(name, datasets.Image())
    images = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]
    arrays = [name for name in dataset.column_names if name not in images]
    if not arrays:
        return dataset.with_format(None)
    return dataset.with_format("numpy", columns=arrays, output_all_columns=True)


def label_array(kind: str, values: Any) -> np.ndarray | None:
    """A column's value as an array; a PIL image as its numbers.

    Classes become integers: a null in a column of integer maps is read as NaN. A masked array stays one.

    Raises:
        ValueError: If classes are given as numbers that are none.
    """
    if values is None:
        return None
    values = label_values(values) if isinstance(values, Image.Image) else np.asanyarray(values)
    if KINDS[kind].has_classes and np.issubdtype(values.dtype, np.floating):
        known = np.isfinite(values)
        if (values[known] != np.floor(values[known])).any():
            raise ValueError(
                f"class ids are whole numbers, got {float(values[known][values[known] % 1 != 0][0]):g}: a map of probabilities?"
            )
        return np.where(known, values, _NO_CLASS).astype(np.int64)
    return values


def read_row(row: Mapping[str, Any], tasks: Mapping[str, TaskSpec]) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The image of a row, uint8 (H, W, 3), and ``{task: label map}`` as ``label_tensor`` makes them, as large as the image.

    Raises:
        ValueError: If the image cannot be read, or a label does not fit it or its task.
    """
    image = image_array(row[IMAGE_COLUMN])
    return image, {name: _row_label(name, spec, row, image.shape[:2]) for name, spec in tasks.items()}


def _row_label(name: str, spec: TaskSpec, row: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    label = label_array(spec.kind, row.get(task_column(name)))
    if label is not None and label.shape[-2:] == size[::-1] != size:
        raise ValueError(
            f"the label of task {name!r} fits the image turned by a quarter: an image whose EXIF orientation says so is "
            "turned upright when it is read, and its label has to be turned with it"
        )
    return label_tensor(name, spec, label, size)


def stored_rows(rows: Any) -> Any:
    """Rows {column: file} where they read their own files; None for any others."""
    return rows.with_format(None) if getattr(rows, "format", {}).get("type") == "custom" else None


def place_of(rows: Any, index: int) -> str:
    """Where a row is from, for messages."""
    stored = stored_rows(rows)
    return f"row {index}" if stored is None else f"row {index} ({stored[index][IMAGE_COLUMN]})"


def file_state(value: Any) -> Any:
    """[path, time of the last change, size] of a file; of anything else the value itself."""
    try:
        status = os.stat(value) if isinstance(value, str | Path) else None
    except OSError:
        status = None
    return value if status is None else [str(value), status.st_mtime_ns, status.st_size]


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds files of images that nobody has declared as such."""
    if isinstance(feature, Mapping):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")
