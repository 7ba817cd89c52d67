"""Partly labelled multi-task data: from rows of Hugging Face `datasets` to batches for an mSAM.

A row has an ``image`` and any of the columns of [`TASK_COLUMNS`]: the schema of the Hub's ``tanganke/nyuv2``. A column
that is missing, a null and a map without a label are unlabelled data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..msam.labels import label_tensor, resize_label, square_label
from ..msam.processing import MSamProcessor, image_array
from ..msam.tasks import KINDS, Tasks, TaskSpec, parse_tasks
from .columns import IGNORE_INDEX, IMAGE_COLUMN, TASK_COLUMNS, TaskColumn, task_column
from .loading import load_multitask_dataset

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_COLUMN",
    "TASK_COLUMNS",
    "Augmentation",
    "MultiTaskDataset",
    "TaskColumn",
    "collate",
    "collate_own_size",
    "detect_tasks",
    "load_multitask_dataset",
]


@dataclass(frozen=True)
class Augmentation:
    """Random scale-crop and horizontal flip.

    The image is cropped to H/s x W/s at a random place and enlarged to its old size, which brings everything closer:
    depth is divided by s. A flip negates the x of the normals.

    Args:
        scales: The s to choose from, all >= 1.
        flip_probability: How often the image is flipped.

    Raises:
        ValueError: If a scale is below 1 or the probability is not in [0, 1].
    """

    scales: tuple[float, ...] = (1.0, 1.2, 1.5)
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales must be at least one number >= 1, got {self.scales}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in [0, 1], got {self.flip_probability}")

    def __call__(
        self, rng: np.random.Generator, image: np.ndarray, labels: Mapping[str, Tensor], specs: Mapping[str, TaskSpec]
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Change an image, uint8 (H, W, 3), and its label maps, as ``label_tensor`` makes them, in the same way."""
        labels = dict(labels)
        scale = float(rng.choice(self.scales))
        height, width = image.shape[0], image.shape[1]
        crop = (int(height / scale), int(width / scale))
        top, left = (int(rng.integers(0, old - new + 1)) for old, new in zip(image.shape[:2], crop, strict=True))
        flip = bool(rng.random() < self.flip_probability)
        if crop != (height, width):
            box = (slice(top, top + crop[0]), slice(left, left + crop[1]))
            image = _enlarge(image[box], (height, width))
            labels = {name: _zoom_label(specs[name], label, box, scale) for name, label in labels.items()}
        if flip:
            image = image[:, ::-1]
            labels = {name: _flip_label(specs[name], label) for name, label in labels.items()}
        return image, labels


class MultiTaskDataset(torch.utils.data.Dataset):
    """Rows of a `datasets.Dataset` as inputs of an mSAM.

    What happens to row i in an epoch depends on (seed, epoch, i) alone, whatever came before and in whichever process:
    a resumed run sees the same data. Call [`set_epoch`] before an epoch's iterator is made; worker processes that
    outlive an epoch (``persistent_workers=True``) do not hear of it.

    Args:
        dataset: Rows with an ``image`` and label columns.
        tasks: The tasks to give labels of, as ``parse_tasks`` takes them, named as in [`TASK_COLUMNS`] or as a column.
        processor: Prepares the images; its image size is that of the labels. Its tasks do not matter here.
        augment: Random changes, for training.
        seed: Seed of those, >= 0.
        own_size: Leave the labels at the images' own resolution, for [`collate_own_size`] and
            ``MultiTaskMetrics.update_images``.

    Raises:
        ValueError: If there is no image column, a task is neither in [`TASK_COLUMNS`] nor a column, or it is of another
            kind than there.
    """

    def __init__(
        self,
        dataset: Dataset,
        tasks: Tasks,
        processor: MSamProcessor,
        augment: Augmentation | None = None,
        seed: int = 0,
        own_size: bool = False,
    ) -> None:
        self.tasks = parse_tasks(tasks)
        _check_kinds(self.tasks, dataset.column_names)
        _check_image_column(dataset.column_names)
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.own_size = own_size
        self.epoch = 0
        self._columns = {name: task_column(name) for name in self.tasks}
        present = [column for column in self._columns.values() if column in dataset.column_names]
        self._rows = _array_rows(dataset.select_columns([IMAGE_COLUMN, *present]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``pixel_values`` (3, S, S), ``labels`` {task: (S, S) or (C, S, S)} and ``original_size`` (2,) of a row.

        With ``own_size`` the labels are (H, W) or (C, H, W), as large as the image.
        """
        image, labels = self._load(index)
        if self.augment is not None:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            image, labels = self.augment(rng, image, labels, self.tasks)
        batch = self.processor.pixel_batch([image])
        if not self.own_size:
            # checked when they were read; a crop of them may look odd
            side = self.processor.image_size
            labels = {name: square_label(self.tasks[name], label, side) for name, label in labels.items()}
        return {
            "pixel_values": batch["pixel_values"][0],
            "labels": labels,
            "original_size": batch["original_sizes"][0],
        }

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; without it every epoch has the same random changes."""
        self.epoch = epoch

    def _load(self, index: int) -> tuple[np.ndarray, dict[str, Tensor]]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset with {len(self)} rows")
        row = self._rows[index]
        image = image_array(row[IMAGE_COLUMN])
        labels = {
            name: label_tensor(name, spec, _label_array(spec.kind, row.get(self._columns[name])), image.shape[:2])
            for name, spec in self.tasks.items()
        }
        return image, labels


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of rows of a [`MultiTaskDataset`]: exactly what an mSAM's forward takes.

    Returns:
        ``pixel_values`` (B, 3, S, S) and ``labels`` {task: (B, S, S) or (B, C, S, S)}.

    Raises:
        ValueError: A row has no labels of a task that another one has.
    """
    names = dict.fromkeys(name for row in rows for name in row["labels"])
    for number, row in enumerate(rows):
        for name in names:
            if name not in row["labels"]:
                raise ValueError(
                    f"row {number} of the batch has no labels of '{name}', others have: a row needs a map for every task, "
                    "for what is unlabelled one of 255 (classes, masks) or 0 (depth, normals)"
                )
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": {name: torch.stack([row["labels"][name] for row in rows]) for name in names},
    }


def collate_own_size(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of rows whose labels are as large as their images: ``pixel_values`` (B, 3, S, S) and B dicts ``labels``."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [dict(row["labels"]) for row in rows],
    }


def detect_tasks(
    dataset: Dataset | DatasetDict,
    names: Sequence[str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, TaskSpec]:
    """The tasks that a dataset has labels for.

    Args:
        dataset: One dataset, or its splits; a column of any split counts. Splits that know their tasks, those of a
            folder, are asked instead.
        names: The tasks wanted, in this order; default: all that have a column.
        class_names: ``{task: names of its classes}`` where they are known. Otherwise the number of classes is the
            largest label + 1 over all rows; negative labels and 255 are unlabelled.

    Returns:
        ``{name: TaskSpec}``.

    Raises:
        ValueError: If there is no image column, or a task is unknown or has no column; the message names the columns
            there are.
    """
    declared = getattr(dataset, "tasks", None)
    if declared is not None:
        return _declared_tasks(declared, names, class_names or {})
    splits = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    for split in splits:
        _check_image_column(split.column_names)
    columns = sorted({column for split in splits for column in split.column_names})
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
        raise ValueError(f"unknown task {unknown[0]!r}, the dataset's description has {list(declared)}")
    tasks = {name: replace(declared[name]) for name in (declared if names is None else names)}
    for name, spec in tasks.items():
        if name in class_names:
            tasks[name] = replace(spec, num_channels=len(class_names[name]), class_names=list(class_names[name]))
    return tasks


def _detect_task(
    name: str, splits: Sequence[Dataset], columns: Sequence[str], class_names: Sequence[str] | None
) -> TaskSpec:
    if name not in TASK_COLUMNS:
        raise ValueError(f"unknown task {name!r}, expected one of {list(TASK_COLUMNS)}")
    column, kind = TASK_COLUMNS[name]
    if column not in columns:
        raise ValueError(f"task {name!r} needs the column {column!r}, the dataset has {columns}")
    if class_names is not None:
        return TaskSpec(kind, num_channels=len(class_names), class_names=list(class_names))
    if not KINDS[kind].has_classes:
        return TaskSpec(kind)
    largest = max((_largest_class(split, column) for split in splits if column in split.column_names), default=-1)
    if largest < 0:
        warnings.warn(f"task {name!r}: no pixel is labelled in column {column!r}, assuming one class", stacklevel=3)
    return TaskSpec(kind, num_channels=max(largest + 1, 1))


def _largest_class(split: Dataset, column: str) -> int:
    largest = -1
    for classes in _class_maps(split, column):
        labelled = classes[classes != IGNORE_INDEX]
        largest = max(largest, int(labelled.max(initial=-1)))
    return largest


def _class_maps(split: Dataset, column: str) -> Iterator[np.ndarray]:
    for row in _array_rows(split.select_columns([column])):
        if row[column] is not None:
            yield _label_array("semantic", row[column])


def _array_rows(dataset: Dataset) -> Dataset:
    """The dataset with numbers as numpy arrays and images as PIL images (whose mode says how to make them RGB)."""
    if dataset.format["type"] == "custom":
        # rows that read their own files
        return dataset
    images = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]
    arrays = [name for name in dataset.column_names if name not in images]
    if not arrays:
        return dataset.with_format(None)
    return dataset.with_format("numpy", columns=arrays, output_all_columns=True)


def _label_array(kind: str, values: Any) -> np.ndarray | None:
    """A column's value as an array. Classes become integers: a null in a column of integer maps is read as NaN."""
    if values is None:
        return None
    values = np.asarray(values)
    if KINDS[kind].has_classes and np.issubdtype(values.dtype, np.floating):
        values = np.where(np.isfinite(values), values, -1).astype(np.int64)
    return values


def _check_image_column(columns: Sequence[str]) -> None:
    if IMAGE_COLUMN not in columns:
        raise ValueError(f"the dataset has no column {IMAGE_COLUMN!r}, only {list(columns)}")


def _check_kinds(tasks: Mapping[str, TaskSpec], columns: Sequence[str]) -> None:
    for name, spec in tasks.items():
        if name not in TASK_COLUMNS and name not in columns:
            raise ValueError(
                f"unknown task {name!r}, expected one of {list(TASK_COLUMNS)} or of the columns {columns}"
            )
        if name in TASK_COLUMNS and spec.kind != TASK_COLUMNS[name].kind:
            raise ValueError(f"task {name!r} is of the kind {TASK_COLUMNS[name].kind!r}, got {spec.kind!r}")


def _enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _zoom_label(spec: TaskSpec, label: Tensor, box: tuple[slice, slice], scale: float) -> Tensor:
    zoomed = resize_label(spec, label[..., box[0], box[1]], tuple(label.shape[-2:]))
    return zoomed / scale if spec.task_kind.is_distance else zoomed


def _flip_label(spec: TaskSpec, label: Tensor) -> Tensor:
    label = label.flip(-1)
    for channel in spec.task_kind.negated_by_flip:
        label[channel] = -label[channel]
    return label
