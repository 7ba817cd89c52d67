"""SAM's position embeddings at another image size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


def resize_absolute(pos_embed: torch.Tensor, grid: int) -> torch.Tensor:
    """(1, H, W, C) -> (1, grid, grid, C), bicubic."""
    if pos_embed.shape[1:3] == (grid, grid):
        return pos_embed
    channels_first = _at_least_float32(pos_embed.permute(0, 3, 1, 2))
    resized = F.interpolate(channels_first, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


def resize_relative(rel_pos: torch.Tensor, grid: int) -> torch.Tensor:
    """(2 * size - 1, C) -> (2 * grid - 1, C), linear: what SAM's attention does with other sizes at run time."""
    if rel_pos.shape[0] == 2 * grid - 1:
        return rel_pos
    resized = F.interpolate(_at_least_float32(rel_pos.T[None]), size=2 * grid - 1, mode="linear")
    return resized[0].T.contiguous().to(rel_pos.dtype)


def _at_least_float32(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


def encoder_state_for(vision_config: PreTrainedConfig, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a SAM vision encoder, its position embeddings resized to `vision_config`.

    The absolute embedding and the relative ones of the global layers depend on the image size; those of windowed
    layers do not. Without windows (a size of 0) all layers are global.
    """
    grid = vision_config.image_size // vision_config.patch_size
    state = dict(encoder.state_dict())
    if state.get("pos_embed") is not None:
        state["pos_embed"] = resize_absolute(state["pos_embed"], grid)
    layers = range(vision_config.num_hidden_layers)
    for index in vision_config.global_attn_indexes if vision_config.window_size else layers:
        for axis in ("h", "w"):
            key = f"layers.{index}.attn.rel_pos_{axis}"
            if key in state:
                state[key] = resize_relative(state[key], grid)
    return state
