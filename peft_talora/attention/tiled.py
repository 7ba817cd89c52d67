"""Attention with decomposed positions, tile by tile: SAM's, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# logits of a tile: few enough for a cache, many enough for every core to have work
_TILE = 2**22
_MIN_QUERIES = 256


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """softmax(scale <q_i, k_j> + rows_i[y'] + columns_i[x']) v, with key j at row y' and column x' of the grid.

    Logits are there for one tile at a time, in backward too, where they are computed again. A CPU's time goes into the
    products, and here they are as small as they can be. There is no second derivative.

    Args:
        query, key, value: (B, heads, H W, c).
        rows: What a query adds to the keys of each row, (B, heads, H W, H).
        columns: What it adds to those of each column, (B, heads, H W, W).
        scale: Factor of the scalar products.

    Returns:
        (B, heads, H W, c).
    """
    flat = [tensor.flatten(0, 1) for tensor in (query, key, value, rows, columns)]
    return _TiledAttention.apply(*flat, scale).unflatten(0, query.shape[:2])


class _TiledAttention(torch.autograd.Function):
    """As [`tiled_attention`], with batch and heads as one dimension."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float
    ) -> Tensor:
        output = torch.empty_like(query)
        for heads, queries in tiles(*query.shape[:2]):
            bias = _position_bias(rows[heads, queries], columns[heads, queries])
            # its kernel wants the two dimensions apart
            tile = F.scaled_dot_product_attention(
                query[None, heads, queries], key[None, heads], value[None, heads], attn_mask=bias[None], scale=scale
            )
            output[heads, queries] = tile[0]
        ctx.save_for_backward(query, key, value, rows, columns, output)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, rows, columns, output = ctx.saved_tensors
        grad_query, grad_rows, grad_columns = (torch.empty_like(tensor) for tensor in (query, rows, columns))
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for heads, queries in tiles(*query.shape[:2]):
            tile = (heads, queries)
            bias = _position_bias(rows[tile], columns[tile])
            weights = bias.baddbmm_(query[tile], key[heads].mT, alpha=ctx.scale).softmax(-1)
            grad_value[heads].baddbmm_(weights.mT, grad[tile])
            # d softmax: weights * (their gradient - its mean under the weights, which is <grad, output>)
            mean = (grad[tile] * output[tile]).sum(-1, keepdim=True)
            grad_logits = (grad[tile] @ value[heads].mT).sub_(mean).mul_(weights)
            grad_query[tile] = (grad_logits @ key[heads]).mul_(ctx.scale)
            grad_key[heads].baddbmm_(grad_logits.mT, query[tile], alpha=ctx.scale)
            on_grid = grad_logits.unflatten(-1, (rows.shape[-1], columns.shape[-1]))
            grad_rows[tile], grad_columns[tile] = on_grid.sum(-1), on_grid.sum(-2)
        return grad_query, grad_key, grad_value, grad_rows, grad_columns, None


def tiles(num_heads: int, num_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Which heads, and which queries, of every tile."""
    heads = max(1, _TILE // (num_tokens * min(num_tokens, _MIN_QUERIES)))
    queries = max(1, _TILE // (min(heads, num_heads) * num_tokens))
    for head in range(0, num_heads, heads):
        for query in range(0, num_tokens, queries):
            yield slice(head, head + heads), slice(query, query + queries)


def _position_bias(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, queries, H), (n, queries, W) -> (n, queries, H W)."""
    return (rows[..., :, None] + columns[..., None, :]).flatten(-2)
