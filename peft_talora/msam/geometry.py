"""Where an image lies in the model's square input, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..losses import resize_logits

Size = tuple[int, int]

# Logits of about this many pixels and channels are enlarged at once.
_STRIP_VALUES = 1 << 20


def reshaped_size(size: Sequence[int], image_size: int, to_square: bool = False) -> Size:
    """(height, width) of an image whose longest side was resized to ``image_size``, as SAM's processor rounds it.

    Args:
        size: (height, width) of the image.
        image_size: Side S of the model's input.
        to_square: Both sides were, as SAM 2's processor does.
    """
    if to_square:
        return image_size, image_size
    scale = image_size * 1.0 / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def check_sides(size: Sequence[int], image_size: int, to_square: bool = False) -> None:
    """Refuse an image (height, width) so thin that nothing of its shorter side is left at the model's resolution."""
    if min(reshaped_size(size, image_size, to_square)) < 1:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels (height x width) is too thin: where its longer side has "
            f"{image_size} pixels, the shorter one has none"
        )


def restore_logits(logits: Tensor, size: Size, image_size: int, to_square: bool = False) -> Tensor:
    """Logits (B, N, h, w) of the padded square as (B, N, H, W) of the image, in the two steps of SAM's processor."""
    return resize_logits(_without_padding(logits, size, image_size, to_square), size)


def restored_map(
    logits: Tensor, size: Size, image_size: int, activation: Callable[[Tensor], Tensor], to_square: bool = False
) -> Tensor:
    """The prediction (H, W) or (C, H, W) of one image: ``activation(restore_logits(logits, size, image_size))[0]``.

    A large image is enlarged and activated strip by strip: the logits of all channels at its resolution would be many times
    larger than what becomes of them.

    Args:
        logits: (1, N, h, w) of the padded square.
        size: (height, width) of the image.
        image_size: Side S of the model's input.
        activation: Logits (1, N, rows, W) -> predictions (1, ..., rows, W), each pixel by itself.
        to_square: As in [`reshaped_size`].
    """
    height, width = size
    rows = max(1, _STRIP_VALUES // (width * logits.shape[1]))
    inner = _without_padding(logits, size, image_size, to_square)
    if rows >= height:
        return activation(resize_logits(inner, size))[0]
    restored = None
    for top in range(0, height, rows):
        strip = activation(_enlarged_rows(inner, size, range(top, min(top + rows, height))))[0]
        if restored is None:
            restored = strip.new_empty((*strip.shape[:-2], height, width))
        restored[..., top : top + rows, :] = strip
    return restored


def _without_padding(logits: Tensor, size: Size, image_size: int, to_square: bool) -> Tensor:
    """Logits at the resolution of the model's input, without what belongs to the padding: (B, N, height, width)."""
    height, width = reshaped_size(size, image_size, to_square)
    return resize_logits(logits, (image_size, image_size))[..., :height, :width]


def _enlarged_rows(logits: Tensor, size: Size, rows: range) -> Tensor:
    """These rows of ``resize_logits(logits, size)``."""
    old = logits.shape[-2]
    centres = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * (old / size[0]) - 0.5
    centres = centres.clamp(0, old - 1)
    above = centres.long()
    below = (above + 1).clamp(max=old - 1)
    share = (centres - above).to(logits.dtype)[:, None].to(logits.device)
    above, below = above.to(logits.device), below.to(logits.device)
    return resize_logits(torch.lerp(logits[..., above, :], logits[..., below, :], share), (len(rows), size[1]))
