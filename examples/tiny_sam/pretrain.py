"""Pretrain a small SAM on rendered rooms with SAM's own objective: prompts in, masks out.

The examples and tests need a pretrained `SamModel` that loads in a moment and runs on a CPU. This script makes one:
boxes and points on instances of `examples/scenes.py` are the prompts, the instances' masks are the targets, and no
other label is used. The whole schedule (warm-up, curriculum, learning-rate decay) is a function of the wall-clock time
spent, so that a run takes `--minutes` on whatever machine it is started, and an interrupted run goes on where it was.

    python examples/tiny_sam/pretrain.py --minutes 52
    python examples/tiny_sam/pretrain.py --evaluate-only
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Threads that spin while they wait lose most of their time on a machine that has other work to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import scenes  # noqa: E402

SIZE = 128  # side of the images in pixels
MIN_AREA = 40  # pixels; smaller instances are not prompted
COLUMNS = ("image", "segmentation", "instance")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


# --- Model ----------------------------------------------------------------------------------------------------------


def tiny_config() -> SamConfig:
    """Return the architecture: a 6-layer encoder over 16 x 16 tokens and a two-layer mask decoder of width 128."""
    return SamConfig(
        vision_config={
            "hidden_size": 160,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "mlp_ratio": 4.0,
            "image_size": SIZE,
            "patch_size": 8,
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            "output_channels": 128,
            "num_pos_feats": 64,
            "initializer_range": 0.02,
            # The default, half the hidden size, makes neighbouring positions as different as distant ones.
            "scale": 1.0,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 128,
            "num_attention_heads": 4,
            "mlp_dim": 256,
            "iou_head_hidden_dim": 128,
        },
        initializer_range=0.02,
    )


def build_model() -> SamModel:
    """Return a randomly initialised model.

    Tokens and prompt types start at unit variance, as in the original SAM, rather than at transformers' 0.02: they
    must be as long as the positions they are added to, or it takes the decoder long to tell them apart.
    """
    model = SamModel(tiny_config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if "no_mask" in name else 1.0)
    nn.init.trunc_normal_(model.vision_encoder.pos_embed, std=0.02)
    # The Fourier features of the positions stay as drawn.
    model.shared_image_embedding.positional_embedding.requires_grad_(False)
    return model


def build_processor() -> SamProcessor:
    """Return the processor: longest edge 128, padded to 128 x 128, ImageNet statistics."""
    return SamProcessor(
        SamImageProcessorPil(
            size={"longest_edge": SIZE},
            pad_size={"height": SIZE, "width": SIZE},
            mask_size={"longest_edge": SIZE // 2},
            mask_pad_size={"height": SIZE // 2, "width": SIZE // 2},
        )
    )


# --- Data -----------------------------------------------------------------------------------------------------------


def load_arrays(split: str, num_scenes: int, cache_dir: str | None = None) -> dict[str, Tensor]:
    """Return image (N, 3, H, W), instance (N, H, W) and label (N, 16), the class of each instance id; all uint8."""
    rows = scenes.load_scenes(split, num_scenes, SIZE, cache_dir=cache_dir, num_proc=os.cpu_count(), columns=COLUMNS)
    arrays = {"image": [], "instance": [], "label": []}
    for batch in rows.with_format("numpy").iter(256):
        instance = np.stack(list(batch["instance"])).astype(np.uint8)
        segmentation = np.stack(list(batch["segmentation"]))
        label = np.stack([((instance == i) * segmentation).max((1, 2)) for i in range(16)], 1)
        arrays["image"].append(np.stack(list(batch["image"])).transpose(0, 3, 1, 2))
        arrays["instance"].append(instance)
        arrays["label"].append(label.astype(np.uint8))
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()}


def normalize(images: Tensor) -> Tensor:
    """Map RGB in [0, 1] (B, 3, H, W) to the statistics of the image processor."""
    return (images - MEAN) / STD


def augment(images: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, zoom into and recolour a batch.

    Args:
        images: (B, 3, H, W) uint8.
        instances: (B, H, W) uint8.

    Returns:
        Images (B, 3, H, W) in [0, 1] and instances (B, H, W) int64.
    """
    batch = len(images)
    zoom = 1 - 0.4 * torch.rand(batch) * (torch.rand(batch) < 0.7)
    flip = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
    theta[:, :, 2] = (torch.rand(batch, 2) * 2 - 1) * (1 - zoom)[:, None]
    grid = F.affine_grid(theta, [batch, 1, *images.shape[-2:]], align_corners=False)
    images = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    instances = F.grid_sample(instances[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    gain = torch.empty(batch, 3, 1, 1).uniform_(0.85, 1.15) * torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.2)
    images = (images * gain).clamp(0, 1) ** torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.25)
    # What an instance is does not depend on its colour, so any order of the channels is a plausible scene.
    order = torch.rand(batch, 3).argsort(1)[:, :, None, None].expand_as(images)
    shuffled = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.gather(1, order), images)
    return shuffled, instances


# --- Prompts --------------------------------------------------------------------------------------------------------


def choose_instances(instances: Tensor, per_image: int) -> tuple[Tensor, Tensor]:
    """Draw instances of at least `MIN_AREA` pixels, with repetition, uniformly within an image.

    Args:
        instances: (B, H, W) int64.
        per_image: How many to draw from each image.

    Returns:
        The images' indices (N,) and boolean masks (N, H, W), N = B * per_image.
    """
    batch, height, width = instances.shape
    area = torch.zeros(batch, 16).scatter_add_(1, instances.flatten(1), torch.ones(batch, height * width))
    weight = (area >= MIN_AREA).float() + 1e-9 * area
    weight[:, 0] = 1e-12
    chosen = torch.multinomial(weight, per_image, replacement=True)
    owner = torch.arange(batch).repeat_interleave(per_image)
    return owner, instances[owner] == chosen.flatten()[:, None, None]


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the tight boxes (N, 4) of boolean masks (N, H, W): x1, y1, x2, y2, inclusive pixel indices."""
    columns, rows = masks.any(1).float(), masks.any(2).float()
    x1, y1 = columns.argmax(1), rows.argmax(1)
    x2, y2 = columns.shape[1] - 1 - columns.flip(1).argmax(1), rows.shape[1] - 1 - rows.flip(1).argmax(1)
    return torch.stack([x1, y1, x2, y2], 1).float()


def jitter_boxes(boxes: Tensor) -> Tensor:
    """Move the corners of boxes (N, 4) by noise of 5 % of the sides, at most 8 pixels: users draw boxes by hand."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = (torch.randn_like(boxes) * 0.05 * sides).clamp(-8, 8)
    return (boxes + noise).clamp(0, SIZE - 1)


def sample_points(masks: Tensor, count: int) -> Tensor:
    """Draw `count` pixels (N, count, 2), as x and y, uniformly from boolean masks (N, H, W), with repetition."""
    flat = masks.flatten(1).float()
    # An empty mask has no pixel to offer: draw from the whole image there.
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, torch.ones_like(flat))
    index = torch.multinomial(flat, count, replacement=True)
    return torch.stack([index % masks.shape[2], index // masks.shape[2]], -1).float()


def center_points(masks: Tensor) -> Tensor:
    """Return the pixel (N, 1, 2) of each boolean mask (N, H, W) farthest from its border, in chessboard distance."""
    inside, depth = F.pad(masks[:, None].float(), (1, 1, 1, 1)), torch.zeros_like(masks, dtype=torch.float32)
    while inside.any():
        depth += inside[:, 0, 1:-1, 1:-1]
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)
        inside = F.pad(inside[:, :, 1:-1, 1:-1], (1, 1, 1, 1))
    index = depth.flatten(1).argmax(1)
    return torch.stack([index % masks.shape[2], index // masks.shape[2]], -1)[:, None].float()


def draw_prompts(masks: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the prompts of masks (N, H, W) as keyword arguments of `SamModel`, one prompt for each batch element.

    Args:
        masks: Boolean instances.
        kind: "box", "point", "box+point" or "points" (two or three inside and one outside).
    """
    prompts = {}
    if "box" in kind:
        prompts["input_boxes"] = jitter_boxes(mask_boxes(masks))[:, None]
    if "point" in kind:
        points = sample_points(masks, int(torch.randint(2, 4, ())) if kind == "points" else 1)
        labels = torch.ones(points.shape[:2], dtype=torch.long)
        if kind == "points":
            points = torch.cat([points, sample_points(~masks, 1)], 1)
            labels = torch.cat([labels, torch.zeros(len(masks), 1, dtype=torch.long)], 1)
        prompts |= {"input_points": points[:, None], "input_labels": labels[:, None]}
    return prompts


def corrective_prompts(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return SAM's second round: the first round's logits (N, 1, h, w) as a mask and a point in its error region."""
    found = F.interpolate(logits, masks.shape[-2:], mode="bilinear")[:, 0] > 0
    points = sample_points(found != masks, 1)
    x, y = points[:, 0].long().unbind(1)
    labels = masks[torch.arange(len(masks)), y, x].long()
    return {"input_masks": logits, "input_points": points[:, None], "input_labels": labels[:, None, None]}


# --- Objective ------------------------------------------------------------------------------------------------------


def mask_losses(logits: Tensor, masks: Tensor, focal_weight: float, gamma: float) -> Tensor:
    """Return focal plus dice loss (N, M) of logits (N, M, h, w) against masks (N, H, W).

    The targets are the masks averaged over the logits' pixels: where half a pixel is covered, the logit should be 0,
    which puts the boundary at sub-pixel precision.
    """
    target = F.adaptive_avg_pool2d(masks[:, None].float(), logits.shape[-2:]).expand_as(logits)
    probability = logits.sigmoid()
    error = (probability - target).abs()
    focal = (error**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean((2, 3))
    overlap = 2 * (probability * target).sum((2, 3)) + 1
    dice = 1 - overlap / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    return focal_weight * focal + dice


def mask_ious(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the IoU (N, M) of logits (N, M, h, w), upsampled and cut at 0, with boolean masks (N, H, W)."""
    found = F.interpolate(logits, masks.shape[-2:], mode="bilinear") > 0
    both, either = found & masks[:, None], found | masks[:, None]
    return both.sum((2, 3)) / either.sum((2, 3)).clamp(min=1)


def decode(model: SamModel, embeddings: Tensor, prompts: dict[str, Tensor], multimask: bool = False) -> tuple:
    """Return logits (N, M, 64, 64) and predicted IoUs (N, M) for embeddings (N, 128, 16, 16) and their prompts."""
    outputs = model(image_embeddings=embeddings, multimask_output=multimask, **prompts)
    return outputs.pred_masks[:, 0].float(), outputs.iou_scores[:, 0].float()


def prompt_loss(logits: Tensor, ious: Tensor, masks: Tensor, args: argparse.Namespace) -> Tensor:
    """Return the loss of one round: the best mask's focal and dice loss, and the IoU head's squared error."""
    best = mask_losses(logits, masks, args.focal_weight, args.gamma).min(1).values.mean()
    return best + F.mse_loss(ious, mask_ious(logits.detach(), masks))


def training_loss(model: SamModel, data: dict[str, Tensor], progress: float, args: argparse.Namespace) -> Tensor:
    """Draw a batch, prompt it and return the loss.

    Boxes come first because they tell where an object ends: points take half of the prompts after a tenth of the
    run. A fifth of the steps also trains the three ambiguity masks, a tenth a second round with a mask prompt.
    """
    index = torch.randint(len(data["image"]), (args.batch_size,))
    images, instances = augment(data["image"][index], data["instance"][index])
    # Half precision speeds up the encoder's large matrix products on CPUs that have it, and slows down the decoder.
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        embeddings = model.vision_encoder(normalize(images)).last_hidden_state
    embeddings = embeddings.float()
    loss, early = torch.zeros(()), progress < 0.1
    kinds = ("box", "box") if early else (_pick(box=0.7, **{"box+point": 0.3}), _pick(point=0.7, points=0.3))
    for kind in kinds:
        owner, masks = choose_instances(instances, args.prompts // 2)
        prompts = draw_prompts(masks, kind)
        logits, ious = decode(model, embeddings[owner], prompts)
        loss = loss + prompt_loss(logits, ious, masks, args) / 2
        if kind == "point" and torch.rand(()) < 0.3:
            loss = loss + prompt_loss(*decode(model, embeddings[owner], prompts, multimask=True), masks, args) / 2
        if not early and torch.rand(()) < 0.05:
            prompts = corrective_prompts(logits.detach(), masks)
            loss = loss + prompt_loss(*decode(model, embeddings[owner], prompts), masks, args) / 2
    return loss


def _pick(**chances: float) -> str:
    """Draw a key with the given probabilities."""
    return list(chances)[int(torch.multinomial(torch.tensor(list(chances.values())), 1))]


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: SamModel, data: dict[str, Tensor]) -> dict[str, float]:
    """Return mean IoUs over the instances of at least `MIN_AREA` pixels in held-out scenes.

    Prompts are the tight box, the point farthest from the border (SAM's own protocol) and a random point; masks are
    cut at 0 after bilinear upsampling to 128 x 128. "objects" leaves out floors and walls; "best of 3" takes the best
    of the ambiguity masks; "iou error" is the mean absolute error of the predicted IoU for boxes.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model.eval()
    scores: dict[str, list[Tensor]] = {}
    for start in range(0, len(data["image"]), 20):
        part = {name: values[start : start + 20] for name, values in data.items()}
        embeddings = model.vision_encoder(normalize(part["image"].float() / 255)).last_hidden_state
        wanted = [
            (i, n) for i, inst in enumerate(part["instance"]) for n in range(1, 16) if (inst == n).sum() >= MIN_AREA
        ]
        owner, number = torch.tensor(wanted).T
        masks = part["instance"][owner] == number[:, None, None]
        thing = part["label"][owner, number] >= 3
        prompts = {
            "box": {"input_boxes": mask_boxes(masks)[:, None]},
            "point": {"input_points": center_points(masks)[:, None]},
            "random point": {"input_points": sample_points(masks, 1)[:, None]},
        }
        for kind, prompt in prompts.items():
            logits, guess = decode(model, embeddings[owner], prompt)
            iou = mask_ious(logits, masks)[:, 0]
            scores.setdefault(kind, []).append(iou)
            scores.setdefault(f"{kind}, objects", []).append(iou[thing])
            if kind == "box":
                scores.setdefault("iou error", []).append((guess[:, 0] - iou).abs())
            if kind == "point":
                logits, _ = decode(model, embeddings[owner], prompt, multimask=True)
                scores.setdefault("point, best of 3", []).append(mask_ious(logits, masks).max(1).values)
    model.train()
    torch.set_rng_state(generator_state)
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in scores.items()}


# --- Model card -----------------------------------------------------------------------------------------------------


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: mask-generation
tags: [sam, segment-anything, tiny, synthetic]
---

# tiny-sam

A Segment Anything Model of {total} M parameters that loads in a moment and runs on a CPU, for tests and examples.
It was pretrained with SAM's own objective, prompts in and masks out, on rendered rooms. It is a stand-in for
`facebook/sam-vit-base` of the same class and module names, **not** a model for photographs.

```python
from transformers import SamModel, SamProcessor

model = SamModel.from_pretrained("examples/tiny_sam")
processor = SamProcessor.from_pretrained("examples/tiny_sam")
```

## Architecture

transformers' `SamModel`: 128 x 128 images, 8 x 8 patches, an encoder of 6 layers (width 160, 5 heads, windows of
8 x 8 tokens, global attention in layers 2 and 5, relative positions, {encoder} M parameters), a neck to 128 channels,
SAM's prompt encoder, and a two-layer mask decoder of width 128 ({decoder} M parameters) with 64 x 64 logits. The
positional features have scale 1.

## Data and objective

{scenes} scenes of the `pretrain` split of `examples/scenes.py` (dataset seed 0): rooms with textured boxes, spheres,
cylinders, cones, tori and capsules. Targets are the visible masks of instances, objects, floor and walls alike, of at
least {min_area} pixels; classes, depth and normals are not used. Images are flipped, zoomed into and recoloured.

Prompts: jittered boxes, with and without a point; one point; two or three points inside and one outside; and, in a
tenth of the steps, SAM's second round with the first round's logits as a mask and a point in its error region. The
first tenth of the run has boxes only. Loss: {focal_weight:g} x focal loss of gamma {gamma:g} + dice loss on the
64 x 64 logits against area-averaged masks + squared error of the predicted IoU. (Gamma 0 is cross-entropy; SAM takes
20 x focal loss of gamma 2; the two were not compared.) The single mask is trained on every prompt, the three
ambiguity masks with the minimum over masks on single points in a fifth of the steps.

Muon for the matrices of the transformer blocks and AdamW for the rest, both with learning rate {lr:g}, weight
decay {weight_decay:g}, a cosine schedule over the wall-clock time with 2 % warm-up, gradient norm 1, batches of
{batch_size} images x {prompts} prompts, bfloat16 in the encoder, a moving average of the weights. Run seed {seed}.
This run: {minutes} minutes on two CPU cores shared with other work, {step} steps, {images} images ({speed} images/s).

## Results

Mean IoU at 128 x 128 on {test_scenes} held-out scenes (`{split}` split, dataset seed 0, disjoint from `pretrain`),
over all instances of at least {min_area} pixels. "point" is the pixel farthest from the mask's border, as in SAM's
evaluation; "objects" leaves out floors and walls; "best of 3" is the best of the ambiguity masks; "iou error" is not
an IoU but the mean absolute error of the predicted IoU for boxes.

| Prompt | Mean IoU |
|---|---|
{rows}

Made with `python examples/tiny_sam/pretrain.py --minutes {minutes}`; the scores are printed by
`python examples/tiny_sam/pretrain.py --evaluate-only`. The schedule follows the clock, so a run is repeatable in its
recipe and not bit by bit.

## Limits

Trained on one kind of synthetic image at one size: expect nothing on photographs. Thin parts and instances of a few
pixels are beyond 64 x 64 logits. A single point on a floor or a wall is ambiguous where surfaces share a texture.
"""


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds: the model, the moving average of its weights, the optimizers and the counters.

    `state` counts "step" and "images", and the "elapsed" seconds of training.
    """

    model: SamModel
    average: SamModel
    optimizers: list[torch.optim.Optimizer]
    state: dict[str, float]


def build_optimizers(model: SamModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon for the encoder's and decoder's matrices if `--muon`; no decay on vectors."""
    groups: dict[str, list] = {"matrices": [], "others": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim == 2 and ("layers" in name or "transformer" in name) and "rel_pos" not in name
        kind = "matrices" if plain and "embed" not in name else "others" if parameter.ndim > 1 else "vectors"
        groups[kind].append(parameter)
    adam = [
        {"params": groups["others"] + ([] if args.muon else groups["matrices"]), "weight_decay": args.weight_decay},
        {"params": groups["vectors"], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(adam, lr=args.lr, betas=(0.9, 0.98))]
    if args.muon:
        muon = torch.optim.Muon(
            groups["matrices"], lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def rate(progress: float) -> float:
    """Return the learning rate as a fraction of its peak: 2 % warm-up, then a cosine to zero."""
    return min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))) + 1e-4


def export(model: SamModel, folder: Path, card: str) -> None:
    """Write weights, configuration, processor and model card; each file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as aside:
        model.save_pretrained(aside)
        build_processor().save_pretrained(aside)
        (Path(aside) / "README.md").write_text(card)
        for path in Path(aside).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def model_card(model: SamModel, scores: dict[str, float], run: dict, args: argparse.Namespace) -> str:
    """Return the README of the model folder."""
    count = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in model.named_children()}
    values = vars(args) | run
    return CARD.format(
        **values | {"minutes": round(run["elapsed"] / 60)},
        total=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        encoder=f"{count['vision_encoder']:.2f}",
        decoder=f"{count['mask_decoder']:.2f}",
        rows="\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items()),
        speed=round(run["images"] / max(run["elapsed"], 1)),
        min_area=MIN_AREA,
    )


def restore(run: Run, path: Path) -> None:
    """Load the state of an interrupted run in place."""
    saved = torch.load(path, weights_only=True)
    run.model.load_state_dict(saved["model"])
    run.average.load_state_dict(saved["average"])
    for optimizer, values in zip(run.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    run.state.update(saved["state"])
    # Draw other batches than those before the interruption.
    torch.manual_seed(run.state["step"] + 1)


def save(run: Run, path: Path) -> None:
    """Write a checkpoint and rename it into place, so that an interruption leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "state": run.state,
    }
    torch.save(saved, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train_step(run: Run, data: dict[str, Tensor], progress: float, args: argparse.Namespace) -> float:
    """Take one step of all optimizers and of the moving average; return the loss."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(progress)
    loss = training_loss(run.model, data, progress, args)
    loss.backward()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    averaged = [p for p, q in zip(run.average.parameters(), run.model.parameters(), strict=True) if q.requires_grad]
    # The average reaches back over a tenth of the run so far, so that early garbage is forgotten.
    horizon = min(1 + run.state["step"] / 10, args.average_steps)
    torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 / horizon)
    run.state["step"] += 1
    run.state["images"] += args.batch_size
    return loss.item()


def report(run: Run, losses: list[float], held_out: dict[str, Tensor]) -> dict[str, float]:
    """Print one JSON line with the time, the speed, the mean loss and the held-out IoUs; return the IoUs."""
    scores, state = evaluate(run.average, held_out), run.state
    line = {"minutes": round(state["elapsed"] / 60, 2), "step": state["step"]}
    line |= {"images/s": round(state["images"] / max(state["elapsed"], 1), 1)}
    line |= {"loss": round(sum(losses) / max(len(losses), 1), 4)}
    print(json.dumps(line | scores), flush=True)
    return scores


def train(args: argparse.Namespace) -> None:
    """Train until `args.minutes` are spent, with a checkpoint and a usable model every `args.report_every` seconds."""
    torch.manual_seed(args.seed)
    data = load_arrays("pretrain", args.scenes, args.cache_dir)
    held_out = load_arrays("validation", 100, args.cache_dir)
    model = build_model().train()
    average = copy.deepcopy(model).requires_grad_(False)
    run = Run(model, average, build_optimizers(model, args), {"step": 0, "images": 0, "elapsed": 0.0})
    checkpoint = args.work_dir / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        restore(run, checkpoint)
    budget, losses, reported, clock = 60 * args.minutes, [], run.state["elapsed"], time.monotonic()
    while run.state["elapsed"] < budget:
        losses.append(train_step(run, data, run.state["elapsed"] / budget, args))
        now = time.monotonic()
        run.state["elapsed"], clock = run.state["elapsed"] + now - clock, now
        if run.state["elapsed"] - reported >= args.report_every:
            scores = report(run, losses, held_out)
            save(run, checkpoint)
            export(
                average,
                args.output,
                model_card(average, scores, run.state | {"split": "validation", "test_scenes": 100}, args),
            )
            # Time spent on evaluation is not training time.
            losses, reported, clock = [], run.state["elapsed"], time.monotonic()
    save(run, checkpoint)
    scores = report(run, losses, load_arrays("test", args.test_scenes, args.cache_dir))
    export(average, args.output, model_card(average, scores, run.state | {"split": "test"}, args))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a small SAM on rendered rooms.")
    parser.add_argument("--minutes", type=float, default=52, help="training time; the whole schedule scales with it")
    parser.add_argument("--scenes", type=int, default=8000, help="number of pretraining scenes")
    parser.add_argument("--test-scenes", type=int, default=200, help="number of scenes of the final evaluation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per image, half of them boxes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--focal-weight", type=float, default=2.0)
    parser.add_argument("--gamma", type=float, default=0.0)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--average-steps", type=int, default=200, help="horizon of the weights' moving average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=float, default=180, help="seconds between evaluations and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work-dir")
    parser.add_argument("--evaluate-only", action="store_true", help="print the IoUs of the model in --output")
    parser.add_argument("--cache-dir", help="folder of the rendered scenes")
    parser.add_argument("--work-dir", type=Path, default=scenes.default_cache_dir().parent / "tiny_sam")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable_progress_bar()
    if args.evaluate_only:
        model = SamModel.from_pretrained(args.output)
        print(json.dumps(evaluate(model, load_arrays("test", args.test_scenes, args.cache_dir)), indent=2))
        return
    train(args)


if __name__ == "__main__":
    main()
