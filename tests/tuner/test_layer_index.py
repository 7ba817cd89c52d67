"""The index of a module's layer is the one that PEFT goes by."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from peft_talora.tuner.layer_index import as_indices, layer_index

NAMES = [
    "vision_encoder.layers.3.attn.qkv",
    "vision_encoder.backbone.blocks.2.attn.qkv",
    "0.layers.1.attn.qkv",
    "models.0.layers.1.attn.qkv",
    "model.layers.2.experts.0.qkv",
    "blocks.0.layers.2.qkv",
    "encoder.qkv",
    "encoder.layers.x.qkv",
    "a.b.12.qkv",
]


@pytest.mark.parametrize(
    "pattern", [None, "layers", "blocks", ["layers", "blocks"], ["blocks", "layers"], "(layers|blocks)", r"l\w+"]
)
@pytest.mark.parametrize("name", NAMES)
def test_as_peft_counts(name, pattern):
    chosen = [
        index
        for index in range(13)
        if check_target_module_exists(
            LoraConfig(target_modules=["qkv"], layers_to_transform=[index], layers_pattern=pattern), name
        )
    ]
    assert [layer_index(name, pattern)] == (chosen or [None])


@pytest.mark.parametrize(
    ("name", "index"), [("layers.4.attn.qkv", 4), ("0.qkv", 0), ("qkv", None), ("3", None), ("lin2.x", None)]
)
def test_a_list_of_the_models_own(name, index):
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("given", "indices"), [(None, []), (3, [3]), ([1, 0], [1, 0]), (range(2), [0, 1]), ("01", ["01"])]
)
def test_indices(given, indices):
    assert as_indices(given) == indices
