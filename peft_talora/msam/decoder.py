"""The mask decoders of an mSAM: one pass per channel, or all channels of a task in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from .split import Features

# heads of a decoder that say how good a mask is, and whether there is anything
SCORE_HEADS = ("iou_prediction_head", "pred_obj_score_head")


class MSamTokenDecoder(SamMaskDecoder):
    r"""SAM's mask decoder with a mask token and a hypernetwork per output channel.

    With F the image embedding after the two-way transformer, up-sampled to 4h x 4w, and m_c the c-th mask token after it,

        logits[c, y, x] = <hypernetwork_c(m_c), F[:, y, x]>

    so that the transformer and the up-sampling, nearly all of the cost, run once for all channels instead of once per
    channel. SAM gives its three multimask outputs in the same way.

    Args:
        config: The SAM's decoder configuration. Its `num_multimask_outputs` is not used.
        num_channels: N, the number of channels.
    """

    decodes_tokens = True

    def __init__(self, config: SamMaskDecoderConfig, num_channels: int) -> None:
        super().__init__(token_config(config, num_channels))

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """(B, C, h, w), and two tensors that broadcast to it, -> logits (B, N, 4h, 4w)."""
        batch_size, channels, height, width = image_embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens, image = self.transformer(
            point_embeddings=tokens.expand(batch_size, 1, -1, -1),
            image_embeddings=image_embeddings + dense_prompt_embeddings,
            image_positional_embeddings=image_positional_embeddings,
            attention_similarity=None,
        )
        image = image.transpose(2, 3).reshape(batch_size, channels, height, width)
        image = self.activation(self.upscale_layer_norm(self.upscale_conv1(image)))
        image = self.activation(self.upscale_conv2(image))
        mask_tokens = tokens[:, 0, 1:].unbind(1)
        hyper = [network(token) for network, token in zip(self.output_hypernetworks_mlps, mask_tokens, strict=True)]
        return torch.einsum("bnc,bchw->bnhw", torch.stack(hyper, dim=1), image)


def decode(model: nn.Module, name: str, features: Features) -> torch.Tensor:
    """The logits (B, N, 4h, 4w) of a task, from the features of B images.

    Args:
        model: The mSAM.
        name: The task.
        features: The image embedding (B, C, h, w), or a tuple that ends with it.
    """
    embedding = features if isinstance(features, torch.Tensor) else features[-1]
    batch_size, _, height, width = embedding.shape
    num_channels, device = model.task_specs[name].num_channels, embedding.device
    if batch_size == 0:
        return embedding.new_zeros(0, num_channels, 4 * height, 4 * width)
    # called, not read: an adapter may have replaced it
    number = 1 if model.config.decodes_tokens else num_channels
    no_mask = model.no_mask_embeds[name](torch.arange(number, device=device))
    return model.family.decode(model, name, features, no_mask, model.get_image_wide_positional_embeddings(device))


def untrained_parts(decoder: nn.Module) -> list[str]:
    """The names of the modules of a decoder that no loss of an mSAM reaches: heads of scores, and unused hypernetworks.

    A decoder pass for one channel uses the hypernetwork of mask token 0. The other mask tokens are trained: the
    transformer's self-attention lets each token see all of them.
    """
    number = len(decoder.output_hypernetworks_mlps)
    used = number if getattr(decoder, "decodes_tokens", False) else 1
    heads = [head for head in SCORE_HEADS if hasattr(decoder, head)]
    return [*heads, *(f"output_hypernetworks_mlps.{index}" for index in range(used, number))]


def token_decoder_state(sam_state: Mapping[str, torch.Tensor], num_channels: int) -> dict[str, torch.Tensor]:
    """The state of a SAM's mask decoder for one with a token per channel: every channel starts as a copy of mask token 0.

    Args:
        sam_state: `state_dict()` of the plain decoder.
        num_channels: N, the number of channels.
    """
    hypernetworks = "output_hypernetworks_mlps."
    state = {key: value for key, value in sam_state.items() if not key.startswith(hypernetworks)}
    for key, value in sam_state.items():
        if key.startswith(f"{hypernetworks}0."):
            name = key.removeprefix(f"{hypernetworks}0.")
            state.update({f"{hypernetworks}{channel}.{name}": value for channel in range(num_channels)})
    # one row per mask token
    for key in ("mask_tokens.weight", "iou_prediction_head.proj_out.weight", "iou_prediction_head.proj_out.bias"):
        state[key] = state[key][:1].expand(num_channels, *state[key].shape[1:])
    return state


def token_config(config: PreTrainedConfig, num_channels: int) -> PreTrainedConfig:
    """The configuration of a plain decoder that has as many mask tokens as a token decoder has channels."""
    changed = copy.deepcopy(config)
    changed._attn_implementation = config._attn_implementation
    # SAM counts its mask token 0 apart
    changed.num_multimask_outputs = num_channels - 1
    return changed
