"""The small SAM: its architecture, how its weights start, and its processor."""

from __future__ import annotations

from torch import nn
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

SIZE = 128  # side of the images in pixels


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
