"""Which checkpoints an mSAM starts from, and which it refuses."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from peft_talora.msam.loading import load_sam


def test_loads_a_saved_sam(sam, tmp_path):
    sam.save_pretrained(tmp_path)
    loaded = load_sam(tmp_path)
    for name, value in sam.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not-here"):
        load_sam(tmp_path / "not-here")


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=tmp_path.name):
        load_sam(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit' model, not of a 'sam' model"):
        load_sam(tmp_path)
