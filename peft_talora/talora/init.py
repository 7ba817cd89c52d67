"""Where the factors of TA-LoRA start: G (p, q, v), U1 (d, p), U2 (k, q) and U3 (T, v)."""

from __future__ import annotations

import math

import torch
from torch import nn


def fill_factors(
    G: torch.Tensor, U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor, init_weights: bool | str
) -> None:
    """Fill the factors as `TALoraConfig.init_weights` says."""
    nn.init.zeros_(G)
    if init_weights is True:
        for factor in (U1, U2, U3):
            nn.init.normal_(factor)
    elif init_weights == "split":
        _split(G, U1, U2, U3)
    elif init_weights == "lora":
        _lora(G, U1, U2, U3)
    elif init_weights == "orthogonal":
        nn.init.orthogonal_(U1)
        nn.init.orthogonal_(U2)
        nn.init.normal_(U3)
    else:
        _normalized(U1, U2, U3)
        if init_weights is False:
            nn.init.normal_(G)


def _normalized(U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor) -> None:
    """Scale the factors so that the first step of size lr on G moves dW as LoRA's first step of size lr on B does.

    With A ~ U(-1/sqrt(d), 1/sqrt(d)) an entry of LoRA's dW moves by about s lr sqrt(r / (3 d)). In ours the step of
    G[a,b,c] has the sign of U3[t,c], hence the sum over c does not average out, and an entry moves by about
    s lr sqrt(p q) std(U1) std(U2) sum_c |U3[t,c]|. U1 gets the variance 1 / d, U3 rows of absolute sum 1, U2 the rest.
    """
    (d, p), q, v = U1.shape, U2.shape[1], U3.shape[1]
    nn.init.normal_(U1, std=1.0 / math.sqrt(d))
    nn.init.normal_(U2, std=math.sqrt(min(p, q) / (3.0 * p * q)))
    nn.init.normal_(U3, std=math.sqrt(math.pi / 2.0) / v)


def _split(G: torch.Tensor, U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor) -> None:
    """Start as a LoRA for each task: M_t = diag(rank a belongs to task t), A = U1^T with LoRA's own start, B = s U2 zero.

    Rank a and task t belong together where a = t modulo the number of shares, that of the tasks unless there are fewer
    slices or ranks. A rank then gets the gradient of its task alone. The slices that are left over start at zero and belong
    to all tasks: what grows there couples them.
    """
    _lora_factors(U1, U2)
    shares = min(*G.shape, len(U3))
    ranks = torch.arange(min(G.shape[:2]))
    G[ranks, ranks, ranks % shares] = 1.0
    _deal_out_slices(U3, shares)


def _lora(G: torch.Tensor, U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor) -> None:
    """Start as one LoRA that all tasks share: M_t = I, A = U1^T with LoRA's own start, and B = s U2 zero.

    I is a slice that belongs to all tasks. Before it there is one for each task, or as many as there are: they start at
    zero, and what grows there is the task's own.
    """
    _lora_factors(U1, U2)
    shares = min(G.shape[2] - 1, len(U3))
    ranks = torch.arange(min(G.shape[:2]))
    G[ranks, ranks, shares] = 1.0
    _deal_out_slices(U3, shares)


def _deal_out_slices(U3: torch.Tensor, shares: int) -> None:
    """Give every task one of the first `shares` slices, in turn, and all that are behind them."""
    U3.fill_(1.0)
    U3[:, :shares] = 0.0
    if shares:
        tasks = torch.arange(len(U3))
        U3[tasks, tasks % shares] = 1.0


def _lora_factors(U1: torch.Tensor, U2: torch.Tensor) -> None:
    """LoRA's start of A and B in U1 and U2.

    With G zero a first step reaches only the span of q random output directions; with U2 zero it reaches all of them.
    """
    nn.init.kaiming_uniform_(U1.T, a=math.sqrt(5))
    nn.init.zeros_(U2)
