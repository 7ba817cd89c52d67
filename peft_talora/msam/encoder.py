"""The image encoder of an mSAM, each image once per task from the first task-aware layer on.

What lies before that layer, the trunk, is the same for all tasks of an image and runs once; the rest is the branch of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionEncoderOutput

from ..routing.router import number_added, using_ids
from .checks import checked_chunk


class SplitEncoder:
    """Lets a vision encoder run in parts: the trunk, a branch from it, or both.

    It comes before the encoder's own class among the bases. Called with images alone the model is that encoder. A family of
    SAMs says how its encoder is made up: `stem`, `blocks` (run one after the other) and `head`. Hidden states have one row
    per image.
    """

    blocks: nn.ModuleList

    def stem(self, pixel_values: torch.Tensor) -> Any:
        """What comes before the blocks: images (B, 3, S, S) -> hidden states."""
        raise NotImplementedError

    def head(self, states: Any) -> Any:
        """What comes after the blocks: hidden states -> the encoder's output, with `last_hidden_state` (B, C, h, w)."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        trunk_states: Any = None,
        trunk_only: bool = False,
        branches: list[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
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
            return super().forward(pixel_values, **kwargs)  # type: ignore[misc]
        states = (
            self._run_blocks(self.stem(pixel_values), 0, self._parting()) if trunk_states is None else trunk_states
        )
        if trunk_only:
            return states
        if branches is None:
            return self._branch(states)
        if isinstance(branches, torch.Tensor):
            ids = branches.to(states.device)
        elif len(branches) == 1:
            ids = branches[0]
        else:
            ids = torch.tensor(branches, device=states.device).repeat(states.shape[0])
            states = states.repeat_interleave(len(branches), dim=0)
        with using_ids(self, ids):
            return self._branch(states)

    def _parting(self) -> int:
        """The index of the first block whose output depends on the task; their number where none does."""
        for index, block in enumerate(self.blocks):
            if is_task_aware(block):
                return index
        return len(self.blocks)

    def _run_blocks(self, states: Any, start: int, stop: int) -> Any:
        for block in self.blocks[start:stop]:
            states = block(states)
        return states

    def _branch(self, states: Any) -> Any:
        return self.head(self._run_blocks(states, self._parting(), len(self.blocks)))


class MSamVisionEncoder(SplitEncoder, SamVisionEncoder):
    """SAM's vision encoder, in two parts. Its hidden states are (B, h, w, D)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.layers

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches with their positions."""
        states = self.patch_embed(pixel_values)
        return states if self.pos_embed is None else states + self.pos_embed

    def head(self, states: torch.Tensor) -> SamVisionEncoderOutput:
        """The neck."""
        return SamVisionEncoderOutput(last_hidden_state=self.neck(states))


def is_task_aware(module: nn.Module) -> bool:
    """Whether the output of a module depends on the task: its layers say so themselves."""
    return any(getattr(layer, "is_task_aware", False) for layer in module.modules())


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
        trunk_states: What the encoder gives of them with `trunk_only`, (B, h, w, D).
        names: The wanted tasks.
        task_chunk: How many tasks run as one batch; all of them when None.

    Raises:
        ValueError: `task_chunk` is no positive number; nothing was computed then.
    """
    chunk_size, encoder = checked_chunk(task_chunk, len(names)), model.vision_encoder
    if not is_task_aware(encoder):
        return dict.fromkeys(names, encoder(pixel_values, trunk_states=trunk_states).last_hidden_state)
    chunks = _chunks(list(model.task_specs), names, chunk_size, number_added(encoder))
    if trunk_states is None and len(chunks) > 1:
        pixel_values, trunk_states = None, encoder(pixel_values, trunk_only=True)
    indices = {name: index for index, name in enumerate(model.task_specs)}
    embeddings: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        branches = [indices[name] for name in chunk]
        output = encoder(pixel_values, trunk_states=trunk_states, branches=branches).last_hidden_state
        rows = output.unflatten(0, (output.shape[0] // len(chunk), len(chunk)))
        embeddings.update(zip(chunk, rows.unbind(1), strict=True))
    return {name: embeddings[name] for name in names}


def _chunks(tasks: list[str], names: list[str], size: int, added: int) -> list[list[str]]:
    """The wanted tasks in batches of `size` at most; each of the last `added` tasks is one by itself.

    Were it in the batch of the others, their products would have other sizes with it than without, and other last bits.
    """
    alone = tasks[len(tasks) - added :]
    first = [name for name in names if name not in alone]
    chunks = [first[start : start + size] for start in range(0, len(first), size)]
    return chunks + [[name] for name in names if name in alone]


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
    return model.vision_encoder(pixel_values, trunk_states=trunk_states, branches=ids).last_hidden_state


def embeddings_by_task(embeddings: Any, image_index: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image embeddings of each task, of one tensor (B, C, h, w) and the rows of each task."""
    if isinstance(embeddings, Mapping):
        raise ValueError("With task_ids, image_embeddings must be one tensor (B, C, h, w), got a dict.")
    return {name: embeddings[rows.to(embeddings.device)] for name, rows in image_index.items()}


def given_embeddings(
    embeddings: torch.Tensor | Mapping[str, torch.Tensor], names: list[str]
) -> dict[str, torch.Tensor]:
    """The image embeddings of the wanted tasks, as they were passed to the forward."""
    if isinstance(embeddings, torch.Tensor):
        if len(names) != 1:
            raise ValueError(
                f"image_embeddings is one tensor, but {len(names)} tasks are wanted ({names}): pass one task, "
                "task_ids, or a dict {task: tensor}."
            )
        return {names[0]: embeddings}
    missing = [name for name in names if name not in embeddings]
    if missing:
        raise ValueError(f"image_embeddings has no entry for {missing}, only for {list(embeddings)}.")
    return {name: embeddings[name] for name in names}
