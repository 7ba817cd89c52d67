"""One task as a plain SamModel."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import move_saved_modules
from transformers import SamModel

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, default_modules_to_save
from peft_talora.export import task_to_sam

TASKS = {"depth": TaskSpec("depth"), "edges": TaskSpec("binary"), "parts": TaskSpec("parts", 3)}


def tuned(sam, image_size=None, lora=False):
    msam = MSamForMultiTask.from_sam(sam.double(), TASKS, image_size=image_size)
    config = TALoraConfig(r=4, init_weights=False)
    if lora:
        modules = default_modules_to_save(msam)
        config = LoraConfig(target_modules=["qkv"], init_lora_weights=False, modules_to_save=modules)
    model = get_peft_model(msam, config, autocast_adapter_dtype=False).eval()
    return move_saved_modules(model)


@torch.no_grad()
@pytest.mark.parametrize(("image_size", "lora"), [(None, False), (48, False), (None, True)])
def test_no_prompt_forward_gives_the_tasks_logits(sam, tmp_path, image_size, lora):
    model, size = tuned(sam, image_size, lora), image_size or 32
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
    before = model(pixels).logits
    for task in ("depth", "edges"):
        exported = task_to_sam(model, task, sam=sam)
        assert type(exported) is SamModel
        masks = exported(pixel_values=pixels, multimask_output=False).pred_masks
        torch.testing.assert_close(masks[:, 0], before[task], rtol=0, atol=1e-10)
        exported.save_pretrained(tmp_path / task)
        loaded = SamModel.from_pretrained(tmp_path / task)
        again = loaded(pixel_values=pixels, multimask_output=False).pred_masks
        torch.testing.assert_close(again, masks, rtol=0, atol=1e-12)
    assert (before["depth"] - before["edges"]).abs().max() > 1e-3
    after = model(pixels).logits
    assert all(torch.equal(after[task], before[task]) for task in TASKS)  # the tuned model is as it was


@torch.no_grad()
def test_prompts_are_those_of_the_sam(sam):
    exported = task_to_sam(tuned(sam), "depth", sam=sam)
    points = torch.rand(1, 1, 2, 2, dtype=torch.float64) * 32
    labels = torch.ones(1, 1, 2, dtype=torch.long)
    inputs = {"input_points": points, "input_labels": labels, "input_boxes": None, "input_masks": None}
    torch.testing.assert_close(exported.prompt_encoder(**inputs)[0], sam.prompt_encoder(**inputs)[0])


def test_a_merged_model_is_unmerged_in_the_copy_only(sam):
    model = tuned(sam)
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixels, tasks=["edges"]).logits["edges"]
        model.set_task("depth")
        model.merge_adapter()
        masks = task_to_sam(model, "edges")(pixel_values=pixels, multimask_output=False).pred_masks
    torch.testing.assert_close(masks[:, 0], expected, rtol=0, atol=1e-10)
    assert any(getattr(module, "merged", False) for module in model.modules())


class TestRefusals:
    def test_several_channels(self, sam):
        with pytest.raises(ValueError, match="'parts' has 3"):
            task_to_sam(tuned(sam), "parts")

    def test_unknown_task(self, sam):
        with pytest.raises(ValueError, match="Unknown task 'normals'"):
            task_to_sam(tuned(sam), "normals")

    def test_no_msam(self, sam):
        with pytest.raises(TypeError, match="got SamModel"):
            task_to_sam(sam, "depth")
