"""Which task each sample of a forward belongs to.

All tuned layers of one model share a [`TaskRouter`]. It holds the active task of every adapter (`set_task`, seen by all
threads) and, for the duration of one `with` block or one forward, an override that only the current thread sees
(`use_task`, `task_ids=`). Layers ask the router; nothing is written on the layers themselves, so an exception inside a
forward leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from .layers import tuned_layers

# One task for all samples (a name or an index), or one task per sample (names or indices, or a LongTensor (B,)).
Task = str | int
TaskRequest = Task | Sequence[Task] | torch.Tensor

_LIVE_ROUTERS: weakref.WeakSet[TaskRouter] = weakref.WeakSet()
_ROUTERS_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Routing:
    """The tasks of one forward.

    Args:
        by_adapter: Per adapter an index for all samples, or a LongTensor (B,) of one index per sample.
        source: The request as the caller gave it.
        adapter_names: The adapter of each sample, where they differ.
    """

    by_adapter: dict[str, int | torch.Tensor]
    source: Any = None
    adapter_names: tuple[str, ...] | None = None


class _OpenBlock:
    """A `with` block that is open: its routing, and the generator or coroutine that it was opened in, if any."""

    def __init__(self, routing: Routing | None, owner: FrameType | None) -> None:
        self.routing = routing
        self.owner = owner


class _ThreadState:
    """What one thread uses instead of the active tasks: the routing of its innermost open block."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.blocks: list[_OpenBlock] = []

    def open(self, block: _OpenBlock) -> None:
        self.blocks.append(block)
        self.routing = block.routing

    def close(self, block: _OpenBlock) -> None:
        """Forget a block, whatever was opened or closed since: those of generators close in any order."""
        self.blocks.remove(block)
        self.routing = self.blocks[-1].routing if self.blocks else None

    def settle(self) -> None:
        """Make the routing that of the innermost block whose generator or coroutine, if it has one, is running."""
        if not any(block.owner is not None for block in self.blocks):
            return
        running = _running_frames()
        for block in reversed(self.blocks):
            if block.owner is None or block.owner in running:
                self.routing = block.routing
                return
        raise RuntimeError(
            "A model is called outside of the `use_task` block that is open in this thread: the generator or coroutine "
            f"'{self.blocks[-1].owner.f_code.co_name}', which opened it, is suspended. Call the model inside of the block, "
            "or give the call its own `use_task` block or task_ids."
        )


class _ThreadRouting(threading.local):
    """The current thread's state; `__init__` runs in every thread that looks at it."""

    def __init__(self) -> None:
        self.state = _ThreadState()


_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _running_frames() -> set[FrameType]:
    """The frames of all functions that are running in this thread."""
    frames, frame = set(), sys._getframe()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames


def _suspendable_owner() -> FrameType | None:
    """The innermost running generator or coroutine, which can be suspended inside of a block; None where there is none.

    The generator of a `contextlib` context manager does not count: its block is that of the function that uses it.
    """
    if torch.compiler.is_compiling():
        return None
    frame = sys._getframe(1)
    while frame is not None:
        outer = frame.f_back
        manager = outer is not None and outer.f_code.co_filename == contextlib.__file__
        if frame.f_code.co_flags & _SUSPENDABLE and not manager and frame.f_code.co_filename != contextlib.__file__:
            return frame
        frame = outer
    return None


class _ThreadReplay(threading.local):
    """Whether the current thread replays a checkpointed forward."""

    def __init__(self) -> None:
        self.active = False


_REPLAY = _ThreadReplay()


def replaying() -> bool:
    """Whether this thread runs a block again for activation checkpointing, inside of `checkpoint_context`'s replay."""
    return _REPLAY.active


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
        self.__init__()
        self.__dict__.update(copy.deepcopy(state))

    @property
    def override(self) -> Routing | None:
        """The routing of the current `with` block or forward in this thread, or None.

        Raises:
            RuntimeError: The only open blocks are those of generators or coroutines that are suspended.
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
        block = _OpenBlock(routing, owner)
        state.open(block)
        try:
            yield
        finally:
            state.close(block)

    def snapshot(self) -> Routing:
        """Everything that decides the tasks of a forward now, to replay it later under activation checkpointing."""
        return self.override or Routing(dict(self.active))


def task_index(task: Task, tasks: Sequence[str]) -> int:
    """The index of `task` (a name or an index) in `tasks`. Raises ValueError naming the known tasks."""
    if isinstance(task, str):
        if task not in tasks:
            raise ValueError(f"Unknown task '{task}'. The known tasks are {list(tasks)}.")
        return tasks.index(task)
    if isinstance(task, bool) or not isinstance(task, int):
        raise ValueError(f"A task is a name or an index, got {task!r} ({type(task).__name__}). Known: {list(tasks)}.")
    if not 0 <= task < len(tasks):
        raise ValueError(f"Task index {task} is out of range for the {len(tasks)} known tasks {list(tasks)}.")
    return task


def resolve_task(request: TaskRequest, tasks: Sequence[str], device: torch.device | None = None) -> int | torch.Tensor:
    """An index for one task, a LongTensor (B,) for one task per sample.

    Args:
        request: A name or an index; or B of them; or an integer tensor (B,), or () for one task.
        tasks: The ordered task names.
        device: Where the LongTensor goes; None leaves a tensor where it is.
    """
    if isinstance(request, str | int):
        return task_index(request, tasks)
    if isinstance(request, torch.Tensor):
        ids = _check_id_tensor(request, tasks)
        return int(ids) if ids.ndim == 0 else ids.to(device=device, dtype=torch.long)
    if isinstance(request, Sequence):
        return torch.tensor([task_index(_as_python(t), tasks) for t in request], dtype=torch.long, device=device)
    raise ValueError(
        f"Tasks are given as a name, an index, a list of these or an integer tensor (B,), got {type(request).__name__}. "
        f"The known tasks are {list(tasks)}."
    )


def _as_python(task: Any) -> Any:
    return task.item() if isinstance(task, torch.Tensor) and task.ndim == 0 else task


def _check_id_tensor(ids: torch.Tensor, tasks: Sequence[str]) -> torch.Tensor:
    if ids.ndim > 1:
        raise ValueError(
            f"task_ids must have the shape (batch,), or () for one task, got {tuple(ids.shape)}. Known tasks: {list(tasks)}."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"task_ids must be integers, got {ids.dtype}. The known tasks are {list(tasks)}.")
    # inside a compiled graph a look at the values would break the graph; there torch reports a bad index itself
    if not torch.compiler.is_compiling() and ids.numel() and ids.device.type != "meta":
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= len(tasks):
            raise ValueError(
                f"Task index {low if low < 0 else high} is out of range for the {len(tasks)} known tasks {list(tasks)}."
            )
    return ids


def check_batch_size(routing: Routing | None, batch_size: int) -> None:
    """Raise ValueError when a per-sample routing is not for `batch_size` samples."""
    if routing is None:
        return
    if routing.adapter_names is not None and len(routing.adapter_names) != batch_size:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(routing.adapter_names)} and {batch_size} respectively."
        )
    for ids in routing.by_adapter.values():
        if isinstance(ids, torch.Tensor) and ids.shape[0] != batch_size:
            raise ValueError(
                f"task_ids names the tasks of {ids.shape[0]} samples, but the batch has {batch_size}: one id per sample."
            )


def find_routers(model: nn.Module) -> list[TaskRouter]:
    """The task routers of all tuned layers in `model`, each once."""
    routers: list[TaskRouter] = []
    for layer in tuned_layers(model):
        router = getattr(layer, "task_router", None)
        if isinstance(router, TaskRouter) and not any(router is known for known in routers):
            routers.append(router)
    return routers


def number_added(model: nn.Module) -> int:
    """How many of the last tasks were added later to the adapters in `model`, the most of any."""
    numbers = [number for router in find_routers(model) for number in router.added.values()]
    return max([0, *numbers])


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
    owner = _suspendable_owner()
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
        for router in find_routers(model):
            stack.enter_context(router.using(Routing(dict.fromkeys(router.tasks, ids), source=ids)))
        yield


def checkpoint_context() -> tuple[Any, Any]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint`: the replay uses the tasks of the forward.

    Layers that keep something of their last forward know by [`replaying`] that this is none.

    Example:
        ```py
        checkpoint(block, x, use_reentrant=False, context_fn=peft_talora.checkpoint_context)
        ```
    """
    with _ROUTERS_LOCK:
        routers = list(_LIVE_ROUTERS)
    snapshots = [(router, router.snapshot()) for router in routers]
    # the forward asks for its tasks in the same way as the replay: compiled code is guarded by it, and would be other code
    return _Tasks(snapshots, replay=False), _Tasks(snapshots, replay=True)


class _Tasks(threading.local):
    """Enters the tasks of a checkpointed forward, as often as it is entered: a graph that is kept is replayed by every backward.

    `__init__` runs in every thread that enters it, for several may replay one forward at once.
    """

    def __init__(self, snapshots: list[tuple[TaskRouter, Routing]], replay: bool) -> None:
        self.snapshots = snapshots
        self.replay = replay
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for router, routing in self.snapshots:
                stack.enter_context(router.using(routing))
            if self.replay:
                stack.enter_context(_replay_flag())
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


@contextmanager
def _replay_flag() -> Iterator[None]:
    previous, _REPLAY.active = _REPLAY.active, True
    try:
        yield
    finally:
        _REPLAY.active = previous
