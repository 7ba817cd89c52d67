"""Lean attention against transformers' own."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, lean_attention
from peft_talora.attention.lean import LeanSamVisionAttention, one_hot_positions


def attention(sam, kind=SamVisionSdpaAttention, window_size=0, **changes):
    config = copy.deepcopy(sam.config.vision_config)
    for name, value in changes.items():
        setattr(config, name, value)
    module = kind(config, window_size).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def tuned(sam):
    return get_peft_model(sam, TALoraConfig(tasks=["a", "b"], r=3, init_weights=False), autocast_adapter_dtype=False)


def pixels(batch=2):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def encode(model, images, **kwargs):
    return model(pixel_values=images, **kwargs).last_hidden_state


@pytest.mark.parametrize("kind", [SamVisionAttention, SamVisionSdpaAttention])
@pytest.mark.parametrize(("window_size", "grid"), [(0, 8), (3, 3)], ids=["global", "window"])
@pytest.mark.parametrize(("positions", "tiles"), [(True, True), (True, False), (False, False)])
def test_values_and_gradients(sam, kind, window_size, grid, positions, tiles, monkeypatch):
    monkeypatch.setattr("peft_talora.attention.lean._prefers_tiles", lambda query: tiles)
    module = attention(sam, kind, window_size, use_rel_pos=positions)
    hidden = torch.randn(2, grid, grid, 16, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, grid, grid, 16, dtype=torch.float64)
    inputs, results = [hidden, *module.parameters()], []
    for enabled in (False, True):
        lean_attention(module, enabled)
        output, weights = module(hidden)
        assert (weights is None) == (enabled or kind is SamVisionSdpaAttention)
        results.append((output, *torch.autograd.grad((output * cotangent).sum(), inputs)))
    # transformers' eager softmax is float32 whatever comes in
    tolerance = 1e-9 if kind is SamVisionSdpaAttention else 2e-6
    names = ["output", "hidden", *dict(module.named_parameters())]
    for name, plain, lean in zip(names, *results, strict=True):
        torch.testing.assert_close(lean, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item(), msg=name)
        assert plain.abs().max() > 1e-3, name
    if positions:  # and they matter
        with torch.no_grad():
            module.rel_pos_h.add_(1.0 + torch.arange(len(module.rel_pos_h))[:, None])
        assert (module(hidden)[0] - results[0][0]).abs().max() > 1e-3


def test_positions_are_those_of_a_row_major_grid():
    expected = torch.zeros(6, 5)
    for y in range(2):
        for x in range(3):
            expected[3 * y + x, y] = expected[3 * y + x, 2 + x] = 1.0
    assert torch.equal(one_hot_positions(2, 3, expected), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(sam, dtype):
    model = SamVisionModel(sam.config.vision_config)
    model.vision_encoder.load_state_dict(sam.vision_encoder.state_dict())
    model = model.to(dtype).eval()
    images = pixels().to(dtype)
    with torch.no_grad():
        plain, lean = encode(model, images), encode(lean_attention(model), images)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert lean.dtype == dtype
    torch.testing.assert_close(lean, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


def test_autocast(sam):
    module = attention(sam).float()
    hidden = torch.randn(2, 8, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, lean = module(hidden)[0], lean_attention(module)(hidden)[0]
    assert plain.dtype == lean.dtype == torch.bfloat16
    torch.testing.assert_close(lean, plain, rtol=5e-2, atol=5e-2 * plain.abs().max().item())


def test_dropout_follows_the_class_that_is_replaced(sam):
    hidden = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    for kind, varies in ((SamVisionAttention, True), (SamVisionSdpaAttention, False)):
        module = lean_attention(attention(sam, kind, attention_dropout=0.5)).train()
        assert torch.equal(module(hidden)[0], module(hidden)[0]) != varies
        assert torch.equal(module.eval()(hidden)[0], module(hidden)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tuned_encoder(sam, checkpointing):
    model, images = tuned(sam.double()), pixels()
    if checkpointing:
        model.train()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for enabled in (False, True):
        lean_attention(model, enabled)
        with model.use_task(["a", "b"]):
            embeddings = model.base_model.model.vision_encoder(images).last_hidden_state
        model.zero_grad()
        embeddings.square().sum().backward()
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if "talora_" in name}
        gradients.append({"embeddings": embeddings.detach(), **trained})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], plain, rtol=1e-8, atol=1e-8 * plain.abs().max().item(), msg=name
        )
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_msam(sam):
    tasks = {"depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
    msam = MSamForMultiTask.from_sam(sam.double(), tasks)
    model, images = get_peft_model(msam, TALoraConfig(r=2, init_weights=False)), pixels()
    with torch.no_grad():
        plain, lean = model(images).logits, lean_attention(model)(images).logits
    for name in tasks:
        torch.testing.assert_close(lean[name], plain[name], rtol=1e-8, atol=1e-8)


def test_compiles_to_one_graph(sam):
    module = lean_attention(attention(sam))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(compiled(hidden)[0], module(hidden)[0], rtol=0, atol=1e-12)


class TestReversible:
    def test_everything_else_stays(self, sam):
        model = tuned(sam.double())
        encoder, images = model.base_model.model.vision_encoder, pixels()
        kinds = [type(layer.attn) for layer in encoder.layers]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        seen = []
        encoder.layers[0].attn.register_forward_hook(lambda *_: seen.append(1))
        before = encoder(images).last_hidden_state
        assert lean_attention(model) is model
        assert all(isinstance(layer.attn, LeanSamVisionAttention) for layer in encoder.layers)
        lean_attention(model)  # twice is once
        lean = encoder(images).last_hidden_state
        lean_attention(model, enabled=False)
        assert [type(layer.attn) for layer in encoder.layers] == kinds
        assert torch.equal(encoder(images).last_hidden_state, before)
        assert not torch.equal(lean, before)  # other rounding: it was another way
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert len(seen) == 3

    def test_copies(self, sam):
        module = lean_attention(attention(sam))
        hidden = torch.randn(1, 8, 8, 16, dtype=torch.float64)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(copied) is type(module)
            assert torch.equal(copied(hidden)[0], module(hidden)[0])

    def test_saved_as_ever(self, sam, tmp_path):
        model = SamVisionModel(sam.config.vision_config).double()
        expected = encode(model, pixels(1) * 0 + 1)
        lean_attention(model).save_pretrained(tmp_path)
        loaded = SamVisionModel.from_pretrained(tmp_path, dtype=torch.float64)
        assert not any(isinstance(module, LeanSamVisionAttention) for module in loaded.modules())
        torch.testing.assert_close(encode(loaded, pixels(1) * 0 + 1), expected, rtol=0, atol=0)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"needs a model with SAM's vision encoder, got Linear"):
        lean_attention(nn.Linear(2, 2))
