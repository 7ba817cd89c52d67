"""What a saved adapter says about the mSAM that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..msam.configuration import CHANNEL_MODES
from ..msam.families import FAMILIES
from ..msam.tasks import TaskSpec, parse_tasks
from ..tuner.checks import check_positive_int
from .tensors import Shape

MSAM_FIELDS = ("tasks", "channel_mode", "image_size")
# What an adapter may ask for before its weights are compared with a model. Whoever needs more passes an MSamForMultiTask.
MAX_IMAGE_SIZE = 4096
MAX_TASKS = 1000
MAX_UNSAVED_TASKS = 64
MAX_UNSAVED_CHANNELS = 1024


def check_recipe(fields: Any, file: Path, tasks: list[str] | None) -> dict[str, TaskSpec]:
    """Refuse what an adapter says about its mSAM where it is not complete or not possible; else its tasks.

    Args:
        fields: What the file says: the tasks as a list, channel_mode, image_size and perhaps the base.
        file: The file, for messages.
        tasks: The task names of the adapter's configuration, if it has any.

    Raises:
        ValueError: The message names the file.
    """
    missing = [name for name in MSAM_FIELDS if not isinstance(fields, dict) or name not in fields]
    if missing:
        raise ValueError(f"{file} does not say the {missing} of the MSamForMultiTask.")
    try:
        return _check_values(fields, tasks)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} describes an MSamForMultiTask that cannot be made: {error}") from error


def _check_values(fields: Mapping[str, Any], tasks: list[str] | None) -> dict[str, TaskSpec]:
    if not isinstance(fields["tasks"], list) or len(fields["tasks"]) > MAX_TASKS:
        number = len(fields["tasks"]) if isinstance(fields["tasks"], list) else repr(fields["tasks"])
        raise ValueError(f"`tasks` must be a list of at most {MAX_TASKS} tasks, got {number}.")
    specs = parse_tasks(fields["tasks"])
    if tasks is not None and tasks != list(specs):
        raise ValueError(f"its tasks are {tasks}, those of its mSAM {list(specs)}.")
    if fields["channel_mode"] not in CHANNEL_MODES:
        raise ValueError(f"`channel_mode` must be one of {CHANNEL_MODES}, got {fields['channel_mode']!r}.")
    check_positive_int("image_size", fields["image_size"])
    if fields.get("base_model_type", "sam") not in list(FAMILIES):
        raise ValueError(f"`base_model_type` must be one of {list(FAMILIES)}, got {fields['base_model_type']!r}.")
    return specs


def check_sizes_against_weights(specs: Mapping[str, TaskSpec], shapes: Mapping[str, Shape], image_size: int) -> None:
    """Refuse an mSAM that is far larger than the weights for it, before it is made.

    Args:
        specs: The adapter's tasks.
        shapes: The shapes of all saved tensors.
        image_size: The adapter's.

    Raises:
        ValueError: The message names what is too large.
    """
    if image_size > MAX_IMAGE_SIZE:
        raise ValueError(
            f"image_size is {image_size} pixels, at most {MAX_IMAGE_SIZE} are made from a file. Pass base_model=, an "
            "MSamForMultiTask of that size, if this is meant."
        )
    saved = _saved_sizes(specs, shapes)
    for name, spec in specs.items():
        if name in saved and spec.num_channels > saved[name]:
            raise ValueError(
                f"the task '{name}' has {spec.num_channels} channels, but no tensor of its decoder in the weights has so many "
                "entries."
            )
    unsaved = [spec.num_channels for name, spec in specs.items() if name not in saved]
    if len(unsaved) > MAX_UNSAVED_TASKS or sum(unsaved) > MAX_UNSAVED_CHANNELS:
        raise ValueError(
            f"the weights hold nothing of {len(unsaved)} of its {len(specs)} tasks, with {sum(unsaved)} channels: at most "
            f"{MAX_UNSAVED_TASKS} tasks with {MAX_UNSAVED_CHANNELS} channels are made without."
        )


def _saved_sizes(specs: Mapping[str, TaskSpec], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Of each task that has a decoder or embedding in the weights, the largest size or number of its tensors."""
    sizes_of: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for part, task in pairwise(parts):
            if part in ("mask_decoders", "no_mask_embeds") and task in specs:
                sizes_of.setdefault(task, []).append(max(shape, default=1))
    return {task: max(len(sizes), *sizes) for task, sizes in sizes_of.items()}
