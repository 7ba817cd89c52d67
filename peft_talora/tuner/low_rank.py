"""The second product of a low-rank update and its addition, as one.

Written out as two linear layers and a sum, an update with thin matrices costs mostly what reading and writing its large side
costs. `python examples/benchmark.py --only low_rank --threads 1` compares: with ranks 3 to 8 forward and backward of what is
added take about 0.6 of the time that they take so, in eager mode and compiled, on a CPU. Sums of outer products in
autograd functions of our own, for compilers to join with what is around them, were faster than this by 6 to 9 % on maps of
64 x 64 tokens and slower by 8 to 15 % on SAM's windows of 14 x 14.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(result: Tensor, hidden: Tensor, B: Tensor) -> Tensor:
    """result + B hidden: (..., k), (..., r), (k, r) -> (..., k)."""
    # a contiguous B^T: autograd then computes the gradient of B as hidden^T times gradient, which CPUs do several times faster
    # than gradient^T times hidden
    transposed = B.T.contiguous()
    if result.dtype != hidden.dtype:
        return result + hidden @ transposed
    flat = torch.addmm(result.reshape(-1, result.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), transposed)
    return flat.reshape(result.shape)
