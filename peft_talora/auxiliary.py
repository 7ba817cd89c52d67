"""Losses that adapters add to the task losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .routing.layers import tuned_layers
from .tuner.tensors import device_of


def auxiliary_loss(model: nn.Module) -> torch.Tensor:
    """The weighted auxiliary losses of all active adapters in `model`, to be added to the task loss.

    TA-LoRA's orthogonality term (MTSAM): per adapter `ortho_reg_weight` times the mean over the Frobenius norms
    ||U1^T U1 - I||, ||U2^T U2 - I|| and ||G[:,:,c]^T G[:,:,c] - I|| of all layers. It depends on the parameters alone.

    Conv-LoRA's balancing loss (arXiv 2401.17868): `aux_loss_weight` times the sum over all layers of CV^2(importance) +
    CV^2(load) of their experts, of the last forward. Every forward replaces it, whatever its mode, one with disabled adapters
    by nothing; a replay by gradient checkpointing does not count. It belongs to the graph of that forward, so that it can be
    differentiated once, together with that forward's output.

    Returns:
        A 0-dim tensor on the model's device; 0.0 where there is nothing to add.
    """
    device = device_of(model)
    values: dict[tuple[Callable[[torch.Tensor], torch.Tensor], str], list[torch.Tensor]] = {}
    for layer in tuned_layers(model):
        if not layer.disable_adapters:
            for adapter_name in layer.active_adapters:
                value = layer.auxiliary_values(adapter_name)
                if value is not None:
                    values.setdefault((layer.auxiliary_reduction, adapter_name), []).append(value.to(device))
    losses = [reduction(torch.cat(parts)) for (reduction, _), parts in values.items()]
    return sum(losses, torch.zeros((), device=device))
