"""Adapters from other formats."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_talora import ConvLoraLayer
from peft_talora.export import convlora_from_autogluon

LAYER = "model.vision_encoder.layers.{}.attn.qkv"


def autogluon_state(layers=(0, 1, 2), r=4, n=5, d=16, prefix=""):
    state = {}
    for index in layers:
        name = prefix + LAYER.format(index)
        state[f"{name}.weight"] = torch.randn(3 * d, d)
        state[f"{name}.lora_A"] = torch.randn(r, d)
        state[f"{name}.lora_B"] = torch.randn(3 * d, r)
        for e in reversed(range(n)):
            state[f"{name}.lora_moe_experts.{e}.0.weight"] = torch.randn(r, r, 3, 3)
            state[f"{name}.lora_moe_experts.{e}.0.bias"] = torch.randn(r)
        state[f"{name}.lora_moe_gating.w_gate"] = torch.randn(r, n)
        state[f"{name}.lora_moe_gating.w_noise"] = torch.randn(r, n)
        state[f"{name}.lora_moe_gating.mean"] = torch.tensor([0.0])
        state[f"{name}.lora_moe_gating.std"] = torch.tensor([1.0])
    state["model.mask_decoder.iou_token.weight"] = torch.randn(1, 8)
    return state


@pytest.mark.parametrize("prefix", ["", "model.lightning_module."])
def test_every_tensor_arrives(sam, prefix):
    state = autogluon_state(prefix=prefix)
    config, weights = convlora_from_autogluon(state, convlora_alpha=8)
    assert (config.r, config.num_experts, config.convlora_alpha) == (4, 5, 8)
    model = get_peft_model(sam, config)
    assert weights.keys() == get_peft_model_state_dict(model).keys()
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    for index in range(3):
        layer, name = model.base_model.model.vision_encoder.layers[index].attn.qkv, prefix + LAYER.format(index)
        assert isinstance(layer, ConvLoraLayer) and layer.scaling["default"] == 2
        assert torch.equal(layer.convlora_A["default"], state[f"{name}.lora_A"])
        assert torch.equal(layer.convlora_B["default"], state[f"{name}.lora_B"])
        assert torch.equal(layer.convlora_gate["default"], state[f"{name}.lora_moe_gating.w_gate"])
        assert torch.equal(layer.convlora_noise["default"], state[f"{name}.lora_moe_gating.w_noise"])
        for e in range(5):
            expert = f"{name}.lora_moe_experts.{e}.0"
            assert torch.equal(layer.convlora_expert_weight["default"][e], state[f"{expert}.weight"])
            assert torch.equal(layer.convlora_expert_bias["default"][e], state[f"{expert}.bias"])


def test_some_of_the_layers(sam):
    config, weights = convlora_from_autogluon(autogluon_state(layers=(2, 0)))
    model = get_peft_model(sam, config)
    assert weights.keys() == get_peft_model_state_dict(model).keys()
    assert not any(".layers.1." in name for name in weights)


FIRST = LAYER.format(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{FIRST}.lora_B": None}, r"layers\.0\.attn\.qkv\.lora_B' is missing"),
        ({f"{FIRST}.lora_moe_gating.w_noise": None}, "w_noise' is missing"),
        ({f"{FIRST}.lora_moe_experts.3.0.bias": None}, r"lora_moe_experts\.3\.0\.bias' is missing"),
        ({f"{FIRST}.lora_moe_experts.4.0.bias": None}, r"convlora_expert_bias has the shape \(4, 4\), expected \(5, 4\)"),
        ({f"{FIRST}.lora_moe_experts.9.0.bias": torch.zeros(4)}, r"lora_moe_experts\.5\.0\.bias' is missing"),
        ({f"{FIRST}.lora_moe_experts.2.0.weight": torch.zeros(4, 4, 5, 5)}, r"\.2\.0\.weight' has the shape .*5, 5\)"),
        ({f"{FIRST}.lora_B": torch.zeros(16, 4)}, r"convlora_B has the shape \(16, 4\), expected \(48, 4\).*fused qkv"),
        ({f"{FIRST}.lora_moe_gating.w_gate": torch.zeros(3, 5)}, r"convlora_gate has the shape \(3, 5\)"),
        ({f"{FIRST}.lora_A": torch.full((4, 16), torch.nan)}, "convlora_A is not finite"),
        ({f"{FIRST}.lora_magnitude": torch.zeros(1)}, r"lora_magnitude' does not belong"),
        ({f"{FIRST}.lora_moe_experts.0.1.weight": torch.zeros(1)}, r"lora_moe_experts\.0\.1\.weight' does not belong"),
        ({f"{FIRST}.lora_moe_gating.std": torch.tensor([2.0])}, r"std' is \[2\.0\], only 1\.0"),
        ({"model.vision_encoder.layers.0.attn.q_proj.lora_A": torch.zeros(4, 16)}, "'.*q_proj.lora_A' is not in the fused"),
        ({f"other.{FIRST}.lora_A": torch.zeros(4, 16)}, "twice, under different prefixes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    state = autogluon_state()
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(ValueError, match=message):
        convlora_from_autogluon(state)


def test_layers_of_different_ranks():
    state = autogluon_state(layers=(0,), r=4) | autogluon_state(layers=(1,), r=3)
    with pytest.raises(ValueError, match=r"one rank and number of experts.*\(4, 5\).*\(3, 5\)"):
        convlora_from_autogluon(state)


def test_no_adapter_at_all():
    with pytest.raises(ValueError, match="no Conv-LoRA"):
        convlora_from_autogluon({"vision_encoder.layers.0.attn.qkv.weight": torch.zeros(3, 1)})
