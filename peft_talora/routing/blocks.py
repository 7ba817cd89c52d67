"""The tasks of one forward, and the `with` blocks of a thread that are open and say so."""

from __future__ import annotations

import contextlib
import inspect
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


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


class SuspendedBlock(RuntimeError):
    """A model is called outside of the `use_task` block that is open, that of a suspended generator."""


@dataclass(frozen=True, eq=False)
class OpenBlock:
    """A `with` block that is open: its routing, and the generator or coroutine that it was opened in, if any."""

    routing: Routing | None
    owner: FrameType | None


class OpenBlocks:
    """What one thread uses instead of the active tasks: the routing of its innermost open block."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.blocks: list[OpenBlock] = []

    def open(self, block: OpenBlock) -> None:
        self.blocks.append(block)
        self.routing = block.routing

    def close(self, block: OpenBlock) -> None:
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
        suspended = self.blocks[-1].owner
        name = suspended.f_code.co_name if suspended is not None else ""
        raise SuspendedBlock(
            "A model is called outside of the `use_task` block that is open in this thread: the generator or coroutine "
            f"'{name}', which opened it, is suspended. Call the model inside of the block, "
            "or give the call its own `use_task` block or task_ids."
        )


def _running_frames() -> set[FrameType]:
    """The frames of all functions that are running in this thread."""
    frames: set[FrameType] = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames


def suspendable_owner() -> FrameType | None:
    """The innermost running generator or coroutine, which can be suspended inside of a block; None where there is none.

    The generator of a `contextlib` context manager does not count: its block is that of the function that uses it.
    """
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        outer = frame.f_back
        manager = outer is not None and outer.f_code.co_filename == contextlib.__file__
        if frame.f_code.co_flags & _SUSPENDABLE and not manager and frame.f_code.co_filename != contextlib.__file__:
            return frame
        frame = outer
    return None
