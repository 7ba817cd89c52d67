"""The tasks of an mSAM: names, their order, and what is known about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..kinds import KINDS, TaskKind, TaskSpec
from ..routing.names import validate_task_names

__all__ = ["KINDS", "TaskKind", "TaskSpec", "Tasks", "parse_tasks", "tasks_to_list"]

Tasks = Mapping[str, TaskSpec | Mapping[str, Any]] | Iterable[Mapping[str, Any]]


def parse_tasks(tasks: Tasks) -> dict[str, TaskSpec]:
    """Tasks as a dict in their order.

    Args:
        tasks: ``{name: TaskSpec or its fields}``, or the list of ``{"name": name, **fields}`` that files hold.

    Raises:
        ValueError: If a name or a task is not possible; the message says which.
    """
    pairs = list(tasks.items()) if isinstance(tasks, Mapping) else [_named_task(entry) for entry in tasks]
    validate_task_names(name for name, _ in pairs)
    return {name: _parse_task(name, value) for name, value in pairs}


def tasks_to_list(tasks: Mapping[str, TaskSpec]) -> list[dict[str, Any]]:
    """The list of ``{"name": name, **fields}`` that files hold: JSON writers sort the keys of a dict."""
    return [{"name": name, **spec.to_dict()} for name, spec in tasks.items()]


def _named_task(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a list of tasks holds dicts with a 'name', got {entry!r}")
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _parse_task(name: str, value: TaskSpec | Mapping[str, Any]) -> TaskSpec:
    if isinstance(value, TaskSpec):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"task {name!r}: expected a TaskSpec or a dict of its fields, got {value!r}")
    try:
        return TaskSpec.from_dict(value)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
