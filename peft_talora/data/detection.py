"""Which tasks a dataset has labels for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kinds import KINDS, TaskSpec
from .columns import IGNORE_INDEX, IMAGE_COLUMN, TASK_COLUMNS
from .rows import array_rows, column_names, label_array

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# More are ids of instances, or a number for "unlabelled" that nobody has told us of.
MOST_CLASSES = 1000


class UnlabelledTask(ValueError):
    """A task was asked for that a dataset has no labels of."""


def detect_tasks(
    dataset: Dataset | DatasetDict | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    names: Sequence[str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, TaskSpec]:
    """The tasks that a dataset has labels for.

    Args:
        dataset: One dataset (rows of `datasets`, or a list of dicts), or its splits; a column of any split counts. Splits
            that know their tasks, those of a folder, are asked instead.
        names: The tasks wanted, in this order; default: all that have a column.
        class_names: ``{task: names of its classes}`` where they are known. Otherwise the number of classes is the
            largest label + 1 over all rows; negative labels and 255 are unlabelled.

    Returns:
        ``{name: TaskSpec}``.

    Raises:
        UnlabelledTask: If a task is unknown or has no column; the message names what there is.
        ValueError: If there is no image column, or a column has no labels.
    """
    declared = getattr(dataset, "tasks", None)
    if declared is not None:
        return _declared_tasks(declared, names, class_names or {})
    splits = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    for split in splits:
        check_image_column(column_names(split))
    columns = sorted({column for split in splits for column in column_names(split)})
    if names is None:
        names = [name for name, task in TASK_COLUMNS.items() if task.column in columns]
        if not names:
            expected = [task.column for task in TASK_COLUMNS.values()]
            raise ValueError(f"the dataset has no labels: expected some of the columns {expected}, it has {columns}")
    return {name: _detect_task(name, splits, columns, (class_names or {}).get(name)) for name in names}


def _declared_tasks(
    declared: Mapping[str, TaskSpec], names: Sequence[str] | None, class_names: Mapping[str, Sequence[str]]
) -> dict[str, TaskSpec]:
    unknown = [name for name in names or [] if name not in declared]
    if unknown:
        raise UnlabelledTask(f"unknown task {unknown[0]!r}, the dataset's description has {list(declared)}")
    tasks = {name: replace(declared[name]) for name in (declared if names is None else names)}
    for name, spec in tasks.items():
        if name in class_names:
            tasks[name] = replace(spec, num_channels=len(class_names[name]), class_names=list(class_names[name]))
    return tasks


def _detect_task(
    name: str, splits: Sequence[Dataset], columns: Sequence[str], class_names: Sequence[str] | None
) -> TaskSpec:
    if name not in TASK_COLUMNS:
        raise UnlabelledTask(f"unknown task {name!r}, expected one of {list(TASK_COLUMNS)}")
    column, kind = TASK_COLUMNS[name]
    if column not in columns:
        raise UnlabelledTask(f"task {name!r} needs the column {column!r}, the dataset has {columns}")
    if class_names is not None:
        return TaskSpec(kind, num_channels=len(class_names), class_names=list(class_names))
    if not KINDS[kind].has_classes:
        return TaskSpec(kind)
    largest = max(
        (_largest_class(split, name, column) for split in splits if column in column_names(split)), default=-1
    )
    if largest < 0:
        warnings.warn(f"task {name!r}: no pixel is labelled in column {column!r}, assuming one class", stacklevel=3)
    if largest >= MOST_CLASSES:
        raise ValueError(
            f"task {name!r}: column {column!r} has numbers up to {largest}, too many for classes: ids of instances, or {largest} "
            f"for what is unlabelled? Unlabelled are {IGNORE_INDEX} and negative numbers; class_names says how many classes there are"
        )
    return TaskSpec(kind, num_channels=max(largest + 1, 1))


def _largest_class(split: Dataset, name: str, column: str) -> int:
    largest = -1
    for index, classes in _class_maps(split, name, column):
        if not np.issubdtype(classes.dtype, np.integer) and classes.dtype != bool:
            raise ValueError(
                f"task {name!r}: row {index} of column {column!r} has no whole numbers but {classes.dtype}"
            )
        labelled = np.ma.compressed(classes[classes != IGNORE_INDEX])
        largest = max(largest, int(labelled.astype(np.int64).max(initial=-1)))
    return largest


def _class_maps(split: Dataset, name: str, column: str) -> Iterator[tuple[int, np.ndarray]]:
    rows = array_rows(split, [column])
    for index in range(len(rows)):
        try:
            classes = label_array("semantic", rows[index].get(column))
            if classes is not None and classes.ndim == 3 and 1 not in (classes.shape[0], classes.shape[-1]):
                raise ValueError(f"expected one number for each pixel, got an array of shape {classes.shape}")
        except ValueError as error:
            raise ValueError(f"task {name!r}: row {index} of column {column!r}: {error}") from error
        if classes is not None:
            yield index, classes


def check_image_column(columns: Sequence[str]) -> None:
    if IMAGE_COLUMN not in columns:
        raise ValueError(f"the dataset has no column {IMAGE_COLUMN!r}, only {list(columns)}")
