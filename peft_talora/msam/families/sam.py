"""SAM (arXiv 2304.02643)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, SamModel
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamVisionEncoder,
    SamVisionEncoderOutput,
)

from ..decoder import MSamTokenDecoder
from ..interpolation import encoder_state_for
from ..split import SplitEncoder
from .family import VIT_FIELDS, Family


class MSamVisionEncoder(SplitEncoder, SamVisionEncoder):
    """SAM's vision encoder, in two parts. Its hidden states are (B, h, w, D)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.layers

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches with their positions."""
        states = self.patch_embed(pixel_values)
        return states if self.pos_embed is None else states + self.pos_embed

    def head(self, states: torch.Tensor) -> SamVisionEncoderOutput:
        """The neck."""
        return SamVisionEncoderOutput(last_hidden_state=self.neck(states))


class SamFamily(Family):
    """SAM: a ViT with windows, and a decoder that takes the image embedding alone."""

    model_type = "sam"
    checkpoint_types = ("sam",)
    model_class = SamModel
    encoder_class = MSamVisionEncoder
    position_class = SamPositionalEmbedding
    decoder_class = SamMaskDecoder
    token_decoder_class = MSamTokenDecoder
    base_fields = (*VIT_FIELDS, "output_channels")

    def feature_shapes(self, vision_config: PreTrainedConfig) -> tuple[tuple[int, int, int], ...]:
        """The image embedding."""
        grid = self.grid_size(vision_config)
        return ((vision_config.output_channels, grid, grid),)

    def trunk_shape(self, vision_config: PreTrainedConfig) -> tuple[int, int, int] | None:
        """Tokens on their grid."""
        grid = self.grid_size(vision_config)
        return (grid, grid, vision_config.hidden_size)

    def decode(
        self, model: nn.Module, name: str, features: torch.Tensor, no_mask: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """One decoder pass per channel; one for all of them in token mode."""
        if model.config.decodes_tokens:
            return model.mask_decoders[name](
                image_embeddings=features,
                image_positional_embeddings=position,
                dense_prompt_embeddings=no_mask[:, :, None, None],
            )
        # one decoder input per image and channel
        batch_size, num_channels = features.shape[0], no_mask.shape[0]
        masks, _ = model.mask_decoders[name](
            image_embeddings=features.repeat_interleave(num_channels, dim=0),
            image_positional_embeddings=position,
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=no_mask.repeat(batch_size, 1)[:, :, None, None],
            multimask_output=False,
        )
        return masks.reshape(batch_size, num_channels, *masks.shape[-2:])

    def encoder_state(self, vision_config: PreTrainedConfig, encoder: nn.Module) -> dict[str, torch.Tensor]:
        """Position embeddings depend on the image size."""
        return encoder_state_for(vision_config, encoder)


FAMILY = SamFamily()
