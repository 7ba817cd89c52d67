"""A saved adapter is read once, and what could not be read again is not saved."""

import sys
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from small_adapters import (
    TASKS,
    assert_same,
    edit_json,
    forget_what_is_new,
    lora,
    make,
    predict,
    rewrite,
    some_key,
    talora,
)
from small_models import move_saved_modules

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, default_modules_to_save, save_adapter
from peft_talora.saving import directory as files_module

FROM_ADAPTER = MSamForMultiTask.from_adapter
pytestmark = pytest.mark.usefixtures("offline")


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

    @pytest.mark.parametrize("kind", ["loha", "ia3", "vera", "norms", "dora", "biases", "pissa", "nested"])
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


def test_of_pefts_own_tuners_a_task_has_another_name(sam, tmp_path):
    msam = MSamForMultiTask.from_sam(sam, {"default": TASKS["depth"]})
    with pytest.warns(UserWarning, match="A task is called 'default'.*call the task otherwise"):
        config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=default_modules_to_save(msam))
    with pytest.raises(ValueError, match="could not be loaded again, so it is not saved"):
        save_adapter(get_peft_model(msam, config), tmp_path / "adapter")


def test_a_sam_whose_configuration_has_tuples(sam_factory, pixels, tmp_path):
    sam = sam_factory(global_attn_indexes=(1,))
    model = get_peft_model(
        MSamForMultiTask.from_sam(sam, TASKS, image_size=48), TALoraConfig(r=2, init_weights=False)
    ).eval()
    save_adapter(model, tmp_path)
    assert_same(predict(FROM_ADAPTER(tmp_path, base_model=sam), pixels), predict(model, pixels))


@pytest.mark.parametrize("make_config", [TALoraConfig, ConvLoraConfig])
@pytest.mark.parametrize(
    "task, adapter_name", [("default", "default"), ("depth", "depth"), ("depth", "weight"), ("depth", "0")]
)
def test_a_task_called_like_the_adapter(sam, pixels, tmp_path, make_config, task, adapter_name):
    tasks = {task: TASKS["depth"], "edges": TaskSpec("binary")}
    msam = MSamForMultiTask.from_sam(sam, tasks, image_size=48)
    model = get_peft_model(msam, make_config(r=2, init_weights=False), adapter_name=adapter_name).eval()
    with torch.no_grad():
        move_saved_modules(model)
        expected = model(pixels).logits
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "pefts")
    for folder in ("ours", "pefts"):
        path = next((tmp_path / folder).rglob("adapter_config.json")).parent
        assert_same(predict(FROM_ADAPTER(path, base_model=sam), pixels), expected)


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
        assert FROM_ADAPTER(path).get_base_model().name_or_path == str(sam_path)

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
