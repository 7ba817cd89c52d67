"""Partly labelled multi-task data: from rows of Hugging Face `datasets` to batches for an mSAM.

A row has an ``image`` and any of the columns of [`TASK_COLUMNS`]: the schema of the Hub's ``tanganke/nyuv2``. A column
that is missing, a null and a map without a label are unlabelled data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..msam.processing import MSamProcessor
from ..msam.tasks import Tasks, TaskSpec, parse_tasks
from .augmentation import Augmentation
from .columns import IMAGE_COLUMN, TASK_COLUMNS, task_column
from .detection import check_image_column
from .rows import array_rows, column_names, place_of, read_row

if TYPE_CHECKING:
    from datasets import Dataset


class MultiTaskDataset(torch.utils.data.Dataset):
    """Rows of a `datasets.Dataset`, or of a list of dicts, as inputs of an mSAM.

    What happens to row i in an epoch depends on (seed, epoch, i) alone, whatever came before and in whichever process:
    a resumed run sees the same data. Call [`set_epoch`] before an epoch's iterator is made; worker processes that
    outlive an epoch (``persistent_workers=True``) do not hear of it.

    Args:
        dataset: Rows with an ``image`` and label columns; a label is an array, a tensor, a PIL image, or None.
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
        dataset: Dataset | Sequence[Mapping[str, Any]],
        tasks: Tasks,
        processor: MSamProcessor,
        augment: Augmentation | None = None,
        seed: int = 0,
        own_size: bool = False,
    ) -> None:
        self.tasks = parse_tasks(tasks)
        columns = column_names(dataset)
        _check_kinds(self.tasks, columns)
        check_image_column(columns)
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.own_size = own_size
        self.epoch = 0
        present = [column for column in map(task_column, self.tasks) if column in columns]
        self._rows = array_rows(dataset, [IMAGE_COLUMN, *present])

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
            labels = {name: self.processor.square_label(self.tasks[name], label) for name, label in labels.items()}
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
        try:
            image, labels = read_row(row, self.tasks)
            self.processor.check_sides(image.shape[:2])
        except ValueError as error:
            raise ValueError(f"{place_of(self._rows, index)}: {error}") from error
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


def _check_kinds(tasks: Mapping[str, TaskSpec], columns: Sequence[str]) -> None:
    for name, spec in tasks.items():
        if name not in TASK_COLUMNS and name not in columns:
            raise ValueError(
                f"unknown task {name!r}, expected one of {list(TASK_COLUMNS)} or of the columns {columns}"
            )
        if name in TASK_COLUMNS and spec.kind != TASK_COLUMNS[name].kind:
            raise ValueError(f"task {name!r} is of the kind {TASK_COLUMNS[name].kind!r}, got {spec.kind!r}")
