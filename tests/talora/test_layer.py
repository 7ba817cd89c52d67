"""The TA-LoRA layer against a plain reference and the authors' numbers."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from peft_talora import TALoraConfig

FIXTURE = Path(__file__).parents[3] / "shared/fixtures/talora_layer.safetensors"
FACTORS = ("G", "U1", "U2", "U3")


def tuned_linear(in_features=10, out_features=12, tasks=("a", "b", "c"), bias=True, **config):
    """A tuned linear layer in float64 with nothing zero; (PeftModel, its TALoraLinear)."""
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).double()
    arguments = {"r_in": 4, "r_out": 3, "r_task": 2, "init_weights": False, **config}
    config = TALoraConfig(tasks=list(tasks), target_modules=["0"], **arguments)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model, model.base_model.model[0]


def factors_of(layer, adapter="default"):
    return [getattr(layer, f"talora_{name}")[adapter] for name in FACTORS]


def reference_delta(layer, task, enabled=None):
    """dW_t entry by entry, as the formula stands in the paper."""
    G, U1, U2, U3 = factors_of(layer)
    delta = torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[task]) * layer.scaling["default"]
    if enabled is None:
        return delta
    third, parts = layer.out_features // 3, []
    rows = iter(delta.split(third))
    for on in enabled:
        parts.append(next(rows) if on else delta.new_zeros(third, delta.shape[1]))
    return torch.cat(parts)


def reference_forward(layer, x, tasks, enabled=None):
    """One sample at a time, with dW_t built in full; x (rows, ..., d), one task per row."""
    base = layer.get_base_layer()
    rows = [
        nn.functional.linear(row, base.weight + reference_delta(layer, task, enabled), base.bias)
        for row, task in zip(x, tasks, strict=True)
    ]
    return torch.stack(rows)


def gradients(output, cotangent, inputs):
    return torch.autograd.grad(output, inputs, cotangent)


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


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [False, True])
    @pytest.mark.parametrize("enabled", [None, [True, False, True]])
    def test_merge_gives_the_active_task_and_unmerge_the_base(self, safe_merge, enabled):
        model, layer = tuned_linear(enable_qkv=enabled)
        x = torch.randn(4, 10, dtype=torch.float64)
        before = layer.get_base_layer().weight.clone()
        for task in ("c", "a"):
            model.set_task(task)
            expected = model(x)
            model.merge_adapter(safe_merge=safe_merge)
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
            model.unmerge_adapter()
            torch.testing.assert_close(layer.get_base_layer().weight, before, rtol=0, atol=1e-14)

    def test_another_task_while_merged_raises(self):
        model, _ = tuned_linear()
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("b")
        model.merge_adapter()
        model(x, task_ids=["b", "b"])
        with pytest.raises(ValueError, match=r"merged for the task 'b'.*'c'"):
            model(x, task_ids=["b", "c"])
        model.set_task("a")
        with pytest.raises(ValueError, match=r"merged for the task 'b'.*'a'"):
            model(x)
        # unmerging takes out what was merged, whatever task is active now
        model.unmerge_adapter()
        model.set_task("b")
        model(x)

    def test_safe_merge_refuses_nan_and_leaves_the_weight(self):
        model, layer = tuned_linear()
        before = layer.get_base_layer().weight.clone()
        layer.talora_G["default"].data[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_safe_merge_leaves_the_layers_before_the_broken_one(self, merge):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
        config = TALoraConfig(tasks=["a", "b"], r=2, target_modules=["0", "1", "2"], init_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        x = torch.randn(2, 4, dtype=torch.float64)
        before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
        expected = model(x)
        model.base_model.model[2].talora_U3["default"].data[0, 0] = float("inf")
        with pytest.raises(ValueError, match="NaNs detected"):
            getattr(model, merge)(safe_merge=True)
        assert [name for name, _ in model.named_modules()] == names
        model.base_model.model[2].talora_U3["default"].data[0, 0] = before["base_model.model.2.talora_U3.default"][
            0, 0
        ]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), expected)
        model.set_task("b")  # nothing is merged
        model(x)

    def test_merge_and_unload_returns_plain_linear(self):
        model, _ = tuned_linear()
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("b")
        expected = model(x)
        merged = model.merge_and_unload()
        assert type(merged[0]) is nn.Linear and not merged._forward_pre_hooks
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-12)

    def test_several_adapters_are_added_and_merged_together(self):
        model, layer = tuned_linear()
        config = TALoraConfig(tasks=["b", "c"], target_modules=["0"], r=2, init_weights=False)
        model.add_adapter("second", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "second"])
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("c")
        assert model.active_task == {"default": "c", "second": "c"}
        delta = layer.get_delta_weight("default", 2) + layer.get_delta_weight("second", 1)
        expected = layer.get_base_layer()(x) + x @ delta.T
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        model.unmerge_adapter()
        # "a" is no task of "second": that is an error, not a silent other task
        with model.use_task("a"), pytest.raises(ValueError, match="adapter 'second'"):
            model(x)


class TestInit:
    @pytest.mark.parametrize("init_weights", [True, "orthogonal", "normalized"])
    def test_starts_as_the_base_model_and_trains(self, init_weights):
        model, layer = tuned_linear(init_weights=init_weights)
        x = torch.randn(5, 10, dtype=torch.float64)
        assert torch.equal(model(x), layer.get_base_layer()(x))
        model(x).sum().backward()
        G, *others = factors_of(layer)
        assert G.grad.abs().max() > 0 and not G.any() and all(u.abs().min() > 0 for u in others)

    def test_lora_start_is_a_shared_lora_whose_first_step_moves_all_outputs(self):
        model, layer = tuned_linear(in_features=40, init_weights="lora", r_in=4, r_out=3)
        G, U1, U2, U3 = factors_of(layer)
        x = torch.randn(5, 40, dtype=torch.float64)
        assert not U2.any() and torch.equal(model(x), layer.get_base_layer()(x))
        assert U1.abs().max() <= 40**-0.5 and U1.std() > 0.4 * 40**-0.5
        for task in range(3):
            torch.testing.assert_close(layer._core("default", task) / 0.5, torch.eye(4, 3, dtype=torch.float64))
        model(x).sin().sum().backward()
        assert torch.linalg.matrix_rank(U2.grad) == 3 and not G.grad.any() and not U1.grad.any()
        # one step on, the slices of G and the rows of U3 get different gradients: the tasks can part
        with torch.no_grad():
            U2.sub_(0.1 * U2.grad)
        model.zero_grad()
        model(x).sin().sum().backward()
        assert (G.grad[:, :, 0] - G.grad[:, :, 1]).abs().max() > 1e-6 and U3.grad[0].any() and not U3.grad[1].any()

    def test_split_start_deals_the_ranks_out_to_the_tasks(self):
        model, layer = tuned_linear(in_features=40, init_weights="split", r_in=8, r_out=7, r_task=4)
        G, U1, U2, U3 = factors_of(layer)
        x = torch.randn(6, 40, dtype=torch.float64)
        assert not U2.any() and torch.equal(model(x), layer.get_base_layer()(x))
        assert U1.abs().max() <= 40**-0.5 and U1.std() > 0.4 * 40**-0.5
        for task, own in enumerate([(0, 3, 6), (1, 4), (2, 5)]):
            expected = torch.zeros(8, 7, dtype=torch.float64)
            for rank in own:
                expected[rank, rank] = 0.5
            assert torch.equal(layer._core("default", task), expected)
        with model.base_model.use_task([1, 1, 1, 1, 1, 1]):
            model(x).sin().sum().backward()
        # a task moves its own ranks alone
        assert [bool(column.any()) for column in U2.grad.T] == [rank % 3 == 1 for rank in range(7)]
        with torch.no_grad():
            U2.sub_(0.1 * U2.grad)
        model.zero_grad()
        with model.base_model.use_task([0, 1, 2, 0, 1, 2]):
            model(x).sin().sum().backward()
        # nothing is dead: the slice that is left over, and what couples the tasks, get gradients
        assert G.grad[:, :, 3].any() and G.grad[0, 1].any() and U3.grad[1].any() and U1.grad[:, 1].any()

    @pytest.mark.parametrize(
        ("tasks", "ranks", "slices", "shares"), [(5, 4, 3, 3), (5, 2, 8, 2), (2, 6, 1, 1), (1, 4, 4, 1), (7, 8, 7, 7)]
    )
    def test_split_start_of_any_shape(self, tasks, ranks, slices, shares):
        names = [f"t{index}" for index in range(tasks)]
        _, layer = tuned_linear(tasks=names, init_weights="split", r_in=ranks, r_out=ranks, r_task=slices)
        cores = [layer._core("default", task) / 0.5 for task in range(tasks)]
        for task, core in enumerate(cores):
            assert core.any() and torch.equal(core, cores[task % shares])
        # together they hold every rank once
        assert torch.equal(sum(cores[:shares]), torch.eye(ranks, dtype=torch.float64))

    def test_published_start_is_standard_normal(self):
        _, layer = tuned_linear(200, 210, tasks=[f"t{i}" for i in range(100)], r=64, r_in=None, r_out=None, r_task=50,
                                init_weights=True)  # fmt: skip
        for factor in factors_of(layer)[1:]:
            assert abs(factor.std().item() - 1) < 0.05 and abs(factor.mean().item()) < 0.05

    def test_orthogonal_start(self):
        _, layer = tuned_linear(init_weights="orthogonal")
        for factor in (layer.talora_U1["default"], layer.talora_U2["default"]):
            gram = factor.T @ factor
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-6)

    def test_first_step_of_the_normalized_start_moves_the_weight_as_lora_does(self):
        from peft import LoraConfig

        rank, d, k = 16, 256, 384
        moved = {}
        for name, config in {
            "lora": LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=["0"]),
            "talora": TALoraConfig(tasks=["a", "b", "c"], r=rank, init_weights="normalized", target_modules=["0"]),
        }.items():
            model = get_peft_model(nn.Sequential(nn.Linear(d, k)), config)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            before = model.base_model.model[0].get_delta_weight("default").clone()
            (model(torch.randn(64, d)) * torch.randn(64, k)).sum().backward()
            optimizer.step()
            moved[name] = (model.base_model.model[0].get_delta_weight("default") - before).std().item()
        assert 0.5 < moved["talora"] / moved["lora"] < 2.0

    def test_nothing_is_zero_without_init(self):
        _, layer = tuned_linear(init_weights=False)
        assert all(factor.abs().min() > 0 for factor in factors_of(layer))


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
