"""Where the factors of TA-LoRA start: G (p, q, v), U1 (d, p), U2 (k, q) and U3 (T, v)."""

from __future__ import annotations

import math

import torch
from torch import nn

# of the starts as LoRAs: which share of the ranks all tasks have in common; the others are dealt out to them
COMMON_SHARE = {"split": 0.0, "half": 0.5, "lora": 1.0}


def fill_factors(
    G: torch.Tensor, U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor, init_weights: bool | str
) -> None:
    """Fill the factors as `TALoraConfig.init_weights` says."""
    nn.init.zeros_(G)
    if init_weights is True:
        for factor in (U1, U2, U3):
            nn.init.normal_(factor)
    elif init_weights in COMMON_SHARE:
        _shares(G, U1, U2, U3, str(init_weights))
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


def _shares(G: torch.Tensor, U1: torch.Tensor, U2: torch.Tensor, U3: torch.Tensor, init_weights: str) -> None:
    """Start as LoRAs: M_t = diag(rank a belongs to task t), A = U1^T with LoRA's own start, and B = s U2 zero.

    The first ranks belong to all tasks: a slice that every task sees has them. The others are dealt out to the tasks in turn, into
    a slice for each, so that such a rank gets the gradient of its task alone. Where slices are fewer than tasks, or ranks where
    none is common, several tasks share one. Slices that are left over start at zero and belong to all tasks.

    Args:
        init_weights: One of [`COMMON_SHARE`], which says how many of the ranks belong to all tasks; of "half" they are fewer, down to
            one, so that each task is dealt one of the others.
    """
    _lora_factors(U1, U2)
    ranks = torch.arange(min(G.shape[:2]))
    # the slices that are dealt out where one is for all
    owned = min(len(U3), G.shape[2] - 1)
    common = math.ceil(COMMON_SHARE[init_weights] * len(ranks))
    if init_weights == "half":
        common = min(common, max(1, len(ranks) - owned))
    if common and not owned:
        # there is no slice to deal out
        common = len(ranks)
    dealt_out = ranks[common:]
    slices = owned if common else min(len(U3), *G.shape)
    if len(dealt_out):
        G[dealt_out, dealt_out, torch.arange(len(dealt_out)) % slices] = 1.0
    if common:
        G[ranks[:common], ranks[:common], slices] = 1.0
    U3.fill_(1.0)
    U3[:, :slices] = 0.0
    if slices:
        tasks = torch.arange(len(U3))
        U3[tasks, tasks % slices] = 1.0


def _lora_factors(U1: torch.Tensor, U2: torch.Tensor) -> None:
    """LoRA's start of A and B in U1 and U2.

    With G zero a first step reaches only the span of q random output directions; with U2 zero it reaches all of them.
    """
    nn.init.kaiming_uniform_(U1.T, a=math.sqrt(5))
    nn.init.zeros_(U2)
