"""The mask decoders of SAM 2 and SAM 3 without prompts: they take features of two higher resolutions.

Each class comes before the family's own decoder among the bases.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..decoder import token_config

Levels = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ChannelPasses(nn.Module):
    """One decoder pass per output channel."""

    def forward(
        self, levels: Levels, position: torch.Tensor, no_mask: torch.Tensor, prompt_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Features to logits (B, N, 4h, 4w).

        Args:
            levels: (B, C, 4h, 4w), (B, C, 2h, 2w) and the image embedding (B, C, h, w).
            position: The positional encoding, (1, C, h, w).
            no_mask: The no-mask embedding of each channel, (N, C).
            prompt_tokens: What stands for the missing prompt, (2, C).
        """
        batch_size, num_channels = levels[-1].shape[0], no_mask.shape[0]
        fine, middle = self.conv_s0(levels[0]), self.conv_s1(levels[1])
        # one decoder input per image and channel
        fine, middle, embedding = (
            level.repeat_interleave(num_channels, dim=0) for level in (fine, middle, levels[-1])
        )
        masks, *_ = super().forward(
            image_embeddings=embedding,
            image_positional_embeddings=position,
            sparse_prompt_embeddings=prompt_tokens.expand(batch_size * num_channels, 1, -1, -1),
            dense_prompt_embeddings=no_mask.repeat(batch_size, 1)[:, :, None, None],
            multimask_output=False,
            high_resolution_features=[fine, middle],
        )
        return masks.reshape(batch_size, num_channels, *masks.shape[-2:])


class ChannelTokens(nn.Module):
    """All channels in one decoder pass, with a mask token and a hypernetwork for each.

    Args:
        config: The plain decoder's configuration. Its `num_multimask_outputs` is not used.
        num_channels: N, the number of channels.
    """

    decodes_tokens = True

    def __init__(self, config: PreTrainedConfig, num_channels: int) -> None:
        super().__init__(token_config(config, num_channels))

    def forward(
        self, levels: Levels, position: torch.Tensor, no_mask: torch.Tensor, prompt_tokens: torch.Tensor
    ) -> torch.Tensor:
        """As in `ChannelPasses`, with a no-mask embedding of (1, C)."""
        batch_size, channels, height, width = levels[-1].shape
        tokens = [self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight, prompt_tokens]
        tokens, image = self.transformer(
            point_embeddings=torch.cat(tokens).expand(batch_size, 1, -1, -1),
            image_embeddings=levels[-1] + no_mask[:, :, None, None],
            image_positional_embeddings=position,
            attention_similarity=None,
        )
        image = image.transpose(2, 3).reshape(batch_size, channels, height, width)
        image = self.upscale_conv1(image) + self.conv_s1(levels[1])
        image = self.activation(self.upscale_layer_norm(image))
        image = self.activation(self.upscale_conv2(image) + self.conv_s0(levels[0]))
        mask_tokens = tokens[:, 0, 2 : 2 + self.num_mask_tokens].unbind(1)
        hyper = [network(token) for network, token in zip(self.output_hypernetworks_mlps, mask_tokens, strict=True)]
        return torch.einsum("bnc,bchw->bnhw", torch.stack(hyper, dim=1), image)
