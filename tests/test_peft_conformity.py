"""What PEFT expects of every tuner holds for both of ours, on a model that knows nothing of them."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_base_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from process_groups import in_a_process_group
from safetensors.torch import load_file
from small_models import differ
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_talora import ConvLoraConfig, TALoraConfig, auxiliary_loss

TUNERS = {
    "talora": lambda **changes: TALoraConfig(**{"tasks": ["a", "b"], "r": 3, **changes}),
    "convlora": lambda **changes: ConvLoraConfig(**{"num_experts": 3, **changes}),
}


class Net(nn.Module):
    """Two linear layers over a grid of 2 x 2 tokens, (B, 4, 10) -> (B, 4, 5)."""

    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 12, bias=bias)
        self.act = nn.Tanh()
        self.lin1 = nn.Linear(12, 5, bias=bias)

    def forward(self, x):
        return self.lin1(self.act(self.lin0(x)))


def make_net(dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net(**options).to(dtype).eval()


def tokens(dtype=torch.float64):
    return torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.fixture(params=sorted(TUNERS))
def tuner(request):
    """The tuner's name; `make_config` follows it."""
    return request.param


@pytest.fixture
def make_config(tuner):
    def make(**changes):
        return TUNERS[tuner](**{"target_modules": ["lin0"], "init_weights": False, **changes})

    return make


@pytest.fixture
def tuned(make_config):
    def make(adapter_name="default", **changes):
        return get_peft_model(make_net(), make_config(**changes), adapter_name).eval()

    return make


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def output(model, **kwargs):
    return model(tokens(), **kwargs)


def assert_same(first, second, atol=1e-12):
    torch.testing.assert_close(first, second, rtol=0, atol=atol)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestLayer:
    def test_it_is_a_layer_of_its_base(self, tuner, tuned):
        model = tuned("some-adapter")
        (layer,) = layers_of(model)
        base = model.base_model.model.lin0.base_layer
        assert (layer.in_features, layer.out_features) == (10, 12)
        assert layer.weight is base.weight and layer.bias is base.bias
        assert model.prefix == f"{tuner}_" and all(name.startswith(f"{tuner}_") for name in layer.adapter_layer_names)
        adapter = {name for name, _ in model.named_parameters() if model.prefix in name}
        assert adapter == {f"base_model.model.lin0.{name}.some-adapter" for name in layer.adapter_layer_names}
        assert model.active_adapters == ["some-adapter"] and model.get_layer_status()[0].available_adapters == [
            "some-adapter"
        ]

    def test_a_fresh_adapter_changes_nothing(self, tuned):
        assert_same(output(tuned(init_weights=True, target_modules=["lin0", "lin1"])), output(make_net()))

    def test_layers_without_a_bias(self, make_config):
        base = make_net(bias=False)
        before = output(base)
        model = get_peft_model(base, make_config(target_modules=["lin0", "lin1"])).eval()
        assert differ(output(model), before) and layers_of(model)[0].bias is None
        assert_same(output(model.unload()), before)


class TestFiles:
    def test_names_that_contain_each_other(self, make_config, tuned, tmp_path):
        names = ["adapter", "adapt", "pt", "my-adapter"]
        model = tuned(names[0], modules_to_save=["lin1"])
        expected = {}
        for name in names:
            if name not in model.peft_config:
                model.add_adapter(name, make_config(modules_to_save=["lin1"]))
            model.set_adapter(name)
            with torch.no_grad():
                model.base_model.model.lin1.modules_to_save[name].weight.normal_()
            expected[name] = output(model)
        model.save_pretrained(tmp_path)
        for name in names:
            state = load_file(tmp_path / name / "adapter_model.safetensors")
            assert {key.rsplit(".", 1)[1] for key in state} == {
                *layers_of(model)[0].adapter_layer_names,
                "weight",
                "bias",
            }
            assert_same(output(PeftModel.from_pretrained(make_net(), tmp_path / name)), expected[name])
            assert all(differ(expected[name], expected[other]) for other in names if other != name)

    def test_selected_adapters(self, make_config, tuned, tmp_path):
        model = tuned("first")
        model.add_adapter("second", make_config())
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]
        with pytest.raises(ValueError, match="third"):
            model.save_pretrained(tmp_path, selected_adapters=["third"])

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loaded_beside_another(self, make_config, tuned, tmp_path, low_cpu_mem_usage):
        model = tuned()
        model.add_adapter("other", make_config(r=2))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(tmp_path / "other", "second", low_cpu_mem_usage=low_cpu_mem_usage)
        assert all(parameter.device.type == "cpu" for parameter in loaded.parameters()) and not trainable(loaded)
        for mine, theirs in (("default", "default"), ("second", "other")):
            loaded.set_adapter(mine, inference_mode=True)
            model.set_adapter(theirs)
            assert_same(output(loaded), output(model))
        assert not trainable(loaded)

    def test_loaded_for_training(self, tuner, tuned, tmp_path):
        tuned(modules_to_save=["lin1"]).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_net(), tmp_path, is_trainable=True)
        assert trainable(model) == {
            name for name, _ in model.named_parameters() if f"{tuner}_" in name or "modules_to_save" in name
        }

    def test_injected_without_memory_and_filled(self, tuner, make_config, tuned):
        model = tuned()
        injected = inject_adapter_in_model(make_config(), make_net(), low_cpu_mem_usage=True)
        assert {p.device.type for n, p in injected.named_parameters() if f"{tuner}_" in n} == {"meta"}
        state = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(model).items()}
        result = set_peft_model_state_dict(injected, state, low_cpu_mem_usage=True)
        assert result.unexpected_keys == []
        assert_same(output(injected.eval()), output(model))

    def test_state_of_the_base_model(self, tuned):
        expected = make_net().state_dict()
        found = get_base_model_state_dict(tuned(modules_to_save=["lin1"]))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)

    @in_a_process_group
    def test_names_wrapped_by_fsdp(self, make_config):
        model = get_peft_model(make_net(), make_config(modules_to_save=["lin1"])).eval()
        expected = output(model)
        plain = get_peft_model_state_dict(model)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        state = get_peft_model_state_dict(wrapped)
        assert state.keys() == plain.keys()
        other = get_peft_model(make_net(), make_config(modules_to_save=["lin1"])).eval()
        set_peft_model_state_dict(other, state)
        assert_same(output(other), expected)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_adapter_and_output(self, make_config, tmp_path, dtype, autocast_adapter_dtype):
        options = {"autocast_adapter_dtype": autocast_adapter_dtype}
        model = get_peft_model(make_net(dtype), make_config(init_weights=True), **options)
        model.add_adapter("other", make_config(init_weights=True), **options)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_net(dtype), tmp_path, **options)
        loaded.load_adapter(tmp_path / "other", "other", **options)
        x, expected = tokens(dtype), torch.float32 if autocast_adapter_dtype else dtype
        for peft_model in (model.eval(), loaded):
            assert {p.dtype for n, p in peft_model.named_parameters() if peft_model.prefix in n} == {expected}
            with torch.no_grad():
                found = peft_model(x)
                assert found.dtype == dtype
                # the update of a fresh adapter is zero in every data type
                torch.testing.assert_close(found, make_net(dtype)(x))

    def test_under_autocast(self, make_config):
        x = tokens(torch.float32)
        model = get_peft_model(make_net(torch.float32), make_config(init_weights=False)).eval()
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(x)
        assert found.dtype == torch.bfloat16 and (found - expected).abs().mean() < 0.05 * expected.abs().mean()


class TestTraining:
    def test_only_the_adapter_and_what_is_saved_change(self, tuner, make_config):
        model = get_peft_model(make_net(), make_config(target_modules=["lin0"], modules_to_save=["lin1"])).train()
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (model(tokens()).square().mean() + auxiliary_loss(model)).backward()
            optimizer.step()
        for name, value in model.state_dict().items():
            is_trained = f".{tuner}_" in name or "modules_to_save" in name
            assert is_trained is not torch.equal(value, before[name]), name


class TestDisabling:
    def test_is_the_base_model_also_when_nested(self, tuned):
        model, before = tuned(target_modules=["lin0", "lin1"]), output(make_net())
        assert differ(output(model), before) and model.has_active_enabled_adapter
        with model.disable_adapter():
            with model.disable_adapter():
                assert_same(output(model), before)
            assert_same(output(model), before)
            assert not model.has_active_enabled_adapter
        assert differ(output(model), before)
        model.disable_adapter_layers()
        with model.disable_adapter():
            pass
        assert_same(output(model), before)

    def test_some_layers_only(self, tuned):
        model = tuned(target_modules=["lin0", "lin1"])
        layers_of(model)[0].enable_adapters(False)
        with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
            assert_same(output(model), output(make_net()))
        assert not any(layer.disable_adapters for layer in layers_of(model))

    def test_modules_to_save_too(self, tuned):
        model = tuned(modules_to_save=["lin1"])
        with torch.no_grad():
            model.base_model.model.lin1.modules_to_save["default"].bias.fill_(9.0)
        with model.disable_adapter():
            assert_same(output(model), output(make_net()))
        assert differ(output(model), output(make_net()))


class TestSeveralAdapters:
    def three(self, tuned, make_config):
        model = tuned("one")
        for name in ("two", "three"):
            model.add_adapter(name, make_config(target_modules=["lin0", "lin1"]))
        # PEFT makes new layers in training mode
        return model.eval()

    def test_deleted_one_after_the_other(self, tuned, make_config):
        model = self.three(tuned, make_config)
        model.set_adapter("two")
        expected = output(model)
        model.delete_adapter("three")
        assert model.active_adapters == ["two"]
        assert_same(output(model), expected)
        with pytest.raises(ValueError, match="Adapter unknown does not exist"):
            model.delete_adapter("unknown")
        model.delete_adapter("two")
        assert model.active_adapters == ["one"] and set(model.peft_config) == {"one"}
        model.delete_adapter("one")
        assert_same(output(model.base_model.model), output(make_net()))

    def test_nothing_of_a_deleted_one_stays(self, tuned):
        model = tuned("gone")
        holders = [model, *layers_of(model)]
        found = [
            (type(holder).__name__, name, value)
            for holder in holders
            for name in dir(holder)
            if not name.startswith("_") and "gone" in keys_of(value := getattr(holder, name, None))
        ]
        assert len(found) > 6
        router = getattr(model.base_model, "task_router", None)
        model.delete_adapter("gone")
        assert [(kind, name) for kind, name, value in found if "gone" in keys_of(value)] == []
        assert router is None or router.tasks == router.active == {}

    def test_unloaded(self, tuned, make_config):
        model = self.three(tuned, make_config)
        base = model.unload()
        assert type(base.lin0) is nn.Linear is type(base.lin1)
        assert base.state_dict().keys() == make_net().state_dict().keys()
        assert_same(output(base), output(make_net()))

    def test_saved_modules_of_two_cannot_both_be_active(self, tuned, make_config):
        model = tuned("one", modules_to_save=["lin1"])
        model.add_adapter("two", make_config(modules_to_save=["lin1"]))
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.base_model.set_adapter(["one", "two"])


def keys_of(value):
    """The keys of anything like a dictionary."""
    return value.keys() if callable(getattr(value, "keys", None)) and hasattr(value, "__getitem__") else ()


class TestRequiresGrad:
    def adapters_with_gradient(self, model):
        return {name.rsplit(".", 1)[1] for name in trainable(model) if model.prefix in name}

    def test_follows_the_active_adapter(self, tuned, make_config):
        model = tuned("one", modules_to_save=["lin1"])
        model.add_adapter("two", make_config(modules_to_save=["lin1"]))
        for name in ("one", "two"):
            model.set_adapter(name)
            assert self.adapters_with_gradient(model) == {name}
            saved = {key for key in trainable(model) if "modules_to_save" in key}
            assert saved == {f"base_model.model.lin1.modules_to_save.{name}.{key}" for key in ("weight", "bias")}
        model.set_adapter("one", inference_mode=True)
        assert trainable(model) == set()

    def test_set_by_hand(self, tuned, make_config):
        model = tuned("one")
        model.add_adapter("two", make_config(target_modules=["lin0", "lin1"]))
        model.set_requires_grad("two")
        assert self.adapters_with_gradient(model) == {"one", "two"}
        model.set_requires_grad(["one", "two"], requires_grad=False)
        assert trainable(model) == set()


class TestMerging:
    """TA-LoRA only; Conv-LoRA's refusal is tested beside it."""

    def make(self, dtype=torch.float64, **changes):
        return get_peft_model(
            make_net(dtype), TUNERS["talora"](target_modules=["lin0"], init_weights=False, **changes)
        )

    @pytest.mark.parametrize(
        ("dtype", "atol"),
        [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)],
    )
    @pytest.mark.parametrize("safe_merge", [False, True])
    @torch.no_grad()
    def test_there_and_back(self, dtype, atol, safe_merge):
        model, x = self.make(dtype, scaling=2.0).eval(), tokens(dtype)
        expected, weight = model(x), model.base_model.model.lin0.weight.clone()
        model.merge_adapter(safe_merge=safe_merge)
        assert (model.base_model.model.lin0.weight - weight).abs().max() > 0.1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=atol)
        model.unmerge_adapter()
        torch.testing.assert_close(model.base_model.model.lin0.weight, weight, rtol=0, atol=atol)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert type(merged.lin0) is nn.Linear and merged.lin0.weight.dtype == dtype
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=atol)

    def test_again_changes_nothing_and_dropout_does_not_matter(self):
        model = self.make(talora_dropout=0.5).train()
        expected = model.base_model.model.lin0.weight + layers_of(model)[0].get_delta_weight("default")
        model.merge_adapter()
        assert_same(model.base_model.model.lin0.weight, expected.detach())
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        assert_same(model.base_model.model.lin0.weight, expected.detach())

    def test_a_merged_one_is_not_deleted(self):
        model = self.make()
        model.add_adapter("other", TUNERS["talora"](target_modules=["lin0"], init_weights=False))
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
            model.delete_adapter("default")
        expected = output(model.eval())
        model.delete_adapter("other")
        assert_same(output(model), expected)
        model.unmerge_adapter()
        model.delete_adapter("default")
        assert_same(output(model.base_model.model), output(make_net()))

    def test_chosen_adapters(self):
        model = self.make()
        model.add_adapter("other", TUNERS["talora"](target_modules=["lin0", "lin1"], init_weights=False))
        model.eval().set_adapter("other")
        expected = output(model)
        model.set_adapter("default")
        assert_same(output(model.merge_and_unload(adapter_names=["other"])), expected)


class TestRefusals:
    """What PEFT allows to its LoRA alone ends in PEFT's own error."""

    def test_mixed_model(self, make_config):
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            get_peft_model(make_net(), make_config(), mixed=True)

    def test_hotswap(self, tuned, tmp_path):
        model = tuned()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
            hotswap_adapter(model, str(tmp_path), "default")
