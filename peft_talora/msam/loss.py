"""The losses of an mSAM's tasks, 0 with zero gradients where nothing is labelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..losses import task_loss
from ..tuner.checks import is_number
from ..tuner.tensors import zero_of


def task_losses(
    model: nn.Module,
    logits: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    image_index: Mapping[str, torch.Tensor] | None,
    loss_divisors: Mapping[str, float | torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """The loss of each task, unweighted.

    Args:
        model: The mSAM.
        logits: Per wanted task (B_t, N_t, 4h, 4w).
        labels: Per task B rows.
        image_index: Per task which rows its B_t images are; all of them when None.
        loss_divisors: Per task what the sum over its labelled images is divided by; their number when None.

    Raises:
        ValueError: `loss_divisors` leaves out a task that has labels, or holds what is no number of images.
    """
    labelled = [name for name in logits if name in labels]
    if loss_divisors is not None:
        _check_loss_divisors(loss_divisors, labelled)
    losses = {}
    for name, task_logits in logits.items():
        if task_logits.shape[0] == 0:
            losses[name] = _zero_loss(model, name, task_logits)
        elif name not in labels:
            losses[name] = zero_of(task_logits)
        else:
            rows = labels[name].to(task_logits.device)
            if image_index is not None:
                rows = rows[image_index[name].to(task_logits.device)]
            divisor = None if loss_divisors is None else loss_divisors[name]
            losses[name] = task_loss(model.task_specs[name], task_logits, rows, divisor)
    return losses


def _check_loss_divisors(loss_divisors: Any, names: list[str]) -> None:
    if not isinstance(loss_divisors, Mapping) or any(name not in loss_divisors for name in names):
        given = list(loss_divisors) if isinstance(loss_divisors, Mapping) else type(loss_divisors).__name__
        raise ValueError(
            f"loss_divisors must be a dict {{task: number}} with all tasks that have labels, {names}; got {given}."
        )
    for name in names:
        value = loss_divisors[name]
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            continue
        if not is_number(value) or value < 0:
            raise ValueError(f"loss_divisors['{name}'] must be a number >= 0 of images per forward, got {value!r}.")


def _zero_loss(model: nn.Module, name: str, logits: torch.Tensor) -> torch.Tensor:
    """0 with zero gradients for the task's own parameters: every process of DDP must see them in every step."""
    total = logits.float().sum()
    for module in (model.no_mask_embeds[name], model.mask_decoders[name]):
        for parameter in module.parameters():
            if parameter.requires_grad:
                total = total + zero_of(parameter)
    return total
