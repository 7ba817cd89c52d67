"""Pictures of labels and predictions, to be judged by a person."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from peft_talora.data import MultiTaskDataset, collate
from peft_talora.drawing import color_range, draw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# a dollar in the name of a file or a class is one
matplotlib.rcParams["text.parse_math"] = False


@torch.inference_mode()
def draw_predictions(model, processor, rows, tasks, path: Path, num_images: int = 4) -> None:
    """Draw the first test images: input, and for every task the truth beside the prediction.

    Args:
        model: A tuned mSAM.
        processor: Its processor.
        rows: The test rows.
        tasks: `{name: TaskSpec}`.
        path: Where the picture goes.
        num_images: How many rows it has.
    """
    dataset = MultiTaskDataset(rows, tasks, processor)
    items = [dataset[index] for index in range(min(num_images, len(dataset)))]
    batch = collate(items)
    sizes = [tuple(int(side) for side in item["original_size"]) for item in items]
    model.eval()
    device = next(model.parameters()).device
    output = model(pixel_values=batch["pixel_values"].to(device))
    predictions = model.get_base_model().post_process(output, sizes)

    grid = []
    for item, size, prediction in zip(items, sizes, predictions, strict=True):
        pictures = {"image": _image(item["pixel_values"], processor, size)}
        for name, spec in tasks.items():
            label = _crop(item["labels"][name], size, processor.image_size)
            value_range = color_range(spec, [label], (0, 100))  # that of the truth: equal colours mean equal values
            pictures[f"{name}: truth"] = draw(spec, label, value_range)
            pictures[f"{name}: prediction"] = draw(spec, prediction[name].cpu(), value_range)
        grid.append(pictures)
    _save_grid(grid, path)


def _crop(values: torch.Tensor, size: tuple[int, int], image_size: int) -> torch.Tensor:
    """Take the padding off a square (..., S, S) map."""
    scale = image_size / max(size)
    height, width = (int(side * scale + 0.5) for side in size)
    return values[..., :height, :width]


def _image(pixel_values: torch.Tensor, processor, size: tuple[int, int]) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    image = _crop(pixel_values, size, processor.image_size) * std + mean
    image = F.interpolate(image[None].clamp(0, 1), size=size, mode="bilinear", align_corners=False)[0]
    return (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def _save_grid(grid: list[dict[str, np.ndarray]], path: Path) -> None:
    columns = len(grid[0])
    figure, axes = plt.subplots(len(grid), columns, figsize=(1.9 * columns, 2.0 * len(grid)), squeeze=False)
    for row, pictures in zip(axes, grid, strict=True):
        for axis, picture in zip(row, pictures.values(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], grid[0], strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)
