"""The folder of a model: weights, configuration, processor and card."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .model import base_of
from .prompts import MIN_AREA

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: mask-generation
tags: [sam, segment-anything, tiny, synthetic]
---

# {title}

{introduction}

## Architecture

{architecture}

## Data and objective

{scenes} scenes of the `pretrain` split of `examples/scenes.py` (dataset seed 0): rooms with textured boxes, spheres,
cylinders, cones, tori and capsules. Targets are the visible masks of instances, objects, floor and walls alike, of at
least {min_area} pixels; classes, depth and normals are not used. Images are flipped, zoomed into and recoloured.

Prompts: jittered boxes, with and without a point; one point; two or three points inside and one outside; and, in a
tenth of the steps, SAM's second round with the first round's logits as a mask and a point in its error region. The
first tenth of the run has boxes only. Loss: {focal_weight:g} x focal loss of gamma {gamma:g} + dice loss on the
logits against area-averaged masks + squared error of the predicted IoU. (Gamma 0 is cross-entropy; SAM takes
20 x focal loss of gamma 2; the two were not compared.) The single mask is trained on every prompt, the three
ambiguity masks with the minimum over masks on single points in a fifth of the steps.

Muon for the matrices of the transformer blocks and AdamW for the rest, both with learning rate {lr:g}, weight
decay {weight_decay:g}, a cosine schedule over the wall-clock time with 2 % warm-up, gradient norm 1, batches of
{batch_size} images x {prompts} prompts, {precision} in the encoder, a moving average of the weights. Run seed {seed}.
This run: {minutes} minutes on {cores} shared with other work, {step} steps, {images} images ({speed} images/s).

## Results

Mean IoU at 128 x 128 on {test_scenes} held-out scenes (`{split}` split, dataset seed 0, disjoint from `pretrain`),
over all instances of at least {min_area} pixels. "point" is the pixel farthest from the mask's border, as in SAM's
evaluation; "objects" leaves out floors and walls; "best of 3" is the best of the ambiguity masks; "iou error" is not
an IoU but the mean absolute error of the predicted IoU for boxes.

| Prompt | Mean IoU |
|---|---|
{rows}

Made with `python examples/tiny_sam/pretrain.py{options} --minutes {minutes}{recipe}`; the scores are printed by
`python examples/tiny_sam/pretrain.py{options} --evaluate-only`. The schedule follows the clock, so a run is repeatable in its
recipe and not bit by bit.

## Limits

Trained on one kind of synthetic image at one size: expect nothing on photographs. {limits} A single point on a floor or a wall is ambiguous where surfaces share a texture.
"""


def export(model: PreTrainedModel, folder: Path, card: str) -> None:
    """Write weights, configuration, card and, if there is one, processor; each file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = base_of(model).processor
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as aside:
        model.save_pretrained(aside)
        if processor is not None:
            processor().save_pretrained(aside)
        (Path(aside) / "README.md").write_text(card)
        for path in Path(aside).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def model_card(model: PreTrainedModel, scores: dict[str, float], run: dict, args: argparse.Namespace) -> str:
    """Return the README of a model's folder.

    Args:
        model: The model.
        scores: Its IoUs, {prompt: mean}.
        run: The run's counters, the "split" that the scores are of, and "recipe", the options that made it another one.
        args: The script's options.
    """
    base = base_of(model)
    sizes = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in model.named_children()}
    counts = {
        "total": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "encoder": f"{sizes['vision_encoder']:.2f}",
        "decoder": f"{sizes['mask_decoder']:.2f}",
    }
    minutes, cores = round(run["elapsed"] / 60), torch.get_num_threads()
    return CARD.format(
        **vars(args) | run | {"minutes": minutes},
        introduction=base.introduction.format(**counts),
        architecture=base.architecture.format(**counts),
        limits=base.limits,
        title=args.base.replace("_", "-"),
        precision="bfloat16" if args.bf16 else "float32",
        cores={1: "one CPU core", 2: "two CPU cores"}.get(cores, f"{cores} CPU cores"),
        options="" if args.base == "tiny_sam" else f" --base {args.base}",
        rows="\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items()),
        speed=round(run["images"] / max(run["elapsed"], 1)),
        min_area=MIN_AREA,
    )
