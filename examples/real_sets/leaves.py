"""Coffee leaves with symptoms of diseases and pests: leaf, symptom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .pictures import read_rgb, tiles
from .writing import Options, RealSet, Sample

ROOT = "segmentation/dataset"
SPLIT_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
# of the annotations: background, leaf, symptom
COLORS = np.array([[0, 0, 0], [0, 176, 0], [255, 0, 0]])


def samples(clone: Path, options: Options) -> Iterator[Sample]:
    """Yield tiles at the pictures' own resolution, where symptoms of a few pixels can be seen.

    Most of a picture is healthy leaf and background: half of its tiles, rounded up, show a symptom where there are such.
    """
    rng = np.random.default_rng(options.seed)
    for split, folder in SPLIT_FOLDERS.items():
        for path in sorted((clone / ROOT / "images" / folder).glob("*.jpg")):
            image = read_rgb(path)
            classes = read_classes(clone / ROOT / "annotations" / folder / f"{path.stem}_mask.png", image.shape[:2])
            for number, here in enumerate(choose_tiles(rng, classes, options)):
                labels = {"leaf": classes[here] > 0, "symptom": classes[here] == 2}
                labels = {task: values.astype(np.uint8) for task, values in labels.items()}
                yield Sample(f"{split}-{path.stem}-{number}", split, image[here], labels)


def read_classes(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W) uint8: 0 background, 1 leaf, 2 symptom, by the nearest of the annotations' colours."""
    colors = read_rgb(path).astype(int)
    if colors.shape[:2] != shape:
        raise ValueError(f"{path} has the shape {colors.shape[:2]}, its picture {shape}")
    return np.stack([np.abs(colors - color).sum(-1) for color in COLORS]).argmin(0).astype(np.uint8)


def choose_tiles(rng: np.random.Generator, classes: np.ndarray, options: Options) -> list[tuple[slice, slice]]:
    """Return at most `options.tiles` tiles that show leaf, those with a symptom first."""
    places = [here for here in tiles(*classes.shape, options.size) if classes[here].any()]
    places = [places[index] for index in rng.permutation(len(places))]
    ill = [here for here in places if (classes[here] == 2).any()]
    healthy = [here for here in places if not (classes[here] == 2).any()]
    first = ill[: max(-(-options.tiles // 2), options.tiles - len(healthy))]
    return first + healthy[: options.tiles - len(first)]


LEAVES = RealSet(
    repository="https://github.com/esgario/lara2018",
    license="MIT",
    tasks={"leaf": {"kind": "binary"}, "symptom": {"kind": "binary"}},
    needs=(f"{ROOT}/images/train", f"{ROOT}/annotations/train"),
    samples=samples,
    splits=("published",),
)
