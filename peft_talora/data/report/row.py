"""One row: what its labels hold, in numbers that can be added up and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...kinds import TaskSpec, doubts
from ..rows import read_row

# So many of a map's values are looked at for its median.
_SAMPLED = 1 << 16


def examine_row(read: Callable[[], Mapping[str, Any]], tasks: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """What a row holds.

    Args:
        read: Gives the row, an image and labels: what reading it raises doubts of counts, too.
        tasks: ``{name: TaskSpec}``.

    Returns:
        ``size`` [H, W] and ``digest`` of its image, ``tasks`` {name: what [`examine_label`] gives} and ``doubts``, of whom they
        are and why.

    Raises:
        ValueError: If something in it cannot be read.
    """
    with doubts.collected() as collected:
        image, labels = read_row(read(), tasks)
    return {
        "size": list(image.shape[:2]),
        "digest": hashlib.blake2b(image.tobytes(), digest_size=12).hexdigest(),
        "tasks": {name: examine_label(spec, labels[name]) for name, spec in tasks.items()},
        "doubts": [list(doubt) for doubt in collected],
    }


def examine_label(spec: TaskSpec, label: Tensor) -> dict[str, Any]:
    """What one image's label map from ``label_tensor`` holds.

    Returns:
        The numbers of ``pixels`` and of ``labelled`` ones. Where any is labelled also, as the kind has it: ``counts`` {class:
        pixels}, the number of ``positive`` pixels, the median ``length`` of vectors, or ``low``, ``median`` and ``high`` of the values.
    """
    kind = spec.task_kind
    labelled = kind.labelled(label, spec.ignore_index)
    content: dict[str, Any] = {"pixels": labelled.numel(), "labelled": int(labelled.sum())}
    if not content["labelled"]:
        return content
    values = label[..., labelled]
    if kind.has_classes:
        counts = values.bincount().tolist()
        content["counts"] = {str(number): count for number, count in enumerate(counts) if count}
    elif kind.largest_label(spec.num_channels) == 1:
        content["positive"] = int((values >= 0.5).sum())
    elif kind.is_direction:
        content["length"] = float(_sampled(values).norm(dim=0).median())
    else:
        content["low"], content["high"] = float(values.min()), float(values.max())
        content["median"] = float(_sampled(values).median())
    return content


def _sampled(values: Tensor) -> Tensor:
    """Some of the pixels (C, P), evenly taken."""
    return values[:, :: max(1, values.shape[1] // _SAMPLED)].to(torch.float64)
