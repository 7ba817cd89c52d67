"""All tasks of an image in one forward, to one forward for each of them; half of the layers shared, to none."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from peft import LoraConfig
from torch import nn

import peft_talora as pt

from .measuring import Row, assert_equal, measure
from .models import SIZES, TASKS, Size, adapted_msam, label_maps, pixels, trained, training_step

LIMITS = {"encoder": 0.72, "inference": 0.75, "training step": 0.75}


def tasks(args: argparse.Namespace) -> Iterator[Row]:
    """The encoder, an inference and a training step, with TA-LoRA in the last half of the layers.

    Where the encoder takes E, the joint forward takes E / 2 + 3 E / 2 and three passes take 3 E: 2 / 3 is the floor. The
    decoders run as often either way. Last, TA-LoRA as the training script has it, in all linear layers, those of the first half shared:
    2 / 3 of what it takes where every layer tells tasks apart is the floor for the encoder.
    """
    for name in args.sizes:
        size = SIZES[name]
        model, images = half_adapted(size, args), pixels(size.images, size.image_size, args)
        labels = label_maps(TASKS, size.images, size.image_size, args.device)
        # rounding makes gradients in float32 differ by more than 1e-5; on a GPU doubles take too much memory
        wide, tolerance = (torch.float64, 1e-5) if args.device == "cpu" else (torch.float32, 1e-3)
        check(copy.deepcopy(model).to(wide), images.to(wide), labels, tolerance)
        for what, variants in comparisons(model, images, labels).items():
            model.train(what == "training step")
            row = Row(f"three tasks, {what}, {name}", "joint", "three passes", limit=LIMITS[what])
            yield measure(row, variants, args)
        rank, half = max(1, size.rank // 4), list(range(size.layers // 2))
        scripts = pt.TALoraConfig(r=rank, target_modules="all-linear", shared_layers=half)
        others = {
            "TA-LoRA, none shared": (replace(scripts, shared_layers=None), 0.85),
            "TA-LoRA on every qkv, first half shared, four times the rank": (
                pt.TALoraConfig(r=size.rank, shared_layers=half),
                None,
            ),
            "PEFT's LoRA on every qkv": (LoraConfig(r=size.rank, target_modules=["qkv"]), None),
        }
        for other, (config, limit) in others.items():
            ways = {"TA-LoRA, first half shared": scripts, other: config}
            row = Row(f"TA-LoRA as the script has it, three tasks, training step, {name}", *ways, limit=limit)
            models = {way: adapted_msam(size, TASKS, adapter, args) for way, adapter in ways.items()}
            steps = {
                way: training_step(model, partial(joint_loss, model, images, labels)) for way, model in models.items()
            }
            yield measure(row, steps, args)


def half_adapted(size: Size, args: argparse.Namespace) -> nn.Module:
    last_half = list(range(size.layers // 2, size.layers))
    model = adapted_msam(size, TASKS, pt.TALoraConfig(r=size.rank, layers_to_transform=last_half), args)
    for module in model.modules():
        if isinstance(module, pt.TALoraLinear):  # as after some steps: at the start the tasks do not differ
            nn.init.normal_(module.talora_U2["default"], std=0.02)
    return model


def comparisons(
    model: nn.Module, images: torch.Tensor, labels: dict[str, torch.Tensor]
) -> dict[str, dict[str, Callable[[], None]]]:
    """{what: {variant: call}}."""

    @torch.no_grad()
    def apart(forward: Callable[[str], object]) -> None:
        for task in TASKS:
            forward(task)

    return {
        "encoder": {
            "joint": torch.no_grad()(lambda: model.encode(images)),
            "three passes": lambda: apart(lambda task: model.encode(images, task)),
        },
        "inference": {
            "joint": torch.no_grad()(lambda: model(images)),
            "three passes": lambda: apart(lambda task: model(images, tasks=task)),
        },
        "training step": {
            "joint": training_step(model, lambda: joint_loss(model, images, labels)),
            "three passes": training_step(model, lambda: losses_apart(model, images, labels)),
        },
    }


def joint_loss(model: nn.Module, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    yield model(images, labels=labels).loss


def losses_apart(model: nn.Module, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for task in TASKS:
        yield model(images, tasks=task, labels=labels).loss


def check(model: nn.Module, images: torch.Tensor, labels: dict[str, torch.Tensor], tolerance: float) -> None:
    """Both ways give the same logits and, added up, the same gradients; and the tasks do differ."""
    results = []
    for passes in (joint_loss, losses_apart):
        model.zero_grad()
        for loss in passes(model, images, labels):
            loss.backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in trained(model)]))
    model.zero_grad()
    assert_equal(*results, "gradients", tolerance)
    with torch.no_grad():
        logits, embeddings = model(images).logits, model.encode(images)
        for task in TASKS:
            assert_equal(logits[task], model(images, tasks=task).logits[task], f"logits of {task}", tolerance)
    first, second = (embeddings[task] for task in list(TASKS)[:2])
    if torch.equal(first, second):
        raise AssertionError("two tasks have the same image embeddings: nothing task-aware was measured")
