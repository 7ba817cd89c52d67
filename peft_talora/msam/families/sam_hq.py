"""SAM-HQ (arXiv 2306.01567)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, SamHQModel
from transformers.models.sam_hq.modeling_sam_hq import (
    SamHQMaskDecoder,
    SamHQPositionalEmbedding,
    SamHQVisionEncoder,
    SamHQVisionEncoderOutput,
)
from transformers.utils import ModelOutput

from ..split import Features, SplitEncoder
from .sam import SamFamily

States = tuple[torch.Tensor, ...]


class MSamHQVisionEncoder(SplitEncoder, SamHQVisionEncoder):
    """SAM-HQ's vision encoder, in two parts.

    Its hidden states are those of the last block, (B, h, w, D), and after the first global block those of that block, which
    the decoder fuses with the image embedding.
    """

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.layers

    def stem(self, pixel_values: torch.Tensor) -> States:
        """Patches with their positions."""
        states = self.patch_embed(pixel_values)
        return (states if self.pos_embed is None else states + self.pos_embed,)

    def step(self, index: int, states: States) -> States:
        """A block; the first global one is kept."""
        block = self.layers[index]
        hidden = block(states[0])
        return (hidden, hidden) if block.window_size == 0 and len(states) == 1 else (hidden, *states[1:])

    def head(self, states: States) -> SamHQVisionEncoderOutput:
        """The neck."""
        return SamHQVisionEncoderOutput(
            last_hidden_state=self.neck(states[0]), intermediate_embeddings=list(states[1:])
        )


class SamHQFamily(SamFamily):
    """SAM-HQ: SAM with a further mask token, on features that fuse the image embedding with the first global block's.

    Its mask is the sum of SAM's and of that of the further token, which is the plain model's default (the other path,
    `hq_token_only`, leaves SAM's mask out): both are trained, from what the plain model predicts.
    """

    model_type = "sam_hq"
    checkpoint_types = ("sam_hq",)
    model_class = SamHQModel
    encoder_class = MSamHQVisionEncoder
    position_class = SamHQPositionalEmbedding
    decoder_class = SamHQMaskDecoder

    def feature_shapes(self, vision_config: PreTrainedConfig) -> tuple[tuple[int, int, int], ...]:
        """The first global block's output, and the image embedding."""
        embedding = super().feature_shapes(vision_config)
        first_global = super().trunk_shape(vision_config)
        return (first_global, *embedding) if first_global and vision_config.global_attn_indexes else embedding

    def trunk_shape(self, vision_config: PreTrainedConfig) -> None:
        """A tuple."""
        return None

    def check(self, config: PreTrainedConfig) -> None:
        """Token mode would add the one mask of the further token to all channels."""
        if config.decodes_tokens:
            raise ValueError(
                "channel_mode='token' is not possible with a SamHQModel: its high-quality token gives one mask, which all "
                "channels would share. Use channel_mode='prompt'."
            )

    def features(self, model: nn.Module, output: ModelOutput) -> Features:
        """What `feature_shapes` says."""
        return (*output.intermediate_embeddings[:1], output.last_hidden_state)

    def decode(
        self, model: nn.Module, name: str, features: Features, no_mask: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """One decoder pass per channel."""
        batch_size, num_channels = features[-1].shape[0], no_mask.shape[0]
        *first_global, embedding = (level.repeat_interleave(num_channels, dim=0) for level in features)
        masks, _ = model.mask_decoders[name](
            image_embeddings=embedding,
            image_positional_embeddings=position,
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=no_mask.repeat(batch_size, 1)[:, :, None, None],
            multimask_output=False,
            hq_token_only=False,
            intermediate_embeddings=first_global,
        )
        return masks.reshape(batch_size, num_channels, *masks.shape[-2:])


FAMILY = SamHQFamily()
