"""The tuned layers of a model are found again after everything that changes them."""

import copy

from peft import LoraConfig, get_peft_model
from torch import nn

from peft_talora import TALoraConfig, TALoraLayer
from peft_talora.routing.layers import tuned_layers


def searched(model):
    return [module for module in model.modules() if isinstance(module, TALoraLayer)]


def assert_found(model, number):
    found = tuned_layers(model)
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
