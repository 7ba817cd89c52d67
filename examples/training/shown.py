"""The predictions that a run's picture shows, and the file in which the baseline's wait for it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from peft_talora.data import MultiTaskDataset, collate
from peft_talora.saving.directory import written_aside

NUM_IMAGES = 4
SIDE = 256  # longest side of a picture, in pixels

Maps = list[dict[str, np.ndarray]]


def shown_items(rows, tasks, processor) -> list[dict]:
    """The first rows, as the model gets them."""
    dataset = MultiTaskDataset(rows, tasks, processor)
    return [dataset[index] for index in range(min(NUM_IMAGES, len(dataset)))]


def shown_size(item: dict) -> tuple[int, int]:
    """(height, width) of an item's picture."""
    sides = [int(side) for side in item["original_size"]]
    scale = min(1.0, SIDE / max(sides))
    height, width = (max(1, round(side * scale)) for side in sides)
    return height, width


@torch.inference_mode()
def predict_shown(model, items: list[dict]) -> Maps:
    """{task: prediction} of each item, of its picture's size, as [`peft_talora.MSamForMultiTask.post_process`] gives them."""
    model.eval()
    pixels = collate(items)["pixel_values"].to(next(model.parameters()).device)
    found = model.get_base_model().post_process(model(pixel_values=pixels), [shown_size(item) for item in items])
    return [{name: values.cpu().numpy() for name, values in maps.items()} for maps in found]


def keep_predictions(model, processor, rows, tasks, path: Path) -> None:
    """Write what [`predict_shown`] gives for [`load_maps`]. A picture is no reason to stop: what goes wrong is told."""
    path.unlink(missing_ok=True)
    try:
        save_maps(path, predict_shown(model, shown_items(rows, tasks, processor)))
    except Exception as error:
        print(f"{path} could not be written, the picture will do without: {error}", file=sys.stderr)


def save_maps(path: Path, maps: Maps) -> None:
    """Write predictions, all or none."""
    arrays = {f"{index}/{name}": values for index, found in enumerate(maps) for name, values in found.items()}
    with written_aside(path.parent) as aside:
        np.savez_compressed(aside / path.name, **arrays)


def load_maps(path: Path) -> Maps | None:
    """What [`save_maps`] wrote; None where there is nothing that can be read."""
    maps: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                index, _, name = key.partition("/")
                maps.setdefault(index, {})[name] = arrays[key]
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return list(maps.values())
