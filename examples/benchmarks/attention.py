"""`lean_attention` to transformers' sdpa attention, on one layer of the encoder."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

import peft_talora as pt

from .measuring import Row, assert_equal, measure
from .models import SIZES, fill


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """A global layer and a windowed one: forward, and forward and backward."""
    for name in args.sizes:
        size = SIZES[name]
        hidden, heads, grid = size.single_layer
        window = min(14, grid)
        windows = (-(-grid // window)) ** 2
        limits = {"forward": {"limit": 0.65}, "forward and backward": {"limit": 1.0, "memory_limit": 0.25}}
        for place, shape in (("global", (1, grid, grid)), ("windowed", (windows, window, window))):
            ways = attending(hidden, heads, shape, args)
            for what, bounds in limits.items():
                title = f"attention, {place}, {shape[0]} x {shape[1]} x {shape[2]} tokens, {hidden} channels, {what}"
                # a window's position bias is small: the limits are for the global layers
                row = Row(title, "lean", "plain", **(bounds if place == "global" else {}))
                yield measure(row, {way: calls[what] for way, calls in ways.items()}, args)


def attending(
    hidden: int, heads: int, shape: tuple[int, int, int], args: argparse.Namespace
) -> dict[str, dict[str, Callable[[], None]]]:
    """{way: {"forward" or "forward and backward": call}} on an input (B, H, W, hidden); the weights are frozen."""
    torch.manual_seed(0)
    config = SamVisionConfig(hidden_size=hidden, num_attention_heads=heads, image_size=16 * shape[1])
    plain = fill(SamVisionSdpaAttention(config, 0)).requires_grad_(False).to(device=args.device, dtype=args.dtype)
    lean = pt.lean_attention(copy.deepcopy(plain))
    x = torch.randn(*shape, hidden, device=args.device, dtype=args.dtype)
    with torch.no_grad():
        tolerance = 1e-5 if args.dtype == torch.float32 else 5e-2
        assert_equal(lean(x)[0], plain(x)[0], "attention", tolerance)
    return {"lean": calls_of(lean, x), "plain": calls_of(plain, x)}


def calls_of(module: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], None]]:
    x = x.clone().requires_grad_()
    return {
        "forward": torch.no_grad()(lambda: module(x)),
        "forward and backward": lambda: torch.autograd.grad(module(x)[0], x, x),
    }
