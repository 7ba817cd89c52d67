"""A saved adapter is complete, here and on the Hub; a save that is killed leaves the one before it."""

import contextlib
import os
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub.constants
import pytest
from peft import (
    PeftModel,
    get_peft_model,
)
from small_adapters import TASKS, assert_same, lora, make, predict, talora

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    push_adapter,
    save_adapter,
)
from peft_talora import hub as hub_module
from peft_talora.saving import directory as files_module

FROM_ADAPTER = MSamForMultiTask.from_adapter
pytestmark = pytest.mark.usefixtures("offline")


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
