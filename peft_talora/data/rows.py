"""Rows of any source: what they are made of, and their labels as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..kinds import KINDS
from .columns import IMAGE_COLUMN
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
    if isinstance(dataset, ListRows):
        return dataset
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


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds files of images that nobody has declared as such."""
    if isinstance(feature, Mapping):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")
