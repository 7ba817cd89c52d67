"""SAM's objective: the masks that prompts ask for, and how good they are."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .model import base_of
from .prompts import choose_instances, corrective_prompts, draw_prompts
from .rooms import augment, normalize


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


def embed(model: PreTrainedModel, images: Tensor) -> list[Tensor]:
    """Return the feature maps that the mask decoder takes of images (B, 3, H, W) in [0, 1]."""
    return base_of(model).embed(model, normalize(images))


def decode(
    model: PreTrainedModel, features: list[Tensor], owner: Tensor, prompts: dict[str, Tensor], multimask: bool = False
) -> tuple[Tensor, Tensor]:
    """Return logits (N, M, h, w) and predicted IoUs (N, M) for N prompts and the images (N,) that they are about."""
    levels = [level[owner] for level in features]
    embeddings = levels if len(levels) > 1 else levels[0]
    outputs = model(image_embeddings=embeddings, multimask_output=multimask, **prompts)
    return outputs.pred_masks[:, 0].float(), outputs.iou_scores[:, 0].float()


def prompt_loss(logits: Tensor, ious: Tensor, masks: Tensor, args: argparse.Namespace) -> Tensor:
    """Return the loss of one round: the best mask's focal and dice loss, and the IoU head's squared error."""
    best = mask_losses(logits, masks, args.focal_weight, args.gamma).min(1).values.mean()
    return best + F.mse_loss(ious, mask_ious(logits.detach(), masks))


def training_loss(
    model: PreTrainedModel, data: dict[str, Tensor], progress: float, args: argparse.Namespace
) -> Tensor:
    """Draw a batch, prompt it and return the loss.

    Boxes come first because they tell where an object ends: points take half of the prompts after a tenth of the
    run. A fifth of the steps also trains the three ambiguity masks, a tenth a second round with a mask prompt.
    """
    index = torch.randint(len(data["image"]), (args.batch_size,))
    images, instances = augment(data["image"][index], data["instance"][index])
    # Half precision speeds up the encoder's large matrix products on CPUs that have it, and slows down the decoder.
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        features = embed(model, images)
    features = [level.float() for level in features]
    loss, early = torch.zeros(()), progress < 0.1
    kinds = ("box", "box") if early else (_pick(box=0.7, **{"box+point": 0.3}), _pick(point=0.7, points=0.3))
    for kind in kinds:
        owner, masks = choose_instances(instances, args.prompts // 2)
        prompts = draw_prompts(masks, kind)
        logits, ious = decode(model, features, owner, prompts)
        loss = loss + prompt_loss(logits, ious, masks, args) / 2
        if kind == "point" and torch.rand(()) < 0.3:
            loss = loss + prompt_loss(*decode(model, features, owner, prompts, multimask=True), masks, args) / 2
        if not early and torch.rand(()) < 0.05:
            prompts = corrective_prompts(logits.detach(), masks)
            loss = loss + prompt_loss(*decode(model, features, owner, prompts), masks, args) / 2
    return loss


def _pick(**chances: float) -> str:
    """Draw a key with the given probabilities."""
    return list(chances)[int(torch.multinomial(torch.tensor(list(chances.values())), 1))]
