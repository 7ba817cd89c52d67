"""The small SAM 2: its architecture and card."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model

from .base import SIZE, Base

WIDTH = 128  # of the feature pyramid and the mask decoder


def tiny_config() -> Sam2Config:
    """Return the architecture: a Hiera of 8 blocks over 32 x 32 to 4 x 4 tokens and a two-layer mask decoder of width 128."""
    widths = [32, 64, 128, 256]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": widths[0],
                "image_size": [SIZE, SIZE],
                "blocks_per_stage": [1, 2, 4, 1],
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 8, 8, 4],
                "global_attention_blocks": [4, 6],
                "window_positional_embedding_background_size": [8, 8],
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[SIZE // stride] * 2 for stride in (4, 8, 16)],
            "fpn_hidden_size": WIDTH,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "mlp_dim": 256,
            "iou_head_hidden_dim": WIDTH,
            # The ambiguity masks are trained on single points alone: they are no answer to a box.
            "dynamic_multimask_via_stability": False,
        },
    )


@torch.no_grad()
def prepare(model: Sam2Model) -> None:
    """Start positions and features small, and give prompts and image the same Fourier features, as SAM 2's checkpoints do.

    Nothing normalises what Hiera gives. At full size it drowns the positions that tell the decoder where a prompt is, and
    masks are found later.
    """
    nn.init.trunc_normal_(model.vision_encoder.backbone.pos_embed, std=0.02)
    nn.init.trunc_normal_(model.vision_encoder.backbone.pos_embed_window, std=0.02)
    for conv in (*model.vision_encoder.neck.convs, model.mask_decoder.conv_s0, model.mask_decoder.conv_s1):
        conv.weight.mul_(0.3)
    ours, theirs = model.prompt_encoder.shared_embedding, model.shared_image_embedding
    ours.positional_embedding.copy_(theirs.positional_embedding)


def embed(model: Sam2Model, images: Tensor) -> list[Tensor]:
    """Return features (B, 16, 32, 32) and (B, 32, 16, 16) and the image embedding (B, 128, 8, 8)."""
    fine, middle, coarse = model.vision_encoder(images).fpn_hidden_states
    no_memory = model.no_memory_embedding[0, 0, :, None, None]
    return [model.mask_decoder.conv_s0(fine), model.mask_decoder.conv_s1(middle), coarse + no_memory]


INTRODUCTION = """A Segment Anything Model 2 of {total} M parameters that loads in a moment and runs on a CPU, for tests and examples.
It was pretrained with SAM's own objective, prompts in and masks out, on rendered rooms. It is a stand-in for
`facebook/sam2.1-hiera-tiny` of the same class and module names, **not** a model for photographs or films.

```python
from transformers import Sam2Model

model = Sam2Model.from_pretrained("examples/tiny_sam2")
```

It takes images that are stretched to 128 x 128 pixels, with ImageNet's mean and standard deviation. There is no file for
transformers' image processor of SAM 2, which needs torchvision; `MSamProcessor.from_model` needs none."""

ARCHITECTURE = """transformers' `Sam2Model`: 128 x 128 images, patches every 4 pixels, a Hiera of four stages with 1, 2, 4 and 1 blocks
(widths 32, 64, 128 and 256, windows of 8 x 8, 8 x 8, 8 x 8 and 4 x 4 tokens, global attention in blocks 4 and 6), a
feature pyramid of width 128 (together {encoder} M parameters), SAM 2's prompt encoder, and a two-layer mask decoder of width
128 ({decoder} M parameters) that sees features at 32 x 32 and 16 x 16 and gives 32 x 32 logits. A single mask is always mask
token 0 (`dynamic_multimask_via_stability` is off). There is no memory and nothing of video, and the object score was not
trained: every prompt asked for something that is there."""

LIMITS = "Thin parts and small instances\nare beyond 32 x 32 logits."

BASE = Base(Sam2Model, tiny_config, prepare, embed, None, INTRODUCTION, ARCHITECTURE, LIMITS)
