"""Folders of small pictures with label files."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

SEMANTIC = {"semantic": {"files": "labels", "class_names": ["background", "object"]}}


def mask(index=0, size=(12, 16)):
    """A square of ones in zeros, further right for a larger index."""
    classes = np.zeros(size, "uint8")
    classes[2:6, 2 + index : 8 + index] = 1
    return classes


def picture(index=0, size=(12, 16)):
    return Image.fromarray(np.stack([mask(index, size) * 180] * 3, axis=-1))


def write_folder(folder, tasks=SEMANTIC, number=4, label=lambda mask: mask, suffix="png", **fields):
    """Images 0 to number - 1, a label of each in `labels`, and the description."""
    folder = Path(folder)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(number):
        picture(index).save(folder / f"images/{index}.png")
        values = label(mask(index))
        if suffix == "npy":
            np.save(folder / f"labels/{index}.npy", values)
        else:
            Image.fromarray(values).save(folder / f"labels/{index}.{suffix}")
    describe(folder, tasks=tasks, **fields)
    return folder


def describe(folder, **fields):
    (folder / "dataset.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
