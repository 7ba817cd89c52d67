"""A folder of image and label files as a `datasets.DatasetDict` that reads a file when its row is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..columns import IMAGE_COLUMN, task_column
from ..extras import import_datasets
from ..images import found_range, read_header, read_image
from .description import FolderDescription, ImageReading, TaskFiles, parse_description, read_description
from .files import FolderFiles, find_files
from .labels import read_label
from .splits import split_names

if TYPE_CHECKING:
    from datasets import DatasetDict

# So many images are looked into to find out how their numbers are meant.
_LOOKED_INTO = 32


def load_folder_dataset(folder: str | Path, description: Mapping[str, Any] | None = None) -> DatasetDict:
    """The splits of a folder of image and label files.

    The rows hold paths, and their files are read, checked and converted when a row is asked for. An image without a
    label file of a task is unlabelled for it.

    Args:
        folder: The folder.
        description: What its ``dataset.yaml`` would say; default: read that.

    Returns:
        A `datasets.DatasetDict` with three more attributes: ``tasks``, ``{name: TaskSpec}``, is what `detect_tasks` gives,
        ``description`` and ``files`` what was read and found.

    Raises:
        FileNotFoundError: If there is no such folder, or no description in it.
        ImportError: If `datasets` is not installed.
        ValueError: If the description is not possible or does not fit the files: no image, no label file of a task
            anywhere, a split that names an image that is not there. What is wrong with a label file is told when its
            row is read. Messages name the file and the field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset folder {str(folder)!r} does not exist")
    parsed = read_description(folder) if description is None else parse_description(description, str(folder))
    files = find_files(folder, parsed)
    splits = split_names(folder, parsed, files.images)
    if parsed.reading.value_range is None:
        parsed = replace(parsed, reading=replace(parsed.reading, value_range=_common_range(parsed, files)))
    return _dataset_dict(parsed, files, splits)


class FolderRows:
    """Reads the files of rows: what `Dataset.with_transform` calls.

    Args:
        tasks: ``{column: (where the description has it, what its files mean)}``.
        reading: How image files are read.
    """

    def __init__(
        self,
        tasks: Mapping[str, tuple[str, TaskFiles]],
        reading: ImageReading = ImageReading(),  # noqa: B008
    ) -> None:
        self.tasks = dict(tasks)
        self.reading = reading

    def __call__(self, batch: Mapping[str, list[str | None]]) -> dict[str, list[Any]]:
        """Paths to arrays: uint8 (H, W, 3) images, and label maps as [`read_label`] makes them or None."""
        images = [self.image(path) for path in batch.get(IMAGE_COLUMN, []) if path is not None]
        columns: dict[str, list[Any]] = {IMAGE_COLUMN: images} if images else {}
        # labels alone may be asked for, too
        sources = batch.get(IMAGE_COLUMN) or [None] * max(map(len, batch.values()), default=0)
        sizes: list[tuple[int, int] | None] = [image.shape[:2] for image in images] or [None] * len(sources)
        for column in batch:
            if column != IMAGE_COLUMN:
                columns[column] = [
                    None if path is None else self.label(column, path, size, source)
                    for path, size, source in zip(batch[column], sizes, sources, strict=True)
                ]
        return columns

    def image(self, path: str) -> np.ndarray:
        """The image of a file, uint8 (H, W, 3)."""
        return read_image(path, self.reading.value_range, self.reading.upright, self.reading.max_megapixels)

    def label(self, column: str, path: str, size: tuple[int, int] | None, image: str | None = None) -> np.ndarray:
        """The label map of a file for an image of this size."""
        where, task = self.tasks[column]
        return read_label(Path(path), task, size, where, image=image, reading=self.reading)


def _common_range(description: FolderDescription, files: FolderFiles) -> tuple[float, float] | None:
    """The numbers that are black and white in images of more than 8 bits, as a sample of them says."""
    paths = list(files.images.values())
    megapixels = description.reading.max_megapixels
    ranges: list[tuple[float, float]] = []
    for path in paths[:: max(1, len(paths) // _LOOKED_INTO)]:
        try:
            mode = read_header(path, megapixels).mode
            if mode.startswith(("I", "F", "uint16", "float")):
                ranges += filter(None, [found_range(path, megapixels)])
        except ValueError:
            # whoever reads its row hears of it
            continue
    if not ranges:
        return None
    common = max(ranges)
    if common not in ((0.0, 1.0), (0.0, 65535.0)):
        warnings.warn(
            f"{description.source}: images hold numbers of more than 8 bits, and {common[1]:g} is taken for white: "
            f"`image_range: [0, {common[1]:g}]` says so",
            stacklevel=4,
        )
    return common


def _dataset_dict(description: FolderDescription, files: FolderFiles, splits: Mapping[str, Sequence[str]]) -> Any:
    datasets, labels = import_datasets(), files.labels
    columns = {name: task_column(name) for name in labels}
    rows = FolderRows(
        {columns[name]: (f"{description.source}: tasks.{name}", description.tasks[name]) for name in labels},
        description.reading,
    )
    features = datasets.Features({column: datasets.Value("string") for column in (IMAGE_COLUMN, *columns.values())})
    dataset = datasets.DatasetDict()
    for split, names in splits.items():
        paths: dict[str, list[str | None]] = {IMAGE_COLUMN: [str(files.images[name]) for name in names]}
        for task, matched in labels.items():
            paths[columns[task]] = [str(matched[name]) if name in matched else None for name in names]
        dataset[split] = datasets.Dataset.from_dict(paths, features=features).with_transform(rows)
    # beside the splits: what their tasks are, and where they are from
    dataset.tasks = {name: description.tasks[name].spec for name in labels}
    dataset.description, dataset.files, dataset.content = description, files, repr(description)
    used = {name for names in splits.values() for name in names}
    dataset.left_out = [name for name in files.images if name not in used]
    return dataset
