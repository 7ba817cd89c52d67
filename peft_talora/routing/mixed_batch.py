"""Batches whose samples use different adapters: PEFT's `adapter_names`.

As in PEFT's LoRA one name per sample, "__base__" for a sample without an adapter, for inference only. The names travel in
the thread's [`Routing`], beside the task of each sample.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .blocks import Routing
from .requests import TaskRequest, resolve_task
from .router import TaskRouter

BASE_MODEL = "__base__"


def check_adapter_names(adapter_names: Sequence[str], known: Iterable[str]) -> None:
    """Raise ValueError when `adapter_names` holds a name that is neither "__base__" nor in `known`."""
    unknown = set(adapter_names) - set(known) - {BASE_MODEL}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")


def samples_of(adapter_name: str, adapter_names: Sequence[str], device: torch.device | None = None) -> torch.Tensor:
    """Which samples use the adapter: LongTensor (n,)."""
    return torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=device)


def by_sample(x: torch.Tensor, number: int) -> torch.Tensor:
    """View (rows, ...) as (number, rows / number, ...): a sample's parts (SAM's windows) follow each other."""
    if x.shape[0] % number:
        raise ValueError(
            f"adapter_names names the adapters of {number} samples, but a layer sees {x.shape[0]} rows, which is no "
            "multiple of it: one name per sample."
        )
    return x.reshape(number, -1, *x.shape[1:])


def route_adapters(
    router: TaskRouter,
    adapter_names: Sequence[str],
    task_ids: TaskRequest | None = None,
    device: torch.device | None = None,
) -> Routing:
    """The routing of a batch of one adapter and one task per sample.

    Args:
        router: The model's router.
        adapter_names: The adapter of each sample; "__base__" for none.
        task_ids: The task of each sample, a name or an index of its own adapter, not looked at where there is none. The
            tasks of the current `use_task` block, or else the active ones, when None.
        device: Where the task indices go.

    Raises:
        ValueError: Numbers of adapters and tasks differ, or an adapter does not know its sample's task.
    """
    names = tuple(adapter_names)
    if task_ids is None:
        return replace(router.snapshot(), adapter_names=names)
    if isinstance(task_ids, str | int):
        raise ValueError(
            f"With adapter_names task_ids has one task per sample, {len(names)}, got the single {task_ids!r}."
        )
    if len(task_ids) != len(names):
        raise ValueError(
            f"task_ids names the tasks of {len(task_ids)} samples, adapter_names the adapters of {len(names)}: one of "
            "each per sample."
        )
    by_adapter = {}
    for adapter_name in set(names) - {BASE_MODEL}:
        rows = samples_of(adapter_name, names)
        tasks_of_its_samples = (
            task_ids[rows.to(task_ids.device)] if isinstance(task_ids, torch.Tensor) else [task_ids[i] for i in rows]
        )
        ids = torch.as_tensor(resolve_task(tasks_of_its_samples, router.tasks[adapter_name], device))
        by_adapter[adapter_name] = ids.new_zeros(len(names)).index_put((rows.to(ids.device),), ids)
    return Routing(by_adapter, source=task_ids, adapter_names=names)


@contextmanager
def saved_modules_use(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside of the `with` block the modules in `modules_to_save` use each sample's own copy, in this thread."""
    hook = partial(_pass_adapter_names, adapter_names=list(adapter_names), thread=threading.get_ident())
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str], thread: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if threading.get_ident() == thread:
        kwargs["adapter_names"] = adapter_names
    return args, kwargs
