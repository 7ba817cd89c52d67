"""Losses that adapters add to the task losses."""

from __future__ import annotations

import torch
from torch import nn

from .talora.layer import TALoraLayer


def auxiliary_loss(model: nn.Module) -> torch.Tensor:
    """The weighted auxiliary losses of all active adapters in `model`, to be added to the task loss.

    TA-LoRA's orthogonality term (MTSAM): per adapter `ortho_reg_weight` times the mean over the Frobenius norms
    ||U1^T U1 - I||, ||U2^T U2 - I|| and ||G[:,:,c]^T G[:,:,c] - I|| of all layers. It depends on the parameters alone.

    Returns:
        A 0-dim tensor on the model's device; 0.0 where there is nothing to add.
    """
    norms: dict[str, list[torch.Tensor]] = {}
    weights: dict[str, float] = {}
    for layer in model.modules():
        if isinstance(layer, TALoraLayer) and not layer.disable_adapters:
            for adapter_name in layer.active_adapters:
                if layer.ortho_reg_weight.get(adapter_name):
                    norms.setdefault(adapter_name, []).append(layer.ortho_norms(adapter_name))
                    weights[adapter_name] = layer.ortho_reg_weight[adapter_name]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    for adapter_name, parts in norms.items():
        total = total + weights[adapter_name] * torch.cat([p.to(device) for p in parts]).mean()
    return total
