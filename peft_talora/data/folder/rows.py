"""A folder of image and label files as a `datasets.DatasetDict` that reads a file when its row is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...msam.tasks import TaskSpec
from ..columns import IMAGE_COLUMN, task_column
from ..images import ARRAY_SUFFIX, IMAGE_SUFFIXES, read_image
from .description import NAME, FolderDescription, TaskFiles, parse_description, read_description
from .labels import read_label

_SUFFIXES = (*IMAGE_SUFFIXES, ARRAY_SUFFIX)


def load_folder_dataset(folder: str | Path, description: Mapping[str, Any] | None = None) -> Any:
    """The splits of a folder of image and label files.

    The rows hold paths, and their files are read, checked and converted when a row is asked for. An image without a
    label file of a task is unlabelled for it.

    Args:
        folder: The folder.
        description: What its ``dataset.yaml`` would say; default: read that.

    Returns:
        A `datasets.DatasetDict` whose attribute ``tasks``, ``{name: TaskSpec}``, is what `detect_tasks` gives.

    Raises:
        FileNotFoundError: If there is no such folder, or no description in it.
        ValueError: If the description is not possible or does not fit the files: no image, no label file of a task
            anywhere, a split that names an image that is not there. What is wrong with a label file is told when its
            row is read. Messages name the file and the field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset folder {str(folder)!r} does not exist")
    if description is None:
        parsed = read_description(folder)
    else:
        parsed = parse_description(description, str(folder))
    images = _find(folder, parsed.images)
    if not images:
        raise ValueError(f"{parsed.source}: images: no image file fits {parsed.images!r} in {str(folder)!r}")
    labels = _find_labels(folder, parsed, images)
    splits = _split_names(folder, parsed, list(images))
    return _dataset_dict(parsed, images, labels, splits)


class FolderRows:
    """Reads the files of rows: what `Dataset.with_transform` calls.

    Args:
        tasks: ``{column: (where the description has it, what its files mean)}``.
    """

    def __init__(self, tasks: Mapping[str, tuple[str, TaskFiles]]) -> None:
        self.tasks = dict(tasks)

    def __call__(self, batch: Mapping[str, list[str | None]]) -> dict[str, list[Any]]:
        """Paths to arrays: uint8 (H, W, 3) images, and label maps as [`read_label`] makes them or None."""
        images = [read_image(path) for path in batch.get(IMAGE_COLUMN, [])]
        columns: dict[str, list[Any]] = {IMAGE_COLUMN: images} if images else {}
        for column in batch:
            if column != IMAGE_COLUMN:
                where, task = self.tasks[column]
                # labels alone may be asked for, too
                sizes = [image.shape[:2] for image in images] or [None] * len(batch[column])
                columns[column] = [
                    None if path is None else read_label(Path(path), task, size, where)
                    for path, size in zip(batch[column], sizes, strict=True)
                ]
        return columns


def _find(folder: Path, pattern: str) -> dict[str, Path]:
    """{name: file} of all files that fit a pattern or lie in a subfolder, sorted by name."""
    found: dict[str, Path] = {}
    if NAME in pattern:
        before, after = pattern.split(NAME)
        for path in sorted((folder / before.rpartition("/")[0]).rglob("*")):
            relative = path.relative_to(folder).as_posix()
            fits = (
                relative.startswith(before) and relative.endswith(after) and len(relative) > len(before) + len(after)
            )
            if fits and path.is_file():
                found[relative[len(before) : len(relative) - len(after)]] = path
        return found
    for path in sorted((folder / pattern).rglob("*")):
        if path.suffix.lower() in _SUFFIXES:
            name = path.relative_to(folder / pattern).with_suffix("").as_posix()
            if name in found:
                raise ValueError(f"{found[name]} and {path} have the same name: which one counts?")
            found[name] = path
    return found


def _find_labels(
    folder: Path, description: FolderDescription, images: Mapping[str, Path]
) -> dict[str, dict[str, Path]]:
    labels = {}
    for name, task in description.tasks.items():
        files: dict[str, Path] = {}
        for pattern in reversed(task.files):
            files.update(_find(folder, pattern))
        files = {image: path for image, path in files.items() if image in images}
        if files:
            labels[name] = files
        elif not task.optional:
            example = next(iter(images))
            raise ValueError(
                f"{description.source}: tasks.{name}.files: no file in {str(folder)!r} fits "
                f"{' or '.join(map(repr, task.files))} and an image; for the image {example!r} one was expected at "
                f"{_expected(task.files[0], example)!r}"
            )
    if not labels:
        raise ValueError(
            f"{description.source}: tasks: {str(folder)!r} has label files for none of {list(description.tasks)}"
        )
    return labels


def _expected(pattern: str, name: str) -> str:
    return pattern.replace(NAME, name) if NAME in pattern else f"{pattern}/{name}.png"


def _split_names(folder: Path, description: FolderDescription, names: list[str]) -> dict[str, list[str]]:
    """{split: names of its images}."""
    where = f"{description.source}: splits"
    if description.splits == "subfolders":
        splits: dict[str, list[str]] = {}
        for name in names:
            split, slash, _ = name.partition("/")
            if not slash:
                raise ValueError(f"{where}: the image {name!r} lies in no subfolder that could be a split")
            splits.setdefault(split, []).append(name)
        return splits
    splits = {}
    for split, value in description.splits.items():
        if isinstance(value, list | str):
            listed = value if isinstance(value, list) else _read_names(folder / value, f"{where}.{split}")
            missing = [name for name in listed if name not in set(names)]
            if missing:
                raise ValueError(
                    f"{where}.{split}: missing image {missing[0]!r} ({len(missing)} of {len(listed)} are missing)"
                )
            splits[split] = listed
    splits = _split_fractions(description.splits, names, splits)
    empty = [split for split, members in splits.items() if not members]
    if empty:
        raise ValueError(f"{where}.{empty[0]}: no image is left for it, there are {len(names)}")
    return splits


def _read_names(file: Path, where: str) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {str(file)!r}")
    names = file.read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"{where}: {str(file)!r} names no image")
    return names


def _split_fractions(
    wanted: Mapping[str, Any], names: list[str], listed: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Add the splits that are fractions of all images, and "train" with what is left where nobody names it.

    Who goes where follows from the sorted names alone.
    """
    taken = {name for split in listed.values() for name in split}
    free = [name for name in names if name not in taken]
    order = [free[index] for index in np.random.default_rng(0).permutation(len(free))]
    splits = dict(listed)
    for split, fraction in wanted.items():
        if split not in listed:
            number = max(1, round(fraction * len(names)))
            splits[split], order = sorted(order[:number]), order[number:]
    if "train" not in splits and order:
        splits = {"train": sorted(order), **splits}
    return splits


def _dataset_dict(
    description: FolderDescription,
    images: Mapping[str, Path],
    labels: Mapping[str, Mapping[str, Path]],
    splits: Mapping[str, list[str]],
) -> Any:
    import datasets

    class FolderDatasetDict(datasets.DatasetDict):
        """Splits that know their tasks."""

        tasks: dict[str, TaskSpec]

    columns = {name: task_column(name) for name in labels}
    rows = FolderRows(
        {columns[name]: (f"{description.source}: tasks.{name}", description.tasks[name]) for name in labels}
    )
    features = datasets.Features({column: datasets.Value("string") for column in (IMAGE_COLUMN, *columns.values())})
    found = FolderDatasetDict()
    for split, names in splits.items():
        paths = {IMAGE_COLUMN: [str(images[name]) for name in names]}
        for task, files in labels.items():
            paths[columns[task]] = [str(files[name]) if name in files else None for name in names]
        found[split] = datasets.Dataset.from_dict(paths, features=features).with_transform(rows)
    found.tasks = {name: description.tasks[name].spec for name in labels}
    return found
