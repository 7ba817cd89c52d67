"""Losses that adapters add to the task losses."""

from __future__ import annotations

import torch
from torch import nn

from .convlora.layer import ConvLoraLayer
from .talora.layer import TALoraLayer


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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    for loss in (*_ortho_losses(model, device), *_balancing_losses(model, device)):
        total = total + loss
    return total


def _ortho_losses(model: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """TA-LoRA's term, per adapter."""
    norms: dict[str, list[torch.Tensor]] = {}
    weights: dict[str, float] = {}
    for layer in model.modules():
        if isinstance(layer, TALoraLayer) and not layer.disable_adapters:
            for adapter_name in layer.active_adapters:
                if layer.ortho_reg_weight.get(adapter_name):
                    norms.setdefault(adapter_name, []).append(layer.ortho_norms(adapter_name))
                    weights[adapter_name] = layer.ortho_reg_weight[adapter_name]
    return [weights[name] * torch.cat([part.to(device) for part in parts]).mean() for name, parts in norms.items()]


def _balancing_losses(model: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Conv-LoRA's terms, per layer and adapter."""
    losses = []
    for layer in model.modules():
        if isinstance(layer, ConvLoraLayer) and not layer.disable_adapters:
            losses += [layer.balancing_loss(adapter_name) for adapter_name in layer.active_adapters]
    return [loss.to(device) for loss in losses if loss is not None]
