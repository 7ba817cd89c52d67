"""Label maps that are possible, and yet most likely in another unit than is expected: what to warn of."""

from __future__ import annotations

from torch import Tensor

from ..losses import labelled_depth

# what a white pixel of an 8-bit picture is
_WHITE = 255
# no camera sees that far in metres; in millimetres it is half a metre
_FARTHEST_MEDIAN = 500.0


def doubt_mask(label: Tensor, ignore_index: int) -> str | None:
    """What is odd in a mask (1, H, W): it is black and white, and white means unlabelled."""
    white = label == _WHITE
    if ignore_index != _WHITE or not white.any() or white.all() or (label[~white] != 0).any():
        return None
    return (
        "a mask holds 0 and 255 alone. 255 means unlabelled, so that nothing in it is positive: where white is what is "
        "to be found, divide by 255 (for the files of a folder: `threshold: 128`)."
    )


def doubt_depth(label: Tensor, ignore_index: int) -> str | None:
    """What is odd in a depth map (1, H, W): the median of its labelled pixels cannot be metres."""
    labelled = labelled_depth(label, ignore_index)
    # cheaper than a median, which every map of a data set would pay for
    if 2 * ((label[0] > _FARTHEST_MEDIAN) & labelled).sum() <= labelled.sum():
        return None
    return (
        f"the median depth is {label[0][labelled].median().item():g}. Depth is expected in metres: divide millimetres by "
        "1000 (for the files of a folder: `scale: 0.001`)."
    )
