"""What adding a low-rank update to a layer's output costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_talora.tuner.low_rank import add_product, project

from .measuring import Row, gradients, measure


def ours(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A linear layer with the update that the package's layers add to it."""
    return add_product(F.linear(x, weight, bias), project(x, A), B)


def plain(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same with two more linear layers, as PEFT's LoRA has them."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B)


def row(args: argparse.Namespace, name: str, shape: tuple[int, ...], width: int, rank: int, compiled: bool) -> Row:
    """Forward and backward of a frozen layer width -> `args.widening` width, its input and its update being trained."""
    torch.compiler.reset()
    out = args.widening * width
    weight, bias = (torch.randn(*size, device=args.device) / 8 for size in ((out, width), (out,)))
    x, A, B = (torch.randn(*size, device=args.device) for size in ((*shape, width), (rank, width), (out, rank)))
    cotangent = torch.randn(*shape, out, device=args.device)
    trained = [tensor.requires_grad_() for tensor in (x, A, B)]

    def step(layer: Callable[..., Tensor]) -> Callable[[], None]:
        layer = torch.compile(layer, dynamic=False) if compiled else layer
        return lambda: gradients((layer(x, weight, bias, A, B),), trained, cotangent)

    def base() -> None:
        gradients((F.linear(x, weight, bias),), [x], cotangent)

    mode = "compiled" if compiled else "eager"
    title = f"update of rank {rank}, {name}, {width} -> {out} channels, {mode}"
    measured = Row(title, "ours", "plain", minus="base", limit=0.95)
    return measure(measured, {"base": base, "ours": step(ours), "plain": step(plain)}, args)


def low_rank(args: argparse.Namespace) -> Iterator[Row]:
    """What the package adds to a layer to what two more linear layers add."""
    for name, shape, width in (("25 windows of 14x14", (25, 14, 14), 64), ("1 map of 64x64", (1, 64, 64), 192)):
        for rank in (3, 8):
            for compiled in (False, True):
                yield row(args, name, shape, width, rank, compiled)
