"""Conv-LoRA: low-rank adaptation with convolutional experts (arXiv 2401.17868)."""

from ..registration import register_tuner
from .config import ConvLoraConfig
from .layer import ConvLoraLayer, ConvLoraLinear
from .model import ConvLoraModel, expert_usage

__all__ = ["ConvLoraConfig", "ConvLoraLayer", "ConvLoraLinear", "ConvLoraModel", "expert_usage"]

register_tuner("convlora", config_cls=ConvLoraConfig, model_cls=ConvLoraModel)
