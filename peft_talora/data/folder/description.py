"""What ``dataset.yaml`` says about a folder of image and label files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ...msam.pictures import Range
from ...routing.names import validate_task_names
from ..columns import IMAGE_COLUMN, task_column
from ..images import MAX_MEGAPIXELS
from .checks import NAME, checked, checked_pattern, checked_range, is_a, is_inside, is_list_of, known_fields, quoted
from .fields import TaskFiles, parse_task

__all__ = [
    "DESCRIPTION_FILES",
    "NAME",
    "FolderDescription",
    "ImageReading",
    "TaskFiles",
    "description_file",
    "parse_description",
    "read_description",
]

DESCRIPTION_FILES = ("dataset.yaml", "dataset.yml", "dataset.json")

_FIELDS = (
    "images",
    "tasks",
    "splits",
    "skip_splits",
    "image_range",
    "exif",
    "flip",
    "max_megapixels",
    "license",
    "source",
)
# Lists of names may be long; a larger file is none that a person has written.
_LARGEST_BYTES = 2_000_000


@dataclass(frozen=True)
class ImageReading:
    """How a folder's image files are read, see [`read_image`]."""

    value_range: Range | None = None
    upright: bool = True
    max_megapixels: float = MAX_MEGAPIXELS


@dataclass(frozen=True)
class FolderDescription:
    """What is in a folder.

    Args:
        source: Who says so, for messages: the description's file.
        tasks: The tasks, in their order.
        images: A pattern with ``{name}``, or a subfolder.
        splits: ``"subfolders"``, or ``{split: list of names, a file of names, or a fraction}``.
        skip_splits: Subfolders that are no splits.
        reading: How images are read.
        flip: Whether images may be flipped in training.
    """

    source: str
    tasks: dict[str, TaskFiles]
    images: str = "images"
    splits: str | dict[str, Any] = field(default_factory=dict)
    skip_splits: tuple[str, ...] = ()
    reading: ImageReading = ImageReading()
    flip: bool = True


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
        return parse_description(_load(file), str(file))
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {str(error)[:500]}") from error
    except RecursionError as error:
        raise ValueError(f"{file} cannot be read: it is nested too deeply") from error


def parse_description(values: Any, source: str) -> FolderDescription:
    """Check a description; `source` stands before what is wrong with it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected fields such as 'images' and 'tasks', got {quoted(values)}")
    known_fields(values, _FIELDS, source)
    for name in ("license", "source"):  # for people: under which terms, and where from
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{source}: {name}: expected a text, got {quoted(values[name])}")
    tasks = values.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"{source}: tasks: expected {{task: its fields}}, got {quoted(tasks)}")
    try:
        validate_task_names(tasks)
    except ValueError as error:
        raise ValueError(f"{source}: tasks: {str(error)[:500]}") from error
    parsed = {name: parse_task(name, fields, f"{source}: tasks.{name}") for name, fields in tasks.items()}
    columns = [IMAGE_COLUMN, *(task_column(name) for name in parsed)]
    twice = {column for column in columns if columns.count(column) > 1}
    if twice:
        raise ValueError(f"{source}: tasks: more than one would have the column {sorted(twice)[0]!r}: rename one")
    skipped = values.get("skip_splits", [])
    if not is_list_of(skipped, str):
        raise ValueError(f"{source}: skip_splits: expected a list of subfolders, got {quoted(skipped)}")
    return FolderDescription(
        source,
        parsed,
        checked_pattern(values.get("images", "images"), f"{source}: images"),
        _parse_splits(values.get("splits", {}), f"{source}: splits"),
        tuple(skipped),
        _reading(values, source),
        checked(values, "flip", bool, source, True),
    )


def _load(file: Path) -> Any:
    size = file.stat().st_size
    if size > _LARGEST_BYTES:
        raise ValueError(f"{file} cannot be read: it has {size} bytes, and a description {_LARGEST_BYTES} at most")
    text = file.read_text(encoding="utf-8-sig")
    return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)


def _reading(values: Mapping[str, Any], source: str) -> ImageReading:
    megapixels = checked(values, "max_megapixels", Real, source, MAX_MEGAPIXELS)
    if megapixels <= 0:
        raise ValueError(f"{source}: max_megapixels: expected a number above 0, got {megapixels!r}")
    value_range = None
    if "image_range" in values:
        value_range = checked_range(values["image_range"], f"{source}: image_range")
    return ImageReading(value_range, checked(values, "exif", bool, source, True), megapixels)


def _parse_splits(splits: Any, where: str) -> str | dict[str, Any]:
    if splits == "subfolders":
        return splits
    if not isinstance(splits, Mapping) or not all(isinstance(split, str) for split in splits):
        raise ValueError(f"{where}: expected 'subfolders' or {{split: names, file or fraction}}, got {quoted(splits)}")
    for split, value in splits.items():
        fraction = is_a(value, Real) and 0 < value < 1
        names = is_list_of(value, str) and value
        if not (fraction or names or isinstance(value, str)):
            raise ValueError(
                f"{where}.{split}: expected a list of names, a file of names or a fraction, got {quoted(value)}"
            )
        if isinstance(value, str) and not is_inside(value):
            raise ValueError(f"{where}.{split}: expected a file below the dataset's folder, got {quoted(value)}")
    # as far as fractions can be added up: 0.7 + 0.2 + 0.1 is a little less than 1
    left = 1 - sum(value for value in splits.values() if is_a(value, Real))
    if left < -1e-9 or ("train" not in splits and left < 1e-9):
        raise ValueError(f"{where}: the fractions must leave something for 'train', got {quoted(dict(splits))}")
    return dict(splits)
