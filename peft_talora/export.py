"""Adapters from and to other formats."""

from .convlora.autogluon import convlora_from_autogluon
from .msam.export import task_to_sam
from .talora.export import save_task_as_lora, task_to_lora

__all__ = ["convlora_from_autogluon", "save_task_as_lora", "task_to_lora", "task_to_sam"]
