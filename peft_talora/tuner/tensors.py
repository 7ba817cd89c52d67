"""What is asked of tensors and models in several rooms."""

from __future__ import annotations

import torch
from torch import nn


def zero_of(tensor: torch.Tensor) -> torch.Tensor:
    """A zero () in float32 at least, in whose graph `tensor` is with zero gradients, whatever its values are."""
    zero = tensor.flatten()[:0].sum()
    return zero.to(torch.promote_types(zero.dtype, torch.float32))


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU where there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
