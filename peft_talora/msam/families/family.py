"""What an mSAM needs to know of a family of SAMs."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..split import Features

# the sizes by which a ViT with windows is known
VIT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "window_size",
    "global_attn_indexes",
)


class Family:
    """One family of SAMs: how its parts are made, what travels between them, and how large it is.

    A module of this folder that has an instance of a subclass as `FAMILY` is all that a further family takes.

    Attributes:
        model_type: That of the plain model, which `MSamConfig.base_model_type` records.
        checkpoint_types: The model types of the checkpoints that the plain model is loaded from.
        model_class: The plain model. It has `vision_encoder`, `shared_image_embedding`, `prompt_encoder` and `mask_decoder`.
        layers: Where in the plain model, and in the mSAM, the encoder's blocks are.
        encoder_class: A vision encoder of the family that is a `SplitEncoder`, made from its configuration.
        position_class: The dense positional encoding: coordinates (..., 2) in [0, 1], x first -> (..., C).
        decoder_class: The mask decoder of a task, for one pass per channel, made from the plain decoder's configuration.
        token_decoder_class: The one with a token per channel, made from that and the number of channels N.
        base_fields: The sizes in the encoder's configuration by which an adapter knows its base.
        resizes_to_square: Whether images are stretched to the model's square, as the family's own processor does; else
            their longest side is resized, and the rest padded.
        image_size_step_name: What `image_size_step` is, for messages.
        image_mean, image_std: What the family's own processor normalises images with; ImageNet's when None.
    """

    model_type: ClassVar[str]
    checkpoint_types: ClassVar[tuple[str, ...]]
    model_class: ClassVar[type[PreTrainedModel]]
    layers: ClassVar[str] = "vision_encoder.layers"
    encoder_class: ClassVar[type[nn.Module]]
    position_class: ClassVar[type[nn.Module]]
    decoder_class: ClassVar[type[nn.Module]]
    token_decoder_class: ClassVar[type[nn.Module]]
    base_fields: ClassVar[tuple[str, ...]]
    resizes_to_square: ClassVar[bool] = False
    image_size_step_name: ClassVar[str] = "the patch size"
    image_mean: ClassVar[list[float] | None] = None
    image_std: ClassVar[list[float] | None] = None

    # The sizes

    def backbone(self, vision_config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of the vision encoder's configuration that says how large the transformer is."""
        return vision_config

    def image_size(self, vision_config: PreTrainedConfig) -> int:
        """Side of the square input, in pixels."""
        return side(self.backbone(vision_config).image_size)

    def image_size_step(self, vision_config: PreTrainedConfig) -> int:
        """What the image size is a multiple of, in pixels."""
        return side(self.backbone(vision_config).patch_size)

    def set_image_size(self, vision_config: PreTrainedConfig, image_size: int) -> None:
        """Change the configuration to images of another size."""
        vision_config.image_size = image_size

    def grid_size(self, vision_config: PreTrainedConfig) -> int:
        """Height and width of the image embedding, in tokens."""
        return self.image_size(vision_config) // side(vision_config.patch_size)

    def feature_shapes(self, vision_config: PreTrainedConfig) -> tuple[tuple[int, int, int], ...]:
        """The shapes of the features of one image; a single one where they are a tensor."""
        raise NotImplementedError

    def trunk_shape(self, vision_config: PreTrainedConfig) -> tuple[int, int, int] | None:
        """The shape of one image's hidden states where they are a tensor; None where they are a tuple."""
        raise NotImplementedError

    # The parts

    def position_embedding(self, config: PreTrainedConfig) -> nn.Module:
        """The dense positional encoding."""
        return self.position_class(config.vision_config)

    def decoder(self, config: PreTrainedConfig, num_channels: int) -> nn.Module:
        """The mask decoder of a task with N channels, for the configuration's channel mode."""
        if config.decodes_tokens:
            return self.token_decoder_class(config.mask_decoder_config, num_channels)
        return self.decoder_class(config.mask_decoder_config)

    def decoder_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """That of the decoders, made from a copy of that of the plain model's."""
        return config

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse an `MSamConfig` that this family cannot have.

        Raises:
            ValueError: The message names what it is.
        """

    def add_parts(self, model: nn.Module) -> None:
        """Give an mSAM what else belongs to it and is no task's own."""

    def copy_parts(self, model: nn.Module, sam: nn.Module) -> None:
        """Fill what `add_parts` made from the plain model."""

    # What travels

    def features(self, model: nn.Module, output: ModelOutput) -> Features:
        """The features of images, of the encoder's output."""
        return output.last_hidden_state

    def decode(
        self, model: nn.Module, name: str, features: Features, no_mask: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """The logits (B, N, 4h, 4w) of a task.

        Args:
            model: The mSAM.
            name: The task.
            features: Those of B images.
            no_mask: The no-mask embedding of each channel, (N, C); (1, C) in token mode.
            position: The positional encoding, (1, C, h, w).
        """
        raise NotImplementedError

    # The weights

    def encoder_state(self, vision_config: PreTrainedConfig, encoder: nn.Module) -> dict[str, torch.Tensor]:
        """The state of a plain encoder for an mSAM's, whose image size may be another."""
        return encoder.state_dict()

    def plain_config(self, config: PreTrainedConfig, mask_decoder_config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of a plain model with an mSAM's encoder."""
        prompt = copy.deepcopy(config.prompt_encoder_config)
        prompt.image_size = config.image_size
        self.set_prompt_grid(prompt, config.grid_size)
        return self.model_class.config_class(
            vision_config=copy.deepcopy(config.vision_config),
            prompt_encoder_config=prompt,
            mask_decoder_config=mask_decoder_config,
        )

    def set_prompt_grid(self, prompt_config: PreTrainedConfig, grid_size: int) -> None:
        """Fit the prompt encoder's configuration to an image embedding of another size, where it says that."""
        prompt_config.image_embedding_size = grid_size

    def export_parts(self, model: nn.Module, sam: nn.Module) -> None:
        """Fill the plain model with what is neither its encoder, nor its decoder, nor its no-mask embedding."""
        sam.prompt_encoder.shared_embedding = sam.shared_image_embedding


def side(size: Any) -> int:
    """The side of a square: a number, or two equal ones.

    Raises:
        ValueError: They differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"An mSAM needs a SAM for square images and patches, got sides of {list(size)}.")
    return sides.pop()
