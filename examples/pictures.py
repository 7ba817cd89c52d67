"""Pictures of labels and predictions, to be judged by a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from legends import classes_shown, draw_legend, legend_inches
from plotting import fonts_for, plt
from torch.nn import functional as F
from training.shown import Maps, predict_shown, shown_items, shown_size

from peft_talora import TaskSpec
from peft_talora.drawing import color_range, draw

# in inches: a picture's width, the space between pictures, between tasks, and for titles
WIDTH, GAP, TASK_GAP, TITLES, DPI = 1.5, 0.04, 0.16, 0.36, 110


def draw_predictions(model, processor, rows, tasks: Mapping[str, TaskSpec], path: Path, others=None) -> None:
    """Draw the first test images: input, and for every task the truth beside the predictions, with a legend.

    Args:
        model: A tuned mSAM.
        processor: Its processor.
        rows: The test rows.
        tasks: `{name: TaskSpec}`.
        path: Where the picture goes.
        others: `{title: predictions}` of other models for the same rows, as [`predict_shown`] gives them: columns
            before the model's own. None where they are not known.
    """
    items = shown_items(rows, tasks, processor)
    truth = [{name: _crop(item["labels"][name], item, processor).numpy() for name in tasks} for item in items]
    others = {title: maps for title, maps in (others or {}).items() if maps is not None}
    columns = {"truth": truth, **others, "prediction": predict_shown(model, items)}
    _save_grid([_image(item, processor) for item in items], columns, tasks, path)


def _crop(values: torch.Tensor, item: dict, processor) -> torch.Tensor:
    """Take the padding off a square (..., S, S) map."""
    height, width = processor.size_in_square([int(side) for side in item["original_size"]])
    return values[..., :height, :width]


def _image(item: dict, processor) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    image = _crop(item["pixel_values"], item, processor) * std + mean
    image = F.interpolate(image[None].clamp(0, 1), size=shown_size(item), mode="bilinear", align_corners=False)[0]
    return (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def _save_grid(
    images: list[np.ndarray], columns: Mapping[str, Maps], tasks: Mapping[str, TaskSpec], path: Path
) -> None:
    # every place is known, so that there is no gap between pictures of whatever shape
    lefts = [WIDTH + TASK_GAP + index * (len(columns) * (WIDTH + GAP) - GAP + TASK_GAP) for index in range(len(tasks))]
    heights = [WIDTH * image.shape[0] / image.shape[1] for image in images]
    seen = {name: classes_shown(spec, _all(columns, name)) for name, spec in tasks.items()}
    legend = max(legend_inches(spec, seen[name]) for name, spec in tasks.items())
    width = lefts[-1] + len(columns) * (WIDTH + GAP) + GAP
    height = TITLES + sum(heights) + GAP * len(images) + legend + 0.2
    texts = [name for spec in tasks.values() for name in spec.class_names or ()]
    with fonts_for([*texts, *tasks, *columns]):
        figure = plt.figure(figsize=(width, height))

        def place(left: float, top: float, wide: float, high: float):
            return figure.add_axes(((left + GAP) / width, 1 - (top + high) / height, wide / width, high / height))

        def write(left: float, top: float, text: str, **style) -> None:
            figure.text((left + GAP) / width, 1 - top / height, text, ha="center", va="center", **style)

        write(WIDTH / 2, 0.27, "image", fontsize=8)
        for image, high, top in zip(images, heights, _tops(heights), strict=True):
            _show(place(0, top, WIDTH, high), image)
        for (name, spec), left in zip(tasks.items(), lefts, strict=True):
            span = len(columns) * (WIDTH + GAP) - GAP
            write(left + span / 2, 0.1, name, fontsize=9, fontweight="bold")
            # one scale, that of the truth where there is any: equal colours mean equal values
            scale = color_range(spec, [maps[name] for maps in columns["truth"]]) or color_range(
                spec, _all(columns, name)
            )
            for number, (title, maps) in enumerate(columns.items()):
                at = left + number * (WIDTH + GAP)
                write(at + WIDTH / 2, 0.27, title, fontsize=8)
                for found, high, top in zip(maps, heights, _tops(heights), strict=True):
                    _show(place(at, top, WIDTH, high), draw(spec, found[name], scale))
            draw_legend(place(left, height - legend - 0.12, span, legend), spec, seen[name], scale)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _tops(heights: list[float]) -> list[float]:
    return [TITLES + sum(heights[:row]) + GAP * row for row in range(len(heights))]


def _all(columns: Mapping[str, Maps], task: str) -> list[np.ndarray]:
    return [maps[task] for column in columns.values() for maps in column]


def _show(axis, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
