"""What both tuners share beside PEFT's BaseTuner."""

from __future__ import annotations

from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from ..msam.adapter import MSAM_MODEL_TYPE, prepare_for_msam
from ..routing.checkpointing import add_checkpoint_hooks, remove_checkpoint_hooks
from ..saving.settings import check_settings, split_settings, with_settings
from ..saving.tensors import check_adapter_state, without_unsaved

# Lists of names: a regular expression would rule out `layers_to_transform`.
# The fused q/k/v projection of the vision encoder.
FUSED = ["qkv"]
# The projections of SAM 3's vision encoder, whose blocks alone call their attention "attention": the text encoder's, the
# DETR's and the mask decoder's projections have the same names.
SEPARATE = ["attention.q_proj", "attention.v_proj"]
DEFAULT_TARGET_MODULES = {
    "sam": FUSED,
    "sam_vision_model": FUSED,
    "sam_hq": FUSED,
    "sam_hq_vision_model": FUSED,
    "sam2": FUSED,
    "sam2_vision_model": FUSED,
    "sam2_hiera_det_model": FUSED,
    "sam3": SEPARATE,
    "sam3_vision_model": SEPARATE,
    "sam3_vit_model": SEPARATE,
    "sam3_tracker": SEPARATE,
    MSAM_MODEL_TYPE: FUSED,
}
# Encoders whose layers may be in a list of the model itself: PEFT finds no index in "blocks.0.attn.qkv" without its name.
ENCODERS = ("sam_vision_model", "sam_hq_vision_model", "sam2_hiera_det_model", "sam3_vit_model")


class PluginTuner(BaseTuner):
    """A tuner for linear layers that knows SAM and mSAM.

    A subclass names its classes: `prefix`, `tuner_layer_cls`, and `linear_layer_cls`, which is called with the target,
    the adapter's name, its config, the layer's full name and `_layer_kwargs()`.
    """

    target_module_mapping = DEFAULT_TARGET_MODULES
    linear_layer_cls: type[BaseTunerLayer]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; then add the hooks that the tuner needs on the model."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._add_hooks()

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        state_dict, settings = split_settings(without_unsaved(model, adapter_name, state_dict))
        check_settings(settings, config.settings(), config.settings_on_file)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT only warns of missing tensors, which then keep the values they were drawn with
        check_adapter_state(model, adapter_name, cls.prefix, state_dict)
        return state_dict

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, **kwargs: Any) -> dict[str, Any]:
        state = super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **kwargs)
        parameter = cls.tuner_layer_cls.adapter_layer_names[-1]
        return with_settings(state, config.settings(), f"{parameter}.{adapter_name}")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's would take any part of that name, and a task may be called like the adapter
        head = key.removesuffix(f".{adapter_name}")
        return head if head.rpartition(".")[2] in cls.tuner_layer_cls.adapter_layer_names else key

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """As in PEFT; an mSAM's default targets are those of its base."""
        if peft_config.target_modules is None and model_config["model_type"] == MSAM_MODEL_TYPE:
            peft_config.target_modules = set(self.target_module_mapping[model_config["base_model_type"]])
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        prepare_for_msam(peft_config, model)
        if peft_config.layers_to_transform is not None and peft_config.layers_pattern is None:
            peft_config.layers_pattern = _own_lists(model) or None

    def _layer_kwargs(self) -> dict[str, Any]:
        return {}

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config=peft_config, name=current_key)
            return
        new_module = self._create_new_module(peft_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(
        self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, name: str
    ) -> BaseTunerLayer:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization_kwargs = get_quantization_kwargs(self)
        if not _is_linear(base_layer, quantization_kwargs):
            raise TypeError(
                f"Target module '{name}' ({type(base_layer).__name__}) is not supported. Only `torch.nn.Linear` "
                "(optionally quantized) is."
            )
        kwargs = {**quantization_kwargs, **self._layer_kwargs()}
        return self.linear_layer_cls(target, adapter_name, config=peft_config, name=name, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # BaseTuner's copies `.weight` back to what it unwraps, which a mask decoder in modules_to_save does not have
        setattr(parent, child_name, new_module)
        child = getattr(child, "base_layer", child)
        device = next((p.device for p in child.parameters()), None)
        for name, module in new_module.named_modules():
            on_meta = any(p.device.type == "meta" for p in module.parameters())
            if self.prefix in name and device is not None and not on_meta:
                module.to(device)

    def _add_hooks(self) -> None:
        add_checkpoint_hooks(self.model, self.tuner_layer_cls)

    def _remove_hooks(self) -> None:
        remove_checkpoint_hooks(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._remove_hooks()
        return model


def _own_lists(model: nn.Module) -> list[str]:
    """The names of the lists of layers that an encoder of the SAM family holds itself; none for other models."""
    if getattr(getattr(model, "config", None), "model_type", None) not in ENCODERS:
        return []
    return [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]


def _is_linear(layer: nn.Module, quantization_kwargs: dict[str, Any]) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    backend = resolve_quantization_backend(layer, **quantization_kwargs)
    return backend is not None and backend.layer_type == "linear"
