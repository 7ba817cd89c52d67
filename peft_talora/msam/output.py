"""What the forward of an mSAM gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class MSamOutput(ModelOutput):
    """Output of `MSamForMultiTask`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            The weighted sum of the tasks' losses and the adapters' auxiliary losses; with `labels` only.
        losses (`dict[str, torch.Tensor]`, *optional*): The loss of each task, unweighted; with `labels` only.
        logits (`dict[str, torch.Tensor]`):
            Per task `(B_t, N_t, 4h, 4w)` for the B_t images that have the task and an image embedding of h x w.
        image_index (`dict[str, torch.LongTensor]`, *optional*):
            With `task_ids` only: per task which rows of the batch its B_t images are.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: dict[str, torch.Tensor] | None = None
    image_index: dict[str, torch.Tensor] | None = None
