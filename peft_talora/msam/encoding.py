"""The image encoder of an mSAM, each image once per task from the first task-aware layer on.

What lies before that layer is the same for all tasks of an image and runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..routing import TaskRequest, find_routers
from ..talora.layer import TALoraLayer


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


def encode_tasks(model: Any, pixel_values: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """The image embeddings {task: (B, C, h, w)} of the wanted tasks."""
    encoder = model.vision_encoder
    first = first_task_aware_layer(encoder.layers)
    if first == len(encoder.layers):
        embedding = encoder(pixel_values).last_hidden_state
        return dict.fromkeys(names, embedding)
    indices = [list(model.task_specs).index(name) for name in names]
    if len(names) == 1:
        with _routed(model, indices[0]):
            return {names[0]: encoder(pixel_values).last_hidden_state}

    hidden = _trunk(encoder, pixel_values, first)
    batch_size = hidden.shape[0]
    ids = torch.tensor(indices, device=hidden.device).repeat(batch_size)
    hidden = hidden.repeat_interleave(len(names), dim=0)
    with _routed(model, ids):
        embedding = _branch(encoder, hidden, first)
    embedding = embedding.reshape(batch_size, len(names), *embedding.shape[1:])
    return dict(zip(names, embedding.unbind(1), strict=True))


def encode_mixed(model: Any, pixel_values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The image embeddings (B, C, h, w), each for the task of its image; ids is a LongTensor (B,)."""
    with _routed(model, ids):
        return model.vision_encoder(pixel_values).last_hidden_state


@contextmanager
def _routed(model: nn.Module, task: TaskRequest) -> Iterator[None]:
    """Like `use_task`, for a model that may have no task-aware adapter."""
    with ExitStack() as stack:
        for router in find_routers(model):
            stack.enter_context(router.using(router.resolve(task)))
        yield


def _trunk(encoder: nn.Module, pixel_values: torch.Tensor, stop: int) -> torch.Tensor:
    """Patch embedding, position embedding and the layers before `stop`: (B, 3, S, S) -> (B, h, w, D)."""
    hidden = encoder.patch_embed(pixel_values)
    if encoder.pos_embed is not None:
        hidden = hidden + encoder.pos_embed
    for layer in encoder.layers[:stop]:
        hidden = layer(hidden)
    return hidden


def _branch(encoder: nn.Module, hidden: torch.Tensor, start: int) -> torch.Tensor:
    """The layers from `start` on and the neck: (B, h, w, D) -> (B, C, h, w)."""
    for layer in encoder.layers[start:]:
        hidden = layer(hidden)
    return encoder.neck(hidden)
