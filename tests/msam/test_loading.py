"""Which checkpoints an mSAM starts from, and which it refuses."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, task_to_sam
from peft_talora.msam.loading import load_sam

TASKS = {"depth": TaskSpec("depth"), "normals": TaskSpec("normals")}


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


class Packed(torch.Tensor):
    """A tensor that looks like one of numbers, as those of torchao do."""


def quantise(sam, how):
    """The qkv weights as bitsandbytes (integers) and torchao (a type of their own) leave them."""
    for layer in sam.vision_encoder.layers:
        weight = layer.attn.qkv.weight
        packed = weight.to(torch.int8) if how == "int8" else torch.Tensor._make_subclass(Packed, weight.data)
        layer.attn.qkv.weight = nn.Parameter(packed, requires_grad=False)
    return sam


@pytest.mark.parametrize(("how", "kind"), [("int8", "torch.int8"), ("packed", "Packed")])
def test_a_quantised_sam_is_refused_with_what_to_do(sam, how, kind):
    message = rf"`sam` is quantised or sharded \('vision_encoder.layers.0.attn.qkv.weight' is a {kind}\): make the mSAM from "
    with pytest.raises(
        ValueError, match=message + r".*save_pretrained.*from_pretrained\(directory, quantization_config="
    ):
        MSamForMultiTask.from_sam(quantise(sam, how), TASKS)


@pytest.mark.parametrize("offload", [disk_offload, cpu_offload])
def test_an_offloaded_sam_is_refused_with_what_to_do(sam, offload, tmp_path):
    if offload is disk_offload:
        disk_offload(sam, tmp_path, execution_device=torch.device("cpu"))
    else:
        cpu_offload(sam, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"`sam` is offloaded .* is not in memory.*from_pretrained\(directory, device_map="
    ):
        MSamForMultiTask.from_sam(sam, TASKS)


def test_nothing_is_exported_of_a_quantised_msam(sam):
    msam = quantise(MSamForMultiTask.from_sam(sam, TASKS), "packed")
    with pytest.raises(ValueError, match=r"The mSAM is quantised or sharded .* export it from one that is not"):
        task_to_sam(msam, "depth")


def test_a_sam_with_an_adapter_is_refused(sam):
    tuned = get_peft_model(sam, TALoraConfig(tasks=["depth"]))
    with pytest.raises(ValueError, match="has an adapter: merge it, or unload it, first"):
        MSamForMultiTask.from_sam(tuned.get_base_model(), TASKS)
