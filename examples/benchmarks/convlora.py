"""What Conv-LoRA adds to a layer and to a training step."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import SamModel

import peft_talora as pt
from peft_talora.convlora.gate import choose

from .measuring import Row, gradients, measure
from .models import TINY_SAM, label_maps, trained, training_step

# images of a whole training step
BATCH = 8


def plain_experts(z: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The experts as the paper writes them, expert by expert: resize, convolve, GELU, resize. z is (B, H, W, r)."""
    z = z.permute(0, 3, 1, 2)
    output = torch.zeros_like(z)
    for e in range(weight.shape[0]):
        rows = (index == e).nonzero().flatten()
        if len(rows) == 0:
            continue
        x = z[rows]
        if e > 0:
            x = F.interpolate(x, scale_factor=e + 1, mode="bicubic", align_corners=False)
        x = F.gelu(F.conv2d(x, weight[e], bias[e], padding=1))
        if e > 0:
            x = F.interpolate(x, size=z.shape[-2:], mode="bicubic", align_corners=False)
        output = output.index_copy(0, rows, x)
    return output.permute(0, 2, 3, 1)


def plain_layer(layer: pt.ConvLoraLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer with the plain experts, all else being the same: (output, balancing loss)."""
    A, B, weight, bias, gate, noise = (getattr(layer, name)["default"] for name in layer.adapter_layer_names)
    z = F.linear(x, A)
    choice = choose(z.mean((1, 2)), gate, noise, noisy=True)
    hidden = (z + plain_experts(z, choice.index, weight, bias)) * layer.scaling["default"]
    result = torch.addmm(layer.base_layer(x).flatten(0, -2), hidden.flatten(0, -2), B.T.contiguous())
    return result.unflatten(0, x.shape[:-1]), 0.01 * choice.loss


def layer_row(args: argparse.Namespace, name: str, shape: tuple, width: int, compiled: bool, limit: float) -> Row:
    """Forward and backward of a layer width -> `args.widening` width of a block in the middle of an encoder."""
    out = args.widening * width
    torch._dynamo.reset()
    wrap = functools.partial(torch.compile, dynamic=False) if compiled else (lambda function: function)
    base = nn.Sequential(nn.Linear(width, out)).requires_grad_(False)
    model = get_peft_model(base, pt.ConvLoraConfig(target_modules=["0"])).to(args.device).train()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.convlora_B["default"])
    parameters = trained(layer)
    x = torch.randn(*shape, width, device=args.device, requires_grad=True)
    cotangent = torch.randn(*shape, out, device=args.device)
    linear, ours = wrap(layer.base_layer), wrap(layer)

    def run_ours() -> None:
        gradients((ours(x), layer.auxiliary_values("default")), [x, *parameters], cotangent)

    variants = {
        "base": lambda: gradients((linear(x),), [x], cotangent),
        "ours": run_ours,
        "plain": lambda: gradients(plain_layer(layer, x), [x, *parameters], cotangent),
    }
    row = Row(name, "ours", "plain", minus="base", limit=limit)
    if compiled:
        # the dispatch by expert breaks its graph; the ratio is to the faster one
        plain = torch.compile(plain_layer)
        variants["plain compiled"] = lambda: gradients(plain(layer, x), [x, *parameters], cotangent)
    measure(row, variants, args)
    row.to = min((n for n in variants if n.startswith("plain")), key=lambda n: statistics.median(row.seconds[n]))
    return row


def layers(args: argparse.Namespace) -> Iterator[Row]:
    """What Conv-LoRA adds to a layer, to what its plain form adds."""
    shapes = {"25 windows of 14x14": (25, 14, 14), "4 maps of 64x64": (4, 64, 64)}
    for width, compiled, limit in ((64, False, 0.45), (64, True, 0.30), (768, True, 0.55)):
        for name, shape in shapes.items():
            mode = "compiled" if compiled else "eager"
            title = f"layer, {name}, {width} -> {args.widening * width} channels, {mode}"
            yield layer_row(args, title, shape, width, compiled, limit)


def sam_step(config, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the small SAM itself, its adapter the only thing that is trained."""
    torch.manual_seed(0)
    model = get_peft_model(SamModel.from_pretrained(TINY_SAM), config).to(args.device).train()
    images = torch.randn(BATCH, 3, 128, 128, device=args.device)
    boxes = torch.tensor([[[20.0, 20.0, 90.0, 100.0]]] * BATCH, device=args.device)

    def passes() -> list[torch.Tensor]:
        masks = model(pixel_values=images, input_boxes=boxes, multimask_output=False).pred_masks
        return [F.binary_cross_entropy_with_logits(masks, torch.ones_like(masks)) + pt.auxiliary_loss(model)]

    return training_step(model, passes)


def msam_step(config, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the training script: three tasks, their decoders and the encoder's norms trained, too."""
    torch.manual_seed(0)
    tasks = {name: pt.TaskSpec(name, 8 if name == "semantic" else None) for name in ("semantic", "depth", "normals")}
    msam = pt.MSamForMultiTask.from_sam(SamModel.from_pretrained(TINY_SAM), tasks)
    if isinstance(config, LoraConfig):
        config.modules_to_save = pt.default_modules_to_save(msam)
    model = get_peft_model(msam, config).to(args.device).train()
    images = torch.randn(BATCH, 3, 128, 128, device=args.device)
    labels = label_maps(tasks, BATCH, 128, args.device)
    return training_step(model, lambda: [model(images, labels=labels).loss])


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """A whole training step with Conv-LoRA to one with PEFT's LoRA of the same rank."""
    for name, make in (("SAM", sam_step), ("mSAM, three tasks", msam_step)):
        variants = {
            "lora": make(LoraConfig(r=3, lora_alpha=32, target_modules=["qkv"]), args),
            "convlora": make(pt.ConvLoraConfig(r=3), args),
        }
        row = Row(f"training step, small {name}, batch {BATCH}, r=3", "convlora", "lora", limit=1.25)
        yield measure(row, variants, args)
