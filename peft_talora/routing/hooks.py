"""Takes `task_ids` out of the arguments of a base model that does not know them, and checks their number."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .blocks import SuspendedBlock
from .router import TaskRouter, check_batch_size


def names_task_ids(model: nn.Module) -> bool:
    """Whether the model's forward has a parameter of that name (`**kwargs` does not count)."""
    return "task_ids" in inspect.signature(model.forward).parameters


def _route_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], router: TaskRouter
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the base model."""
    task_ids = kwargs.pop("task_ids", None)
    if kwargs.get("branches") is not None or kwargs.get("trunk_only"):
        # the vision encoder of an mSAM, which has its tasks from the mSAM, or needs none
        return args, kwargs
    try:
        override = router.override
    except SuspendedBlock:
        if not _is_disabled(model):
            raise
        return args, kwargs
    if task_ids is not None and (override is None or override.source is not task_ids) and not _is_disabled(model):
        raise ValueError(
            f"{type(model).__name__} was called with task_ids without its PeftModel. "
            "Use `with peft_talora.use_task(model, task_ids): model(...)`."
        )
    if override is not None:
        sizes = _batch_sizes(model, args, kwargs)
        if sizes:
            check_batch_size(override, sizes)
    return args, kwargs


def _is_disabled(model: nn.Module) -> bool:
    return all(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))


def _batch_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The batch size, as the main input has it; without one, those that the tensors among the arguments may mean."""
    main_input = kwargs.get(getattr(model, "main_input_name", ""))
    values = (*args, *kwargs.values()) if main_input is None else (main_input,)
    return [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.ndim]


def _is_task_hook(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _route_forward


def add_task_hook(model: nn.Module, router: TaskRouter) -> None:
    """Hook the base model, and every model inside it that has tuned layers and may be called by itself.

    A model whose forward takes task_ids itself, and one that is hooked already, is left as it is.
    """
    for module in model.modules():
        if module is not model and not (isinstance(module, PreTrainedModel) and _is_tuned(module)):
            continue
        if not names_task_ids(module) and not any(_is_task_hook(h) for h in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(partial(_route_forward, router=router), with_kwargs=True)


def _is_tuned(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def remove_task_hook(model: nn.Module) -> None:
    """Undo [`add_task_hook`]."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if _is_task_hook(hook)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
