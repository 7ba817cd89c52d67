"""The vision encoder of an mSAM, each image once per task from the first task-aware layer on.

What lies before that layer, the trunk, is the same for all tasks of an image and runs once; the rest is the branch of a task.
What it gives, the features of an image, is a tensor (B, C, h, w), or a tuple that ends with it where the decoder of a family
takes others beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from ..routing.router import check_task_order, number_added
from .checks import checked_chunk
from .split import Features, States, is_task_aware, map_tensors


def encode_tasks(
    model: nn.Module,
    pixel_values: torch.Tensor | None,
    trunk_states: States | None,
    names: list[str],
    task_chunk: int | None = None,
) -> dict[str, Features]:
    """The features of the images for the wanted tasks, {task: features}.

    Args:
        model: The mSAM.
        pixel_values: Images (B, 3, S, S), or None where `trunk_states` are given.
        trunk_states: What the encoder gives of them with `trunk_only`.
        names: The wanted tasks.
        task_chunk: How many tasks run as one batch; all of them when None.

    Raises:
        ValueError: `task_chunk` is no positive number, or an adapter has other tasks; nothing was computed then.
    """
    chunk_size, encoder = checked_chunk(task_chunk, len(names)), model.vision_encoder
    if not is_task_aware(encoder):
        return dict.fromkeys(names, model.family.features(model, encoder(pixel_values, trunk_states=trunk_states)))
    check_task_order(encoder, list(model.task_specs))
    chunks = _chunks(list(model.task_specs), names, chunk_size, number_added(encoder))
    if trunk_states is None and len(chunks) > 1:
        pixel_values, trunk_states = None, encoder(pixel_values, trunk_only=True)
    indices = {name: index for index, name in enumerate(model.task_specs)}
    embeddings: dict[str, Features] = {}
    for chunk in chunks:
        branches = [indices[name] for name in chunk]
        output = encoder(pixel_values, trunk_states=trunk_states, branches=branches)
        embeddings.update(zip(chunk, _of_each_task(model.family.features(model, output), len(chunk)), strict=True))
    return {name: embeddings[name] for name in names}


def _chunks(tasks: list[str], names: list[str], size: int, added: int) -> list[list[str]]:
    """The wanted tasks in batches of `size` at most; each of the last `added` tasks is one by itself.

    Were it in the batch of the others, their products would have other sizes with it than without, and other last bits.
    """
    alone = tasks[len(tasks) - added :]
    first = [name for name in names if name not in alone]
    chunks = [first[start : start + size] for start in range(0, len(first), size)]
    return chunks + [[name] for name in names if name in alone]


def _of_each_task(features: Features, number: int) -> list[Features]:
    """Features of B T rows, those of an image after each other, as T times those of B rows."""
    if isinstance(features, torch.Tensor):
        return list(features.unflatten(0, (features.shape[0] // number, number)).unbind(1))
    return list(zip(*(_of_each_task(level, number) for level in features), strict=True))


def embeddings_by_task(
    embeddings: Features | Mapping[str, Features], image_index: Mapping[str, torch.Tensor]
) -> dict[str, Features]:
    """The features of each task's images, of those of all images and the rows of each task."""
    if isinstance(embeddings, Mapping):
        raise ValueError("With task_ids, image_embeddings must be one tensor (B, C, h, w), got a dict.")
    return {name: map_tensors(functools.partial(_rows_of, rows), embeddings) for name, rows in image_index.items()}


def _rows_of(rows: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return level[rows.to(level.device)]


def given_embeddings(embeddings: Features | Mapping[str, Features], names: list[str]) -> dict[str, Features]:
    """The features of the wanted tasks, as they were passed to the forward."""
    if not isinstance(embeddings, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"image_embeddings is one tensor, but {len(names)} tasks are wanted ({names}): pass one task, "
                "task_ids, or a dict {task: tensor}."
            )
        return {names[0]: embeddings}
    missing = [name for name in names if name not in embeddings]
    if missing:
        raise ValueError(f"image_embeddings has no entry for {missing}, only for {list(embeddings)}.")
    return {name: embeddings[name] for name in names}
