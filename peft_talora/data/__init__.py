"""Partly labelled multi-task data: from rows to batches for an mSAM."""

from .augmentation import Augmentation
from .columns import IGNORE_INDEX, IMAGE_COLUMN, TASK_COLUMNS, TaskColumn
from .dataset import MultiTaskDataset, collate, collate_own_size
from .detection import detect_tasks
from .images import IMAGE_SUFFIXES, read_image
from .loading import load_multitask_dataset
from .report import DataReport, check_dataset, save_check_sheet

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_COLUMN",
    "IMAGE_SUFFIXES",
    "TASK_COLUMNS",
    "Augmentation",
    "DataReport",
    "MultiTaskDataset",
    "TaskColumn",
    "check_dataset",
    "collate",
    "collate_own_size",
    "detect_tasks",
    "load_multitask_dataset",
    "read_image",
    "save_check_sheet",
]
