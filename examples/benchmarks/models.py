"""The sizes that are measured, and untrained models of them: what a step costs does not depend on the weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import SamConfig, SamModel

import peft_talora as pt

TINY_SAM = Path(__file__).parents[1] / "tiny_sam"
TASKS = {
    "semantic": pt.TaskSpec("semantic", num_channels=13),
    "depth": pt.TaskSpec("depth"),
    "normals": pt.TaskSpec("normals"),
}


@dataclass(frozen=True)
class Size:
    """The shape of a SAM, and how many images a call sees. `attention` is (channels, heads, side of the grid)."""

    hidden: int
    layers: int
    heads: int
    image_size: int
    window: int = 14
    patch: int = 16
    decoder: int = 256
    images: int = 1
    rank: int = 32
    attention: tuple[int, int, int] | None = None

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    @property
    def single_layer(self) -> tuple[int, int, int]:
        """Channels, heads and side of the grid where one attention layer is measured alone."""
        return self.attention or (self.hidden, self.heads, self.grid)


SIZES: dict[str, Size] = {
    # for tests alone
    "tiny": Size(16, 2, 2, 32, window=3, patch=4, decoder=16, rank=2, attention=(16, 2, 8)),
    # a CPU's: one layer of ViT-B at 1024 pixels can be measured there, twelve cannot
    "small": Size(256, 8, 4, 256, window=8, images=2, attention=(768, 12, 64)),
    "base": Size(768, 12, 12, 1024),
    "large": Size(1024, 24, 16, 1024),
    "huge": Size(1280, 32, 16, 1024),
}


def make_sam(size: Size, args: argparse.Namespace, layers: int | None = None) -> SamModel:
    """A SAM with random weights; every fourth of its layers has global attention, the last one included."""
    layers = layers or size.layers
    every = max(1, layers // 4)
    vision = {
        "hidden_size": size.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": size.heads,
        "image_size": size.image_size,
        "patch_size": size.patch,
        "window_size": size.window,
        "global_attn_indexes": list(range(every - 1, layers, every)),
        "output_channels": size.decoder,
        "num_pos_feats": size.decoder // 2,
        "scale": 1.0,
    }
    prompt = {
        "hidden_size": size.decoder,
        "image_size": size.image_size,
        "patch_size": size.patch,
        "image_embedding_size": size.grid,
    }
    decoder = {"hidden_size": size.decoder, "mlp_dim": 8 * size.decoder, "iou_head_hidden_dim": size.decoder}
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    return fill(sam).to(device=args.device, dtype=args.dtype)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Weights as torch draws them, since transformers' own start of a SAM is nearly zero."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            nn.init.normal_(parameter, std=0.02)
    return model


def pixels(count: int, image_size: int, args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(count, 3, image_size, image_size, device=args.device, dtype=args.dtype)


def label_maps(tasks: Mapping[str, pt.TaskSpec], count: int, size: int, device: str) -> dict[str, torch.Tensor]:
    """Labels of the kinds semantic, depth and normals, everything labelled."""
    make = {
        "semantic": lambda spec: torch.randint(spec.num_channels, (count, size, size), device=device),
        "depth": lambda spec: torch.rand(count, 1, size, size, device=device) + 1,
        "normals": lambda spec: torch.randn(count, 3, size, size, device=device),
    }
    return {name: make[spec.kind](spec) for name, spec in tasks.items()}


def adapt(model: nn.Module, config: Any) -> nn.Module:
    """The model with an adapter in the model's own precision, for training."""
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def adapted_msam(
    size: Size, tasks: Mapping[str, pt.TaskSpec], config: PeftConfig, args: argparse.Namespace
) -> nn.Module:
    """An mSAM in token mode with an adapter, for training; what is trained in full is the same with every adapter."""
    torch.manual_seed(0)
    msam = pt.MSamForMultiTask.from_sam(make_sam(size, args), tasks, channel_mode="token")
    return adapt(msam, replace(config, modules_to_save=pt.default_modules_to_save(msam)))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(model: nn.Module, passes: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], None]:
    """A step: forward and backward of every one of the `passes`, which give their losses, and the optimiser."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        for loss in passes():
            loss.backward()
        optimizer.step()

    return step
