"""COCO annotations, as LabelMe, CVAT and Roboflow export them: outlines of objects become label maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kinds import TaskSpec
from .columns import IGNORE_INDEX, IMAGE_COLUMN, task_column
from .extras import import_coco_masks, import_datasets
from .folder.checks import is_inside, quoted
from .images import read_header, read_image
from .rows import file_state

if TYPE_CHECKING:
    from datasets import DatasetDict

BACKGROUND = "background"
TASKS = ("semantic", "saliency", "edges")

# Roboflow's exports have a folder for each split with this file in it.
_ROBOFLOW = "_annotations.coco.json"
_COCO = "annotations/instances_*.json"
# What a file has, and what each entry of it has.
_KEYS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}


def load_coco(path: str | Path) -> DatasetDict:
    """Images and the outlines of their objects as a dataset of three tasks.

    "semantic" has the categories, after a background, where objects overlap the smaller one's; "saliency" is what any object
    covers, "edges" the outlines between objects and around them. An object without an outline, of which only a box is
    known, makes its box unlabelled; for outlines the crowds are unlabelled, too.

    Args:
        path: A file of annotations, whose images lie beside it, in ``images/`` there or one level up, or in a folder of the split's
            name; or a folder of such files: ``annotations/instances_SPLIT.json``, or ``SPLIT/_annotations.coco.json``.

    Returns:
        A `datasets.DatasetDict` with an attribute ``tasks``. One file is the split "train".

    Raises:
        FileNotFoundError: If there is no such file, or none of the images.
        ImportError: If `datasets` or pycocotools is not installed.
        ValueError: If the file is no list of annotations, or no object in it has an outline.
    """
    datasets = import_datasets()
    import_coco_masks()
    files = _annotation_files(Path(path).expanduser())
    contents = {split: _read(file) for split, file in files.items()}
    categories = _categories(files, contents)
    used = {annotation["category_id"] for content in contents.values() for annotation in content["annotations"]}
    ids = sorted(number for number in categories if number in used)
    classes = {number: position for position, number in enumerate(ids, start=1)}
    columns = {name: task_column(name) for name in TASKS}
    features = {IMAGE_COLUMN: datasets.Value("string"), **dict.fromkeys(columns.values(), datasets.Value("int64"))}
    dataset = datasets.DatasetDict()
    for split, content in contents.items():
        images = [(image["id"], str(_image_file(files[split], image["file_name"]))) for image in content["images"]]
        values = {IMAGE_COLUMN: [file for _, file in images]}
        values |= {column: [number for number, _ in images] for column in columns.values()}
        rows = CocoRows(content["annotations"], classes, files[split], content["images"])
        dataset[split] = datasets.Dataset.from_dict(values, features=datasets.Features(features)).with_transform(rows)
    dataset.content = repr([file_state(file) for file in files.values()])
    names = [BACKGROUND, *(categories[number] for number in ids)]
    dataset.tasks = {
        "semantic": TaskSpec("semantic", len(names), class_names=names),
        "saliency": TaskSpec("binary"),
        "edges": TaskSpec("binary"),
    }
    return dataset


class CocoRows:
    """Reads images and draws label maps: what `Dataset.with_transform` calls.

    Args:
        annotations: The objects of all images.
        classes: ``{category: class}``.
        source: The file that they are from.
        images: The images, with the sizes that the outlines belong to where the file says them.
    """

    def __init__(
        self,
        annotations: Sequence[Mapping[str, Any]],
        classes: Mapping[int, int],
        source: Path,
        images: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes, self.source = dict(classes), source
        self.sizes = {
            image["id"]: (image["height"], image["width"]) for image in images if {"height", "width"} <= image.keys()
        }
        self._objects: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in annotations:
            self._objects.setdefault(annotation["image_id"], []).append(annotation)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Paths to images, and numbers of images to label maps, where -1 is unlabelled."""
        asked = [name for name in TASKS if task_column(name) in batch]
        files = batch.get(IMAGE_COLUMN)
        if files is None:
            raise ValueError(f"label maps are drawn at the size of their images: ask for {IMAGE_COLUMN!r}, too")
        columns: dict[str, list[Any]] = {IMAGE_COLUMN: [read_image(file) for file in files]}
        if asked:
            numbers = batch[task_column(asked[0])]
            images = zip(numbers, columns[IMAGE_COLUMN], files, strict=True)
            maps = [self.label_maps(number, image.shape[:2], file) for number, image, file in images]
            columns |= {task_column(name): [each[name] for each in maps] for name in asked}
        return columns

    def label_maps(self, number: int, size: tuple[int, int], file: str) -> dict[str, np.ndarray]:
        """``{task: int64 (H, W)}`` of an image. Raises ValueError where its outlines belong to one of another size."""
        height, width = self.sizes.get(number, size)
        if (height, width) != tuple(size):
            raise ValueError(
                f"{self.source}: the outlines of {file} are for {width} x {height} pixels, {_size_of(file, size)}"
            )
        classes = np.zeros(size, dtype=np.int64)
        instances = np.zeros(size, dtype=np.int64)
        crowd, unknown = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        objects = sorted(self._objects.get(number, []), key=lambda item: -float(item.get("area") or np.inf))
        for position, item in enumerate(objects, start=1):
            mask = self._mask(item, size, file)
            if mask is None:
                unknown |= _box(item, size)
                continue
            classes[mask], instances[mask] = self.classes[item["category_id"]], position
            if item.get("iscrowd"):
                crowd |= mask
        unknown &= classes == 0
        edges = _outlines(instances)
        return {
            "semantic": np.where(unknown, -1, classes),
            "saliency": np.where(unknown, -1, (classes > 0).astype(np.int64)),
            "edges": np.where(unknown | crowd, -1, edges.astype(np.int64)),
        }

    def _mask(self, item: Mapping[str, Any], size: tuple[int, int], file: str) -> np.ndarray | None:
        masks, outline = import_coco_masks(), item.get("segmentation")
        if isinstance(outline, list):
            # two points enclose nothing
            outline = [part for part in outline if not isinstance(part, list) or len(part) >= 6]
        if not outline:
            return None
        try:
            if isinstance(outline, list):
                encoded = masks.merge(masks.frPyObjects(outline, *size))
            else:
                encoded = masks.frPyObjects(outline, *size) if isinstance(outline["counts"], list) else outline
            if list(encoded["size"]) != list(size):
                raise ValueError(f"its mask is {encoded['size'][1]} x {encoded['size'][0]}, {_size_of(file, size)}")
            return masks.decode(encoded).astype(bool)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{self.source}: annotation {item.get('id')} of {file} has no mask: {error}") from error


def _size_of(file: str, size: tuple[int, int]) -> str:
    header = read_header(file)
    turned = f", turned as its EXIF orientation ({header.orientation}) says" if header.orientation > 1 else ""
    return f"its image {size[1]} x {size[0]}{turned}"


def _box(item: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    left, top, width, height = item.get("bbox") or (0, 0, 0, 0)
    inside = np.zeros(size, dtype=bool)
    inside[int(max(top, 0)) : int(np.ceil(top + height)), int(max(left, 0)) : int(np.ceil(left + width))] = True
    return inside


def _outlines(instances: np.ndarray) -> np.ndarray:
    """Pixels of objects that have a neighbour, above, below or beside them, that is of another one or of none."""
    edges = np.zeros(instances.shape, dtype=bool)
    for first, second in (
        ((slice(1, None),), (slice(None, -1),)),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        differ = instances[first] != instances[second]
        edges[first] |= differ & (instances[first] > 0)
        edges[second] |= differ & (instances[second] > 0)
    return edges


def _annotation_files(path: Path) -> dict[str, Path]:
    """{split: file of annotations}."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise FileNotFoundError(f"COCO annotations {str(path)!r} do not exist")
    files = {file.parent.name: file for file in sorted(path.glob(f"*/{_ROBOFLOW}"))}
    for file in sorted(path.glob(_COCO)):
        split = file.stem.removeprefix("instances_").rstrip("0123456789")
        files[split.strip("_-") or file.stem] = file
    if not files:
        raise FileNotFoundError(
            f"{str(path)!r} has no COCO annotations: expected {_COCO}, or SPLIT/{_ROBOFLOW}, or say which file it is"
        )
    return files


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {str(error)[:300]}") from error
    if not isinstance(content, dict) or not _KEYS.keys() <= content.keys():
        raise ValueError(f"{file} holds no COCO annotations: expected 'images', 'annotations' and 'categories'")
    for part, keys in _KEYS.items():
        odd = next(
            (item for item in content[part] if not isinstance(item, dict) or any(key not in item for key in keys)),
            None,
        )
        if odd is not None:
            raise ValueError(f"{file}: {part} have {' and '.join(map(repr, keys))} each, got {quoted(odd)}")
    if content["annotations"] and not any(item.get("segmentation") for item in content["annotations"]):
        raise ValueError(f"{file} has boxes alone: dense tasks need the outlines of objects ('segmentation')")
    known = {category["id"] for category in content["categories"]}
    stray = next((item for item in content["annotations"] if item.get("category_id") not in known), None)
    if stray is not None:
        raise ValueError(
            f"{file}: annotation {stray.get('id')} is of the category {stray.get('category_id')}, which is not there"
        )
    if len(known) >= IGNORE_INDEX:
        raise ValueError(f"{file} has {len(known)} categories, expected fewer than {IGNORE_INDEX}")
    return content


def _categories(files: Mapping[str, Path], contents: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
    """{category: its name}, of all files; ValueError where two of them mean different things by one number."""
    names: dict[int, tuple[str, Path]] = {}
    for split, content in contents.items():
        for each in content["categories"]:
            name, file = names.setdefault(each["id"], (each["name"], files[split]))
            if name != each["name"]:
                raise ValueError(
                    f"{files[split]}: category {each['id']} is {each['name']!r}, in {file} it is {name!r}: a category has one "
                    "meaning in all files"
                )
    return {number: name for number, (name, _) in names.items()}


def _image_file(annotations: Path, name: str) -> Path:
    """Where an image of a file of annotations is."""
    if not is_inside(name):
        raise ValueError(f"{annotations}: expected the image's file relative to a folder, got {quoted(name)}")
    beside = annotations.parent
    split = annotations.stem.removeprefix("instances_")
    folders = (
        beside,
        beside / "images",
        beside.parent / split,
        beside.parent / "images",
        beside.parent / "images" / split,
        beside.parent,
    )
    image = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if image is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(f"{annotations}: the image {name!r} is in none of {looked}")
    return image
