"""The small models that can be pretrained, and how their weights start."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import sam, sam2
from .base import Base

# by the name of their folder
BASES = {"tiny_sam": sam.BASE, "tiny_sam2": sam2.BASE}


def base_of(model: PreTrainedModel) -> Base:
    """Return what is known about a model's class."""
    return next(base for base in BASES.values() if isinstance(model, base.model_class))


def build_model(base: Base, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Return a randomly initialised model, of the base's configuration or another one.

    Tokens and prompt types start at unit variance, as in the original SAM, rather than at transformers' 0.02: they
    must be as long as the positions they are added to, or it takes the decoder long to tell them apart.
    """
    model = base.model_class(config or base.config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if "no_mask" in name else 1.0)
    base.prepare(model)
    return model
