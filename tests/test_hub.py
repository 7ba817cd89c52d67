"""A saved adapter and its SAM are enough to get the mSAM back; everything else is refused by name."""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

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
    TALoraConfig,
    TaskSpec,
    load_adapter,
    push_adapter,
    save_adapter,
)
from peft_talora import hub as hub_module
from peft_talora.saving import directory as files_module

ROOT = Path(__file__).parents[1]
FROM_ADAPTER = MSamForMultiTask.from_adapter
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


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


class TestSaveAdapter:
    @pytest.mark.parametrize("make_config", [talora, lora])
    def test_round_trip(self, sam, sam_path, pixels, tmp_path, make_config):
        model = make(sam_path, make_config)
        expected = predict(model, pixels)
        path = save_adapter(model, tmp_path / "deep" / "adapter")
        assert path == tmp_path / "deep" / "adapter"
        files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert {p.name for p in path.iterdir()} == files | ({"msam.json"} if make_config is lora else set())
        assert [p.name for p in path.parent.iterdir()] == ["adapter"]  # nothing is left aside
        assert_same(predict(FROM_ADAPTER(path), pixels), expected)
        assert_same(predict(FROM_ADAPTER(path, base_model=sam), pixels), expected)

    def test_replaces_an_existing_one(self, sam, sam_path, pixels, tmp_path):
        path = tmp_path / "adapter"
        save_adapter(make(sam_path, lora), path)
        (path / "metrics.json").write_text("{}")
        model = make(sam_path, tasks={"depth": TaskSpec("depth")}, image_size=32)
        save_adapter(model, path)
        small = pixels[..., :32, :32]
        assert_same(predict(FROM_ADAPTER(path), small), predict(model, small))
        assert (path / "metrics.json").read_text() == "{}"

    def test_the_active_one_of_several(self, sam_path, pixels, tmp_path):
        model = make(sam_path)
        model.add_adapter("second", talora(None, r=2))
        model.set_adapter("second")
        model.eval()
        for _ in range(2):  # the second time onto the first
            save_adapter(model, tmp_path / "adapter")
            assert_same(predict(FROM_ADAPTER(tmp_path / "adapter"), pixels), predict(model, pixels))
        assert not [p for p in (tmp_path / "adapter").iterdir() if p.is_dir()]

    @pytest.mark.parametrize("fails_at", range(6))
    def test_an_interrupted_save_leaves_the_old_or_the_new_one(
        self, sam_path, pixels, tmp_path, monkeypatch, fails_at
    ):
        path, calls = tmp_path / "adapter", []
        first, second = make(sam_path), make(sam_path, scaling=2.0)
        save_adapter(first, path)

        class Killed(BaseException):
            pass

        def killed(function):
            def run(*args, **kwargs):
                calls.append(function.__name__)
                if len(calls) > fails_at:
                    raise Killed
                return function(*args, **kwargs)

            return run

        # the card, the rename that decides, then every file on its way to its place
        monkeypatch.setattr(hub_module, "model_card", killed(hub_module.model_card))
        monkeypatch.setattr(files_module.os, "rename", killed(os.rename))
        monkeypatch.setattr(files_module.os, "replace", killed(os.replace))
        with contextlib.suppress(Killed):
            save_adapter(second, path)
        assert calls[:3] == ["model_card", "rename", "replace"][: fails_at + 1]
        monkeypatch.undo()
        expected = second if fails_at >= 2 else first
        loaded = FROM_ADAPTER(path)
        assert loaded.peft_config["default"].scaling == expected.peft_config["default"].scaling
        assert_same(predict(loaded, pixels), predict(expected, pixels))
        assert [p.name for p in tmp_path.iterdir() if p.name != "sam"] == ["adapter"]

    def test_peft_finishes_an_interrupted_save(self, sam, pixels, tmp_path):
        path = save_adapter(make(sam), tmp_path / "adapter")
        second = make(sam, scaling=2.0)
        save_adapter(second, path / files_module.PENDING)  # killed after the rename that decides
        msam = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        assert_same(predict(PeftModel.from_pretrained(msam, path), pixels), predict(second, pixels))

    def test_one_adapter_on_top_of_another(self, sam, tmp_path):
        msam = make(sam).get_base_model()
        with pytest.warns(UserWarning):
            model = get_peft_model(msam, lora(msam))
        with pytest.raises(ValueError, match=r"qkv' has one adapter on top of another \(Linear on TALoraLinear\)"):
            save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    @pytest.mark.parametrize("metrics", [{"miou": 0.3}, {"method": "talora", "tasks": {}}, [{"miou": 0.3}]])
    def test_metrics_of_another_form(self, sam, tmp_path, metrics):
        with pytest.raises(ValueError, match=r"`metrics` must be \{task: \{metric: value\}\}"):
            save_adapter(make(sam), tmp_path / "adapter", metrics=metrics)
        assert not (tmp_path / "adapter").exists()

    def test_what_is_no_msam(self, sam, tmp_path):
        model = get_peft_model(sam, TALoraConfig(tasks=["a"], r=2))
        with pytest.raises(TypeError, match="one around a SamModel"):
            save_adapter(model, tmp_path / "adapter")
        assert not list(tmp_path.iterdir())


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


class TestPush:
    @pytest.fixture
    def uploaded(self, monkeypatch, tmp_path):
        """Where the files go that huggingface_hub is asked to upload; the calls are checked against its signatures."""
        folder, self.calls = tmp_path / "uploaded", {}
        url = huggingface_hub.RepoUrl("https://huggingface.co/somebody/adapter")

        def answer(name, act):
            def called(api, *args, **kwargs):
                self.calls[name] = kwargs
                return act(**kwargs)

            function = create_autospec(getattr(huggingface_hub.HfApi, name), side_effect=called)
            monkeypatch.setattr(huggingface_hub.HfApi, name, function)

        def commit(operations, **kwargs):
            for operation in operations:
                (folder / operation.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)

        def no_card(*args, **kwargs):
            raise huggingface_hub.errors.LocalEntryNotFoundError("no card yet")

        answer("create_repo", lambda **kwargs: url)
        answer("create_branch", lambda **kwargs: None)
        answer("upload_folder", lambda folder_path, **kwargs: shutil.copytree(folder_path, folder) and "committed")
        answer("create_commit", commit)
        monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
        return folder

    @pytest.mark.parametrize("make_config", [talora, lora])
    def test_uploads_all_that_loading_needs(self, sam, pixels, tmp_path, uploaded, make_config):
        model = make(sam, make_config)
        assert push_adapter(model, "adapter", metrics={"depth": {"rmse": 0.5}}, private=True) == "committed"
        names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert {file.name for file in uploaded.iterdir()} == names | ({"msam.json"} if make_config is lora else set())
        assert_same(predict(FROM_ADAPTER(uploaded, base_model=sam), pixels), predict(model, pixels))
        card = (uploaded / "README.md").read_text()
        assert 'MSamForMultiTask.from_adapter("somebody/adapter"' in card and "| depth | rmse | 0.5 |" in card
        assert self.calls["create_repo"] == {"private": True, "exist_ok": True}
        upload = self.calls["upload_folder"]
        assert upload["repo_id"] == "somebody/adapter" and upload["revision"] is None and not upload["create_pr"]
        assert not Path(upload["folder_path"]).exists() and "create_branch" not in self.calls

    def test_to_a_branch(self, sam, uploaded):
        push_adapter(make(sam), "somebody/adapter", revision="v2", create_pr=True, commit_message="Better")
        assert self.calls["create_branch"] == {"branch": "v2", "exist_ok": True}
        upload = self.calls["upload_folder"]
        assert (upload["revision"], upload["create_pr"], upload["commit_message"]) == ("v2", True, "Better")

    def test_what_is_no_msam(self, sam, uploaded):
        for model in (sam, get_peft_model(sam, TALoraConfig(tasks=["a"], r=2))):
            with pytest.raises(TypeError, match="a SamModel; use its save_pretrained or push_to_hub"):
                push_adapter(model, "somebody/adapter")
        assert not self.calls

    def test_metrics_of_another_form(self, sam, uploaded):
        with pytest.raises(ValueError, match=r"`metrics` must be \{task: \{metric: value\}\}"):
            push_adapter(make(sam), "somebody/adapter", metrics={"miou": 0.3})
        assert not self.calls  # not even an empty repository

    def test_without_a_network(self, sam):
        with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
            push_adapter(make(sam), "somebody/adapter")

    def test_pefts_own_push_is_enough(self, sam, pixels, uploaded):
        model = make(sam)
        model.push_to_hub("somebody/adapter")
        names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert {file.name for file in uploaded.iterdir()} == names
        assert_same(predict(FROM_ADAPTER(uploaded, base_model=sam), pixels), predict(model, pixels))
