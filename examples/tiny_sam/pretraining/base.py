"""What the small models have in common, and what each of them says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

SIZE = 128  # side of the images in pixels


@dataclass(frozen=True)
class Base:
    """A small model that can be pretrained.

    Attributes:
        model_class: transformers' class of it.
        config: Makes its configuration.
        prepare: Changes what the common start of the weights leaves wrong for this class, in place.
        embed: The feature maps (B, C, h, w) that the mask decoder takes of normalised images (B, 3, H, W), from high to
            low resolution, with gradients.
        processor: Makes its processor; None where transformers has none that works without torchvision.
        introduction: The first part of its card.
        architecture: What its card says about its architecture.
        limits: What its card says about the size of its masks.
    """

    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    prepare: Callable[[PreTrainedModel], None]
    embed: Callable[[PreTrainedModel, Tensor], list[Tensor]]
    processor: Callable[[], ProcessorMixin] | None
    introduction: str
    architecture: str
    limits: str
