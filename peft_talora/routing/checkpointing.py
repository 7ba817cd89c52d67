"""Keeps transformers' gradient checkpointing and the task routing in step.

A checkpointed block runs a second time during backward, when the `with` block or the forward that chose the tasks is
over, and perhaps in another thread. So every checkpointed block that holds tuned layers gets the `context_fn` that
replays the tasks of its own forward. transformers stores the checkpoint function on the block whenever the user
switches checkpointing on, before or after the adapter was added; forward pre-hooks on the block and on the modules around
it therefore look at it right before it is used. (In transformers 5.10 a block's own hooks run inside the checkpoint.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .replay import checkpoint_context, replaying

REENTRANT_ERROR = (
    "Reentrant gradient checkpointing (use_reentrant=True) is not supported: its replay cannot be told which tasks the "
    "forward used, so the gradients would silently be those of another task. Use "
    'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
)
# the contexts of a forward and of its replay
ContextFn = Callable[[], tuple[Any, Any]]


class RoutedCheckpoint:
    """Calls a checkpoint function with a `context_fn` that replays the tasks of the forward."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = {**getattr(self.checkpoint, "keywords", {}), **kwargs}
        if options.get("use_reentrant"):
            raise ValueError(REENTRANT_ERROR)
        # torch's own default is the reentrant variant
        kwargs = {**kwargs, "use_reentrant": False}
        if torch.compiler.is_compiling():
            # the replay is part of the same graph, where the task ids are ordinary inputs
            return self.checkpoint(function, *args, **kwargs)
        kwargs["context_fn"] = joined_context(options.get("context_fn"))
        return self.checkpoint(function, *args, **kwargs)


def joined_context(context_fn: ContextFn | None) -> ContextFn:
    """`checkpoint_context` together with the `context_fn` that the user may have set."""
    if context_fn is None:
        return checkpoint_context

    def joined() -> tuple[Any, Any]:
        forward, replay = context_fn()
        task_forward, task_replay = checkpoint_context()
        return _Nested(forward, task_forward), _Nested(replay, task_replay)

    return joined


class _Nested:
    """Two contexts as one, which can be entered again wherever both can."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            self.inner.__exit__(*error)
        finally:
            result = self.outer.__exit__(*error)
        return result


def _route_checkpoints(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a block that can be checkpointed, and of the module that holds such blocks."""
    if torch.compiler.is_compiling():
        return
    for block in (module, *_held_by(module)):
        checkpoint = block.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, RoutedCheckpoint):
            block._gradient_checkpointing_func = RoutedCheckpoint(checkpoint)


def _held_by(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, and those of its children that are lists or dicts of modules, or models.

    Models: an mSAM's encoder calls the blocks of the backbone in it one by one, and not the backbone.
    """
    for child in module.children():
        yield child
        if isinstance(child, nn.ModuleList | nn.ModuleDict | PreTrainedModel):
            yield from _held_by(child)


def add_checkpoint_hooks(model: nn.Module, layer_class: type) -> None:
    """Hook every block of `model` that transformers may checkpoint and that holds a tuned layer, and what holds it."""
    for module in model.modules():
        blocks = [block for block in (module, *_held_by(module)) if hasattr(block, "gradient_checkpointing")]
        is_hooked = any(hook is _route_checkpoints for hook in module._forward_pre_hooks.values())
        if not is_hooked and any(isinstance(layer, layer_class) for block in blocks for layer in block.modules()):
            module.register_forward_pre_hook(_route_checkpoints)


def remove_checkpoint_hooks(model: nn.Module) -> None:
    """Undo [`add_checkpoint_hooks`]."""
    for block in model.modules():
        for key in [k for k, hook in block._forward_pre_hooks.items() if hook is _route_checkpoints]:
            del block._forward_pre_hooks[key]
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, RoutedCheckpoint):
            block._gradient_checkpointing_func = checkpoint.checkpoint


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def is_replay() -> bool:
    """Whether a layer runs again for activation checkpointing, with or without `checkpoint_context`."""
    return replaying() or in_backward()
