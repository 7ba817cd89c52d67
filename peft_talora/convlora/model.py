"""The Conv-LoRA tuner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..tuner.model import PluginTuner
from .config import ConvLoraConfig
from .grids import check_place, place_of
from .layer import MERGE_ERROR, ConvLoraLayer, ConvLoraLinear


class ConvLoraModel(PluginTuner):
    """Conv-LoRA (arXiv 2401.17868): a low-rank update whose bottleneck is a mixture of convolutions at several scales.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`ConvLoraConfig`]): The configuration of the Conv-LoRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The Conv-LoRA model.

    Example:
        ```py
        >>> from transformers import SamModel
        >>> from peft import get_peft_model
        >>> from peft_talora import ConvLoraConfig, auxiliary_loss

        >>> sam = SamModel.from_pretrained("facebook/sam-vit-base")
        >>> model = get_peft_model(sam, ConvLoraConfig())
        >>> masks = model(pixel_values=pixel_values, input_boxes=boxes).pred_masks
        >>> loss = task_loss(masks, labels) + auxiliary_loss(model)
        ```

    **Attributes**:
        - **model** ([`~torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`ConvLoraConfig`]): The configuration of the Conv-LoRA model.
    """

    prefix: str = "convlora_"
    tuner_layer_cls = ConvLoraLayer
    linear_layer_cls = ConvLoraLinear

    def _prepare_model(self, peft_config: ConvLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.grid_size is None:
            for name in self._targets(peft_config, model):
                check_place(place_of(model, name), name)

    def _targets(self, peft_config: ConvLoraConfig, model: nn.Module) -> list[str]:
        """The names of the modules that are about to be adapted."""
        if str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            peft_config = replace(peft_config, target_modules=list(linear))
        return [name for name, _ in model.named_modules() if self._check_target_module_exists(peft_config, name)]

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, after the check that the inputs of all targets are grids; see `check_place`."""
        super().inject_adapter(model, *args, **kwargs)
        for name, layer in model.named_modules():
            if isinstance(layer, ConvLoraLayer):
                layer.place = place_of(model, name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Not possible: raises NotImplementedError that says why, and what to do instead."""
        raise NotImplementedError(MERGE_ERROR)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        # before anything is changed
        if merge:
            raise NotImplementedError(MERGE_ERROR)
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

    def _add_hooks(self) -> None:
        super()._add_hooks()
        if _forget_last_forward not in self.model._forward_pre_hooks.values():
            self.model.register_forward_pre_hook(_forget_last_forward)

    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        for key in [k for k, hook in self.model._forward_pre_hooks.items() if hook is _forget_last_forward]:
            del self.model._forward_pre_hooks[key]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Mixed adapter batches (`adapter_names`) are not supported by Conv-LoRA: call the model once per adapter."
            )
        yield


def _forget_last_forward(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: layers that this forward does not reach must not count any more in the auxiliary loss."""
    for layer in model.modules():
        if isinstance(layer, ConvLoraLayer):
            layer.remember({})


def expert_usage(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """How many samples of the last forward each expert got, in every layer.

    A sample is what the layer routes as one: an image, or one of its windows in SAM's windowed layers.

    Args:
        model: A model with Conv-LoRA layers.
        adapter_name: The adapter to count for; the active one when None.

    Returns:
        `{name of the layer: counts}`, LongTensors (num_experts,). A layer that the last forward did not reach is missing.

    Raises:
        ValueError: Several adapters are active, and none is named; or no layer has the one that is named.
    """
    usage = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvLoraLayer)}
    known = sorted({adapter for layer in layers.values() for adapter in layer.convlora_A})
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(f"There is no Conv-LoRA adapter '{adapter_name}', the known ones are {known}.")
    for name, layer in layers.items():
        if adapter_name is None and len(layer.active_adapters) > 1:
            raise ValueError(f"Several adapters are active, {layer.active_adapters}: pass one as adapter_name.")
        counts = layer.expert_counts(adapter_name or next(iter(layer.active_adapters), ""))
        if counts is not None:
            usage[name] = counts
    return usage
