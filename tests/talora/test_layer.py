"""The TA-LoRA layer against a plain reference and the authors' numbers."""

import copy
import json
import pickle

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from shared_folder import SHARED
from small_talora import FACTORS, factors_of, gradients, reference_delta, reference_forward, tuned_linear
from torch import nn

from peft_talora import TALoraConfig

FIXTURE = SHARED / "fixtures/talora_layer.safetensors"


@pytest.mark.parametrize("enabled", [None, [True, True, True], [True, False, True], [False, True, False]])
@pytest.mark.parametrize("shape", [(6, 10), (6, 5, 10), (6, 3, 4, 10)])
def test_values_and_gradients_match_the_formula(enabled, shape):
    model, layer = tuned_linear(enable_qkv=enabled)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *factors_of(layer)]
    cotangent = torch.randn(*shape[:-1], 12, dtype=torch.float64)
    outputs = []
    for request, tasks in [("b", [1] * 6), ([2, 0, 1, 1, 0, 2], [2, 0, 1, 1, 0, 2])]:
        with model.use_task(request):
            output = model(x)
        expected = reference_forward(layer, x, tasks, enabled)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        for got, want in zip(
            gradients(output, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        outputs.append(output)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3  # the tasks do differ


def test_every_sample_of_a_mixed_batch_is_expanded_over_its_windows():
    model, layer = tuned_linear()
    x = torch.randn(12, 5, 10, dtype=torch.float64)  # 3 samples of 4 windows each, batch-major
    tasks = [2, 0, 1]
    with model.use_task(tasks):
        output = model.base_model.model[0](x)
    expected = reference_forward(layer, x, [t for t in tasks for _ in range(4)])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_update_is_never_materialised(monkeypatch):
    model, layer = tuned_linear(in_features=64, out_features=96)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append((str(func), tuple(out.shape)))
            return out

    x = torch.randn(2, 5, 64, dtype=torch.float64)
    with Spy(), model.use_task([0, 1]):
        layer(x)
    views = ("aten.t.default", "aten.transpose", "aten.detach")
    built = [entry for entry in seen if set(entry[1][-2:]) == {64, 96} and not entry[0].startswith(views)]
    assert seen and not built


def test_autocast_does_not_round_the_orthogonality_term():
    # near the optimum little is left of U^T U once I is taken away
    _, layer = tuned_linear(256, 256, r_in=16, r_out=16, ortho_reg_weight=1.0)
    layer.float()
    for name in ("U1", "U2"):
        parameter = getattr(layer, f"talora_{name}")["default"]
        parameter.data = torch.linalg.qr(torch.randn(256, 16))[0] * 1.002
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            norms = layer.ortho_norms("default")
        gradients.append(torch.autograd.grad(norms.mean(), layer.talora_U2["default"])[0])
        assert norms.dtype == torch.float32
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def read_cases():
    with safe_open(FIXTURE, "pt") as file:
        return json.loads(file.metadata()["cases"])


@pytest.mark.skipif(not FIXTURE.exists(), reason="the authors' numbers (../shared/fixtures) are not here")
@pytest.mark.parametrize("case", ["qkv_3tasks", "qv_2tasks", "plain_1task"])
def test_reproduces_the_authors_numbers(case):
    spec = read_cases()[case]
    with safe_open(FIXTURE, "pt") as file:
        tensors = {k.removeprefix(f"{case}."): file.get_tensor(k) for k in file.keys() if k.startswith(f"{case}.")}  # noqa: SIM118
    enabled = spec["enabled_chunks"] if len(spec["enabled_chunks"]) == 3 else None
    model, layer = tuned_linear(
        spec["in_features"],
        spec["out_features"],
        tasks=[f"task{t}" for t in range(spec["tasks"])],
        r_in=spec["r_in"],
        r_out=spec["r_out"],
        r_task=spec["r_task"],
        scaling=spec["scaling"],
        enable_qkv=enabled,
    )
    layer.get_base_layer().weight.data, layer.get_base_layer().bias.data = tensors["weight"], tensors["bias"]
    for name in FACTORS:
        getattr(layer, f"talora_{name}")["default"].data = tensors[name]
    x, batch = tensors["x"].requires_grad_(), tensors["x"].shape[0]
    inputs = [x, *factors_of(layer)]

    for t in range(spec["tasks"]):
        model.set_task(t)
        for output in (model(x), model(x, task_ids=[t] * batch)):
            torch.testing.assert_close(output, tensors[f"task{t}.y"], rtol=0, atol=1e-9)
            for name, got in zip(("x", *FACTORS), gradients(output, tensors["grad_output"], inputs), strict=True):
                torch.testing.assert_close(got, tensors[f"task{t}.grad_{name}"], rtol=0, atol=1e-9)

    # mixed: every sample gives what it gives in the authors' batch of its task, and gradients add up sample by sample
    ids = torch.arange(batch) % spec["tasks"]
    output = model(x, task_ids=ids)
    expected = torch.stack([tensors[f"task{int(t)}.y"][b] for b, t in enumerate(ids)])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    got = gradients(output, tensors["grad_output"], inputs)
    expected_x = torch.stack([tensors[f"task{int(t)}.grad_x"][b] for b, t in enumerate(ids)])
    torch.testing.assert_close(got[0], expected_x, rtol=0, atol=1e-9)
    summed = [torch.zeros_like(factor) for factor in inputs[1:]]
    for b, t in enumerate(ids.tolist()):
        model.set_task(t)
        single = gradients(model(x[b : b + 1]), tensors["grad_output"][b : b + 1], inputs[1:])
        summed = [total + part for total, part in zip(summed, single, strict=True)]
    for total, mixed in zip(summed, got[1:], strict=True):
        torch.testing.assert_close(mixed, total, rtol=0, atol=1e-9)


def test_dropout_applies_to_the_adapter_alone():
    model, layer = tuned_linear(talora_dropout=0.5)
    x = torch.randn(3, 10, dtype=torch.float64)
    model.train()
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.get_base_layer()(x) + dropped @ reference_delta(layer, 0).T
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    model.eval()
    torch.testing.assert_close(model(x), reference_forward(layer, x, [0, 0, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_keeps_its_dtype_and_float32_factors(dtype):
    base = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    model = get_peft_model(base, TALoraConfig(tasks=["a", "b"], r=2, target_modules=["0"], init_weights=False))
    assert all(factor.dtype == torch.float32 for factor in factors_of(model.base_model.model[0]))
    x = torch.randn(2, 8, dtype=dtype)
    assert model(x).dtype == dtype and model(x, task_ids=[0, 1]).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(x)).all()
    model.merge_adapter(safe_merge=True)
    assert model(x).dtype == dtype


def test_disabled_adapter_is_the_base_model():
    model, layer = tuned_linear()
    x = torch.randn(2, 10, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.get_base_layer()(x))
        assert torch.equal(model(x, task_ids=[1, 2]), layer.get_base_layer()(x))
    assert not torch.allclose(model(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_route_on_their_own(duplicate):
    model, _ = tuned_linear()
    model.set_task("b")
    other = duplicate(model)
    assert other.active_task == "b"
    model.set_task("c")
    x = torch.randn(2, 10, dtype=torch.float64)
    assert other.active_task == "b" and not torch.allclose(model(x), other(x))
    other.set_task("c")
    torch.testing.assert_close(model(x), other(x))
