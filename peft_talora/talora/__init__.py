"""TA-LoRA: task-aware low-rank adaptation (arXiv 2403.10971)."""

from ..registration import register_tuner
from .config import TALoraConfig
from .layer import TALoraLayer, TALoraLinear
from .model import TALoraModel

__all__ = ["TALoraConfig", "TALoraLayer", "TALoraLinear", "TALoraModel"]

register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)
