"""The image encoder of an mSAM, each image once per task from the first task-aware layer on.

What lies before that layer is the same for all tasks of an image and runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..routing.router import TaskRequest, find_routers
from ..talora.layer import TALoraLayer
from .checks import checked_chunk


def first_task_aware_layer(layers: nn.ModuleList) -> int:
    """The index of the first layer whose output depends on the task; their number where none does."""
    for index, layer in enumerate(layers):
        if any(_is_task_aware(module) for module in layer.modules()):
            return index
    return len(layers)


def _is_task_aware(module: nn.Module) -> bool:
    return (
        isinstance(module, TALoraLayer)
        and not module.disable_adapters
        and any(name in module.talora_G for name in module.active_adapters)
    )


def encode_trunk(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """What all tasks of an image have in common: the hidden states (B, h, w, D) before the first task-aware layer."""
    encoder = model.vision_encoder
    hidden = encoder.patch_embed(pixel_values)
    if encoder.pos_embed is not None:
        hidden = hidden + encoder.pos_embed
    for layer in encoder.layers[: first_task_aware_layer(encoder.layers)]:
        hidden = layer(hidden)
    return hidden


def encode_tasks(
    model: Any,
    pixel_values: torch.Tensor | None,
    trunk_states: torch.Tensor | None,
    names: list[str],
    task_chunk: int | None = None,
) -> dict[str, torch.Tensor]:
    """The image embeddings {task: (B, C, h, w)} of the wanted tasks.

    Args:
        model: The mSAM.
        pixel_values: Images (B, 3, S, S), or None where `trunk_states` are given.
        trunk_states: What [`encode_trunk`] gives of them, (B, h, w, D); computed when None.
        names: The wanted tasks.
        task_chunk: How many tasks run as one batch; all of them when None.

    Raises:
        ValueError: `task_chunk` is no positive number; nothing was computed then.
    """
    chunk_size = checked_chunk(task_chunk, len(names))
    hidden = encode_trunk(model, pixel_values) if trunk_states is None else trunk_states
    encoder = model.vision_encoder
    first = first_task_aware_layer(encoder.layers)
    if first == len(encoder.layers):
        return dict.fromkeys(names, encoder.neck(hidden))
    embeddings = {}
    for start in range(0, len(names), chunk_size):
        chunk = names[start : start + chunk_size]
        indices = [list(model.task_specs).index(name) for name in chunk]
        embeddings.update(zip(chunk, _encode_chunk(model, hidden, first, indices), strict=True))
    return embeddings


def encode_mixed(
    model: Any, pixel_values: torch.Tensor | None, trunk_states: torch.Tensor | None, ids: torch.Tensor
) -> torch.Tensor:
    """The image embeddings (B, C, h, w), each for the task of its image.

    Args:
        model: The mSAM.
        pixel_values: As in [`encode_tasks`].
        trunk_states: As in [`encode_tasks`].
        ids: The index of each image's task, a LongTensor (B,).
    """
    hidden = encode_trunk(model, pixel_values) if trunk_states is None else trunk_states
    with _routed(model, ids):
        return _branch(model.vision_encoder, hidden, first_task_aware_layer(model.vision_encoder.layers))


def _encode_chunk(model: Any, trunk_states: torch.Tensor, first: int, indices: list[int]) -> list[torch.Tensor]:
    """One (B, C, h, w) per task, from one batch of all images and tasks."""
    if len(indices) == 1:
        with _routed(model, indices[0]):
            return [_branch(model.vision_encoder, trunk_states, first)]
    batch_size = trunk_states.shape[0]
    ids = torch.tensor(indices, device=trunk_states.device).repeat(batch_size)
    hidden = trunk_states.repeat_interleave(len(indices), dim=0)
    with _routed(model, ids):
        embedding = _branch(model.vision_encoder, hidden, first)
    return list(embedding.reshape(batch_size, len(indices), *embedding.shape[1:]).unbind(1))


@contextmanager
def _routed(model: nn.Module, task: TaskRequest) -> Iterator[None]:
    """Like `use_task`, for a model that may have no task-aware adapter."""
    with ExitStack() as stack:
        for router in find_routers(model):
            stack.enter_context(router.using(router.resolve(task)))
        yield


def _branch(encoder: nn.Module, hidden: torch.Tensor, start: int) -> torch.Tensor:
    """The layers from `start` on and the neck: (B, h, w, D) -> (B, C, h, w)."""
    for layer in encoder.layers[start:]:
        hidden = layer(hidden)
    return encoder.neck(hidden)
