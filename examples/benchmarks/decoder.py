"""The mask decoder of one task with many channels: one pass for all of them, to one pass per channel."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import nn

import peft_talora as pt

from .measuring import Row, measure
from .models import SIZES, Size, make_sam

CHANNELS = 13


def decoder(args: argparse.Namespace) -> Iterator[Row]:
    """Token mode to prompt mode on a given image embedding: inference, and forward and backward."""
    for name in args.sizes:
        calls = {mode: decoding(SIZES[name], mode, CHANNELS, args) for mode in ("token", "prompt")}
        for what in ("inference", "training"):
            row = Row(f"decoder alone, {CHANNELS} channels, {what}, {name}", "token", "prompt", limit=0.15)
            yield measure(row, {mode: call[what] for mode, call in calls.items()}, args)


def decoding(size: Size, mode: str, channels: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """{"inference" or "training": call}; trained are the decoder, its no-mask embedding, and what is before it."""
    torch.manual_seed(0)
    tasks = {"semantic": pt.TaskSpec("semantic", num_channels=channels)}
    model = pt.MSamForMultiTask.from_sam(make_sam(size, args, layers=1), tasks, channel_mode=mode)
    shape = (size.images, size.decoder, size.grid, size.grid)
    embedding = torch.randn(shape, device=args.device, dtype=args.dtype).requires_grad_()
    logits = model(image_embeddings=embedding).logits["semantic"]
    cotangent = torch.randn_like(logits)
    # the decoder's other heads get no loss, and a layer of SAM's own no query
    parameters = used_parameters(logits, [*model.mask_decoders.parameters(), *model.no_mask_embeds.parameters()])

    def train() -> None:
        torch.autograd.grad(model(image_embeddings=embedding).logits["semantic"], [embedding, *parameters], cotangent)

    return {"inference": torch.no_grad()(lambda: model(image_embeddings=embedding)), "training": train}


def used_parameters(output: torch.Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]
