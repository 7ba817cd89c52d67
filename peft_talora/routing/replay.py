"""A checkpointed forward that runs again in backward: with the tasks that it had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from .blocks import Routing, SuspendedBlock
from .router import TaskRouter, live_routers


class _ThreadReplay(threading.local):
    """Whether the current thread replays a checkpointed forward."""

    def __init__(self) -> None:
        self.active = False


_REPLAY = _ThreadReplay()


def replaying() -> bool:
    """Whether this thread runs a block again for activation checkpointing, inside of `checkpoint_context`'s replay."""
    return _REPLAY.active


def checkpoint_context() -> tuple[Any, Any]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint`: the replay uses the tasks of the forward.

    Layers that keep something of their last forward know by [`replaying`] that this is none.

    Example:
        ```py
        checkpoint(block, x, use_reentrant=False, context_fn=peft_talora.checkpoint_context)
        ```
    """
    snapshots = []
    for router in live_routers():
        # of a model that is not called here; were it, its layers would say so
        with suppress(SuspendedBlock):
            snapshots.append((router, router.snapshot()))
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
