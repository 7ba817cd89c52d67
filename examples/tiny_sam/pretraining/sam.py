"""The small SAM: its architecture, processor and card."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

from .base import SIZE, Base


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


def prepare(model: SamModel) -> None:
    """Start the positions small; the Fourier features of the positions stay as drawn."""
    nn.init.trunc_normal_(model.vision_encoder.pos_embed, std=0.02)
    model.shared_image_embedding.positional_embedding.requires_grad_(False)


def embed(model: SamModel, images: Tensor) -> list[Tensor]:
    """Return the image embedding (B, 128, 16, 16)."""
    return [model.vision_encoder(images).last_hidden_state]


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


INTRODUCTION = """A Segment Anything Model of {total} M parameters that loads in a moment and runs on a CPU, for tests and examples.
It was pretrained with SAM's own objective, prompts in and masks out, on rendered rooms. It is a stand-in for
`facebook/sam-vit-base` of the same class and module names, **not** a model for photographs.

```python
from transformers import SamModel, SamProcessor

model = SamModel.from_pretrained("examples/tiny_sam")
processor = SamProcessor.from_pretrained("examples/tiny_sam")
```"""

ARCHITECTURE = """transformers' `SamModel`: 128 x 128 images, 8 x 8 patches, an encoder of 6 layers (width 160, 5 heads, windows of
8 x 8 tokens, global attention in layers 2 and 5, relative positions, {encoder} M parameters), a neck to 128 channels,
SAM's prompt encoder, and a two-layer mask decoder of width 128 ({decoder} M parameters) with 64 x 64 logits. The
positional features have scale 1."""

LIMITS = "Thin parts and instances of a few\npixels are beyond 64 x 64 logits."

BASE = Base(SamModel, tiny_config, prepare, embed, build_processor, INTRODUCTION, ARCHITECTURE, LIMITS)
