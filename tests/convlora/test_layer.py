"""The Conv-LoRA layer against a plain reference and the authors' numbers."""

import copy
import json
import pickle

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from shared_folder import SHARED
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_talora import ConvLoraConfig, auxiliary_loss, checkpoint_context, expert_usage

FIXTURE = SHARED / "fixtures/convlora_layer.safetensors"
PARAMETERS = ("A", "B", "expert_weight", "expert_bias", "gate", "noise")


def tuned_linear(in_features=10, out_features=12, dtype=torch.float64, **config):
    """A tuned linear layer with nothing zero; (PeftModel, its ConvLoraLinear)."""
    base = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    config = ConvLoraConfig(target_modules=["0"], **{"init_weights": False, **config})
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model, model.base_model.model[0]


def parameters_of(layer, adapter="default"):
    return [getattr(layer, f"convlora_{name}")[adapter] for name in PARAMETERS]


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def reference_update(layer, x, plain_experts, adapter="default"):
    """The update in eval for one grid per sample (B, H, W, d), as the formula stands in the paper."""
    A, B, weight, bias, gate, _ = parameters_of(layer, adapter)
    z = x @ A.T
    index = (z.mean((1, 2)) @ gate).argmax(1)
    return layer.scaling[adapter] * (z + plain_experts(z, index, weight, bias)) @ B.T


class TestAuthorsNumbers:
    def read(self, case):
        with safe_open(FIXTURE, "pt") as file:
            spec = json.loads(file.metadata()["cases"])[case]
            names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
            return spec, {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}

    @pytest.mark.skipif(not FIXTURE.exists(), reason="the authors' numbers (../shared/fixtures) are not here")
    @pytest.mark.parametrize("case", ["window_eval", "window_train", "rect_eval"])
    def test_reproduced(self, case, monkeypatch):
        spec, tensors = self.read(case)
        model, layer = tuned_linear(
            spec["in_features"],
            spec["out_features"],
            r=spec["r"],
            convlora_alpha=spec["alpha"],
            num_experts=spec["num_experts"],
        )
        layer.get_base_layer().weight.data, layer.get_base_layer().bias.data = tensors["weight"], tensors["bias"]
        theirs = ("A", "B", "expert_weight", "expert_bias", "w_gate", "w_noise")
        for parameter, name in zip(parameters_of(layer), theirs, strict=True):
            assert parameter.shape == tensors[name].shape
            parameter.data = tensors[name]
        monkeypatch.setattr(torch, "randn_like", lambda clean: tensors["noise"])
        x = tensors["x"].requires_grad_()
        model.train(spec["training"])

        output = model(x)
        torch.testing.assert_close(output, tensors["y"], rtol=0, atol=1e-9)
        index, _ = layer.last_forward.choices["default"]
        assert torch.equal(index, tensors["expert_index"])
        assert torch.equal(nn.functional.one_hot(index, spec["num_experts"]).double(), tensors["gates"])
        loss = auxiliary_loss(model)
        torch.testing.assert_close(loss, tensors["aux_loss"], rtol=0, atol=1e-9)
        ((output * tensors["grad_output"]).sum() + loss).backward()
        for parameter, name in zip([x, *parameters_of(layer)], ("x", *theirs), strict=True):
            if f"grad_{name}" in tensors:
                torch.testing.assert_close(parameter.grad, tensors[f"grad_{name}"], rtol=0, atol=1e-9)


class TestValues:
    @pytest.mark.parametrize("size", [(14, 14), (9, 13), (20, 18)])
    def test_match_the_plain_form(self, size, plain_experts):
        model, layer = tuned_linear()
        model.eval()
        x = tokens(9, *size, 10)
        output = model(x)
        expected = layer.get_base_layer()(x) + reference_update(layer, x, plain_experts)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
        assert len(layer.last_forward.choices["default"][0].unique()) > 2
        cotangent = torch.randn_like(output)
        inputs = [x, *parameters_of(layer)[:4]]
        for got, want in zip(
            torch.autograd.grad(output, inputs, cotangent),
            torch.autograd.grad(expected, inputs, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-8)

    def test_leading_dimensions_are_samples(self):
        model, _ = tuned_linear()
        model.eval()
        x = tokens(2, 3, 5, 6, 10)
        torch.testing.assert_close(model(x), model(x.flatten(0, 1)).unflatten(0, (2, 3)), rtol=0, atol=1e-12)

    def test_start_is_the_base_model(self):
        model, layer = tuned_linear(init_weights=True)
        x = tokens(3, 4, 4, 10)
        assert torch.equal(model(x), layer.get_base_layer()(x))
        A, B, weight, bias, gate, noise = parameters_of(layer)
        assert not any(p.any() for p in (B, bias, gate, noise))
        assert A.abs().max() <= 10**-0.5 and A.std() > 0.1
        assert weight.abs().max() <= 27**-0.5 and weight.std() > 0.09  # that of nn.Conv2d(3, 3, 3)

    def test_nothing_is_zero_without_init(self):
        assert all(p.abs().min() > 0 for p in parameters_of(tuned_linear()[1]))

    def test_dropout_applies_to_the_adapter_alone(self, plain_experts):
        model, layer = tuned_linear(convlora_dropout=0.5, noisy_gating=False)
        x = tokens(3, 4, 4, 10)
        torch.manual_seed(3)
        output = model.train()(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
        expected = layer.get_base_layer()(x) + reference_update(layer, dropped, plain_experts)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)

    def test_noise_is_drawn_once_and_only_in_noisy_training(self, monkeypatch):
        drawn, randn_like = [], torch.randn_like

        def record(tensor):
            drawn.append(tuple(tensor.shape))
            return randn_like(tensor)

        monkeypatch.setattr(torch, "randn_like", record)
        model, _ = tuned_linear(num_experts=5)
        x = tokens(7, 4, 4, 10)
        model.eval()(x)
        assert drawn == []
        model.train()(x)
        assert drawn == [(7, 5)]
        model, _ = tuned_linear(noisy_gating=False)
        model.train()(x)
        assert len(drawn) == 1


class TestTokenSequences:
    def test_square_grid_and_prefix(self):
        model, layer = tuned_linear(num_prefix_tokens=2)
        model.eval()
        x = tokens(4, 2 + 25, 10)
        output = model(x)
        grid = x[:, 2:].unflatten(1, (5, 5))
        torch.testing.assert_close(output[:, 2:], model(grid).flatten(1, 2), rtol=0, atol=1e-12)
        A, B, *_ = parameters_of(layer)
        expected = layer.get_base_layer()(x[:, :2]) + layer.scaling["default"] * x[:, :2] @ A.T @ B.T
        torch.testing.assert_close(output[:, :2], expected, rtol=0, atol=1e-9)

    def test_grid_size(self):
        model, _ = tuned_linear(grid_size=(3, 7), num_prefix_tokens=1)
        model.eval()
        x = tokens(4, 22, 10)
        expected = model(x[:, 1:].unflatten(1, (3, 7))).flatten(1, 2)
        torch.testing.assert_close(model(x)[:, 1:], expected, rtol=0, atol=1e-12)

    def test_prefix_tokens_do_not_route(self):
        model, layer = tuned_linear(num_prefix_tokens=1)
        model.eval()
        x = tokens(6, 17, 10)
        first = model(x)
        index = layer.last_forward.choices["default"][0]
        with torch.no_grad():
            x[:, 0] += 100
        torch.testing.assert_close(model(x)[:, 1:], first[:, 1:], rtol=0, atol=1e-12)
        assert torch.equal(layer.last_forward.choices["default"][0], index)

    @pytest.mark.parametrize(
        ("config", "shape", "message"),
        [
            ({}, (10,), r"expected an input \(\.\.\., H, W, 10\) or \(B, N, 10\), got \(10,\)"),
            ({}, (5, 10), r"got \(5, 10\)\. Layers without a grid can be left out with exclude_modules"),
            ({}, (2, 12, 10), r"\(2, 12, 10\) has 12 tokens, 0 of them prefix.*other 12 are no square grid"),
            ({}, (2, 17, 10), r"no square grid \(num_prefix_tokens=0\)\. Set grid_size"),
            ({"num_prefix_tokens": 1}, (2, 16, 10), "other 15 are no square grid"),
            ({"num_prefix_tokens": 9}, (2, 9, 10), "other 0 are no square grid"),
            ({"num_prefix_tokens": 9}, (2, 4, 10), "other -5 are no square grid"),
            ({"grid_size": (3, 4)}, (2, 16, 10), r"other 16 are no grid \(grid_size=\(3, 4\), num_prefix_tokens=0\)"),
            ({"grid_size": [3, 4], "num_prefix_tokens": 1}, (2, 12, 10), r"other 11 are no grid \(grid_size=\(3, 4\)"),
        ],
    )
    def test_no_grid(self, config, shape, message):
        model, _ = tuned_linear(**config)
        with pytest.raises(ValueError, match=message):
            model(torch.randn(shape, dtype=torch.float64))


class TestGraph:
    @pytest.mark.parametrize("noisy_gating", [True, False])
    @pytest.mark.parametrize("num_experts", [8, 1])
    @pytest.mark.parametrize("train", [True, False])
    def test_every_parameter_is_in_every_forward(self, train, num_experts, noisy_gating):
        model, layer = tuned_linear(num_experts=num_experts, noisy_gating=noisy_gating)
        model.train(train)
        model(tokens(2, 4, 4, 10)).sum().backward()
        grads = dict(zip(PARAMETERS, (p.grad for p in parameters_of(layer)), strict=True))
        assert all(grad is not None for grad in grads.values())
        for name in ("gate", "noise"):
            assert grads[name].shape == (3, num_experts) and not grads[name].any()
        assert all(grads[name].any() for name in ("A", "B", "expert_weight", "expert_bias"))

    def test_balancing_loss_trains_the_gate(self):
        model, layer = tuned_linear()
        model.train()
        model(tokens(6, 4, 4, 10))
        auxiliary_loss(model).backward()
        *_, gate, noise = parameters_of(layer)
        assert gate.grad.abs().max() > 0 and noise.grad.abs().max() > 0

    def test_gate_gradient(self, plain_experts):
        x = tokens(6, 4, 4, 10)
        published, _ = tuned_linear()
        model, layer = tuned_linear(gate_gradient=True)
        model.load_state_dict(published.state_dict())
        model.eval()
        published.eval()
        output = model(x)
        assert torch.equal(output, published(x))
        cotangent = torch.randn_like(output)
        output.backward(cotangent)
        A, B, weight, bias, gate, _ = (p.detach() for p in parameters_of(layer))
        z = x.detach() @ A.T
        features = z.mean((1, 2))
        gate = gate.clone().requires_grad_()
        probabilities = (features @ gate).softmax(1)
        chosen, index = probabilities.max(1)
        expert = plain_experts(z, index, weight, bias)
        effect = (layer.scaling["default"] * expert @ B.T * cotangent).sum((1, 2, 3))
        (effect * chosen / chosen.detach()).sum().backward()
        assert gate.grad.abs().max() > 1e-3
        torch.testing.assert_close(parameters_of(layer)[4].grad, gate.grad, rtol=0, atol=1e-9)


class TestMerge:
    MESSAGE = "cannot be merged: its update goes through a GELU.*call unload()"

    def test_every_way_says_why(self):
        model, layer = tuned_linear()
        x = tokens(2, 4, 4, 10)
        model.eval()
        before = model(x)
        for call in (layer.merge, model.merge_adapter, model.merge_and_unload, model.base_model.merge_and_unload):
            with pytest.raises(NotImplementedError, match=self.MESSAGE):
                call()
        with pytest.raises(NotImplementedError, match=self.MESSAGE):
            layer.merge(safe_merge=True, adapter_names=["default"])
        assert torch.equal(model(x), before) and not layer.merged

    def test_unmerge_does_nothing(self):
        model, _ = tuned_linear()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    def test_unload(self):
        model, layer = tuned_linear()
        linear = layer.get_base_layer()
        base = model.unload()
        assert base[0] is linear and not base._forward_pre_hooks


class TestPrecision:
    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("upcast", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, upcast, train):
        base = nn.Sequential(nn.Linear(8, 6)).to(dtype)
        config = ConvLoraConfig(target_modules=["0"], init_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=upcast).train(train)
        layer = model.base_model.model[0]
        assert all(p.dtype == (torch.float32 if upcast else dtype) for p in parameters_of(layer))
        x = tokens(12, 6, 7, 8, dtype=dtype)
        output = model(x)
        assert output.dtype == dtype and output.isfinite().all()
        (output.float().mean() + auxiliary_loss(model)).backward()
        assert auxiliary_loss(model).dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in (x, *parameters_of(layer)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_gate_s_mean_is_not_rounded(self, dtype):
        model, layer = tuned_linear(dtype=dtype, num_experts=4)
        A, *_, gate, _ = parameters_of(layer)
        x = tokens(20000, 2, 3, 10, dtype=dtype)
        model.eval()(x)
        z = torch.nn.functional.linear(x, A)
        index = (z.float().mean((1, 2)) @ gate.float()).argmax(1)
        assert torch.equal(layer.last_forward.choices["default"][0], index)
        # a mean of the tokens' own type would choose other experts
        assert not torch.equal((z.mean((1, 2)).float() @ gate.float()).argmax(1), index)

    def test_large_tokens_in_half_precision(self):
        # the released code goes through exp, which overflows in half precision beyond 11
        model, _ = tuned_linear(dtype=torch.float16, init_weights=True)
        x = (100 * torch.randn(2, 4, 4, 10)).half()
        assert model(x).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("train", [True, False])
    def test_autocast(self, train, dtype):
        model, layer = tuned_linear(dtype=torch.float32)
        x = tokens(12, 6, 7, 10, dtype=torch.float32)
        model.train(train)
        with torch.autocast("cpu", dtype=dtype):
            output = model(x)
        assert output.dtype == dtype and output.isfinite().all()
        assert layer.auxiliary_values("default").dtype == torch.float32
        (output.float().mean() + auxiliary_loss(model)).backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in parameters_of(layer))
        if not train:
            torch.testing.assert_close(output.float(), model(x), rtol=0.1, atol=3.0)


class TestLastForward:
    def test_usage(self):
        model, layer = tuned_linear()
        assert expert_usage(model) == {}
        with pytest.raises(ValueError, match=r"no Conv-LoRA adapter 'defualt', the known ones are \['default'\]"):
            expert_usage(model, "defualt")
        model.eval()
        model(tokens(20, 4, 4, 10))
        usage = expert_usage(model)
        assert list(usage) == ["base_model.model.0"]
        counts = usage["base_model.model.0"]
        index = layer.last_forward.choices["default"][0]
        assert counts.tolist() == [(index == e).sum().item() for e in range(8)] and counts.sum() == 20

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_is_not_copied(self, duplicate):
        model, _ = tuned_linear()
        model.train()
        x = tokens(6, 4, 4, 10)
        model(x)
        names = set(model.state_dict())
        other = duplicate(model)
        assert auxiliary_loss(model) > 0 and auxiliary_loss(other) == 0 and expert_usage(other) == {}
        other.eval()(x)
        assert expert_usage(other) != {} and set(model.state_dict()) == names

    def test_a_hand_written_checkpoint_does_not_count_twice(self):
        model, layer = tuned_linear()
        model.train()
        x = tokens(6, 4, 4, 10)
        for options in ({}, {"context_fn": checkpoint_context}):
            output = checkpoint(layer, x, use_reentrant=False, **options)
            kept = layer.last_forward.choices
            loss = auxiliary_loss(model)
            (output.sum() + loss).backward()
            assert layer.last_forward.choices is kept and auxiliary_loss(model) is not loss
            assert auxiliary_loss(model).item() == loss.item()


class TestCompile:
    def check(self, backend, size=(14, 14)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        model, layer = tuned_linear()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        model.eval()
        for seed in range(3):
            torch.manual_seed(seed)
            x = tokens(5, *size, 10)
            expected = layer(x)
            kept = layer.last_forward.choices["default"]
            output = compiled(x)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
            assert torch.equal(layer.last_forward.choices["default"][0], kept[0])  # the usage, too
            assert layer.last_forward.choices["default"][0] is not kept[0]
            inputs, cotangent = [x, *parameters_of(layer)], torch.randn_like(output)
            got = torch.autograd.grad(output, inputs, cotangent)
            want = torch.autograd.grad(expected, inputs, cotangent)
            for mine, reference in zip(got, want, strict=True):
                torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)
        assert counter.frame_count == 1
        model.train()
        for _ in range(2):
            output = compiled(tokens(5, *size, 10))
            loss = auxiliary_loss(model)
            (output.sum() + loss).backward()
            assert loss.isfinite() and layer.convlora_gate["default"].grad.abs().max() > 0
        assert counter.frame_count == 2  # training is another graph

    def test_once_for_all_routings(self):
        self.check("aot_eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [(14, 14), (20, 33)])
    def test_inductor(self, size):
        self.check("inductor", size)
