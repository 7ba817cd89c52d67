"""Products with the thin matrices A (r x d) and B (k x r) of a low-rank update.

With a rank of a few, such a product costs what reading and writing its large side costs. Eager mode has its routines for
products. A compiler does better where a product is written out as a sum of r outer products: it joins them with the addition
that follows, one pass over the large tensor and no further one of its size. Both functions here do so in compiled graphs, in
forward and backward, up to a rank of 8.

What that brings shows `python examples/benchmark.py --only layer --threads 1`: of what Conv-LoRA's plain form adds to a compiled
layer of SAM-B's 768 channels ours adds 0.38 to 0.53 on windows of 14 x 14, where the routines of eager mode make it 0.68 to 0.79, with
0.64 of the memory instead of 0.98. At 64 channels windows cost a tenth more than with those.
`--only low_rank` compares with two linear layers and a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# up to this rank products are written out
MAX_WRITTEN_OUT = 8
# shorter blocks of tokens are summed as one: their partial sums would be as large as the tensor that is summed
_MIN_BLOCK = 8


def project(x: Tensor, A: Tensor) -> Tensor:
    """A x: (..., d), (r, d) -> (..., r)."""
    if _is_written_out(A.shape[0]):
        return Project.apply(x, A)
    return F.linear(x, A)


def add_product(result: Tensor, hidden: Tensor, B: Tensor) -> Tensor:
    """result + B hidden: (..., k), (..., r), (k, r) -> (..., k)."""
    if _is_written_out(B.shape[1]):
        return AddProduct.apply(result, hidden, B)
    # a contiguous B^T: autograd then computes the gradient of B as hidden^T times gradient, which CPUs do several times faster
    # than gradient^T times hidden
    transposed = B.T.contiguous()
    if result.dtype != hidden.dtype:
        return result + hidden @ transposed
    flat = torch.addmm(result.reshape(-1, result.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), transposed)
    return flat.reshape(result.shape)


def _is_written_out(rank: int) -> bool:
    return torch.compiler.is_compiling() and rank <= MAX_WRITTEN_OUT


class Project(Function):
    """A x, whose gradient for x is written out: it joins the addition to the base layer's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, A)
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, A = ctx.saved_tensors
        grad_x = _outer_products(grad, A)
        return grad_x.to(x.dtype), _sum_of_outer_products(grad, x).to(A.dtype)


class AddProduct(Function):
    """result + B hidden, written out: it joins whatever made the result."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, hidden: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, B)
        ctx.result_dtype = result.dtype
        # B^T by a product: a compiler would not store a copy, and read B with strides all over the large loop
        transposed = torch.eye(B.shape[1], dtype=B.dtype, device=B.device) @ B.T
        return result + _outer_products(hidden, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, B = ctx.saved_tensors
        grad_hidden = torch.stack([(grad * column).sum(-1) for column in B.unbind(1)], dim=-1)
        grad_B = _sum_of_outer_products(hidden, grad).T
        return grad.to(ctx.result_dtype), grad_hidden.to(hidden.dtype), grad_B.to(B.dtype)


def _outer_products(thin: Tensor, matrix: Tensor) -> Tensor:
    """The product (..., r), (r, k) -> (..., k) as a sum of r outer products."""
    return sum(column[..., None] * row for column, row in zip(thin.unbind(-1), matrix.unbind(0), strict=True))


def _sum_of_outer_products(thin: Tensor, wide: Tensor) -> Tensor:
    """The sum over all tokens: (..., N, r), (..., N, k) -> (r, k).

    Tokens are summed in blocks of N, then the blocks: one long product of this shape is slower on CPUs.
    """
    dtype = torch.promote_types(thin.dtype, wide.dtype)
    block = thin.shape[-2] if thin.shape[-2] >= _MIN_BLOCK else thin.shape[:-1].numel()
    thin, wide = (t.reshape(-1, block, t.shape[-1]).to(dtype) for t in (thin, wide))
    return torch.bmm(thin.transpose(1, 2), wide).sum(0)
