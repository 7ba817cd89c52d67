"""The auxiliary loss against a plain loop over the norms."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_talora import TALoraConfig, auxiliary_loss
from peft_talora.talora.config import INIT_WEIGHTS


def config(weight=0.5, **changes):
    arguments = {"tasks": ["a", "b"], "r_in": 4, "r_out": 3, "r_task": 2, "init_weights": False, **changes}
    return TALoraConfig(target_modules=["0", "2"], ortho_reg_weight=weight, **arguments)


def tuned(*args, **changes):
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)).double()
    return get_peft_model(base, config(*args, **changes), autocast_adapter_dtype=False)


def layers(model):
    return [model.base_model.model[0], model.base_model.model[2]]


def reference(model, adapter="default"):
    """The mean over all norms of all layers, one by one."""
    norms = []
    for layer in layers(model):
        G, U1, U2 = (getattr(layer, f"talora_{name}")[adapter] for name in ("G", "U1", "U2"))
        for factor in (U1, U2, *(G[:, :, c] for c in range(G.shape[2]))):
            difference = factor.T @ factor - torch.eye(factor.shape[1], dtype=factor.dtype)
            norms.append(sum(entry**2 for entry in difference.flatten()) ** 0.5)
    return sum(norms) / len(norms)


def gradients(loss, model):
    factors = [getattr(layer, f"talora_{name}")["default"] for layer in layers(model) for name in ("G", "U1", "U2")]
    return torch.autograd.grad(loss, factors)


def test_value_and_gradient_match_a_plain_loop():
    model = tuned()
    loss, expected = auxiliary_loss(model), 0.5 * reference(model)
    assert loss.ndim == 0 and loss > 0.1
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for got, want in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_higher_task_rank_means_more_norms():
    model = tuned()
    model.add_adapter("other", config(r_task=5), autocast_adapter_dtype=False)
    model.set_adapter("other")
    torch.testing.assert_close(auxiliary_loss(model), 0.5 * reference(model, "other"), rtol=0, atol=1e-12)


def test_task_factor_is_not_in_it():
    model = tuned()
    before = auxiliary_loss(model).item()
    auxiliary_loss(model).backward()
    for layer in layers(model):
        assert layer.talora_U3["default"].grad is None
        layer.talora_U3["default"].data.mul_(7)
    assert auxiliary_loss(model).item() == before


def test_it_depends_on_the_parameters_alone():
    model = tuned()
    before = auxiliary_loss(model).item()
    model(torch.randn(3, 6, dtype=torch.float64), task_ids=["b", "a", "b"])
    model.set_task("b")
    assert auxiliary_loss(model).item() == before == auxiliary_loss(copy.deepcopy(model)).item()


@pytest.mark.parametrize("init_weights", INIT_WEIGHTS)
def test_every_start_has_finite_gradients(init_weights):
    # orthonormal factors are where the norm has no derivative, zero cores where G^T G has none to first order
    model = tuned(init_weights=init_weights)
    if init_weights == "orthogonal":
        for layer in layers(model):
            for factor in (layer.talora_U1["default"], layer.talora_U2["default"]):
                factor.data = torch.eye(*factor.shape, dtype=factor.dtype)
    loss = auxiliary_loss(model)
    loss.backward()
    assert loss.isfinite()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 6 and all(grad.isfinite().all() for grad in grads)


class TestNothingToAdd:
    def check(self, loss):
        assert loss.ndim == 0 and loss.item() == 0.0 and not loss.requires_grad

    def test_weight_zero(self):
        self.check(auxiliary_loss(tuned(0.0)))

    def test_disabled_adapter(self):
        model = tuned()
        with model.disable_adapter():
            self.check(auxiliary_loss(model))
        assert auxiliary_loss(model) > 0

    def test_model_without_our_adapter(self):
        base = nn.Sequential(nn.Linear(6, 5))
        self.check(auxiliary_loss(base))
        self.check(auxiliary_loss(get_peft_model(base, LoraConfig(target_modules=["0"]))))
        self.check(auxiliary_loss(nn.Identity()))

    def test_it_is_on_the_models_device(self):
        with torch.device("meta"):
            model = tuned(0.0)
        assert auxiliary_loss(model).device.type == "meta"


class TestSeveralAdapters:
    def make(self):
        model = tuned(0.5)
        model.add_adapter("other", config(2.0, r_in=2), autocast_adapter_dtype=False)
        return model

    def test_only_the_active_one_counts(self):
        model = self.make()
        torch.testing.assert_close(auxiliary_loss(model), 0.5 * reference(model), rtol=0, atol=1e-12)
        model.set_adapter("other")
        torch.testing.assert_close(auxiliary_loss(model), 2.0 * reference(model, "other"), rtol=0, atol=1e-12)

    def test_active_ones_add_up_each_with_its_weight(self):
        model = self.make()
        model.base_model.set_adapter(["default", "other"])
        expected = 0.5 * reference(model) + 2.0 * reference(model, "other")
        torch.testing.assert_close(auxiliary_loss(model), expected, rtol=0, atol=1e-12)

    def test_one_that_is_switched_off_by_its_weight_does_not_count(self):
        model = tuned(0.5)
        model.add_adapter("other", config(0.0), autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(auxiliary_loss(model), 0.5 * reference(model), rtol=0, atol=1e-12)


def test_it_is_no_state_of_the_model():
    model = tuned()
    names = set(model.state_dict())
    auxiliary_loss(model)
    assert set(model.state_dict()) == names
