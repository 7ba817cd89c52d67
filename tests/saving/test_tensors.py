"""Weights that are not those of the model's adapter are refused by name."""

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec
from peft_talora.saving.tensors import TensorKind, adapter_tensors, check_weights, saved_tensors

EXPECTED = {"a": TensorKind((2, 3), True), "count": TensorKind((), False)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def save(path, **changes):
    tensors = {"a": torch.ones(2, 3), "count": torch.tensor(4), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


class TestCheckWeights:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    )
    def test_what_fits(self, path, dtype):
        save(path, a=torch.ones(2, 3).to(dtype))
        assert saved_tensors(path) == EXPECTED
        check_weights(path, EXPECTED)

    def test_large_numbers_of_double_precision_are_finite(self, path):
        save(path, a=torch.full((2, 3), 1e300, dtype=torch.float64))
        check_weights(path, EXPECTED)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"a": None}, "the tensor 'a' is missing"),
            ({"a": None, "count": None}, r"the tensor 'a' \(and 1 more\) is missing"),
            ({"b": torch.ones(1)}, "the tensor 'b' does not belong to the model"),
            ({"a": torch.ones(3, 2)}, r"'a' has another shape than in the model: \(3, 2\), expected \(2, 3\)"),
            ({"a": torch.ones(2, 3, dtype=torch.int32)}, "'a' has another type of numbers"),
            ({"count": torch.tensor(4.0)}, "'count' has another type of numbers"),
            ({"a": torch.tensor([[0.0, 1, 2], [3, float("nan"), 5]])}, "'a' is not finite"),
            ({"a": torch.full((2, 3), float("-inf"), dtype=torch.bfloat16)}, "'a' is not finite"),
            ({"a": torch.full((2, 3), float("nan")).to(torch.float8_e4m3fn)}, "'a' is not finite"),
        ],
    )
    def test_what_does_not(self, path, changes, message):
        save(path, **changes)
        with pytest.raises(
            ValueError, match=rf"weights\.safetensors: the tensor .*{message.removeprefix('the tensor ')}"
        ):
            check_weights(path, EXPECTED)

    def test_a_damaged_file(self, path):
        save(path)
        path.write_bytes(path.read_bytes()[:-1])
        for check in (saved_tensors, lambda path: check_weights(path, EXPECTED)):
            with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
                check(path)


def test_adapter_tensors_are_those_that_peft_saves(sam):
    msam = MSamForMultiTask.from_sam(sam, {"b": TaskSpec("depth"), "a": TaskSpec("semantic", num_channels=2)})
    config = TALoraConfig(r=3, r_task=2)
    names = [name for name, _ in msam.named_parameters()]
    found = adapter_tensors(msam, config)
    assert config == TALoraConfig(r=3, r_task=2) and [name for name, _ in msam.named_parameters()] == names
    state = get_peft_model_state_dict(get_peft_model(msam, config))
    assert found == {name: TensorKind(tuple(value.shape), True) for name, value in state.items()}
    assert len(found) > 100


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
