"""Which task each sample of a forward belongs to.

All tuned layers of one model share a [`TaskRouter`]. It holds the active task of every adapter (`set_task`, seen by all
threads) and, for the duration of one `with` block or one forward, an override that only the current thread sees
(`use_task`, `task_ids=`). Layers ask the router; nothing is written on the layers themselves, so an exception inside a
forward leaves nothing behind.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from .blocks import OpenBlock, OpenBlocks, Routing, suspendable_owner
from .layers import layer_made, layers_of_forward, tuned_layers
from .requests import Task, TaskRequest, resolve_task

_LIVE_ROUTERS: weakref.WeakSet[TaskRouter] = weakref.WeakSet()
_ROUTERS_LOCK = threading.Lock()


class _ThreadRouting(threading.local):
    """The current thread's state; `__init__` runs in every thread that looks at it."""

    def __init__(self) -> None:
        self.state = OpenBlocks()


class TaskRouter:
    """Routes the samples of a forward to tasks, for all adapters of one model.

    Attributes:
        tasks (`dict[str, tuple[str, ...]]`): The ordered task names of each adapter.
        active (`dict[str, int]`): The index of each adapter's active task.
        added (`dict[str, int]`): How many of each adapter's tasks, the last ones, were added later.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[str, ...]] = {}
        self.active: dict[str, int] = {}
        self.added: dict[str, int] = {}
        self._thread = _ThreadRouting()
        with _ROUTERS_LOCK:
            _LIVE_ROUTERS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # what a thread is doing right now belongs to neither a copy nor a file
        return {"tasks": dict(self.tasks), "active": dict(self.active), "added": dict(self.added)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TaskRouter.__init__(self)
        layer_made()
        self.__dict__.update(copy.deepcopy(state))

    @property
    def override(self) -> Routing | None:
        """The routing of the current `with` block or forward in this thread, or None.

        Raises:
            SuspendedBlock: The only open blocks are those of generators or coroutines that are suspended.
        """
        state = self._thread.state
        if not torch.compiler.is_compiling():
            state.settle()
        return state.routing

    @property
    def adapter_names(self) -> tuple[str, ...] | None:
        """The adapter of each sample, or None where all samples use the active ones."""
        return None if self.override is None else self.override.adapter_names

    def add(self, adapter_name: str, tasks: Sequence[str], added: int = 0) -> None:
        """Register an adapter; its first task becomes active. Registering the same tasks again changes nothing."""
        tasks = tuple(tasks)
        if self.tasks.get(adapter_name) != tasks:
            self.tasks[adapter_name] = tasks
            self.active[adapter_name] = 0
            self.added[adapter_name] = added

    def add_task(self, adapter_name: str, task: str) -> None:
        """Let a known adapter have one more task, the last one; the active one stays."""
        self.tasks[adapter_name] = (*self.tasks[adapter_name], task)
        self.added[adapter_name] = self.added.get(adapter_name, 0) + 1

    def forget(self, adapter_name: str) -> None:
        """Drop an adapter that was deleted."""
        self.tasks.pop(adapter_name, None)
        self.active.pop(adapter_name, None)
        self.added.pop(adapter_name, None)

    def task_of(self, adapter_name: str) -> int | torch.Tensor:
        """The task index, or the LongTensor (B,) of task indices, that `adapter_name` has to use now."""
        routing = self.override
        if routing is None:
            return self.active[adapter_name]
        if adapter_name not in routing.by_adapter:
            raise ValueError(
                f"The requested task {routing.source!r} is not one of adapter '{adapter_name}', which knows the tasks "
                f"{list(self.tasks[adapter_name])}."
            )
        return routing.by_adapter[adapter_name]

    def resolve(self, request: TaskRequest, device: torch.device | None = None) -> Routing:
        """Translate a task request for every adapter that knows it.

        Raises:
            ValueError: No adapter knows the task(s), naming the known ones; or the ids are no (B,) integers.
        """
        by_adapter, first_error = {}, None
        for adapter_name, tasks in self.tasks.items():
            try:
                by_adapter[adapter_name] = resolve_task(request, tasks, device)
            except ValueError as error:
                first_error = first_error or error
        if not by_adapter and first_error is not None:
            raise first_error
        return Routing(by_adapter, source=request)

    def set_active(self, task: Task) -> None:
        """Make `task` the active one of every adapter that knows it."""
        routing = self.resolve(task)
        self.active.update(routing.by_adapter)

    @contextmanager
    def using(self, routing: Routing | None, owner: FrameType | None = None) -> Iterator[None]:
        """Use `routing` in this thread inside the `with` block.

        Args:
            routing: The routing; None for the active tasks.
            owner: The generator or coroutine that opens the block and may be suspended inside of it.
        """
        state = self._thread.state  # not looked up again: a generator may be closed by another thread
        if torch.compiler.is_compiling():
            previous, state.routing = state.routing, routing
            try:
                yield
            finally:
                state.routing = previous
            return
        block = OpenBlock(routing, owner)
        state.open(block)
        try:
            yield
        finally:
            state.close(block)

    def snapshot(self) -> Routing:
        """Everything that decides the tasks of a forward now, such as a later replay under activation checkpointing needs."""
        return self.override or Routing(dict(self.active))


def check_batch_size(routing: Routing, sizes: Sequence[int]) -> None:
    """Raise ValueError when a per-sample routing is for none of these numbers of samples."""
    if routing.adapter_names is not None and len(routing.adapter_names) not in sizes:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(routing.adapter_names)} and {sizes[0]} respectively."
        )
    for ids in routing.by_adapter.values():
        if isinstance(ids, torch.Tensor) and ids.shape[0] not in sizes:
            raise ValueError(
                f"task_ids names the tasks of {ids.shape[0]} samples, but the batch has {sizes[0]}: one id per sample."
            )


def find_routers(model: nn.Module) -> list[TaskRouter]:
    """The task routers of all tuned layers in `model`, each once."""
    return _routers_of(tuned_layers(model))


def routers_of_forward(model: nn.Module) -> list[TaskRouter]:
    """As [`find_routers`], of a model that asks in every forward; see [`layers_of_forward`]."""
    return _routers_of(layers_of_forward(model))


def _routers_of(layers: Sequence[Any]) -> list[TaskRouter]:
    routers: list[TaskRouter] = []
    for layer in layers:
        router = getattr(layer, "task_router", None)
        if isinstance(router, TaskRouter) and not any(router is known for known in routers):
            routers.append(router)
    return routers


def number_added(model: nn.Module) -> int:
    """How many of the last tasks were added later to the adapters in `model`, the most of any."""
    numbers = [number for router in routers_of_forward(model) for number in router.added.values()]
    return max([0, *numbers])


def check_task_order(model: nn.Module, tasks: Sequence[str]) -> None:
    """Raise ValueError unless all adapters in `model` have these tasks in this order, so that an index means the same."""
    for router in routers_of_forward(model):
        for adapter_name, own in router.tasks.items():
            if own != tuple(tasks):
                raise ValueError(
                    f"The adapter '{adapter_name}' in the {type(model).__name__} has the tasks {list(own)}, the model around it "
                    f"has {list(tasks)}: they must be the same, in the same order. get_peft_model(msam, ...) takes them over."
                )


def live_routers() -> list[TaskRouter]:
    """Every router that there is."""
    with _ROUTERS_LOCK:
        return list(_LIVE_ROUTERS)


def _require_routers(model: nn.Module) -> list[TaskRouter]:
    routers = find_routers(model)
    if not routers:
        raise ValueError(f"{type(model).__name__} has no task-aware adapter layer: there is no task to choose.")
    return routers


def set_task(model: nn.Module, task: Task) -> None:
    """Make `task` the active one of all task-aware adapters in `model`, until the next call.

    Args:
        model: A PeftModel, or a model with adapters made by `inject_adapter_in_model` or transformers' `add_adapter`.
        task: The task's name or index.

    Raises:
        ValueError: Unknown task (names the known ones), or no task-aware layer in `model`.
    """
    if not isinstance(task, str | int):
        raise ValueError(f"set_task takes one task name or index, got {task!r}; use use_task for one task per sample.")
    for router in _require_routers(model):
        router.set_active(task)


@contextmanager
def use_task(model: nn.Module, task: TaskRequest) -> Iterator[None]:
    """Use `task` inside the `with` block, in this thread only.

    Args:
        model: As in [`set_task`].
        task: One task for all samples (name or index), or one per sample (list, or LongTensor (B,)).

    Raises:
        ValueError: Unknown task (names the known ones), or no task-aware layer in `model`.
    """
    owner = suspendable_owner()
    with ExitStack() as stack:
        for router in _require_routers(model):
            stack.enter_context(router.using(router.resolve(task), owner))
        yield


@contextmanager
def using_ids(model: nn.Module, ids: int | torch.Tensor) -> Iterator[None]:
    """Like [`use_task`] with ids that are known to be right, those of a model whose adapters all have its own tasks.

    Args:
        model: A model, which may have no task-aware layer at all.
        ids: The index of one task, or a LongTensor (B,) of one per sample.
    """
    with ExitStack() as stack:
        for router in routers_of_forward(model):
            stack.enter_context(router.using(Routing(dict.fromkeys(router.tasks, ids), source=ids)))
        yield
