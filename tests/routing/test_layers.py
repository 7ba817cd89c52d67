"""The tuned layers of a model are found again after everything that changes them."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_talora import TALoraConfig, TALoraLayer, auxiliary_loss, set_task, use_task
from peft_talora.routing.layers import layers_of_forward, tuned_layers


def searched(model):
    return [module for module in model.modules() if isinstance(module, TALoraLayer)]


def assert_found(model, number):
    for found in (tuned_layers(model), layers_of_forward(model)):
        assert len(found) == number and all(a is b for a, b in zip(found, searched(model), strict=True))


def tune(sam, **config):
    return get_peft_model(sam, TALoraConfig(tasks=["a", "b"], r=2, **config))


def test_found_again(sam, sam_factory):
    assert_found(sam, 0)
    model = tune(sam, layers_to_transform=[1])
    assert_found(sam, 1)
    assert tuned_layers(sam)[0] is tuned_layers(model)[0]
    model.add_adapter("second", TALoraConfig(tasks=["a", "b"], r=2, target_modules=["qkv", "proj"]))
    assert_found(model, len(searched(model)))
    duplicate = copy.deepcopy(model)
    assert_found(duplicate, len(searched(model)))
    assert not {id(layer) for layer in tuned_layers(duplicate)} & {id(layer) for layer in tuned_layers(model)}
    plain = sam_factory()
    assert_found(plain, 0)
    plain.vision_encoder = duplicate.vision_encoder  # made before the search
    assert_found(plain, len(searched(model)))
    plain.vision_encoder.layers[1] = nn.Identity()
    assert_found(plain, len(searched(plain)))
    unloaded = model.unload()
    assert_found(unloaded, 0)


def test_layers_of_others_are_not_ours(sam):
    assert_found(get_peft_model(sam, LoraConfig(target_modules=["qkv"])), 0)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), None])
def test_a_model_that_is_put_beside_another(sam_factory, make):
    both = nn.Module()
    other = tune(sam_factory(), init_weights=False)
    both.student = tune(sam_factory(), init_weights=False, ortho_reg_weight=1.0)
    set_task(both, "a")
    alone = auxiliary_loss(both)
    # a mean teacher; or one that was made before the first search
    both.teacher = make(both.student) if make else other
    set_task(both, "b")
    assert both.student.active_task == both.teacher.active_task == "b"
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), use_task(both, "a"):
        inside = both.teacher.vision_encoder(pixels).last_hidden_state
    both.teacher.set_task("a")
    with torch.no_grad():
        torch.testing.assert_close(inside, both.teacher.vision_encoder(pixels).last_hidden_state, rtol=0, atol=0)
    if make:
        for layer in searched(both.teacher):
            layer.talora_U1["default"].data *= 2
        alone = (alone + auxiliary_loss(both.teacher)) / 2
    torch.testing.assert_close(auxiliary_loss(both), alone)
