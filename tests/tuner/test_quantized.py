"""Quantised base layers, through PEFT's generic backend: here torchao's int8 weights, which run on CPUs."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import SamModel, TorchAoConfig

from peft_talora import ConvLoraConfig, TALoraConfig

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

CONFIGS = {
    "talora": lambda: TALoraConfig(tasks=["a", "b"], r=4, init_weights=False),
    "convlora": lambda: ConvLoraConfig(num_experts=2, init_weights=False),
}


@pytest.fixture
def quantized(sam, tmp_path):
    """Loads the same SAM with int8 weights."""
    sam.save_pretrained(tmp_path / "sam")
    options = {"quantization_config": TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())}
    return lambda: SamModel.from_pretrained(tmp_path / "sam", **options)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def embed(model):
    return model.vision_encoder(images()).last_hidden_state


def relative(error, scale):
    return (error.abs().mean() / scale.abs().mean()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_trained_saved_and_loaded(name, quantized, tmp_path):
    base = quantized()
    before = embed(base).detach()
    model = get_peft_model(base, CONFIGS[name]()).eval()
    layer = model.vision_encoder.layers[0].attn.qkv
    assert layer.quantization_backend.backend_name == "torchao" and "torchao" in repr(layer)
    x = torch.randn(2, 5, 5, 16)
    plain = torch.nn.functional.linear(x, layer.base_layer.weight.dequantize(), layer.base_layer.bias)
    torch.testing.assert_close(layer.base_layer(x), plain, rtol=1e-4, atol=1e-4)

    output = embed(model)
    assert relative(output - before, before) > 0.05
    output.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    with model.disable_adapter():
        torch.testing.assert_close(embed(model), before, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    torch.testing.assert_close(embed(loaded), output, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_merged_and_quantised_again(quantized):
    """A merge rounds to int8 anew, by steps of 1/127 of the largest weight of a row."""
    base = quantized()
    before = embed(base)
    model = get_peft_model(base, CONFIGS["talora"]()).eval()
    model.set_task("b")
    expected = embed(model)
    quantised_type = type(model.vision_encoder.layers[0].attn.qkv.weight)
    model.merge_adapter()
    merged = embed(model)
    assert type(model.vision_encoder.layers[0].attn.qkv.weight) is quantised_type
    assert relative(merged - expected, expected - before) < 0.05
    model.unmerge_adapter()
    assert relative(embed(model) - expected, expected - before) < 0.05
