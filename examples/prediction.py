"""A picture on its way through the model, and its maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import peft_talora as pt

VIEW_SIDE = 2048  # longest side of an overlay: it is there to be looked at


@dataclass
class Picture:
    """A picture on its way through the model.

    Args:
        name: Its folder in the output.
        file: Where it was.
        size: Its (height, width).
        view: The picture, at most `VIEW_SIDE` long, uint8 (h, w, 3).
        pixel_values: The model's input (3, S, S).
        image: The picture at its own resolution, where it goes through the model in tiles.
    """

    name: str
    file: Path
    size: tuple[int, int]
    view: np.ndarray
    pixel_values: torch.Tensor
    image: np.ndarray | None = None


def make_picture(name: str, file: Path, image: np.ndarray, processor: pt.MSamProcessor, tile: bool = False) -> Picture:
    """ValueError where the image cannot be shown to the model."""
    pixel_values = processor([image])["pixel_values"][0]
    view = shrink_image(image, VIEW_SIDE)
    return Picture(name, file, image.shape[:2], view, pixel_values, image if tile else None)


class Maps(Mapping):
    """{task: array} of a picture at its resolution. Each is computed when it is asked for: all at once could be too much."""

    def __init__(self, tasks: Sequence[str], compute: Callable[[str], torch.Tensor]) -> None:
        self._tasks = list(tasks)
        self._compute = compute

    def __getitem__(self, task: str) -> np.ndarray:
        if task not in self._tasks:
            raise KeyError(task)
        values = self._compute(task)
        return values.numpy().astype(array_type(values), copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


@contextmanager
def one_thread() -> Iterator[None]:
    """Maps are made and drawn in strips so small that threads would wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def predict(model, pictures: Sequence[Picture], tasks: Sequence[str]) -> list[Maps]:
    """The maps of each picture, from one forward of the model."""
    pixels = torch.stack([picture.pixel_values for picture in pictures]).to(model.device)
    logits = {name: values.float().cpu() for name, values in model(pixel_values=pixels, tasks=tasks).logits.items()}

    def compute(index: int, task: str) -> torch.Tensor:
        one = pt.MSamOutput(logits={task: logits[task][index : index + 1]})
        with one_thread():
            return model.get_base_model().post_process(one, [pictures[index].size])[0][task]

    return [Maps(tasks, functools.partial(compute, index)) for index in range(len(pictures))]


def array_type(values: torch.Tensor) -> type:
    if values.is_floating_point():
        return np.float32
    return np.uint8 if values.max() < 256 else np.int32


def shrink_image(image: np.ndarray, side: int) -> np.ndarray:
    """An image, uint8 (H, W, 3), whose longest side is no longer than that."""
    factor = min(1.0, side / max(image.shape[:2]))
    if factor == 1:
        return image
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def shrink_map(values: np.ndarray, size: tuple[int, int], axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """What is nearest to the pixels of a smaller map (h, w) in one whose height and width are the axes."""
    for axis, new in zip(axes, size, strict=True):
        old = values.shape[axis]
        if new != old:
            values = values.take(((np.arange(new) + 0.5) * (old / new)).astype(int), axis)
    return values
