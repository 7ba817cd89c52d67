"""One task as a stock LoRA."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec
from peft_talora.export import save_task_as_lora, task_to_lora

TASKS = {"depth": TaskSpec("depth"), "edges": TaskSpec("binary")}


def tuned(sam, **config):
    arguments = {"tasks": ["a", "b"], "r_in": 4, "r_out": 3, "init_weights": False, **config}
    return get_peft_model(sam, TALoraConfig(**arguments), autocast_adapter_dtype=False).eval()


def embed(model, pixels):
    with torch.no_grad():
        return model.vision_encoder(pixels).last_hidden_state


@pytest.mark.parametrize("ranks", [{"r_in": 4, "r_out": 3}, {"r_in": 2, "r_out": 5}, {"r_in": 3, "r_out": 3}])
@pytest.mark.parametrize("enable_qkv", [None, [True, False, True]])
def test_stock_lora_gives_the_same_encoder_output(sam_factory, tmp_path, ranks, enable_qkv):
    sam, pixels = sam_factory().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = tuned(sam, enable_qkv=enable_qkv, **ranks)
    outputs = {}
    for task in ("a", "b"):
        model.set_task(task)
        outputs[task] = embed(model, pixels)
        config, state = task_to_lora(model, task)
        assert type(config) is LoraConfig and config.r == min(ranks.values())
        save_task_as_lora(model, task, tmp_path / task)
        plain = PeftModel.from_pretrained(sam_factory().double(), tmp_path / task, autocast_adapter_dtype=False)
        torch.testing.assert_close(embed(plain, pixels), outputs[task], rtol=0, atol=1e-10)
        assert all(name.startswith("base_model.model.vision_encoder.") for name in state)
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-3


def test_loads_without_this_package_with_the_norms_of_an_msam(sam_factory, tmp_path):
    sam_factory().save_pretrained(tmp_path / "sam")
    msam = MSamForMultiTask.from_sam(tmp_path / "sam", TASKS)
    model = get_peft_model(msam, TALoraConfig(r=4, init_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name and parameter.requires_grad:
                parameter.mul_(1.3)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = msam.encode(pixels, ["edges"])["edges"]
    save_task_as_lora(model, "edges", tmp_path / "lora")
    torch.save({"pixels": pixels, "expected": expected}, tmp_path / "data.pt")
    code = """
import sys, torch
from peft import PeftModel
from transformers import SamModel
folder = sys.argv[1]
data = torch.load(folder + "/data.pt")
model = PeftModel.from_pretrained(SamModel.from_pretrained(folder + "/sam"), folder + "/lora").eval()
with torch.no_grad():
    got = model.vision_encoder(data["pixels"]).last_hidden_state
torch.testing.assert_close(got, data["expected"], rtol=0, atol=1e-5)
assert "peft_talora" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_injected_adapters_too(sam_factory):
    sam = inject_adapter_in_model(TALoraConfig(tasks=["a"], r=2, init_weights=False), sam_factory())
    _, state = task_to_lora(sam, "a")
    assert len(state) == 6


class TestRefusals:
    def test_unknown_task(self, sam):
        with pytest.raises(ValueError, match=r"Unknown task 'c'.*\['a', 'b'\]"):
            task_to_lora(tuned(sam), "c")

    def test_no_adapter(self, sam):
        with pytest.raises(ValueError, match="the model has none"):
            task_to_lora(get_peft_model(sam, LoraConfig(target_modules=["qkv"])), "a")

    def test_an_msam_of_another_image_size(self, sam):
        msam = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        model = get_peft_model(msam, TALoraConfig(r=2))
        with pytest.raises(ValueError, match=r"image_size=48, its SAM at 32"):
            task_to_lora(model, "depth")
