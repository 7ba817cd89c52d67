"""Weights that are not those of the model's adapter are refused by name."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec
from peft_talora.saving.settings import split_settings
from peft_talora.saving.tensors import (
    TensorKind,
    adapter_tensors,
    check_sizes,
    check_tensors,
    parse_tensors,
    try_to_load,
    weightless_twin,
)

EXPECTED = {"a": TensorKind((2, 3), True), "count": TensorKind((), False), "old": TensorKind((1,), True, False)}


def tensors(**changes):
    values = {"a": torch.ones(2, 3), "count": torch.tensor(4), **changes}
    return {name: value for name, value in values.items() if value is not None}


class TestCheckTensors:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    )
    def test_what_fits(self, dtype):
        check_tensors("weights", tensors(a=torch.ones(2, 3).to(dtype)), EXPECTED)
        with pytest.raises(ValueError, match="'a' is not finite"):
            check_tensors("weights", tensors(a=torch.full((2, 3), float("nan")).to(dtype)), EXPECTED)

    def test_what_need_not_be_there(self):
        check_tensors("weights", tensors(old=torch.ones(1)), EXPECTED)
        with pytest.raises(ValueError, match="'old' has another shape"):
            check_tensors("weights", tensors(old=torch.ones(2)), EXPECTED)

    def test_large_numbers_of_double_precision_are_finite(self):
        check_tensors("weights", tensors(a=torch.full((2, 3), 1e300, dtype=torch.float64)), EXPECTED)
        with pytest.raises(ValueError, match="'a' is not finite"):
            check_tensors("weights", tensors(a=torch.full((2, 3), 1e300, dtype=torch.float64).float()), EXPECTED)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"a": None}, "the tensor 'a' is missing"),
            ({"a": None, "count": None}, r"the tensor 'a' \(and 1 more\) is missing"),
            ({"b": torch.ones(1)}, "the tensor 'b' does not belong to the model"),
            ({"a": torch.ones(3, 2)}, r"'a' has another shape than in the model: \(3, 2\), expected \(2, 3\)"),
            ({"old": torch.ones(2)}, r"'old' has another shape than in the model: \(2,\), expected \(1,\)"),
            ({"a": torch.ones(2, 3, dtype=torch.int32)}, "'a' has another type of numbers"),
            ({"count": torch.tensor(4.0)}, "'count' has another type of numbers"),
            ({"a": torch.tensor([[0.0, 1, 2], [3, float("nan"), 5]])}, "'a' is not finite"),
            ({"a": torch.full((2, 3), float("-inf"), dtype=torch.bfloat16)}, "'a' is not finite"),
            ({"a": torch.full((2, 3), float("nan")).to(torch.float8_e4m3fn)}, "'a' is not finite"),
        ],
    )
    def test_what_does_not(self, changes, message):
        with pytest.raises(ValueError, match=rf"weights: the tensor .*{message.removeprefix('the tensor ')}"):
            check_tensors("weights", tensors(**changes), EXPECTED)


def test_a_damaged_file(tmp_path):
    content = save(tensors())
    assert parse_tensors(content, tmp_path)["a"].tolist() == [[1.0] * 3] * 2
    for damaged in (content[:-1], b"", content[:20], b"{}" + content):
        with pytest.raises(ValueError, match=rf"{tmp_path} is damaged"):
            parse_tensors(damaged, tmp_path)


def test_sizes_of_a_configuration():
    shapes = {"x.talora_G": (2, 3, 4), "y.talora_G": (2, 3, 5), "talora_U1": (7, 2)}
    with pytest.raises(
        ValueError, match=r"'y.talora_G' has another shape .*\(2, 3, 5\), expected \(2, 3, 4\) of ranks"
    ):
        check_sizes("ranks", (2, 3, 4), shapes, "talora_G")
    with pytest.raises(ValueError, match="none of the 3 tensors is a talora_U3"):
        check_sizes("ranks", (2, 4), shapes, "talora_U3")


class TestTwin:
    @pytest.fixture
    def msam(self, sam):
        return MSamForMultiTask.from_sam(sam, {"b": TaskSpec("depth"), "a": TaskSpec("semantic", num_channels=2)})

    def test_its_tensors_are_those_that_peft_saves(self, msam):
        config = TALoraConfig(r=3, r_task=2)
        names = [name for name, _ in msam.named_parameters()]
        twin = weightless_twin(msam, config)
        found = {name: kind for name, kind in adapter_tensors(twin).items() if kind.required}
        assert config == TALoraConfig(r=3, r_task=2) and [name for name, _ in msam.named_parameters()] == names
        assert all(parameter.device.type == "meta" for parameter in twin.parameters())
        state, _ = split_settings(get_peft_model_state_dict(get_peft_model(msam, config)))
        assert found == {name: TensorKind(tuple(value.shape), True) for name, value in state.items()}
        assert len(found) > 100

    def test_peft_s_own_trouble_is_seen(self, msam):
        # "layer_norm1" is in the decoder, too, which is saved in full: PEFT does not find it again for tuners of its own
        config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["mask_decoders.b", "layer_norm1"])
        state = get_peft_model_state_dict(get_peft_model(msam, copy.deepcopy(config)))
        with pytest.raises(KeyError):
            try_to_load(weightless_twin(msam, config), state)


class TestCheckAdapterState:
    """As `BaseTuner._remap_adapter_state_dict_for_load` would call it: on its way into the model."""

    @pytest.fixture
    def model(self, sam):
        return get_peft_model(sam, TALoraConfig(tasks=["a", "b"], r=2, modules_to_save=["mask_decoder"]))

    def test_what_fits(self, model):
        state = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, state)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        set_peft_model_state_dict(model, {name: value + 1 for name, value in state.items()}, "second")
        again = get_peft_model_state_dict(model, adapter_name="second")
        assert all(torch.equal(again[name], value + 1) for name, value in state.items())

    @pytest.mark.parametrize("part", ["talora_G", "talora_U3"])
    def test_a_missing_tensor(self, model, part):
        state = get_peft_model_state_dict(model)
        del state[next(name for name in state if part in name)]
        with pytest.raises(ValueError, match=rf"The adapter: the tensor '.*{part}\.default' is missing"):
            set_peft_model_state_dict(model, state)

    def test_an_unknown_tensor(self, model):
        state = {**get_peft_model_state_dict(model), "base_model.model.neck.talora_G": torch.ones(1)}
        with pytest.raises(ValueError, match=r"'base_model\.model\.neck\.talora_G' does not belong to the model"):
            set_peft_model_state_dict(model, state)

    @pytest.mark.parametrize("part", ["talora_U1", "mask_decoder"])
    def test_what_is_not_finite(self, model, part):
        state = get_peft_model_state_dict(model)
        name = next(name for name in state if part in name)
        state[name] = state[name] / 0
        with pytest.raises(ValueError, match=rf"the tensor '.*{part}.*' is not finite"):
            set_peft_model_state_dict(model, state)

    def test_an_injected_adapter(self, sam):
        sam.add_adapter(TALoraConfig(tasks=["a", "b"], r=2), "mine")
        state = {name: value + 1 for name, value in get_peft_model_state_dict(sam, adapter_name="mine").items()}
        set_peft_model_state_dict(sam, state, "mine")
        set_peft_model_state_dict(sam, {f"base_model.model.{name}": value for name, value in state.items()}, "mine")
        again = get_peft_model_state_dict(sam, adapter_name="mine")
        assert len(again) > 4 and all(torch.equal(again[name], value) for name, value in state.items())
