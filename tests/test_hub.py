"""A saved adapter and its SAM are enough to get the mSAM back; everything else is refused by name."""

import contextlib
import copy
import json
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
    AutoPeftModel,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from small_models import move_saved_modules
from torch import nn

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    load_adapter,
    push_adapter,
    save_adapter,
)
from peft_talora import hub as hub_module
from peft_talora.saving import directory as files_module
from peft_talora.saving import loading

ROOT = Path(__file__).parents[1]
# in no alphabetical order
TASKS = {
    "semantic": TaskSpec("semantic", num_channels=3, class_names=["wall", "floor", "door"]),
    "depth": TaskSpec("depth", weight=0.5),
    "a_normals": TaskSpec("normals"),
}
FROM_ADAPTER = MSamForMultiTask.from_adapter


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def sam_path(sam, tmp_path):
    sam.save_pretrained(tmp_path / "sam")
    return tmp_path / "sam"


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


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


class TestReading:
    @pytest.fixture
    def path(self, sam_path, tmp_path):
        return save_adapter(make(sam_path), tmp_path / "adapter")

    @pytest.fixture
    def events(self):
        """What happens to files, `(event, path, ...)`, while the test runs."""
        seen, active = [], True

        def hook(event, args):
            if active and (event == "open" or event.startswith("os.")):
                seen.append((event, *map(str, args)))

        sys.addaudithook(hook)  # for good
        yield seen
        active = False

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_every_file_once(self, path, sam, events, is_trainable):
        FROM_ADAPTER(path, base_model=sam, is_trainable=is_trainable)
        opened = [name for event, name, *_ in events if event == "open"]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert opened.count(str(path / name)) == 1, opened

    @pytest.mark.parametrize("moved", [[], ["adapter_config.json"]])
    def test_nothing_is_written(self, path, sam_path, sam, pixels, events, moved):
        """Not even where a save was interrupted: the folder may be read-only."""
        second = make(sam_path, scaling=2.0)
        pending = save_adapter(second, path / files_module.PENDING)
        for name in moved:
            (pending / name).rename(path / name)
        events.clear()
        loaded = FROM_ADAPTER(path, base_model=sam)
        touched = [event for event in events if event[1].startswith(str(path))]
        assert {event for event, *_ in touched} <= {"open", "os.listdir", "os.scandir"}
        assert {mode for event, _, mode, *_ in touched if event == "open"} == {"r"}
        assert_same(predict(loaded, pixels), predict(second, pixels))

    def test_beside_a_writer(self, path, sam_path, sam, pixels, monkeypatch):
        """Another save comes between the two files."""
        second = make(sam_path, scaling=2.0)
        read_bytes, calls = Path.read_bytes, []

        def read(file):
            calls.append(file.name)
            if len(calls) == 1:
                content = read_bytes(file)
                save_adapter(second, path)
                return content
            return read_bytes(file)

        monkeypatch.setattr(Path, "read_bytes", read)
        loaded = FROM_ADAPTER(path, base_model=sam)
        assert_same(predict(loaded, pixels), predict(second, pixels))

    def test_every_number_is_looked_at_once(self, path, sam, monkeypatch):
        looked_at, isfinite = [], torch.isfinite
        monkeypatch.setattr(torch, "isfinite", lambda value: (looked_at.append(value.shape), isfinite(value))[1])
        FROM_ADAPTER(path, base_model=sam)
        assert len(looked_at) == len([t for t in load_file(path / "adapter_model.safetensors").values() if t.numel()])


class TestWhatCouldNotBeLoadedAgain:
    """The other tuners of PEFT on an mSAM, and uses of LoRA that go wrong: loaded as saved, or not saved."""

    def config(self, kind, msam):
        saved = {"modules_to_save": default_modules_to_save(msam)}
        return {
            "loha": lambda: LoHaConfig(r=2, target_modules=["qkv"], **saved),
            "ia3": lambda: IA3Config(target_modules=["qkv"], feedforward_modules=[], **saved),
            "vera": lambda: VeraConfig(r=2, target_modules=["qkv"], save_projection=False, **saved),
            "norms": lambda: LNTuningConfig(target_modules=["layer_norm1"], modules_to_save=["mask_decoders.depth"]),
            "dora": lambda: LoraConfig(r=2, target_modules=["qkv"], use_dora=True, **saved),
            "biases": lambda: LoraConfig(r=2, target_modules=["qkv"], bias="all", **saved),
            "pissa": lambda: LoraConfig(r=2, target_modules=["qkv"], init_lora_weights="pissa", **saved),
            "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["qkv"], **saved),
            "by chance": lambda: LoraConfig(r=2, target_modules=["qkv"], init_lora_weights="pissa_niter_2", **saved),
            "nested": lambda: TALoraConfig(r=2, modules_to_save=["mask_decoders.depth", "layer_norm1"]),
        }[kind]()

    def tuned(self, sam, kind):
        msam = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        model = move_saved_modules(get_peft_model(msam, self.config(kind, msam)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "modules_to_save" not in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    @pytest.mark.parametrize("kind", ["loha", "ia3", "vera", "norms", "dora", "biases", "pissa"])
    def test_saved_and_loaded(self, sam, pixels, tmp_path, kind):
        model = self.tuned(sam, kind)
        save_adapter(model, tmp_path / "adapter")
        assert_same(predict(FROM_ADAPTER(tmp_path / "adapter", base_model=sam), pixels), predict(model, pixels))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (
                "boft",
                r"not saved: .*/adapter/adapter_config\.json describes no adapter that PEFT can put on an MSamFor",
            ),
            ("by chance", "init_lora_weights='pissa_niter_2' changed the SAM's own weights"),
            ("nested", r"not saved: .*/adapter/adapter_model\.safetensors cannot be loaded .*layer_norm1"),
        ],
    )
    def test_refused(self, sam, tmp_path, kind, message):
        model = self.tuned(sam, kind)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "adapter")
        assert not list(tmp_path.iterdir())

    def test_two_active_adapters(self, sam, tmp_path):
        model = make(sam, modules_to_save=[])
        model.add_adapter("second", talora(None, modules_to_save=[]))
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"One adapter is saved, but \['default', 'second'\] are active"):
            save_adapter(model, tmp_path / "adapter")


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


class TestChecksums:
    @pytest.fixture
    def path(self, sam, tmp_path):
        return save_adapter(make(sam, scaling=0.5), tmp_path / "adapter")

    def test_a_changed_weight(self, path, sam, pixels):
        before = predict(FROM_ADAPTER(path, base_model=sam), pixels)
        rewrite(path, lambda tensors: tensors[some_key(tensors, "talora_U1")].add_(1.0))
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved.*verify=False"):
            FROM_ADAPTER(path, base_model=sam)
        after = predict(FROM_ADAPTER(path, base_model=sam, verify=False), pixels)
        assert (after["depth"] - before["depth"]).abs().max() > 1e-3

    def test_a_configuration_edited_by_hand(self, path, sam):
        """It has no checksum: it loads where its values fit the weights."""
        edit_json(
            path / "adapter_config.json", lambda values: values.update(scaling=0.7, talora_dropout=0.25, note="mine")
        )
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['note'\]"):
            config = FROM_ADAPTER(path, base_model=sam).peft_config["default"]
        assert (config.scaling, config.talora_dropout) == (0.7, 0.25)

    @pytest.mark.parametrize(
        "changes", [{"r_task": 3}, {"r": 10**9}, {"r_in": 4}, {"enable_qkv": [True, True, False]}]
    )
    def test_one_that_does_not_fit(self, path, sam, changes):
        edit_json(path / "adapter_config.json", lambda values: values.update(changes))
        with pytest.raises(ValueError, match=r"tensor '.*talora_(G|U2)' has another shape"):
            FROM_ADAPTER(path, base_model=sam)

    def test_beside_a_stock_lora(self, sam, tmp_path):
        path = save_adapter(make(sam, lora), tmp_path / "adapter")
        edit_json(path / "adapter_config.json", lambda values: values.update(lora_alpha=3))
        assert FROM_ADAPTER(path, base_model=sam).peft_config["default"].lora_alpha == 3
        rewrite(path, lambda tensors: tensors[some_key(tensors, "lora_A")].add_(1.0))
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not as it was saved"):
            FROM_ADAPTER(path, base_model=sam)

    def test_the_base_may_move(self, path, sam_path):
        edit_json(path / "adapter_config.json", lambda values: values.update(base_model_name_or_path=str(sam_path)))
        FROM_ADAPTER(path)

    @pytest.mark.parametrize("make_config", [talora, lora])
    def test_of_an_older_version(self, sam, pixels, tmp_path, make_config):
        model = make(sam, make_config)
        path = save_adapter(model, tmp_path / "adapter")
        for name in {"adapter_config.json", "msam.json"} & {file.name for file in path.iterdir()}:
            edit_json(path / name, forget_what_is_new)
        assert_same(predict(FROM_ADAPTER(path, base_model=sam), pixels), predict(model, pixels))

    @pytest.mark.parametrize("make_config", [talora, lora])
    @pytest.mark.parametrize("verify", [True, False])
    def test_of_a_newer_version(self, sam, tmp_path, make_config, verify):
        path = save_adapter(make(sam, make_config), tmp_path / "adapter")
        file = path / ("msam.json" if make_config is lora else "adapter_config.json")
        edit_json(file, lambda values: values["saved_by"].update(format=2))
        with pytest.raises(ValueError, match=rf"{file.name} was saved in format 2.*Upgrade peft_talora"):
            FROM_ADAPTER(path, base_model=sam, verify=verify)


def forget_what_is_new(values):
    values.pop("saved_by", None)
    values.get("msam", values).pop("base", None)


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


class TestRefusedDirectories:
    def test_no_adapter_in_it(self, tmp_path, sam_path):
        for path in (tmp_path, sam_path):
            with pytest.raises(FileNotFoundError, match=rf"'{path}' is no saved adapter: .*adapter_config\.json"):
                FROM_ADAPTER(path)

    def test_a_missing_path(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"There is no folder 'runs/mutlitask'.* from the Hub either: "):
            FROM_ADAPTER("runs/mutlitask")
        # what can be no name on the Hub is not looked for there
        monkeypatch.setattr(loading, "snapshot_download", None)
        for path in (tmp_path / "missing", "./runs/mutlitask", "runs/rooms/mutlitask"):
            with pytest.raises(FileNotFoundError, match=f"There is no folder '{path}'; it is no name of an adapter"):
                FROM_ADAPTER(path)

    def test_a_file(self, sam, tmp_path):
        path = save_adapter(make(sam), tmp_path / "adapter") / "adapter_model.safetensors"
        with pytest.raises(FileNotFoundError, match=f"'{path}' is a file"):
            FROM_ADAPTER(path)

    def test_pickled_weights(self, sam, tmp_path):
        path = save_adapter(make(sam), tmp_path / "adapter")
        torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
        (path / "adapter_model.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"no adapter_model\.safetensors\. Its adapter_model\.bin is not read"
        ):
            FROM_ADAPTER(path, base_model=sam)

    def test_an_adapter_of_another_model(self, sam, tmp_path):
        for config in (LoraConfig(target_modules=["qkv"]), TALoraConfig(tasks=["a", "b"], r=2)):
            get_peft_model(copy.deepcopy(sam), config).save_pretrained(tmp_path)
            with pytest.raises(ValueError, match="not one of an MSamForMultiTask"):
                FROM_ADAPTER(tmp_path, base_model=sam)

    def test_a_broken_configuration(self, sam, tmp_path):
        path = save_adapter(make(sam), tmp_path / "adapter")
        config = path / "adapter_config.json"
        good = config.read_text()
        for text in (good[:50], good.replace('"TALORA"', '"UNKNOWN"')):
            config.write_text(text)
            with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
                FROM_ADAPTER(path, base_model=sam)

    @pytest.mark.parametrize("make_config", [talora, lora])
    def test_broken_msam_fields(self, sam, tmp_path, make_config):
        path = save_adapter(make(sam, make_config), tmp_path / "adapter")
        file = path / ("msam.json" if make_config is lora else "adapter_config.json")
        edit_json(file, lambda values: values.get("msam", values).pop("image_size"))
        with pytest.raises(ValueError, match=f"{file.name}.*image_size"):
            FROM_ADAPTER(path, base_model=sam)


class TestRefusedWeights:
    @pytest.fixture
    def path(self, sam, tmp_path):
        return save_adapter(make(sam), tmp_path / "adapter")

    def refuse(self, path, sam, message):
        base = MSamForMultiTask.from_sam(sam, TASKS, image_size=48)
        names = [name for name, _ in base.named_modules()]
        with pytest.raises(ValueError, match=message):
            FROM_ADAPTER(path, base_model=base)
        # a refused adapter leaves nothing in the model it was meant for
        assert [name for name, _ in base.named_modules()] == names

    @pytest.mark.parametrize("part", ["talora_U3", "mask_decoders.depth", "no_mask_embeds.a_normals", "layer_norm1"])
    def test_a_missing_tensor(self, path, sam, part):
        rewrite(path, lambda tensors: tensors.pop(some_key(tensors, part)))
        # without U3 not even the number of tasks is known: that is told as damage
        self.refuse(path, sam, rf"the tensor '.*{part}.*' is missing|is not as it was saved")

    def test_an_unexpected_tensor(self, path, sam):
        rewrite(path, lambda tensors: tensors.update({"base_model.model.vision_encoder.extra": torch.zeros(2)}))
        self.refuse(path, sam, "the tensor '.*extra' does not belong to the model")

    @pytest.mark.parametrize("part", ["talora_G", "no_mask_embeds.semantic"])
    def test_a_wrong_shape(self, path, sam, part):
        def cut(tensors):
            key = some_key(tensors, part)
            tensors[key] = tensors[key][1:].clone()

        rewrite(path, cut)
        self.refuse(path, sam, rf"the tensor '.*{part}.*' has another shape")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, path, sam, value):
        def spoil(tensors):
            tensors[some_key(tensors, "talora_U2")][0, 0] = value

        rewrite(path, spoil)
        self.refuse(path, sam, "the tensor '.*talora_U2' is not finite")

    @pytest.mark.parametrize("keep", [0, 7, 1000, -1])
    def test_a_truncated_file(self, path, sam, keep):
        file = path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refuse(path, sam, r"adapter_model\.safetensors is damaged")


class TestRefusedBases:
    @pytest.fixture
    def path(self, sam, tmp_path):
        return save_adapter(make(sam), tmp_path / "adapter")

    @pytest.mark.parametrize(
        "tasks",
        [
            {"depth": TaskSpec("depth", weight=0.5)},
            {name: TASKS[name] for name in ("depth", "semantic", "a_normals")},
            {**TASKS, "depth": TaskSpec("binary")},
        ],
    )
    def test_other_tasks(self, path, sam, tasks):
        with pytest.raises(ValueError, match=r"The adapter's task(s are| 'depth' is) .*th(ose|at) of the base model"):
            FROM_ADAPTER(path, base_model=MSamForMultiTask.from_sam(sam, tasks, image_size=48))

    def test_another_image_size(self, path, sam):
        with pytest.raises(ValueError, match="trained with image_size=48, the base model has 32"):
            FROM_ADAPTER(path, base_model=MSamForMultiTask.from_sam(sam, TASKS))

    def test_other_tasks_in_the_configuration_than_in_the_model(self, path, sam):
        edit_json(path / "adapter_config.json", lambda values: values["tasks"].reverse())
        with pytest.raises(
            ValueError, match=r"\['a_normals', 'depth', 'semantic'\].*\['semantic', 'depth', 'a_normals'\]"
        ):
            FROM_ADAPTER(path, base_model=sam)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 24}, "that has hidden_size=16, .* has hidden_size=24"),
            ({"num_hidden_layers": 4}, "that has num_hidden_layers=3, .* has num_hidden_layers=4"),
            # the same shapes, and another encoder
            ({"num_attention_heads": 4}, "that has num_attention_heads=2, .* has num_attention_heads=4"),
            (
                {"global_attn_indexes": [0], "window_size": 4},
                r"that has window_size=3, global_attn_indexes=\[1\], .* has window_size=4, global_attn_indexes=\[0\]",
            ),
        ],
    )
    def test_a_sam_of_other_sizes(self, path, sam_factory, sizes, message):
        other = sam_factory(**sizes)
        other.name_or_path = "other/sam"
        with pytest.raises(
            ValueError, match=f"trained on another SAM: {message.replace(', .*', ', the base model .other/sam.')}"
        ):
            FROM_ADAPTER(path, base_model=other)
        # through PEFT, too
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(MSamForMultiTask.from_sam(other, TASKS, image_size=48), path)

    def test_a_sam_of_other_sizes_and_an_older_adapter(self, path, sam_factory):
        edit_json(path / "adapter_config.json", forget_what_is_new)
        with pytest.raises(ValueError, match=r"has another shape than in the model: .*16.*, expected .*24"):
            FROM_ADAPTER(path, base_model=sam_factory(hidden_size=24))
        with pytest.raises(ValueError, match=r"layers\.3\..* is missing"):
            FROM_ADAPTER(path, base_model=sam_factory(num_hidden_layers=4))

    def test_a_sam_of_another_name_is_a_warning(self, sam, tmp_path, recwarn):
        sam.name_or_path = "somebody/sam"
        path = save_adapter(make(sam), tmp_path / "adapter")
        sam.name_or_path = str(tmp_path)  # a copy of it
        FROM_ADAPTER(path, base_model=sam)
        assert not [warning for warning in recwarn if "trained on" in str(warning.message)]
        sam.name_or_path = "somebody/other-sam"
        with pytest.warns(UserWarning, match="trained on 'somebody/sam', the base model is 'somebody/other-sam'"):
            FROM_ADAPTER(path, base_model=sam)

    def test_other_tasks_through_peft(self, path, sam):
        reverse = {name: TASKS[name] for name in reversed(TASKS)}
        for tasks, size in ((reverse, 48), (TASKS, 32)):
            with pytest.raises(ValueError, match=r"tasks of the adapter, \['sem.*\['a_norm|image_size=48, .* has 32"):
                PeftModel.from_pretrained(MSamForMultiTask.from_sam(sam, tasks, image_size=size), path)

    def test_neither_sam_nor_msam(self, path, sam):
        for base in (nn.Linear(2, 2), sam.vision_encoder):
            with pytest.raises(TypeError, match=f"got {type(base).__name__}"):
                FROM_ADAPTER(path, base_model=base)

    def test_a_bare_sam_through_peft(self, path, sam):
        with pytest.raises(
            ValueError, match=r"\['semantic', 'depth', 'a_normals'\], but the model is a SamModel.*from_adapter"
        ):
            PeftModel.from_pretrained(sam, path)

    def test_auto_peft_model(self, sam_path, tmp_path):
        path = save_adapter(make(sam_path), tmp_path / "adapter")
        # PEFT asks whether the package may be imported, and cannot make an mSAM of a SAM's checkpoint then
        with pytest.raises(ValueError, match=r"peft_talora\.msam\.modeling"):
            AutoPeftModel.from_pretrained(path)
        with pytest.raises(ValueError, match=r"MSamForMultiTask\.from_adapter"):
            AutoPeftModel.from_pretrained(path, import_allowlist=["peft_talora.msam.modeling"])
