"""A set of pictures with labels, and the `folder:` dataset that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Options:
    """What a user chooses.

    Attributes:
        size: Side of the tiles, or the longest side of whole pictures, in pixels.
        tiles: At most so many tiles of one picture.
        split: One of the set's `splits`.
        seed: Which pictures go where, and which tiles are taken.
    """

    size: int = 128
    tiles: int = 4
    split: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """A picture with its labels.

    Attributes:
        name: Names its files; no white space.
        split: One of `SPLITS`.
        image: (H, W, 3) uint8.
        labels: `{task: array}` as it goes into a PNG: (H, W) uint8 or uint16, or (H, W, 3) uint8.
    """

    name: str
    split: str
    image: np.ndarray
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class RealSet:
    """A public set.

    Attributes:
        repository: Its address on GitHub.
        license: Under which terms the pictures are.
        tasks: What the dataset's description says of each task.
        needs: Paths that a clone has.
        samples: Yields the samples of a clone.
        splits: Ways to split it; the first is the usual one.
    """

    repository: str
    license: str
    tasks: dict[str, dict[str, Any]]
    needs: tuple[str, ...]
    samples: Callable[[Path, Options], Iterator[Sample]]
    splits: tuple[str, ...]


def check_clone(clone: Path, real_set: RealSet) -> None:
    """See whether a folder is a clone of the set's repository.

    Raises:
        FileNotFoundError: If something is missing. The message says what, and how to get it.
    """
    missing = [path for path in real_set.needs if not (clone / path).exists()]
    if missing:
        raise FileNotFoundError(
            f"{clone} has no {missing[0]!r}, so it is no clone of {real_set.repository}: "
            f"git clone --depth 1 {real_set.repository}"
        )


def write_folder(samples: Iterable[Sample], real_set: RealSet, folder: Path) -> dict[str, int]:
    """Write samples and the description into an empty folder: `{split: number of pictures}`.

    Raises:
        ValueError: If a split is left without pictures.
    """
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for sample in samples:
        names[sample.split].append(sample.name)
        for column, values in {"images": sample.image, **sample.labels}.items():
            (folder / column).mkdir(exist_ok=True)
            Image.fromarray(values).save(folder / column / f"{sample.name}.png")
    empty = [split for split, listed in names.items() if not listed]
    if empty:
        raise ValueError(f"no picture is left for the split {empty[0]!r}: the clone has too few")
    for split, listed in names.items():
        (folder / f"{split}.txt").write_text("\n".join(listed) + "\n")
    description = {
        "source": real_set.repository,
        "license": real_set.license,
        "images": "images",
        "tasks": real_set.tasks,
        "splits": {split: f"{split}.txt" for split in SPLITS},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    return {split: len(listed) for split, listed in names.items()}


def random_splits(number: int, seed: int, validation: float = 0.1, test: float = 0.1) -> list[str]:
    """Return the split of each of `number` pictures; every split has one if there are three."""
    counts = [max(1, round(share * number)) for share in (validation, test)]
    kinds = ["validation"] * counts[0] + ["test"] * counts[1] + ["train"] * max(0, number - sum(counts))
    order = np.random.default_rng(seed).permutation(number)
    splits = [""] * number
    for index, kind in zip(order, kinds, strict=False):
        splits[index] = kind
    return splits
