"""SAM 2 and 2.1 (arXiv 2408.00714), on images."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedConfig, Sam2Model
from transformers.models.sam2.modeling_sam2 import (
    Sam2MaskDecoder,
    Sam2PositionalEmbedding,
    Sam2VisionEncoderOutput,
    Sam2VisionModel,
)
from transformers.utils import ModelOutput

from ..split import Features, SplitEncoder
from .family import Family, side
from .high_resolution import ChannelPasses, ChannelTokens

States = tuple[torch.Tensor, ...]


class MSamSam2VisionEncoder(SplitEncoder, Sam2VisionModel):
    """SAM 2's Hiera and its feature pyramid, in two parts.

    Its hidden states are those of the last block, (B, h', w', D'), and those at the end of every stage so far, of which the
    pyramid is made.
    """

    @property
    def blocks(self) -> nn.ModuleList:
        """Hiera's blocks, of all stages."""
        return self.backbone.blocks

    def stem(self, pixel_values: torch.Tensor) -> States:
        """Patches with their positions."""
        states = self.backbone.patch_embed(pixel_values)
        return (states + self.backbone._get_pos_embed(states.shape[1:3]),)

    def step(self, index: int, states: States) -> States:
        """A block; those at the end of a stage are kept."""
        hidden = self.backbone.blocks[index](states[0])
        kept = (hidden,) if index in self.backbone.stage_ends else ()
        return (hidden, *states[1:], *kept)

    def head(self, states: States) -> Sam2VisionEncoderOutput:
        """The feature pyramid, from high to low resolution."""
        levels, _ = self.neck(states[1:])
        return Sam2VisionEncoderOutput(
            last_hidden_state=states[0], fpn_hidden_states=levels[-self.num_feature_levels :][::-1]
        )


class MSamSam2MaskDecoder(ChannelPasses, Sam2MaskDecoder):
    """SAM 2's decoder, once per channel."""


class MSamSam2TokenDecoder(ChannelTokens, Sam2MaskDecoder):
    """SAM 2's decoder with a token per channel."""


class Sam2Family(Family):
    """SAM 2: Hiera, and a decoder that takes features of two higher resolutions.

    Beside SAM's parts there are the embedding that stands for the missing memory of earlier frames, and the one that stands
    for a missing point. They are no task's own.
    """

    model_type = "sam2"
    checkpoint_types = ("sam2", "sam2_video")
    model_class = Sam2Model
    encoder_class = MSamSam2VisionEncoder
    position_class = Sam2PositionalEmbedding
    decoder_class = MSamSam2MaskDecoder
    token_decoder_class = MSamSam2TokenDecoder
    layers = "vision_encoder.backbone.blocks"
    base_fields = (
        "hidden_size",
        "blocks_per_stage",
        "embed_dim_per_stage",
        "num_attention_heads_per_stage",
        "window_size_per_stage",
        "global_attention_blocks",
        "window_positional_embedding_background_size",
    )
    resizes_to_square = True
    image_size_step_name = "the coarsest tokens' and the first windows' size"

    def backbone(self, vision_config: PreTrainedConfig) -> PreTrainedConfig:
        """Hiera's."""
        return vision_config.backbone_config

    def image_size_step(self, vision_config: PreTrainedConfig) -> int:
        """The last stage's tokens, and the windows of the first, whose positions are tiled."""
        backbone = vision_config.backbone_config
        patch, pooling = side(backbone.patch_stride), side(backbone.query_stride)
        coarsest = patch * pooling**backbone.num_query_pool_stages
        return math.lcm(coarsest, patch * backbone.window_size_per_stage[0])

    def set_image_size(self, vision_config: PreTrainedConfig, image_size: int) -> None:
        """The encoder itself takes any; what is written down are the sizes of what it gives."""
        before = self.image_size(vision_config)
        sizes = [[side(size) * image_size // before] * 2 for size in vision_config.backbone_feature_sizes]
        vision_config.backbone_feature_sizes = sizes
        self._set_backbone_size(vision_config, image_size)

    def _set_backbone_size(self, vision_config: PreTrainedConfig, image_size: int) -> None:
        vision_config.backbone_config.image_size = [image_size, image_size]

    def grid_size(self, vision_config: PreTrainedConfig) -> int:
        """That of the coarsest level."""
        return side(vision_config.backbone_feature_sizes[-1])

    def feature_shapes(self, vision_config: PreTrainedConfig) -> tuple[tuple[int, int, int], ...]:
        """The levels of the pyramid, from high to low resolution."""
        sizes = map(side, vision_config.backbone_feature_sizes)
        return tuple((vision_config.fpn_hidden_size, size, size) for size in sizes)

    def trunk_shape(self, vision_config: PreTrainedConfig) -> tuple[int, int, int] | None:
        """A tuple."""
        return None

    def check(self, config: PreTrainedConfig) -> None:
        """The decoder takes three levels."""
        levels = config.vision_config.backbone_feature_sizes
        if len(levels) != 3:
            raise ValueError(f"The decoder takes features of three resolutions, backbone_feature_sizes are {levels}.")

    def position_embedding(self, config: PreTrainedConfig) -> nn.Module:
        """Its sizes are the prompt encoder's."""
        return self.position_class(config.prompt_encoder_config)

    def decoder_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A channel is mask token 0; no other mask ever takes its place."""
        config.dynamic_multimask_via_stability = False
        return config

    def add_parts(self, model: nn.Module) -> None:
        """The embeddings for no memory and for no point; called like a task's, so that offloading sees them."""
        hidden_size = model.config.mask_decoder_config.hidden_size
        model.no_memory_embed = nn.Embedding(1, hidden_size)
        model.not_a_point_embed = nn.Embedding(1, hidden_size)

    def copy_parts(self, model: nn.Module, sam: nn.Module) -> None:
        """From the plain model and its prompt encoder."""
        model.no_memory_embed.weight.copy_(sam.no_memory_embedding[0])
        model.not_a_point_embed.weight.copy_(sam.prompt_encoder.not_a_point_embed.weight)

    def features(self, model: nn.Module, output: ModelOutput) -> Features:
        """The levels that the decoder takes; the last one has the embedding for no memory added."""
        *levels, last = output.fpn_hidden_states
        no_memory = model.no_memory_embed(torch.zeros(1, dtype=torch.long, device=last.device))
        levels = (*levels, last + no_memory[:, :, None, None])
        return levels[: len(model.config.vision_config.backbone_feature_sizes)]

    def decode(
        self, model: nn.Module, name: str, features: Features, no_mask: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """The plain model pads its missing prompt with two points that are none."""
        prompt_tokens = model.not_a_point_embed(torch.zeros(2, dtype=torch.long, device=no_mask.device))
        return model.mask_decoders[name](features, position, no_mask, prompt_tokens)

    def set_prompt_grid(self, prompt_config: PreTrainedConfig, grid_size: int) -> None:
        """It follows from the image size."""

    def export_parts(self, model: nn.Module, sam: nn.Module) -> None:
        """The other way round than `copy_parts`."""
        sam.no_memory_embedding.copy_(model.no_memory_embed.weight[None])
        sam.prompt_encoder.not_a_point_embed.weight.copy_(model.not_a_point_embed.weight)
        sam.prompt_encoder.shared_embedding = copy.deepcopy(sam.shared_image_embedding)


FAMILY = Sam2Family()
