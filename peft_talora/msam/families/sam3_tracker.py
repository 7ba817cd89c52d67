"""SAM 3's model for points, boxes and masks, on images: a ViT with rotary positions, and SAM 2's decoder."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, Sam3TrackerModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, Sam3VisionModel
from transformers.models.sam3_tracker.modeling_sam3_tracker import (
    Sam3TrackerMaskDecoder,
    Sam3TrackerPositionalEmbedding,
)

from ..split import SplitEncoder
from .family import VIT_FIELDS, Family
from .high_resolution import ChannelPasses, ChannelTokens
from .sam2 import Sam2Family


class MSamSam3VisionEncoder(SplitEncoder, Sam3VisionModel):
    """SAM 3's vision encoder, in two parts. Its hidden states are (B, h, w, D)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.backbone.layers

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches with their positions, normalised."""
        height, width = (size // self.config.backbone_config.patch_size for size in pixel_values.shape[-2:])
        return self.backbone.layer_norm(self.backbone.embeddings(pixel_values).unflatten(1, (height, width)))

    def head(self, states: torch.Tensor) -> Sam3VisionEncoderOutput:
        """The levels of other resolutions."""
        levels, _ = self.neck(states.permute(0, 3, 1, 2))
        return Sam3VisionEncoderOutput(last_hidden_state=states.flatten(1, 2), fpn_hidden_states=levels)


class MSamSam3MaskDecoder(ChannelPasses, Sam3TrackerMaskDecoder):
    """SAM 3's decoder, once per channel."""


class MSamSam3TokenDecoder(ChannelTokens, Sam3TrackerMaskDecoder):
    """SAM 3's decoder with a token per channel."""


class Sam3TrackerFamily(Sam2Family):
    """SAM 3: what differs from SAM 2."""

    model_type = "sam3_tracker"
    checkpoint_types = ("sam3_tracker", "sam3_video")
    model_class = Sam3TrackerModel
    encoder_class = MSamSam3VisionEncoder
    position_class = Sam3TrackerPositionalEmbedding
    decoder_class = MSamSam3MaskDecoder
    token_decoder_class = MSamSam3TokenDecoder
    layers = "vision_encoder.backbone.layers"
    base_fields = (*VIT_FIELDS, "pretrain_image_size")
    image_size_step_name = Family.image_size_step_name
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def image_size_step(self, vision_config: PreTrainedConfig) -> int:
        """A patch: positions are tiled, and turned by the layers."""
        return Family.image_size_step(self, vision_config)

    def _set_backbone_size(self, vision_config: PreTrainedConfig, image_size: int) -> None:
        vision_config.backbone_config.image_size = image_size

    def trunk_shape(self, vision_config: PreTrainedConfig) -> tuple[int, int, int] | None:
        """Tokens on their grid."""
        grid = self.grid_size(vision_config)
        return (grid, grid, vision_config.backbone_config.hidden_size)


FAMILY = Sam3TrackerFamily()
