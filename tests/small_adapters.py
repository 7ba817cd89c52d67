"""Adapters of an mSAM that several tests save and load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import move_saved_modules

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, default_modules_to_save, save_adapter

# in no alphabetical order
TASKS = {
    "semantic": TaskSpec("semantic", num_channels=3, class_names=["wall", "floor", "door"]),
    "depth": TaskSpec("depth", weight=0.5),
    "a_normals": TaskSpec("normals"),
}


def make_adapter(base: str, directory: Path, tasks: Mapping[str, TaskSpec]) -> str:
    """Save an adapter whose decoders were moved at random; the directory."""
    msam = MSamForMultiTask.from_sam(base, tasks, channel_mode="token")
    save_adapter(move_saved_modules(get_peft_model(msam, TALoraConfig(r=4))), directory)
    return str(directory)


def talora(msam, **changes):
    return TALoraConfig(**{"r": 3, "r_task": 2, "init_weights": False, **changes})


def lora(msam):
    modules_to_save = default_modules_to_save(msam)
    return LoraConfig(r=2, target_modules=["qkv"], modules_to_save=modules_to_save, init_lora_weights=False)


def make(sam, make_config=talora, tasks=None, image_size=48, **changes):
    """A tuned mSAM in which everything that is saved differs from its SAM."""
    msam = MSamForMultiTask.from_sam(sam, tasks or TASKS, image_size=image_size)
    model = get_peft_model(msam, make_config(msam, **changes)).eval()
    return move_saved_modules(model)


@torch.no_grad()
def predict(model, pixels, **kwargs):
    return model(pixels, **kwargs).logits


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


def rewrite(directory, change):
    """Change the saved tensors in place."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def some_key(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def forget_what_is_new(values):
    values.pop("saved_by", None)
    values.get("msam", values).pop("base", None)
