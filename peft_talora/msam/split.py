"""A vision encoder in two parts: the trunk, the same for all tasks of an image, and the branch of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..routing.router import using_ids

# what the encoder gives of images: (B, C, h, w), or a tuple of tensors of which that is the last
Features: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
# what travels between its blocks: (B, h, w, D), or a tuple of such where later parts take more than the last block's output
States: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], states: States) -> States:
    """`function` of a tensor, or of each tensor in a tuple."""
    if isinstance(states, torch.Tensor):
        return function(states)
    return tuple(function(tensor) for tensor in states)


def is_task_aware(module: nn.Module) -> bool:
    """Whether the output of a module depends on the task: its layers say so themselves."""
    return any(getattr(layer, "is_task_aware", False) for layer in module.modules())


class SplitEncoder(nn.Module):
    """Lets a vision encoder run in parts: the trunk, a branch from it, or both.

    It comes before the encoder's own class among the bases. Called with images alone the model is that encoder. A family of
    SAMs says how its encoder is made up: `stem`, `blocks` (run one after the other, by `step`) and `head`. Hidden states are
    a tensor with one row per image, or a tuple of such tensors where more than the last block's output is used later.
    """

    blocks: nn.ModuleList

    def stem(self, pixel_values: torch.Tensor) -> States:
        """What comes before the blocks: images (B, 3, S, S) -> hidden states."""
        raise NotImplementedError

    def step(self, index: int, states: States) -> States:
        """The block of this index: hidden states -> hidden states."""
        return self.blocks[index](states)

    def head(self, states: States) -> ModelOutput:
        """What comes after the blocks: hidden states -> the encoder's output, with `last_hidden_state` (B, C, h, w)."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        trunk_states: States | None = None,
        trunk_only: bool = False,
        branches: list[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | States:
        """Encode images, as the encoder's own class does, or a part of the way.

        Args:
            pixel_values: Images (B, 3, S, S).
            trunk_states: Instead of them, what `trunk_only` gave of them.
            trunk_only: Stop before the first task-aware block, and return the hidden states.
            branches: For which tasks, by their indices: a list of T tasks for every image, so that the output has B T rows,
                those of an image after each other; or a LongTensor (B,) with the task of each. The active task when None.
            **kwargs: Those of the encoder's own forward, where it runs as a whole.
        """
        if trunk_states is None and branches is None and not trunk_only:
            return super().forward(pixel_values, **kwargs)
        states = (
            self._run_blocks(self.stem(pixel_values), 0, self._parting()) if trunk_states is None else trunk_states
        )
        if trunk_only:
            return states
        if branches is None:
            return self._branch(states)
        first = states if isinstance(states, torch.Tensor) else states[0]
        if isinstance(branches, torch.Tensor):
            ids = branches.to(first.device)
        elif len(branches) == 1:
            ids = branches[0]
        else:
            ids = torch.tensor(branches, device=first.device).repeat(first.shape[0])
            states = map_tensors(lambda rows: rows.repeat_interleave(len(branches), dim=0), states)
        with using_ids(self, ids):
            return self._branch(states)

    def _parting(self) -> int:
        """The index of the first block whose output depends on the task; their number where none does."""
        for index, block in enumerate(self.blocks):
            if is_task_aware(block):
                return index
        return len(self.blocks)

    def _run_blocks(self, states: States, start: int, stop: int) -> States:
        for index in range(start, stop):
            states = self.step(index, states)
        return states

    def _branch(self, states: States) -> ModelOutput:
        return self.head(self._run_blocks(states, self._parting(), len(self.blocks)))
