"""What ``dataset.yaml`` says about a folder of image and label files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ...kinds import KINDS, Numbers, TaskSpec
from ...routing.names import validate_task_names
from ..columns import IGNORE_INDEX, IMAGE_COLUMN, TASK_COLUMNS, task_column

DESCRIPTION_FILES = ("dataset.yaml", "dataset.yml", "dataset.json")
NAME = "{name}"


@dataclass(frozen=True)
class TaskFiles(Numbers):
    """Where a task's label files are and what their numbers mean; the latter is explained at [`Numbers`].

    Args:
        spec: The task.
        files: Patterns with ``{name}``, or subfolders, relative to the dataset's folder. The first that exists counts.
        optional: Whether there may be no file at all; the task is left out then.
    """

    spec: TaskSpec
    files: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class FolderDescription:
    """What is in a folder.

    Args:
        source: Who says so, for messages: the description's file.
        tasks: The tasks, in their order.
        images: A pattern with ``{name}``, or a subfolder.
        splits: ``"subfolders"``, or ``{split: list of names, a file of names, or a fraction}``.
    """

    source: str
    tasks: dict[str, TaskFiles]
    images: str = "images"
    splits: str | dict[str, Any] = field(default_factory=dict)


def description_file(folder: Path) -> Path | None:
    """The folder's description, if it has one."""
    return next((folder / name for name in DESCRIPTION_FILES if (folder / name).is_file()), None)


def read_description(folder: Path) -> FolderDescription:
    """Read the description of a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read, or says something that is not possible. The message names the file and the
            field.
    """
    file = description_file(folder)
    if file is None:
        raise FileNotFoundError(
            f"dataset folder {str(folder)!r} has no description: none of {list(DESCRIPTION_FILES)}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return parse_description(values, str(file))


def parse_description(values: Any, source: str) -> FolderDescription:
    """Check a description; `source` stands before what is wrong with it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected fields such as 'images' and 'tasks', got {values!r}")
    _known_fields(values, ("images", "tasks", "splits", "license", "source"), source)
    for name in ("license", "source"):  # for people: under which terms, and where from
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{source}: {name}: expected a text, got {values[name]!r}")
    tasks = values.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"{source}: tasks: expected {{task: its fields}}, got {tasks!r}")
    try:
        validate_task_names(tasks)
    except ValueError as error:
        raise ValueError(f"{source}: tasks: {error}") from error
    parsed = {name: _parse_task(name, fields, f"{source}: tasks.{name}") for name, fields in tasks.items()}
    columns = [IMAGE_COLUMN, *(task_column(name) for name in parsed)]
    twice = {column for column in columns if columns.count(column) > 1}
    if twice:
        raise ValueError(f"{source}: tasks: more than one would have the column {sorted(twice)[0]!r}: rename one")
    images = _pattern(values.get("images", "images"), f"{source}: images")
    return FolderDescription(source, parsed, images, _parse_splits(values.get("splits", {}), f"{source}: splits"))


def _parse_task(name: str, fields: Any, where: str) -> TaskFiles:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected fields such as 'kind' and 'files', got {fields!r}")
    usual = TASK_COLUMNS[name].kind if name in TASK_COLUMNS else None
    kind = fields.get("kind", usual)
    if kind not in KINDS:
        raise ValueError(f"{where}.kind: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if usual not in (None, kind):
        raise ValueError(f"{where}.kind: a task named {name!r} is of the kind {usual!r}, got {kind!r}: rename it")
    own = KINDS[kind].own_fields
    known = ("kind", "files", "optional", *KINDS[kind].file_fields, *own)
    _known_fields(fields, known, where, f" of a {kind} task")
    files = fields.get("files", name)
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list | tuple) or not files:
        raise ValueError(f"{where}.files: expected a subfolder or a pattern with {NAME}, got {files!r}")
    spec = _spec(kind, fields, where)
    return TaskFiles(
        spec=spec,
        files=tuple(_pattern(pattern, f"{where}.files") for pattern in files),
        optional=_checked(fields, "optional", bool, where, False),
        ignore=_ignore(kind, fields, where),
        class_map=_class_map(fields, spec, where),
        threshold=_checked(fields, "threshold", Real, where),
        scale=_checked(fields, "scale", Real, where, 1.0),
        offset=_checked(fields, "offset", Real, where, 0.0),
        disparity=_checked(fields, "disparity", Real, where),
        axes=_axes(fields, where),
        own={name: _own(check, fields[name], f"{where}.{name}") for name, check in own.items() if name in fields},
    )


def _own(check: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _spec(kind: str, fields: Mapping[str, Any], where: str) -> TaskSpec:
    names, channels = fields.get("class_names"), fields.get("num_channels")
    if KINDS[kind].has_classes:
        # the files would have to be read for it otherwise, all of them
        channels = fields.get("num_classes", len(names) if isinstance(names, list) else None)
        if channels is None:
            raise ValueError(
                f"{where}.class_names: expected a list of the classes' names (or num_classes), got {names!r}"
            )
    try:
        return TaskSpec(kind, num_channels=channels, class_names=names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _ignore(kind: str, fields: Mapping[str, Any], where: str) -> tuple[float, ...]:
    usual = [IGNORE_INDEX] if KINDS[kind].has_classes else []
    if usual and fields.get("num_classes", len(fields.get("class_names") or [])) > IGNORE_INDEX:
        usual = []
    values = fields.get("ignore", usual)
    values = values if isinstance(values, list | tuple) else [values]
    if not all(_is(value, Real) for value in values):
        raise ValueError(f"{where}.ignore: expected a number or a list of numbers, got {fields['ignore']!r}")
    return tuple(values)


def _class_map(fields: Mapping[str, Any], spec: TaskSpec, where: str) -> dict[int, int] | None:
    if "class_map" not in fields:
        return None
    values = fields["class_map"]
    try:
        pairs = {int(number): label for number, label in values.items()}  # JSON has strings as keys
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{where}.class_map: expected {{number in the file: class}}, got {values!r}") from error
    for label in pairs.values():
        if not _is(label, int) or not 0 <= label < spec.num_channels:
            raise ValueError(f"{where}.class_map: class {label!r} is beyond the {spec.num_channels} classes")
    return pairs


def _axes(fields: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    axes = fields.get("axes", [1, 1, 1])
    if not isinstance(axes, list | tuple) or len(axes) != 3 or any(axis not in (1, -1) for axis in axes):
        raise ValueError(f"{where}.axes: expected three factors 1 or -1, got {axes!r}")
    return tuple(axes)


def _parse_splits(splits: Any, where: str) -> str | dict[str, Any]:
    if splits == "subfolders":
        return splits
    if not isinstance(splits, Mapping):
        raise ValueError(f"{where}: expected 'subfolders' or {{split: names, file or fraction}}, got {splits!r}")
    for split, value in splits.items():
        fraction = _is(value, Real) and 0 < value < 1
        names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
        if not (fraction or names or isinstance(value, str)):
            raise ValueError(
                f"{where}.{split}: expected a list of names, a file of names or a fraction, got {value!r}"
            )
    # as far as fractions can be added up: 0.7 + 0.2 + 0.1 is a little less than 1
    left = 1 - sum(value for value in splits.values() if _is(value, Real))
    if left < -1e-9 or ("train" not in splits and left < 1e-9):
        raise ValueError(f"{where}: the fractions must leave something for 'train', got {dict(splits)}")
    return dict(splits)


def _pattern(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or value.count(NAME) > 1 or Path(value).is_absolute() or ".." in value:
        raise ValueError(
            f"{where}: expected a subfolder, or a pattern with one {NAME}, below the dataset's folder; got {value!r}"
        )
    return value


def _checked(fields: Mapping[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    value = fields.get(name, default)
    if value is not default and not _is(value, kind):
        expected = "true or false" if kind is bool else "a number"
        raise ValueError(f"{where}.{name}: expected {expected}, got {value!r}")
    return value


def _is(value: Any, kind: type) -> bool:
    """Whether a value has a type; True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _known_fields(values: Mapping[str, Any], known: tuple[str, ...], where: str, what: str = "") -> None:
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}, those{what} are {list(known)}")
