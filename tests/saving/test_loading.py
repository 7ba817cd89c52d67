"""From a directory, or the Hub's cache, to the model that was saved."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from small_adapters import TASKS, assert_same, lora, make, predict, talora

from peft_talora import (
    MSamForMultiTask,
    load_adapter,
    save_adapter,
)

ROOT = Path(__file__).parents[2]
FROM_ADAPTER = MSamForMultiTask.from_adapter
pytestmark = pytest.mark.usefixtures("offline")


class TestPeftsOwnSaveIsEnough:
    def test_with_every_kind_of_base(self, sam, sam_path, pixels, tmp_path):
        model = make(sam_path)
        expected = predict(model, pixels)
        assert (expected["semantic"][:, :1] - expected["depth"]).abs().max() > 1e-3
        path = tmp_path / "adapter"
        model.save_pretrained(path)
        assert_same(predict(FROM_ADAPTER(path), pixels), expected)
        bases = (sam, sam_path, str(sam_path), MSamForMultiTask.from_sam(sam, TASKS, image_size=48))
        for base in bases:
            loaded = FROM_ADAPTER(str(path), base_model=base)
            assert isinstance(loaded, PeftModel) and isinstance(loaded.get_base_model(), MSamForMultiTask)
            assert_same(predict(loaded, pixels), expected)
            ids = ["a_normals", "depth"]
            assert_same(predict(loaded, pixels, task_ids=ids), predict(model, pixels, task_ids=ids))
        assert loaded.get_base_model() is bases[-1]
        assert loaded.get_base_model().task_specs == TASKS and list(loaded.get_base_model().task_specs) == list(TASKS)
        assert load_adapter(path).active_task == "semantic"

    def test_in_a_fresh_process(self, sam_path, pixels, tmp_path):
        model = make(sam_path)
        model.save_pretrained(tmp_path / "adapter")
        torch.save(pixels, tmp_path / "pixels.pt")
        code = """
import sys, torch
from peft_talora import MSamForMultiTask
model = MSamForMultiTask.from_adapter(sys.argv[1] + "/adapter")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/pixels.pt")).logits, sys.argv[1] + "/logits.pt")
"""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_same(torch.load(tmp_path / "logits.pt"), predict(model, pixels))

    def test_the_base_sam_is_not_changed(self, sam, sam_path, tmp_path):
        make(sam_path).save_pretrained(tmp_path / "adapter")
        before = copy.deepcopy(sam.state_dict())
        FROM_ADAPTER(tmp_path / "adapter", base_model=sam)
        after = sam.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def test_frozen_unless_it_is_to_be_trained(self, sam_path, tmp_path):
        model = make(sam_path)
        model.save_pretrained(tmp_path / "adapter")
        assert not any(p.requires_grad for p in FROM_ADAPTER(tmp_path / "adapter").parameters())
        loaded = FROM_ADAPTER(tmp_path / "adapter", is_trainable=True)
        names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
        assert names[0] == names[1] and len(names[0]) > 50

    def test_of_an_msam_that_was_itself_loaded(self, sam, pixels, tmp_path):
        MSamForMultiTask.from_sam(sam, TASKS, image_size=48).save_pretrained(tmp_path / "msam")
        model = get_peft_model(MSamForMultiTask.from_pretrained(tmp_path / "msam"), talora(None)).eval()
        model.save_pretrained(tmp_path / "adapter")
        assert_same(predict(FROM_ADAPTER(tmp_path / "adapter"), pixels), predict(model, pixels))

    def test_without_any_base(self, sam, tmp_path):
        make(sam).save_pretrained(tmp_path)  # a SAM that was made from a config has no name
        with pytest.raises(ValueError, match="does not say which SAM it was trained on: pass base_model="):
            FROM_ADAPTER(tmp_path)
        FROM_ADAPTER(tmp_path, base_model=sam)

    def test_its_base_is_gone(self, sam, sam_path, tmp_path):
        make(sam_path).save_pretrained(tmp_path / "adapter")
        sam_path.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match=str(sam_path)):
            FROM_ADAPTER(tmp_path / "adapter")
        FROM_ADAPTER(tmp_path / "adapter", base_model=tmp_path / "moved")


class TestArguments:
    @pytest.fixture
    def path(self, sam_path, tmp_path):
        model = make(sam_path)
        model.set_task("depth")
        return save_adapter(model, tmp_path / "adapter")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64])
    def test_dtype(self, path, sam, pixels, dtype):
        model = FROM_ADAPTER(path, base_model=sam, dtype=dtype)
        msam = model.get_base_model()
        expected = torch.float64 if dtype is torch.float64 else torch.bfloat16
        assert msam.dtype == msam.vision_encoder.layers[0].attn.qkv.base_layer.weight.dtype == expected
        # in half precision the adapter's own numbers stay as PEFT has them
        factor = msam.vision_encoder.layers[0].attn.qkv.talora_U1["default"]
        assert factor.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert sam.dtype == torch.float32
        if expected == torch.float64:
            torch.testing.assert_close(
                predict(model, pixels.double())["depth"].float(),
                predict(FROM_ADAPTER(path, base_model=sam), pixels)["depth"],
                rtol=1e-3,
                atol=1e-3,
            )

    @pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), "auto", {"": "cpu"}, "sequential"])
    def test_device_map(self, path, sam, pixels, device_map):
        model = FROM_ADAPTER(path, base_model=sam, device_map=device_map)
        assert_same(predict(model, pixels), predict(FROM_ADAPTER(path, base_model=sam), pixels))

    def test_to_another_device(self, path, sam):
        model = FROM_ADAPTER(path, base_model=sam, device_map="meta")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    def test_adapter_name(self, path, sam, pixels):
        model = FROM_ADAPTER(path, base_model=sam, adapter_name="rooms")
        assert model.active_adapters == ["rooms"] and list(model.peft_config) == ["rooms"]
        assert_same(predict(model, pixels), predict(FROM_ADAPTER(path, base_model=sam), pixels))
        model.load_adapter(path, "second")
        assert list(model.peft_config) == ["rooms", "second"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"adapter_name": "a.b"}, "`adapter_name` must be a name without dots, got 'a.b'"),
            ({"adapter_name": ""}, "`adapter_name` must be a name without dots, got ''"),
            ({"dtype": "int8"}, "`dtype` must be a floating point type .* got 'int8'"),
            ({"dtype": "bf16"}, "`dtype` must be a floating point type .* got 'bf16'"),
        ],
    )
    def test_impossible_ones(self, path, sam, arguments, message):
        with pytest.raises(ValueError, match=message):
            FROM_ADAPTER(path, base_model=sam, **arguments)

    def test_the_active_task_travels(self, path, sam):
        assert FROM_ADAPTER(path, base_model=sam).active_task == "depth"

    def test_a_base_that_has_an_adapter(self, path, sam, pixels):
        msam = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        model = FROM_ADAPTER(path, base_model=msam)
        expected = predict(model, pixels)
        with pytest.raises(ValueError, match=r"has an adapter already \('default'\).*load_adapter\(directory"):
            FROM_ADAPTER(path, base_model=msam)
        assert_same(predict(model, pixels), expected)
        # the way that the error names keeps both
        model.load_adapter(path, "another name")
        for name in ("another name", "default"):
            model.set_adapter(name)
            assert_same(predict(model.eval(), pixels), expected)


def cache(folder, hub_id, directory):
    """Lay a directory out in `folder` as huggingface_hub's cache does."""
    repository = folder / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789" * 4
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in directory.iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")


class TestHubCache:
    """From the Hub without a network: what was loaded once is loaded again."""

    @pytest.mark.parametrize("make_config", [talora, lora])
    def test_adapter_and_base(self, sam, sam_path, pixels, tmp_path, monkeypatch, make_config):
        sam.name_or_path = "somebody/sam"
        model = make(sam, make_config)
        cache(tmp_path / "hub", "somebody/sam", sam_path)
        cache(tmp_path / "hub", "somebody/adapter", save_adapter(model, tmp_path / "adapter"))
        with pytest.raises(FileNotFoundError, match=r"There is no folder 'somebody/adapter'.* from the Hub either"):
            FROM_ADAPTER("somebody/adapter")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        for revision in (None, "main", "0123456789" * 4):
            loaded = FROM_ADAPTER("somebody/adapter", revision=revision)
        assert_same(predict(loaded, pixels), predict(model, pixels))
        assert loaded.get_base_model().name_or_path == "somebody/sam"
        with pytest.raises(FileNotFoundError, match="There is no folder 'somebody/adapter'"):
            FROM_ADAPTER("somebody/adapter", revision="v2")

    def test_another_cache(self, sam, tmp_path):
        cache(tmp_path / "hub", "somebody/adapter", save_adapter(make(sam), tmp_path / "adapter"))
        FROM_ADAPTER("somebody/adapter", base_model=sam, cache_dir=tmp_path / "hub")

    def test_through_peft(self, sam, pixels, tmp_path, monkeypatch):
        model = make(sam)
        path = save_adapter(model, tmp_path / "adapter")
        cache(tmp_path / "hub", "somebody/adapter", path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        msam = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        assert_same(predict(PeftModel.from_pretrained(msam, "somebody/adapter"), pixels), predict(model, pixels))
