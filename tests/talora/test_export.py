"""One task as a stock LoRA."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from small_models import move_saved_modules

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


def masks(model, pixels, points):
    with torch.no_grad():
        return model(pixel_values=pixels, input_points=points, multimask_output=False).pred_masks


@pytest.mark.parametrize("saved", [["mask_decoder"], ["layers.0.layer_norm1", "neck", "prompt_encoder"]])
def test_everything_that_was_trained_in_full_comes_along(sam_factory, tmp_path, saved):
    model = move_saved_modules(tuned(sam_factory().double(), modules_to_save=saved))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    points = 32 * torch.rand(2, 1, 2, 2, dtype=torch.float64)
    base = masks(sam_factory().double(), pixels, points)
    model.set_task("b")
    save_task_as_lora(model, "b", tmp_path)
    plain = PeftModel.from_pretrained(sam_factory().double(), tmp_path, autocast_adapter_dtype=False)
    expected = masks(model, pixels, points)
    torch.testing.assert_close(masks(plain, pixels, points), expected, rtol=0, atol=1e-9)
    assert (expected - base).abs().max() > 1e-3
    # neither model's own modules were changed
    for changed in (model, plain):
        with changed.disable_adapter():
            torch.testing.assert_close(masks(changed, pixels, points), base, rtol=0, atol=1e-9)


def test_of_an_msam_the_sam_s_norms_are_left_alone(sam_factory, tmp_path):
    msam = MSamForMultiTask.from_sam(sam_factory(), TASKS)
    targets = ["qkv", "mask_decoders.edges.transformer.layers.0.mlp.lin1"]
    norms = [f"vision_encoder.layers.{index}.layer_norm1" for index in range(3)]
    config = TALoraConfig(r=4, init_weights=False, target_modules=targets, modules_to_save=norms)
    model = move_saved_modules(get_peft_model(msam, config)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    save_task_as_lora(model, "edges", tmp_path)
    plain = PeftModel.from_pretrained(sam_factory(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(embed(plain, pixels), msam.encode(pixels, ["edges"])["edges"], rtol=0, atol=1e-5)
        with plain.disable_adapter():
            torch.testing.assert_close(embed(plain, pixels), embed(sam_factory(), pixels), rtol=0, atol=1e-6)
    assert all("mask_decoders" not in name for name in plain.peft_config["default"].target_modules)


def test_an_adapter_of_the_decoders_alone(sam):
    config = TALoraConfig(
        r=4, target_modules=["mask_decoders.edges.transformer.layers.0.mlp.lin1"], modules_to_save=[]
    )
    model = get_peft_model(MSamForMultiTask.from_sam(sam, TASKS), config)
    with pytest.raises(ValueError, match="'default' has no TA-LoRA layer outside of the mask decoders"):
        task_to_lora(model, "edges")


def test_a_name_that_is_the_end_of_another(tmp_path):
    """PEFT would tune the longer one, too."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
    base = torch.nn.ModuleDict({"0": torch.nn.Linear(4, 4), "inner": inner})
    model = get_peft_model(base, TALoraConfig(tasks=["a"], r=2, target_modules=["0"], exclude_modules=["inner.0"]))
    save_task_as_lora(model, "a", tmp_path)
    plain = PeftModel.from_pretrained(torch.nn.ModuleDict({"0": torch.nn.Linear(4, 4), "inner": inner}), tmp_path)
    assert [name for name, _ in plain.named_modules() if name.endswith("base_layer")] == [
        "base_model.model.0.base_layer"
    ]


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
