"""How well masks of held-out rooms are found."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .objective import decode, embed, mask_ious
from .prompts import MIN_AREA, center_points, mask_boxes, sample_points


@torch.no_grad()
def evaluate(model: PreTrainedModel, data: dict[str, Tensor]) -> dict[str, float]:
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
        features = embed(model, part["image"].float() / 255)
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
            logits, guess = decode(model, features, owner, prompt)
            iou = mask_ious(logits, masks)[:, 0]
            scores.setdefault(kind, []).append(iou)
            scores.setdefault(f"{kind}, objects", []).append(iou[thing])
            if kind == "box":
                scores.setdefault("iou error", []).append((guess[:, 0] - iou).abs())
            if kind == "point":
                logits, _ = decode(model, features, owner, prompt, multimask=True)
                scores.setdefault("point, best of 3", []).append(mask_ious(logits, masks).max(1).values)
    model.train()
    torch.set_rng_state(generator_state)
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in scores.items()}
