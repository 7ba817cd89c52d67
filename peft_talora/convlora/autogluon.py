"""Conv-LoRA adapters of their authors' implementation."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..saving.settings import PEFT_PREFIX, with_settings
from .config import ConvLoraConfig
from .layer import ConvLoraLayer

_QKV = re.compile(r"(?:.*\.)?(vision_encoder\.layers\.\d+\.attn\.qkv)")
_EXPERT = re.compile(r"lora_moe_experts\.(\d+)\.0\.(weight|bias)")
_NAMES = {
    "lora_A": "convlora_A",
    "lora_B": "convlora_B",
    "lora_moe_gating.w_gate": "convlora_gate",
    "lora_moe_gating.w_noise": "convlora_noise",
}
# buffers of the released gate: the normal distribution of its noise
_CONSTANTS = {"lora_moe_gating.mean": 0.0, "lora_moe_gating.std": 1.0}


def convlora_from_autogluon(
    state_dict: Mapping[str, Tensor], convlora_alpha: float = 32
) -> tuple[ConvLoraConfig, dict[str, Tensor]]:
    """The Conv-LoRA adapter in a checkpoint of its authors' implementation (AutoGluon), for the fused qkv of a SAM.

    Args:
        state_dict: Keys `...vision_encoder.layers.{i}.attn.qkv.` with `lora_A`, `lora_B`, `lora_moe_gating.w_gate`,
            `lora_moe_gating.w_noise` and `lora_moe_experts.{e}.0.weight` and `.bias`. Other modules, and the base layer's
            own weights, are ignored.
        convlora_alpha: The alpha it was trained with, which the checkpoint does not say.

    Returns:
        The configuration, and the weights under the names of PEFT's files:

            model = get_peft_model(sam, config)
            set_peft_model_state_dict(model, weights)

    Raises:
        ValueError: Something is missing, unknown or of another shape; the message names it.
    """
    layers = _adapter_keys(state_dict)
    if not layers:
        raise ValueError(
            "The state dict has no Conv-LoRA of a fused qkv: no key ends in 'vision_encoder.layers.{i}.attn.qkv.lora_A'."
        )
    sizes, weights = {}, {}
    for layer, tensors in sorted(layers.items(), key=lambda item: _index_of(item[0])):
        converted = _convert_layer(layer, tensors)
        r, n = converted["convlora_gate"].shape
        sizes[layer] = (r, n)
        weights.update({f"{PEFT_PREFIX}{layer}.{name}": tensor for name, tensor in converted.items()})
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All layers must have one rank and number of experts, got (r, num_experts) = {sizes}.")
    indices = [_index_of(layer) for layer in sizes]
    config = ConvLoraConfig(
        r=r, num_experts=n, convlora_alpha=convlora_alpha, target_modules=["qkv"], layers_to_transform=indices
    )
    return config, with_settings(weights, config.settings(), ConvLoraLayer.adapter_layer_names[-1])


def _adapter_keys(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{name of the layer: {name in the layer: tensor}}` of all keys that belong to an adapter."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        module, dot, name = key.partition(".lora_")
        if not dot:
            continue
        match = _QKV.fullmatch(module)
        if match is None:
            raise ValueError(
                f"'{key}' is not in the fused qkv of a SAM ('vision_encoder.layers.{{i}}.attn.qkv'): only that is "
                "converted."
            )
        entries = layers.setdefault(match[1], {})
        if f"lora_{name}" in entries:
            raise ValueError(f"The state dict has '{match[1]}.lora_{name}' twice, under different prefixes.")
        entries[f"lora_{name}"] = tensor
    return layers


def _index_of(layer: str) -> int:
    """The number of an encoder's layer in the name of its projection, vision_encoder.layers.{i}.attn.qkv."""
    return int(layer.split(".")[2])


def _convert_layer(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            experts[match[2]][int(match[1])] = tensor
        elif name in _CONSTANTS:
            if not torch.all(tensor == _CONSTANTS[name]):
                raise ValueError(f"'{layer}.{name}' is {tensor.tolist()}, only {_CONSTANTS[name]} is supported.")
        elif name in _NAMES:
            converted[_NAMES[name]] = tensor
        else:
            raise ValueError(f"'{layer}.{name}' does not belong to a Conv-LoRA layer.")
    for name, converted_name in _NAMES.items():
        if converted_name not in converted:
            raise ValueError(f"'{layer}.{name}' is missing.")
    for kind, of_expert in experts.items():
        missing = [e for e in range(max((*of_expert, 0)) + 1) if e not in of_expert]
        if missing:
            raise ValueError(f"'{layer}.lora_moe_experts.{missing[0]}.0.{kind}' is missing.")
        _check_equal_shapes(layer, kind, of_expert)
        converted[f"convlora_expert_{kind}"] = torch.stack([of_expert[e] for e in sorted(of_expert)])
    _check_shapes(layer, converted)
    return converted


def _check_equal_shapes(layer: str, kind: str, of_expert: Mapping[int, Tensor]) -> None:
    for e, tensor in of_expert.items():
        if tensor.shape != of_expert[0].shape:
            raise ValueError(
                f"'{layer}.lora_moe_experts.{e}.0.{kind}' has the shape {tuple(tensor.shape)}, that of expert 0 "
                f"{tuple(of_expert[0].shape)}."
            )


def _check_shapes(layer: str, converted: Mapping[str, Tensor]) -> None:
    A, experts = converted["convlora_A"], converted["convlora_expert_weight"]
    r, d, n = A.shape[0], A.shape[-1], experts.shape[0]
    expected = {
        "convlora_A": (r, d),
        "convlora_B": (3 * d, r),
        "convlora_expert_weight": (n, r, r, 3, 3),
        "convlora_expert_bias": (n, r),
        "convlora_gate": (r, n),
        "convlora_noise": (r, n),
    }
    for name, shape in expected.items():
        if tuple(converted[name].shape) != shape:
            raise ValueError(
                f"'{layer}': {name} has the shape {tuple(converted[name].shape)}, expected {shape} for rank {r}, {n} "
                f"experts and a fused qkv of width {d}."
            )
        if not torch.isfinite(converted[name]).all():
            raise ValueError(f"'{layer}': {name} is not finite.")
