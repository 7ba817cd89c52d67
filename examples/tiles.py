"""Large images tile by tile at their own resolution: micrographs, aerial images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import peft_talora as pt
from peft_talora.losses import resize_logits


@torch.inference_mode()
def predict_tiled(
    model: torch.nn.Module,
    processor: pt.MSamProcessor,
    side: int,
    batch_size: int,
    image: np.ndarray,
    task: str,
) -> Tensor:
    """The prediction of one task, as ``post_process`` gives it, from overlapping tiles.

    The logits of the tiles are averaged where they overlap, a quarter of a tile, with weights that fall towards the edges
    of a tile: what the model sees least of counts least. Only a band of the image as high as a tile is held as logits.

    Args:
        model: A tuned mSAM.
        processor: Its processor.
        side: Side of a tile in pixels of the image; it is resized to the model's input where that has another one.
        batch_size: Tiles per forward.
        image: uint8 (H, W, 3).
        task: The task's name.
    """
    spec = model.get_base_model().task_specs[task]
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, max(0, side - height)), (0, max(0, side - width)), (0, 0)), mode="edge")
    tops, lefts = (tile_starts(length, side) for length in padded.shape[:2])
    window = tile_window(side)
    result = None
    band = torch.zeros(spec.num_channels, side, padded.shape[1])
    weight = torch.zeros(side, padded.shape[1])
    for top, following in zip(tops, [*tops[1:], padded.shape[0]], strict=True):
        for left, logits in _row_of_tiles(model, processor, padded[top : top + side], task, lefts, batch_size):
            band[..., left : left + side] += window * logits
            weight[:, left : left + side] += window
        # no later tile reaches these rows
        done = following - top
        rows = spec.task_kind.activation((band[:, :done] / weight[:done])[None])[0][..., :width]
        if result is None:
            result = rows.new_empty((*rows.shape[:-2], padded.shape[0], width))
        result[..., top:following, :] = rows
        band[:, : side - done], weight[: side - done] = band[:, done:].clone(), weight[done:].clone()
        band[:, side - done :], weight[side - done :] = 0, 0
    return result[..., :height, :]


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles begin that cover a length, which is no less than a side, and overlap by a quarter at least."""
    number = 1 + math.ceil((length - side) / (side - side // 4))
    return [round(start) for start in np.linspace(0, length - side, number)]


def tile_window(side: int) -> Tensor:
    """Weights (side, side): 1, and falling over the outer quarter to all but nothing."""
    distance = torch.arange(side) + 0.5
    ramp = (torch.minimum(distance, side - distance) / max(side // 4, 1)).clamp(max=1)
    return ramp[:, None] * ramp


def _row_of_tiles(
    model: torch.nn.Module,
    processor: pt.MSamProcessor,
    strip: np.ndarray,
    task: str,
    lefts: list[int],
    batch_size: int,
) -> Iterator[tuple[int, Tensor]]:
    """(left edge, logits (N, side, side)) of each tile of a strip of the image."""
    side = strip.shape[0]
    for start in range(0, len(lefts), batch_size):
        some = lefts[start : start + batch_size]
        pixels = processor([strip[:, left : left + side] for left in some])["pixel_values"].to(model.device)
        logits = model(pixel_values=pixels, tasks=[task]).logits[task].float().cpu()
        square = resize_logits(logits, (processor.image_size, processor.image_size))
        yield from zip(some, resize_logits(square, (side, side)), strict=True)
