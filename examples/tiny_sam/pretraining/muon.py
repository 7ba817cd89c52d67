"""Muon in the precision of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# of the polynomial that drives a matrix's singular values towards 1, and how often it is applied
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors with singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum and steps as long as AdamW's.

    torch's own orthogonalises in bfloat16, which a CPU without instructions for it does more than ten times slower.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step on all matrices that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
