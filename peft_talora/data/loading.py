"""Datasets by name: parquet, what `save_to_disk` wrote, the Hub, and folders of image and label files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .coco import load_coco
from .extras import import_datasets
from .folder.description import description_file
from .folder.rows import load_folder_dataset
from .folder.schemas import SCHEMAS

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER_PREFIX, COCO_PREFIX = "folder", "coco"


def load_multitask_dataset(name_or_path: str | Path) -> DatasetDict:
    """Load a dataset with a "train" split.

    Args:
        name_or_path: A folder of parquet files (split by file names such as ``train-*.parquet``), one that
            `save_to_disk` wrote, or a dataset of the Hub. ``"folder:PATH"`` is a folder of image and label files that
            its ``dataset.yaml`` or ``dataset.json`` describes, and ``"cityscapes:PATH"`` or
            ``"pascal_context:PATH"`` one whose layout is known ([`SCHEMAS`]). ``"coco:PATH"`` are images with outlines of
            objects, see [`load_coco`].

    Returns:
        Its splits.

    Raises:
        ImportError: If `datasets`, or for COCO pycocotools, is not installed.
        FileNotFoundError: If it is no folder, and no dataset that can be had from the Hub.
        ValueError: If the folder has no data, there is no "train" split, or a folder's description does not fit its
            files; the message names the file and the field.
    """
    prefix, _, rest = str(name_or_path).partition(":")
    if rest and prefix == COCO_PREFIX:
        splits = load_coco(rest)
    elif rest and prefix in (FOLDER_PREFIX, *SCHEMAS):
        splits = load_folder_dataset(Path(rest).expanduser(), SCHEMAS.get(prefix))
    else:
        splits = _load_rows(name_or_path)
    if "train" not in splits:
        raise ValueError(f"dataset {str(name_or_path)!r} has no split 'train', only {list(splits)}")
    return splits


def _load_rows(name_or_path: str | Path) -> DatasetDict:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if path.exists() or path.is_absolute() or len(path.parts) > 2 or str(name_or_path).startswith((".", "~")):
        problem = "is a file, expected a folder of parquet files" if path.exists() else "does not exist"
        raise FileNotFoundError(f"dataset folder {str(path)!r} {problem}")
    return _load_from_hub(str(name_or_path))


def _load_folder(path: Path) -> DatasetDict:
    datasets = import_datasets()
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").exists():
        return datasets.DatasetDict(train=datasets.load_from_disk(str(path)))
    if any(path.rglob("*.parquet")):
        return datasets.load_dataset(str(path))
    if description_file(path) is not None:
        return load_folder_dataset(path)
    raise ValueError(
        f"dataset folder {str(path)!r} has no parquet file, and no dataset.yaml that describes other files"
    )


def _load_from_hub(name: str) -> DatasetDict:
    datasets = import_datasets()
    try:
        return datasets.load_dataset(name)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        message = f"dataset {name!r} is no local folder (looked in {str(Path.cwd())!r}), and the Hub does not give it"
        raise FileNotFoundError(f"{message}: {error}") from error
