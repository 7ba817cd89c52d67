"""The small models beside the scripts: what their folders hold, and that the scripts run on them."""

import json
import re
from pathlib import Path

import predict
import pytest
import torch
from bases import BASES, base_path
from PIL import Image
from pretraining.base import SIZE
from pretraining.model import BASES as PRETRAINED
from training.options import parse_args

from peft_talora import MSamForMultiTask, MSamProcessor

every_base = pytest.mark.parametrize("name", BASES)


@every_base
def test_its_folder(name):
    folder, base = Path(base_path(name)), PRETRAINED[name]
    model, fresh = base.model_class.from_pretrained(folder), base.model_class(base.config())
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in fresh.state_dict().items()
    }
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < 12e6
    assert (folder / "processor_config.json").exists() == (base.processor is not None)


@every_base
def test_its_card(name):
    card = (Path(base_path(name)) / "README.md").read_text()
    (box,) = re.findall(r"^\| box \| (0\.\d{3}) \|$", card, re.M)
    assert float(box) > 0.75 and "`test` split" in card


def test_a_name_is_a_folder_and_anything_else_itself():
    assert [Path(base_path(name)).name for name in BASES] == list(BASES)
    assert base_path("facebook/sam-vit-base") == "facebook/sam-vit-base" and base_path("./tiny_sam") == "./tiny_sam"
    assert parse_args(["--base", "tiny_sam2"]).base == base_path("tiny_sam2")


@every_base
def test_a_box_gives_a_mask_of_what_is_in_it(name):
    """A bright square on a dark ground, which weights that nobody trained do not find."""
    model = PRETRAINED[name].model_class.from_pretrained(base_path(name)).eval()
    square = torch.zeros(SIZE, SIZE)
    square[32:96, 40:88] = 1
    image = Image.fromarray((60 + 150 * square).byte().numpy()).convert("RGB")
    msam = MSamForMultiTask.from_sam(model, {"mask": {"kind": "binary"}})
    pixels = MSamProcessor.from_model(msam)([image])["pixel_values"]
    with torch.no_grad():
        boxes = torch.tensor([[[40.0, 32.0, 87.0, 95.0]]])
        logits = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks[0, 0]
    mask = torch.nn.functional.interpolate(logits[None], size=(SIZE, SIZE), mode="bilinear")[0, 0] > 0
    iou = (mask & square.bool()).sum() / (mask | square.bool()).sum()
    assert iou > 0.7


@pytest.mark.slow
def test_training_and_prediction_on_the_small_sam_2(run, tmp_path):
    run(tmp_path / "run", "--base", "tiny_sam2", "--baseline", "none", "--tasks", "depth")
    adapter = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base_path("tiny_sam2")
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "photo.png")
    command = [str(tmp_path / "photo.png"), "--adapter", str(tmp_path / "run"), "--output-dir", str(tmp_path / "maps")]
    assert predict.main(command) == 0
    assert Image.open(tmp_path / "maps/photo/depth.png").size == (60, 40)
