"""Where Conv-LoRA may stand: layers whose input is known to be a grid of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

# encoders whose linear layers see (B, H, W, C), windows included
GRID_MODELS = (
    "sam_vision_model",
    "sam_hq_vision_model",
    "sam2_hiera_det_model",
    "sam2_vision_model",
    "sam3_vit_model",
)
# encoders whose linear layers see (B, N, C), all patches of an image of the configuration's size behind prefix tokens
TOKEN_MODELS = (
    "vit",
    "deit",
    "beit",
    "vit_msn",
    "ijepa",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip_vision_model",
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "metaclip_2_vision_model",
    "siglip_vision_model",
    "vitpose_backbone",
)


class Place(NamedTuple):
    """What is known about a layer's input before any forward.

    Args:
        model_type: That of the part of a transformers model that the layer belongs to; None in other models.
        is_grid: Whether the input is known to be (..., H, W, C), or (B, N, C) tokens of a grid.
        grid: Height and width of that grid in tokens, where the input is (B, N, C).
    """

    model_type: str | None = None
    is_grid: bool = False
    grid: tuple[int, int] | None = None


def place_of(model: nn.Module, name: str) -> Place:
    """The place of the layer `name` in `model`: the innermost configuration around it says."""
    config = None
    for part in (model, *_modules_around(model, name)):
        of_part = getattr(part, "config", None)
        config = of_part if isinstance(getattr(of_part, "model_type", None), str) else config
    if config is None:
        return Place()
    if config.model_type in TOKEN_MODELS:
        return Place(config.model_type, True, _token_grid(config))
    return Place(config.model_type, config.model_type in GRID_MODELS)


def _modules_around(model: nn.Module, name: str) -> Iterable[nn.Module]:
    for part in name.split(".")[:-1]:
        model = getattr(model, part)
        yield model


def _token_grid(config: Any) -> tuple[int, int]:
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(config.patch_size)
    return height // patch_height, width // patch_width


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_place(place: Place, name: str) -> None:
    """Refuse a layer of a transformers model whose input is not known to be a grid, or is known to be none.

    A linear layer sees only a shape: four dimensions may be (B, H, W, C), or prompts times tokens whose neighbours have
    nothing to do with each other.

    Raises:
        ValueError: The message names the layer.
    """
    if place.model_type is not None and not place.is_grid:
        raise ValueError(
            f"Conv-LoRA works on grids of tokens, and the input of '{name}' (in a '{place.model_type}') is not known to be "
            "one: it would mix tokens that are no neighbours. Leave the layer out (exclude_modules, or target_modules "
            "that match layers of the image encoder alone), or say with grid_size which grid its tokens (B, N, C) form."
        )
