"""A merged task leaves Python: torch.export and ONNX, run by onnxruntime."""

import pytest
import torch
from peft import get_peft_model
from small_models import MAKERS, OTHER_FAMILIES, side_of
from torch import nn

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, lean_attention, task_to_sam

TASKS = {"depth": TaskSpec("depth"), "parts": TaskSpec("parts", 3)}
other_families = pytest.mark.parametrize("family", OTHER_FAMILIES)


class TaskLogits(nn.Module):
    """A model of one tensor in and one out, as deployment wants it."""

    def __init__(self, msam, task):
        super().__init__()
        self.msam, self.task = msam, task

    def forward(self, pixel_values):
        return self.msam(pixel_values=pixel_values, tasks=[self.task]).logits[self.task]


class SamLogits(nn.Module):
    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, pixel_values):
        return self.sam(pixel_values=pixel_values, multimask_output=False).pred_masks[:, 0]


def tuned(sam, channel_mode):
    msam = MSamForMultiTask.from_sam(sam, TASKS, channel_mode=channel_mode)
    return get_peft_model(msam, TALoraConfig(r=3, init_weights=False)).eval()


def merged(sam, channel_mode, task):
    """Its merged mSAM of one task, images, and what the unmerged model says of them."""
    model = tuned(sam, channel_mode)
    side = side_of(model.get_base_model().config.base_model_type)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = model(pixels, tasks=[task]).logits[task]
    model.set_task(task)
    return TaskLogits(model.merge_and_unload(), task).eval(), pixels, expected


@pytest.mark.slow
@pytest.mark.parametrize("channel_mode", ["prompt", "token"])
def test_torch_export(sam, channel_mode):
    model, pixels, expected = merged(sam, channel_mode, "parts")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": {0: batch}})
    torch.testing.assert_close(program.module()(pixels), expected, rtol=1e-4, atol=1e-4)
    more = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@other_families
def test_torch_export_of_the_other_families(family):
    model, pixels, expected = merged(MAKERS[family](), "prompt", "parts")
    program = torch.export.export(model, (pixels,))
    torch.testing.assert_close(program.module()(pixels), expected, rtol=1e-4, atol=1e-4)


def run_onnx(model, pixels, path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the runtime that runs the file")
    pytest.importorskip("onnxscript", reason="torch writes ONNX with it")
    torch.onnx.export(model, (pixels,), path, input_names=["pixel_values"], output_names=["logits"], dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(("channel_mode", "lean"), [("prompt", False), ("token", False), ("token", True)])
def test_onnx_of_a_merged_task(sam, tmp_path, channel_mode, lean):
    model, pixels, expected = merged(sam, channel_mode, "parts")
    if lean:
        lean_attention(model)
    torch.testing.assert_close(run_onnx(model, pixels, tmp_path / "parts.onnx"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@other_families
def test_onnx_of_the_other_families(family, tmp_path):
    model, pixels, expected = merged(MAKERS[family](), "prompt", "parts")
    torch.testing.assert_close(run_onnx(model, pixels, tmp_path / "parts.onnx"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_of_a_plain_sam(sam, tmp_path):
    model, pixels = tuned(sam, "prompt"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels, tasks=["depth"]).logits["depth"]
    exported = SamLogits(task_to_sam(model, "depth")).eval()
    torch.testing.assert_close(run_onnx(exported, pixels, tmp_path / "depth.onnx"), expected, rtol=1e-4, atol=1e-4)
