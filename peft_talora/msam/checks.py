"""What an mSAM is given, checked: every error names what came and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..losses import check_labels
from ..routing.requests import TaskRequest, resolve_task
from ..tuner.checks import is_int
from .configuration import MSamConfig
from .families import Family
from .split import States
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


def check_inputs(config: MSamConfig, pixel_values: Any, image_embeddings: Any, trunk_states: States | None) -> int:
    """The batch size of the one input that is given."""
    if sum(given is not None for given in (pixel_values, image_embeddings, trunk_states)) != 1:
        raise ValueError("Give exactly one of pixel_values, image_embeddings and trunk_states.")
    if pixel_values is not None:
        hint = " MSamProcessor brings images to that size."
        channels = config.family.backbone(config.vision_config).num_channels
        return _checked_batch("pixel_values", pixel_values, (channels, *[config.image_size] * 2), hint)
    if trunk_states is not None:
        shape = config.family.trunk_shape(config.vision_config)
        return _checked_states(trunk_states) if shape is None else _checked_batch("trunk_states", trunk_states, shape)
    embeddings = image_embeddings if isinstance(image_embeddings, Mapping) else {"": image_embeddings}
    return _check_embeddings(config, embeddings)


def _checked_batch(where: str, tensor: torch.Tensor, expected: tuple[int, ...], hint: str = "") -> int:
    """The batch size of a tensor that must be (batch, *expected)."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where} must be a tensor (batch, {', '.join(map(str, expected))}), got {_kind(tensor)}.")
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
        raise ValueError(
            f"{where} must have the shape (batch, {', '.join(map(str, expected))}), got {tuple(tensor.shape)}.{hint}"
        )
    return tensor.shape[0]


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")


def _checked_states(states: States) -> int:
    """The batch size of hidden states that are a tuple: how many depends on where the tasks part."""
    is_tuple = isinstance(states, tuple) and all(isinstance(part, torch.Tensor) and part.ndim == 4 for part in states)
    if not is_tuple or len({part.shape[0] for part in states}) != 1:
        raise ValueError(f"trunk_states must be the tuple that encode_trunk gives of one batch, got {_kind(states)}.")
    return states[0].shape[0]


def _check_embeddings(config: MSamConfig, embeddings: Mapping[str, Any]) -> int:
    shapes, sizes = config.family.feature_shapes(config.vision_config), {}
    for name, embedding in embeddings.items():
        where = f"image_embeddings['{name}']" if name else "image_embeddings"
        levels = (embedding,) if len(shapes) == 1 else embedding
        if not isinstance(levels, tuple) or len(levels) != len(shapes):
            raise ValueError(
                f"{where} must be a tuple of {len(shapes)} tensors, as encode gives it: "
                f"{', '.join(f'(batch, {a}, {b}, {c})' for a, b, c in shapes)}; got {_kind(embedding)}."
            )
        batch_sizes = {_checked_batch(where, level, shape) for level, shape in zip(levels, shapes, strict=True)}
        if len(batch_sizes) != 1:
            raise ValueError(f"The tensors of {where} must have one batch size, got {sorted(batch_sizes)}.")
        sizes[name] = batch_sizes.pop()
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


def checked_image_size(image_size: int | None, family: Family, vision_config: PreTrainedConfig) -> int:
    """`image_size`, or that of the configuration when None."""
    if image_size is None:
        return family.image_size(vision_config)
    step, name = family.image_size_step(vision_config), family.image_size_step_name
    if not is_int(image_size, step) or image_size % step:
        raise ValueError(f"`image_size` must be a positive multiple of {name} {step}, got {image_size!r}.")
    return image_size


def checked_chunk(task_chunk: int | None, num_tasks: int) -> int:
    """`task_chunk`, a number of tasks; all of them when None."""
    size = num_tasks if task_chunk is None else task_chunk
    if not is_int(size, 1):
        raise ValueError(f"`task_chunk` must be a positive number of tasks, got {size!r}.")
    return size
