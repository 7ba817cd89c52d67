"""What an mSAM is given, checked: every error names what came and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses import check_labels
from ..routing.requests import TaskRequest, resolve_task
from ..tuner.checks import is_int
from .configuration import MSamConfig
from .tasks import TaskSpec


def wanted_tasks(specs: Mapping[str, TaskSpec], tasks: Sequence[str] | str | None) -> list[str]:
    """The names of the wanted tasks; all of them when None."""
    if tasks is None:
        return list(specs)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [name for name in names if name not in specs]
    if unknown or not names:
        raise ValueError(f"Unknown tasks {unknown} in {names}. The model's tasks are {list(specs)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"A task is named twice in {names}.")
    return names


def checked_task_ids(
    specs: Mapping[str, TaskSpec], task_ids: TaskRequest, batch_size: int, device: torch.device
) -> torch.Tensor:
    """One index per image, a LongTensor (B,)."""
    # the device of a model is meta where its first part is offloaded
    device = None if device.type == "meta" else device
    ids = task_ids if isinstance(task_ids, str | int) else resolve_task(task_ids, list(specs), device)
    if not isinstance(ids, torch.Tensor) or ids.shape[0] != batch_size:
        given = len(ids) if isinstance(ids, torch.Tensor) else repr(ids)
        raise ValueError(
            f"task_ids takes one task per image, got {given} for a batch of {batch_size}. "
            f"The model's tasks are {list(specs)}."
        )
    return ids


def check_inputs(config: MSamConfig, pixel_values: Any, image_embeddings: Any, trunk_states: Any) -> int:
    """The batch size of the one input that is given."""
    if sum(given is not None for given in (pixel_values, image_embeddings, trunk_states)) != 1:
        raise ValueError("Give exactly one of pixel_values, image_embeddings and trunk_states.")
    vision, grid = config.vision_config, config.grid_size
    if pixel_values is not None:
        hint = " MSamProcessor brings images to that size."
        return _checked_batch("pixel_values", pixel_values, (vision.num_channels, *[vision.image_size] * 2), hint)
    if trunk_states is not None:
        return _checked_batch("trunk_states", trunk_states, (grid, grid, vision.hidden_size))
    embeddings = image_embeddings if isinstance(image_embeddings, Mapping) else {"": image_embeddings}
    return _check_embeddings(config, embeddings)


def _checked_batch(where: str, tensor: torch.Tensor, expected: tuple[int, ...], hint: str = "") -> int:
    """The batch size of a tensor that must be (batch, *expected)."""
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
        raise ValueError(
            f"{where} must have the shape (batch, {', '.join(map(str, expected))}), got {tuple(tensor.shape)}.{hint}"
        )
    return tensor.shape[0]


def _check_embeddings(config: MSamConfig, embeddings: Mapping[str, torch.Tensor]) -> int:
    expected = (config.vision_config.output_channels, config.grid_size, config.grid_size)
    for name, embedding in embeddings.items():
        _checked_batch(f"image_embeddings['{name}']" if name else "image_embeddings", embedding, expected)
    sizes = {name: embedding.shape[0] for name, embedding in embeddings.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"image_embeddings must have one batch size, got {sizes}.")
    return next(iter(sizes.values()))


def check_all_labels(
    specs: Mapping[str, TaskSpec], labels: Any, batch_size: int, wanted: Mapping[str, torch.Tensor | None]
) -> None:
    """Check the labels of a batch; `wanted` says which tasks count and for which rows (None: all)."""
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise ValueError(f"labels must be a dict {{task: tensor}}, got {type(labels).__name__}.")
    for name, label in labels.items():
        if name not in specs:
            raise ValueError(f"labels of an unknown task '{name}'. The model's tasks are {list(specs)}.")
        if name in wanted:
            check_labels(name, specs[name], label, batch_size, wanted[name])


def checked_image_size(image_size: int | None, vision_config: Any) -> int:
    """`image_size`, or that of the configuration when None."""
    size, patch = vision_config.image_size if image_size is None else image_size, vision_config.patch_size
    if not is_int(size, patch) or size % patch:
        raise ValueError(f"`image_size` must be a positive multiple of the patch size {patch}, got {size!r}.")
    return size


def checked_chunk(task_chunk: int | None, num_tasks: int) -> int:
    """`task_chunk`, a number of tasks; all of them when None."""
    size = num_tasks if task_chunk is None else task_chunk
    if not is_int(size, 1):
        raise ValueError(f"`task_chunk` must be a positive number of tasks, got {size!r}.")
    return size
