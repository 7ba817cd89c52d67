"""Where an image lies in the model's square input, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..losses import resize_logits

Size = tuple[int, int]


def reshaped_size(size: Sequence[int], image_size: int) -> Size:
    """(height, width) of an image whose longest side was resized to ``image_size``, as SAM's processor rounds it."""
    scale = image_size * 1.0 / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def check_sides(size: Sequence[int], image_size: int) -> None:
    """Refuse an image (height, width) so thin that nothing of its shorter side is left at the model's resolution."""
    if min(reshaped_size(size, image_size)) < 1:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels (height x width) is too thin: where its longer side has "
            f"{image_size} pixels, the shorter one has none"
        )


def restore_logits(logits: Tensor, size: Size, image_size: int) -> Tensor:
    """Logits (B, N, h, w) of the padded square as (B, N, H, W) of the image, in the two steps of SAM's processor."""
    height, width = reshaped_size(size, image_size)
    return resize_logits(resize_logits(logits, (image_size, image_size))[..., :height, :width], size)
