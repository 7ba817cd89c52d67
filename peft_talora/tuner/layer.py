"""What the layers of both tuners share beside PEFT's BaseTunerLayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from ..routing.layers import layer_made


class PluginLayer(BaseTunerLayer):
    """A tuner's parameters for one linear layer, plain or quantised by a backend that PEFT knows.

    A subclass names its parameters in `adapter_layer_names`; each becomes an `nn.ParameterDict` keyed by adapter name.

    Args:
        base_layer: The layer to adapt.
        kwargs: What PEFT's quantisation backends ask for.

    Raises:
        TypeError: The size of the layer's input and output is not known.
    """

    # a layer of one of our tuners; see `routing.layers`
    is_tuned_layer = True
    # how the auxiliary values of all layers become one loss
    auxiliary_reduction: Callable[[torch.Tensor], torch.Tensor] = staticmethod(torch.sum)

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs

        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}.")
        self.in_features, self.out_features = in_features, out_features
        layer_made()

    def base_result(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, to which an update can be added."""
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters in the order of the class's `adapter_layer_names`."""
        return [getattr(self, name)[adapter_name] for name in type(self).adapter_layer_names]

    def auxiliary_values(self, adapter_name: str) -> torch.Tensor | None:
        """What the adapter brings to the auxiliary loss, weighted: (n,), to be reduced over all layers; None for nothing."""
        return None

    def _activate(self, adapter_name: str, config: PeftConfig) -> None:
        """The end of every `update_layer`: new parameters go where the base layer is, and are frozen unless active."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def extra_repr(self) -> str:
        """What a print of the model says of a quantised base layer."""
        return quantization_extra_repr(self)
