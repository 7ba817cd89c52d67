"""Losses of dense prediction tasks: one way of averaging what a pixel of each kind of task loses.

The losses of a pixel, and which pixels of a label map count, are those of the task's kind: see [`peft_talora.kinds`].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .kinds import TaskSpec
from .kinds.binary import balanced_bce, labelled_binary, structure_loss
from .kinds.classes import cross_entropy, labelled_classes
from .kinds.depth import labelled_depth
from .kinds.normals import cosine_distance, labelled_normals
from .kinds.regression import absolute_error, labelled_values
from .routing.requests import resolve_task

__all__ = [
    "absolute_error",
    "balanced_bce",
    "check_labels",
    "cosine_distance",
    "cross_entropy",
    "labelled_binary",
    "labelled_classes",
    "labelled_depth",
    "labelled_normals",
    "labelled_per_forward",
    "labelled_values",
    "mean_over_images",
    "resize_logits",
    "structure_loss",
    "task_loss",
]


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, N, h, w) at ``size`` (H, W), bilinear, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def mean_over_images(pixels: Tensor, labelled: Tensor, loss_divisors: float | Tensor | None = None) -> Tensor:
    """Mean over the labelled images of the mean over their labelled pixels; 0 where nothing is labelled.

    Args:
        pixels: One value per pixel, (B, H, W).
        labelled: Which of them count, bool (B, H, W).
        loss_divisors: What the sum over the images is divided by; how many of them are labelled when None.
    """
    counts = labelled.sum(dim=(1, 2))
    images = torch.where(labelled, pixels, 0).sum(dim=(1, 2)) / counts.clamp(min=1)
    if loss_divisors is None:
        return images.sum() / (counts > 0).sum().clamp(min=1)
    divisor = torch.as_tensor(loss_divisors, device=images.device, dtype=images.dtype)
    return images.sum() / divisor.clamp(min=torch.finfo(images.dtype).tiny)


def labelled_per_forward(specs: Mapping[str, TaskSpec], forwards: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How many labelled images a task has on average in the forwards of one optimiser step, over all processes.

    That is N_t / F for the N_t labelled images of task t in F forwards: those of this process, which accumulate gradients,
    and as many of every other process of `torch.distributed`, where it is running (one small all-reduce). As `loss_divisors`
    of all of these forwards it makes the mean of their gradients that of one forward of all their images. (Without it a
    labelled image counts more where its forward has few of them.)

        for step in steps:
            batches = [next(loader) for _ in range(accumulation)]
            loss_divisors = labelled_per_forward(msam.task_specs, batches)
            for batch in batches:
                (model(**batch, loss_divisors=loss_divisors).loss / accumulation).backward()

    Args:
        specs: The tasks of the model, in their order.
        forwards: What the forwards are called with, of which `labels` and `task_ids` count: an image of another task has
            no label. Tasks without labels have no labelled images.

    Returns:
        `{task: 0-dim tensor}`, on the labels' device.

    Raises:
        ValueError: There is no forward.
    """
    if not forwards:
        raise ValueError("labelled_per_forward needs the batch of at least one forward, got none.")
    counts = torch.stack([_count_labelled(specs, forward) for forward in forwards]).sum(0)
    total = torch.cat([counts, counts.new_full((1,), len(forwards))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    total = total.float() if total.device.type == "mps" else total.double()
    return dict(zip(specs, total[:-1] / total[-1], strict=True))


def _count_labelled(specs: Mapping[str, TaskSpec], forward: Mapping[str, Any]) -> Tensor:
    """Labelled images of each task in the batch of one forward, a LongTensor (T,)."""
    labels, ids = forward["labels"], forward.get("task_ids")
    device = next((label.device for label in labels.values()), None)
    counts = torch.zeros(len(specs), device=device, dtype=torch.long)
    ids = None if ids is None else resolve_task(ids, list(specs), device)
    for index, (name, spec) in enumerate(specs.items()):
        if name in labels:
            images = spec.task_kind.labelled(labels[name], spec.ignore_index).flatten(1).any(1)
            counts[index] = (images if ids is None else images & (ids == index)).sum()
    return counts


def task_loss(spec: TaskSpec, logits: Tensor, labels: Tensor, loss_divisors: float | Tensor | None = None) -> Tensor:
    """Loss of one task: the mean over its labelled images of the mean over their labelled pixels.

    It is exactly 0, with zero gradients, where nothing is labelled, whatever the logits and the labels hold there.

    Args:
        spec: The task, which says the loss of a pixel and which pixels are labelled.
        logits: (B, N, h, w); they are resized (bilinear) to the resolution of the labels.
        labels: (B, H, W) int for class maps, (B, C, H, W) otherwise. See [`check_labels`].
        loss_divisors: What the sum over the images is divided by; how many of them are labelled when None. See
            [`labelled_per_forward`].

    Returns:
        A 0-dim tensor in float32, or float64 for float64 logits, not weighted by ``spec.weight``.
    """
    kind = spec.task_kind
    labelled = kind.labelled(labels, spec.ignore_index)
    logits = resize_logits(logits, labels.shape[-2:])
    # Replaced before any arithmetic: a NaN multiplied by 0 afterwards is still a NaN, in the loss or its gradient.
    logits = torch.where(labelled[:, None], logits, 0)
    if kind.layout == "map":
        labels = torch.where(labelled, labels, 0).long()
    else:
        labels = torch.where(labelled[:, None], labels, 0).to(logits.dtype)
    return mean_over_images(spec.pixel_loss(logits, labels, labelled), labelled, loss_divisors)


def check_labels(name: str, spec: TaskSpec, labels: Tensor, batch_size: int, rows: Tensor | None = None) -> None:
    """Check that labels fit their task.

    Values are looked at only on the CPU and outside of compiled graphs, where that costs no synchronisation.

    Args:
        name: The task's name, for the message.
        spec: The task.
        labels: What was given as its labels.
        batch_size: Number of images B.
        rows: The images whose values count; default: all.

    Raises:
        ValueError: If ``labels`` is no tensor of the shape and type that the kind asks for, or holds a value that is
            neither allowed nor a mark of unlabelled pixels.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels[{name!r}]: expected a tensor, got {type(labels).__name__}")
    is_map = spec.task_kind.layout == "map"
    shape = tuple(labels.shape)
    leading = (batch_size,) if is_map else (batch_size, spec.num_channels)
    if shape[:-2] != leading or 0 in shape[-2:]:
        expected = ", ".join(str(size) for size in (*leading, "H", "W"))
        raise ValueError(f"labels[{name!r}]: a {spec.kind} task needs shape ({expected}), got {shape}")
    if is_map and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise ValueError(f"labels[{name!r}]: a {spec.kind} task needs integer classes, got {labels.dtype}")
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        _check_values(name, spec, labels if rows is None else labels[rows.cpu()])


def _check_values(name: str, spec: TaskSpec, labels: Tensor) -> None:
    largest_allowed = spec.task_kind.largest_label(spec.num_channels)
    if largest_allowed is None:
        return
    wrong = labels[(labels > largest_allowed) & (labels != spec.ignore_index) & torch.isfinite(labels)]
    if wrong.numel():
        raise ValueError(
            f"labels[{name!r}]: {wrong[0].item():g} is neither ignore_index ({spec.ignore_index}) nor at most "
            f"{largest_allowed}, the largest label of a {spec.kind} task with {spec.num_channels} channel(s)"
        )
