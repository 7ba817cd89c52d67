"""TA-LoRA beside PEFT's LoRA of the same rank: one fused qkv layer, and a training step of an mSAM."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import SamModel

import peft_talora as pt

from .measuring import Row, gradients, measure
from .models import SIZES, TASKS, TINY_SAM, Size, adapt, label_maps, make_sam, pixels, trained, training_step

# the tasks of a mixed batch: every task several times, in no order
MIXED = (0, 2, 1, 1, 0, 2, 2, 0)


def talora(args: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward with TA-LoRA, for one task and for a batch of mixed tasks, to the same with PEFT's LoRA."""
    for name in args.sizes:
        size = SIZES[name]
        for mixed in (False, True):
            kind, limit = ("mixed tasks", 1.1) if mixed else ("one task", 1.0)
            row = Row(f"fused qkv layer, {name}, r={size.rank}, {kind}", "talora", "lora", limit=limit)
            yield measure(row, layer_variants(size, mixed, args), args)
        for mixed in (False, True):
            kind, limit = ("mixed tasks", 1.1) if mixed else ("one task", 1.0)
            row = Row(f"mSAM training step, {name}, r={size.rank}, {kind}", "talora", "lora", limit=limit)
            yield measure(row, step_variants(name, mixed, args), args)


def layer_variants(size: Size, mixed: bool, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A layer D -> 3 D on the windows of `len(MIXED)` images: alone, with LoRA, with TA-LoRA."""
    torch.manual_seed(0)
    windows = len(MIXED) * (-(-size.grid // size.window)) ** 2
    like = {"device": args.device, "dtype": args.dtype}
    x = torch.randn(windows, size.window, size.window, size.hidden, **like).requires_grad_()
    cotangent = torch.randn(*x.shape[:-1], 3 * size.hidden, **like)
    base = nn.Sequential(nn.Linear(size.hidden, 3 * size.hidden, **like)).requires_grad_(False)
    variants = {"base": lambda: gradients((base(x),), [x], cotangent)}
    for name, config in configs(size, target_modules=["0"]).items():
        model = adapt(nn.Sequential(nn.Linear(size.hidden, 3 * size.hidden, **like)), config)
        ids = torch.tensor(MIXED, device=args.device) if mixed and name == "talora" else None
        inputs = [x, *trained(model)]
        variants[name] = lambda model=model, ids=ids, inputs=inputs: gradients(
            (routed_layer(model, x, ids),), inputs, cotangent
        )
    return variants


def routed_layer(model: nn.Module, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """The adapted layer itself: it sees windows, more rows than the model is told tasks of."""
    layer = model.base_model.model[0]
    if ids is None:
        return layer(x)
    with model.use_task(ids):
        return layer(x)


def configs(size: Size, **changes: Any) -> dict[str, Any]:
    """Both adapters, of the same rank."""
    return {
        "lora": LoraConfig(r=size.rank, lora_alpha=size.rank // 2, **changes),
        "talora": pt.TALoraConfig(r=size.rank, **{"tasks": list(TASKS), **changes}),
    }


def step_variants(name: str, mixed: bool, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A training step of an mSAM, the decoders and the encoder's norms trained, too; all images for one task, or mixed."""
    size = SIZES[name]
    if name == "small":  # the SAM of the training script
        sam, count = SamModel.from_pretrained(TINY_SAM).to(device=args.device, dtype=args.dtype), len(MIXED)
    else:
        sam, count = make_sam(size, args), len(MIXED) if name == "tiny" else 3
    image_size = sam.config.vision_config.image_size
    images = pixels(count, image_size, args)
    ids = torch.tensor(MIXED[:count] if mixed else [1] * count, device=args.device)
    labels = label_maps(TASKS, count, image_size, args.device)
    variants = {}
    for kind, config in configs(size, target_modules=["qkv"]).items():
        torch.manual_seed(0)
        msam = pt.MSamForMultiTask.from_sam(sam, TASKS, channel_mode="token")
        config.modules_to_save = pt.default_modules_to_save(msam)
        model = adapt(msam, config)
        # with one task for all images the task is an argument of the forward, too
        chosen = {"task_ids": ids} if mixed else {"tasks": ["depth"]}
        variants[kind] = training_step(
            model, lambda model=model, chosen=chosen: [model(images, labels=labels, **chosen).loss]
        )
    return variants
