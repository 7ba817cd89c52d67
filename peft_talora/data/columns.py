"""Where the rows of a dataset have their labels."""

from __future__ import annotations

from typing import NamedTuple

IMAGE_COLUMN = "image"
IGNORE_INDEX = 255


class TaskColumn(NamedTuple):
    """Where a task's labels are, and of what kind it is."""

    column: str
    kind: str


TASK_COLUMNS: dict[str, TaskColumn] = {
    "semantic": TaskColumn("segmentation", "semantic"),
    "depth": TaskColumn("depth", "depth"),
    "normals": TaskColumn("normal", "normals"),
    "saliency": TaskColumn("saliency", "binary"),
    "edges": TaskColumn("edge", "binary"),
    "parts": TaskColumn("parts", "parts"),
}


def task_column(name: str) -> str:
    """The column of a task's labels: that of [`TASK_COLUMNS`], and the task's own name for any other task."""
    return TASK_COLUMNS[name].column if name in TASK_COLUMNS else name
