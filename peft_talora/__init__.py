"""Multi-task adapters for the Segment Anything Model, as a plugin for Hugging Face PEFT.

Importing the package registers the tuners with PEFT: `get_peft_model(sam, TALoraConfig(tasks=[...]))` then works like
`get_peft_model(sam, LoraConfig(...))`.
"""

from .attention.lean import lean_attention
from .auxiliary import auxiliary_loss
from .convlora import ConvLoraConfig, ConvLoraLayer, ConvLoraLinear, ConvLoraModel, expert_usage
from .export import convlora_from_autogluon, save_task_as_lora, task_to_lora, task_to_sam
from .hub import load_adapter, push_adapter, save_adapter
from .metrics import delta_b
from .msam import MSamConfig, MSamForMultiTask, MSamOutput, MSamProcessor, TaskSpec
from .msam.adapter import default_modules_to_save
from .msam.add_task import add_task
from .routing import checkpoint_context, set_task, use_task
from .talora import TALoraConfig, TALoraLayer, TALoraLinear, TALoraModel

__version__ = "0.1.0"

__all__ = [
    "ConvLoraConfig",
    "ConvLoraLayer",
    "ConvLoraLinear",
    "ConvLoraModel",
    "MSamConfig",
    "MSamForMultiTask",
    "MSamOutput",
    "MSamProcessor",
    "TALoraConfig",
    "TALoraLayer",
    "TALoraLinear",
    "TALoraModel",
    "TaskSpec",
    "add_task",
    "auxiliary_loss",
    "checkpoint_context",
    "convlora_from_autogluon",
    "default_modules_to_save",
    "delta_b",
    "expert_usage",
    "lean_attention",
    "load_adapter",
    "push_adapter",
    "save_adapter",
    "save_task_as_lora",
    "set_task",
    "task_to_lora",
    "task_to_sam",
    "use_task",
]
