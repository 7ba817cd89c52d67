"""Which type and which devices a loaded model gets."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating point type of torch, also by its name; None for None and "auto".

    Raises:
        ValueError: It is something else.
    """
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(f"`dtype` must be a floating point type such as torch.bfloat16 or 'bfloat16', got {dtype!r}.")
    return parsed


def place(model: PreTrainedModel, device_map: str | int | torch.device | dict[str, Any] | None) -> None:
    """Move a model to a device, or have accelerate dispatch its parts.

    Args:
        model: The model.
        device_map: A device; or as in transformers one of `STRATEGIES`, or a dict of modules and devices. None: leave it.
    """
    if device_map is None:
        return
    if not isinstance(device_map, dict) and device_map not in STRATEGIES:
        model.to(device_map)
        return
    if not isinstance(device_map, dict):
        whole = list(model._no_split_modules or [])
        memory = None
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=low_zero)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    dispatch_model(model, device_map=device_map)
