"""Tasks as a caller names them, checked and translated to indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ..tuner.checks import is_int

# One task for all samples (a name or an index), or one task per sample (names or indices, or a LongTensor (B,)).
Task: TypeAlias = str | int
TaskRequest: TypeAlias = Task | Sequence[Task] | torch.Tensor


def task_index(task: Task, tasks: Sequence[str]) -> int:
    """The index of `task` (a name or an index) in `tasks`. Raises ValueError naming the known tasks."""
    if isinstance(task, str):
        if task not in tasks:
            raise ValueError(f"Unknown task '{task}'. The known tasks are {list(tasks)}.")
        return tasks.index(task)
    if not is_int(task):
        raise ValueError(f"A task is a name or an index, got {task!r} ({type(task).__name__}). Known: {list(tasks)}.")
    if not 0 <= task < len(tasks):
        raise ValueError(f"Task index {task} is out of range for the {len(tasks)} known tasks {list(tasks)}.")
    return task


def resolve_task(request: TaskRequest, tasks: Sequence[str], device: torch.device | None = None) -> int | torch.Tensor:
    """An index for one task, a LongTensor (B,) for one task per sample.

    Args:
        request: A name or an index; or B of them; or an integer tensor (B,), or () for one task.
        tasks: The ordered task names.
        device: Where the LongTensor goes; None leaves a tensor where it is.
    """
    if isinstance(request, str | int):
        return task_index(request, tasks)
    if isinstance(request, torch.Tensor):
        ids = _check_id_tensor(request, tasks)
        return int(ids) if ids.ndim == 0 else ids.to(device=device, dtype=torch.long)
    if isinstance(request, Sequence):
        return torch.tensor([task_index(_as_python(t), tasks) for t in request], dtype=torch.long, device=device)
    raise ValueError(
        f"Tasks are given as a name, an index, a list of these or an integer tensor (B,), got {type(request).__name__}. "
        f"The known tasks are {list(tasks)}."
    )


def _as_python(task: Any) -> Any:
    return task.item() if isinstance(task, torch.Tensor) and task.ndim == 0 else task


def _check_id_tensor(ids: torch.Tensor, tasks: Sequence[str]) -> torch.Tensor:
    if ids.ndim > 1:
        raise ValueError(
            f"task_ids must have the shape (batch,), or () for one task, got {tuple(ids.shape)}. Known tasks: {list(tasks)}."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"task_ids must be integers, got {ids.dtype}. The known tasks are {list(tasks)}.")
    # inside a compiled graph a look at the values would break the graph; there torch reports a bad index itself
    if not torch.compiler.is_compiling() and ids.numel() and ids.device.type != "meta":
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= len(tasks):
            raise ValueError(
                f"Task index {low if low < 0 else high} is out of range for the {len(tasks)} known tasks {list(tasks)}."
            )
    return ids
