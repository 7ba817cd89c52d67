"""Images and label maps on their way into an mSAM, and predictions on their way out.

Images go through transformers' own SAM image processor: the longest side is resized to the model's image size, the
values are normalised, and zeros fill up the square at the bottom and on the right. For SAM 2 and SAM 3 they are stretched to
the square instead, as the processors of these models do. Label maps follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, SamImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin

from ..tuner.checks import is_int
from .geometry import check_sides, reshaped_size, restore_logits, restored_map
from .labels import label_tensor, square_label
from .pictures import image_array
from .tasks import Tasks, TaskSpec, parse_tasks, tasks_to_list

__all__ = ["MSamBatch", "MSamProcessor", "check_sides", "image_array", "post_process", "reshaped_size"]


class MSamBatch(BatchFeature):
    """A processed batch. Unlike its base class, ``to`` moves the label maps too (it does not change their type)."""

    def to(self, *args: Any, **kwargs: Any) -> MSamBatch:
        """Move everything to a device, and the images to a floating point type."""
        super().to(*args, **kwargs)
        device = self["pixel_values"].device
        if "labels" in self:
            self["labels"] = {name: labels.to(device) for name, labels in self["labels"].items()}
        return self


class MSamProcessor(ImageProcessingMixin):
    """Prepares images and label maps for an mSAM, and its logits for use.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are transformers' own: the file is
    ``preprocessor_config.json``, and the latter two take a repository of the Hub too.

    Args:
        image_size: Side S of the model's square input, in pixels.
        tasks: The tasks, as [`parse_tasks`] takes them; needed for labels and for ``post_process``.
        image_mean: Mean of each of the three colours, of values in [0, 1]; default: ImageNet's, which is SAM's.
        image_std: Their standard deviation.
        to_square: Whether images are stretched to the square, as for SAM 2 and SAM 3, or padded, as for SAM and SAM-HQ.

    Raises:
        ValueError: If the image size is not a positive integer or a task is not possible.
    """

    def __init__(
        self,
        image_size: int,
        tasks: Tasks | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        to_square: bool = False,
    ) -> None:
        super().__init__()
        if not is_int(image_size, 1):
            raise ValueError(f"image_size must be a positive integer, got {image_size!r}")
        if not isinstance(to_square, bool):
            raise ValueError(f"to_square must be True or False, got {to_square!r}")
        self.image_size = image_size
        self.to_square = to_square
        self.tasks = None if tasks is None else parse_tasks(tasks)
        self.image_mean = list(SamImageProcessorPil.image_mean if image_mean is None else image_mean)
        self.image_std = list(SamImageProcessorPil.image_std if image_std is None else image_std)
        self._images = SamImageProcessorPil(
            size={"longest_edge": image_size},
            pad_size={"height": image_size, "width": image_size},
            image_mean=self.image_mean,
            image_std=self.image_std,
        )

    @classmethod
    def from_model(cls, msam: Any) -> MSamProcessor:
        """The processor for an ``MSamForMultiTask``, or for a PEFT model around one."""
        config, family = msam.config, msam.config.family
        return cls(
            config.image_size, config.tasks or None, family.image_mean, family.image_std, family.resizes_to_square
        )

    def __call__(self, images: Any, labels: Any = None, return_tensors: str = "pt") -> MSamBatch:
        """Process a batch.

        Args:
            images: One image or a list of them, of any sizes: PIL images, uint8 arrays (H, W, 3), or float arrays or
                tensors (3, H, W) in [0, 1].
            labels: For each image a dict ``{task: label map}`` at the image's own resolution: (H, W) classes, or
                (C, H, W) values ((H, W) for one channel). A task that is missing or None is unlabelled there.
            return_tensors: Only "pt".

        Returns:
            ``pixel_values`` (B, 3, S, S), ``original_sizes`` and ``reshaped_input_sizes`` (B, 2), height first, and
            with labels ``labels``: ``{task: (B, S, S) int64 or (B, C, S, S) float32}``, all unlabelled in the padding.

        Raises:
            ValueError: If an image or a label map has another shape, type or range, or belongs to no task.
        """
        if return_tensors != "pt":
            raise ValueError(f"MSamProcessor makes PyTorch tensors (return_tensors='pt'), got {return_tensors!r}")
        single = not isinstance(images, list | tuple)
        arrays = [image_array(image) for image in ([images] if single else images)]
        if not arrays:
            raise ValueError("expected at least one image, got an empty list")
        batch = self.pixel_batch(arrays)
        if labels is not None:
            rows = [labels] if isinstance(labels, Mapping) else list(labels)
            batch["labels"] = self._label_batch(rows, batch["original_sizes"].tolist())
        return batch

    def pixel_batch(self, arrays: Sequence[np.ndarray]) -> MSamBatch:
        """What ``processor(images)`` gives for images that [`image_array`] made: at least one, each uint8 (H, W, 3)."""
        sizes = [image.shape[:2] for image in arrays]
        for size in sizes:
            self.check_sides(size)
        if self.to_square:
            square = (self.image_size, self.image_size)
            arrays = [np.array(Image.fromarray(image).resize(square, Image.Resampling.BILINEAR)) for image in arrays]
        batch = MSamBatch(dict(self._images(list(arrays), input_data_format="channels_last", return_tensors="pt")))
        batch["original_sizes"] = sizes
        for key in ("original_sizes", "reshaped_input_sizes"):
            batch[key] = torch.as_tensor(np.asarray(batch[key]), dtype=torch.long)
        return batch

    def check_sides(self, size: Sequence[int]) -> None:
        """Refuse an image of a size (height, width) of which nothing is left in the model's square."""
        check_sides(size, self.image_size, self.to_square)

    def size_in_square(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) that an image of a size (height, width) takes in the model's square, from its upper left corner."""
        return reshaped_size(size, self.image_size, self.to_square)

    def square_label(self, spec: TaskSpec, label: Tensor) -> Tensor:
        """A label map from ``label_tensor`` as the model's square has it: where its image lies, (S, S) or (C, S, S)."""
        return square_label(spec, label, self.image_size, self.to_square)

    def restore(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, N, h, w) of padded squares as (B, N, H, W) of images of a size (H, W), before any activation."""
        return restore_logits(logits, size, self.image_size, self.to_square)

    def post_process(
        self, output: Any, target_sizes: Any, tasks: Sequence[str] | None = None
    ) -> list[dict[str, Tensor]]:
        """Predictions at the images' own resolution, see [`post_process`].

        Args:
            output: An mSAM's output; its ``logits`` and ``image_index`` are read.
            target_sizes: (height, width) of each image, (B, 2).
            tasks: The tasks wanted; default: all that the output has.
        """
        logits = output.logits
        if tasks is not None:
            missing = [name for name in tasks if name not in logits]
            if missing:
                raise ValueError(f"the output has no logits for {missing}, only for {list(logits)}")
            logits = {name: logits[name] for name in tasks}
        image_index = getattr(output, "image_index", None)
        return post_process(logits, self._tasks(), target_sizes, self.image_size, image_index, self.to_square)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> MSamProcessor:
        """The processor that ``to_dict`` describes; further arguments take the place of what it says.

        Raises:
            ValueError: If it describes another processor.
        """
        values = dict(image_processor_dict)
        kind = values.pop("image_processor_type", None)
        if kind != cls.__name__:
            raise ValueError(f"expected the file of an {cls.__name__}, got that of a {kind}")
        return cls(**{**values, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """The processor as JSON has it."""
        return {
            "image_processor_type": type(self).__name__,
            "image_size": self.image_size,
            "tasks": None if self.tasks is None else tasks_to_list(self.tasks),
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "to_square": self.to_square,
        }

    def _tasks(self) -> dict[str, TaskSpec]:
        if self.tasks is None:
            raise ValueError("this MSamProcessor knows no tasks: make it with tasks=... or MSamProcessor.from_model")
        return self.tasks

    def _label_batch(self, rows: list[Mapping[str, Any]], sizes: list[list[int]]) -> dict[str, Tensor]:
        tasks = self._tasks()
        if len(rows) != len(sizes):
            raise ValueError(f"got {len(sizes)} images and labels for {len(rows)}")
        for position, row in enumerate(rows):
            unknown = [name for name in row if name not in tasks]
            if unknown:
                raise ValueError(f"labels of image {position}: unknown tasks {unknown}, the tasks are {list(tasks)}")
        return {
            name: torch.stack(
                [
                    self.square_label(spec, label_tensor(name, spec, row.get(name), (size[0], size[1])))
                    for row, size in zip(rows, sizes, strict=True)
                ]
            )
            for name, spec in tasks.items()
        }


def post_process(
    logits: Mapping[str, Tensor],
    specs: Mapping[str, TaskSpec],
    target_sizes: Any,
    image_size: int,
    image_index: Mapping[str, Tensor] | None = None,
    to_square: bool = False,
) -> list[dict[str, Tensor]]:
    """Predictions at the images' own resolution: the logits are enlarged, freed of the padding, and activated.

    Args:
        logits: ``{task: (B_t, N_t, h, w)}`` of the padded square.
        specs: ``{task: TaskSpec}`` for at least these tasks.
        target_sizes: (height, width) of each image, (B, 2).
        image_size: Side S of the model's input.
        image_index: ``{task: (B_t,)}``, the image that each row of the logits belongs to; default: B_t = B, in order.
        to_square: Whether images were stretched to the square; else they were padded.

    Returns:
        For each image ``{task: prediction}``: semantic and parts (H, W) classes, int64; binary (H, W) probability;
        depth (H, W) metres, not negative; normals (3, H, W) of unit length; regression (C, H, W).

    Raises:
        ValueError: If a task is unknown or its logits are not as many as the images.
    """
    sizes = [(int(height), int(width)) for height, width in target_sizes]
    predictions: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, task_logits in logits.items():
        if name not in specs:
            raise ValueError(f"logits of an unknown task {name!r}, the tasks are {list(specs)}")
        images = range(len(sizes)) if image_index is None else [int(index) for index in image_index[name]]
        if len(task_logits) != len(images):
            raise ValueError(f"task {name!r} has logits for {len(task_logits)} images, expected {len(images)}")
        for row, image in zip(task_logits, images, strict=True):
            activation = specs[name].task_kind.activation
            predictions[image][name] = restored_map(row[None], sizes[image], image_size, activation, to_square)
    return predictions
