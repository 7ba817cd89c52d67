"""What a configuration accepts, and what it says about what it does not."""

import pytest
from peft import PeftConfig
from peft.utils.peft_types import PeftType

from peft_talora import ConvLoraConfig


def test_defaults_are_the_published_ones():
    config = ConvLoraConfig()
    assert (config.r, config.convlora_alpha, config.num_experts, config.aux_loss_weight) == (3, 32, 8, 0.01)
    assert config.convlora_dropout == 0.0 and config.noisy_gating and not config.gate_gradient
    assert config.init_weights is True and config.grid_size is None and config.num_prefix_tokens == 0
    assert config.peft_type is PeftType.CONVLORA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"r": 2.5}, "`r` must be a positive integer, got 2.5"),
        ({"num_experts": 0}, "`num_experts` must be a positive integer, got 0"),
        ({"num_experts": True}, "`num_experts` must be a positive integer, got True"),
        ({"convlora_alpha": 0}, "`convlora_alpha` must be a positive number, got 0"),
        ({"convlora_alpha": float("nan")}, "`convlora_alpha` must be a positive number, got nan"),
        ({"convlora_alpha": "32"}, "`convlora_alpha` must be a positive number, got '32'"),
        ({"convlora_alpha": None}, "`convlora_alpha` must be a positive number, got None"),
        ({"convlora_alpha": True}, "`convlora_alpha` must be a positive number, got True"),
        ({"aux_loss_weight": "0"}, "`aux_loss_weight` must be a number of at least 0, got '0'"),
        ({"convlora_dropout": float("nan")}, r"`convlora_dropout` must be in \[0, 1\), got nan"),
        ({"noisy_gating": "false"}, "`noisy_gating` must be True or False, got 'false'"),
        ({"gate_gradient": None}, "`gate_gradient` must be True or False, got None"),
        ({"convlora_dropout": 1.0}, r"`convlora_dropout` must be in \[0, 1\), got 1.0"),
        ({"aux_loss_weight": -0.1}, "`aux_loss_weight` must be a number of at least 0, got -0.1"),
        ({"aux_loss_weight": float("inf")}, "`aux_loss_weight` must be a number of at least 0, got inf"),
        ({"init_weights": "gaussian"}, "`init_weights` must be True or False, got 'gaussian'"),
        ({"num_prefix_tokens": -1}, "`num_prefix_tokens` must be an integer of at least 0, got -1"),
        ({"num_prefix_tokens": 1.0}, "`num_prefix_tokens` must be an integer of at least 0, got 1.0"),
        ({"grid_size": 14}, "`grid_size` must be a height and a width or None, got 14"),
        ({"grid_size": (14,)}, r"`grid_size` must be a height and a width or None, got \(14,\)"),
        ({"grid_size": (14, 0)}, "`grid_size` must be a positive integer, got 0"),
        ({"target_modules": "qkv", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_impossible_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvLoraConfig(**arguments)


def test_saved_and_loaded(tmp_path):
    config = ConvLoraConfig(r=5, grid_size=[3, 7], num_prefix_tokens=1, gate_gradient=True, target_modules=["a", "b"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is ConvLoraConfig and loaded == config
    assert loaded.grid_size == (3, 7) and loaded.target_modules == {"a", "b"}
