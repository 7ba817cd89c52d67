"""The order of the tasks travels with the weights, also where PEFT reads no configuration."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, set_task
from peft_talora.saving.settings import check_settings, split_settings, with_settings

SETTINGS = {"tasks": ["a", "b"], "scaling": 0.5, "enable_qkv": None}


def talora(**changes):
    return TALoraConfig(**{"tasks": ["organs", "vessels"], "r": 2, "init_weights": False, **changes})


class TestEntry:
    @pytest.mark.parametrize("front", ["", "base_model.model."])
    @pytest.mark.parametrize("adapter", ["default", "5", "a"])
    def test_survives_the_way_through_a_file(self, front, adapter):
        state = with_settings({f"{front}x.talora_G.{adapter}": torch.ones(1)}, SETTINGS, f"talora_U3.{adapter}")
        # as PEFT takes the adapter's name away
        state = {name.removesuffix(f".{adapter}"): value.half() * 2 for name, value in state.items()}
        tensors, settings = split_settings(state)
        assert list(tensors) == [f"{front}x.talora_G"] and settings == SETTINGS

    def test_none(self):
        assert split_settings({"x": 1}) == ({"x": 1}, None)
        assert with_settings({}, SETTINGS, "talora_U3.default") == {}
        check_settings(None, SETTINGS, {})

    @pytest.mark.parametrize("text", ["{.talora_U3", "3.talora_U3", ".talora_U3"])
    def test_damage(self, text):
        with pytest.raises(ValueError, match="settings cannot be read"):
            split_settings({f"base_model.model.settings:{text}": torch.empty(0)})

    def test_a_factor_may_be_edited_and_the_tasks_may_not(self):
        check_settings(SETTINGS, {**SETTINGS, "scaling": 0.7}, on_file=SETTINGS)
        for changes in ({"scaling": 0.7}, {"tasks": ["b", "a"]}, {"enable_qkv": [True, False, True]}):
            (name,) = changes
            with pytest.raises(ValueError, match=f"saved with {name}=.*, the adapter .* has {name}="):
                check_settings(SETTINGS, {**SETTINGS, **changes}, on_file={} if name == "scaling" else SETTINGS)


class TestOverAnAdapter:
    """Ways of PEFT that read no configuration; a Trainer that resumes uses the first."""

    OTHERS = [
        {"tasks": ["vessels", "organs"]},
        {"tasks": ["organs", "vessel"]},
        {"enable_qkv": [True, True, False]},
        {"scaling": 1.0},
    ]

    def save(self, sam, path, **changes):
        model = get_peft_model(sam, talora(**changes))
        model.save_pretrained(path)
        return get_peft_model_state_dict(model)

    @pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: next(iter(changes)))
    def test_other_settings_are_refused(self, sam_factory, tmp_path, changes):
        own = {"enable_qkv": [True, False, True]} if "enable_qkv" in changes else {}
        state = self.save(sam_factory(), tmp_path, **own)
        model = get_peft_model(sam_factory(), talora(**changes))
        before = copy.deepcopy(model.state_dict())
        (name,) = changes
        for load in (
            lambda: model.load_adapter(tmp_path, "default"),
            lambda: set_peft_model_state_dict(model, state),
            lambda: set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors")),
        ):
            with pytest.raises(ValueError, match=rf"saved with {name}=.*, the adapter .* has {name}=") as caught:
                load()
            assert str(changes[name]) in str(caught.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_the_same_settings_are_loaded(self, sam_factory, tmp_path):
        state = self.save(sam_factory(), tmp_path, enable_qkv=[True] * 3)
        model = get_peft_model(sam_factory(), talora())  # all three are what None means
        model.set_task("vessels")
        model.load_adapter(tmp_path, "default")
        again = get_peft_model_state_dict(model)
        assert all(torch.equal(again[name], value) for name, value in state.items() if value.numel())
        assert model.active_task == "vessels"  # weights replace weights

    def test_an_older_file(self, sam_factory):
        state, _ = split_settings(get_peft_model_state_dict(get_peft_model(sam_factory(), talora())))
        model = get_peft_model(sam_factory(), talora(tasks=["vessels", "organs"]))
        set_peft_model_state_dict(model, state)
        loaded, _ = split_settings(get_peft_model_state_dict(model))
        assert state and all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_an_msam_with_its_tasks_in_another_order(self, sam, tmp_path):
        tasks = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth")}
        get_peft_model(MSamForMultiTask.from_sam(sam, tasks), TALoraConfig(r=2)).save_pretrained(tmp_path)
        other = get_peft_model(MSamForMultiTask.from_sam(sam, dict(reversed(tasks.items()))), TALoraConfig(r=2))
        with pytest.raises(ValueError, match=r"tasks=\['semantic', 'depth'\].*tasks=\['depth', 'semantic'\]"):
            other.load_adapter(tmp_path, "default")

    def test_convlora_with_another_factor(self, sam_factory, tmp_path):
        get_peft_model(sam_factory(), ConvLoraConfig(convlora_alpha=8)).save_pretrained(tmp_path)
        model = get_peft_model(sam_factory(), ConvLoraConfig())
        with pytest.raises(ValueError, match=r"convlora_alpha=8, .* convlora_alpha=32"):
            model.load_adapter(tmp_path, "default")

    def test_a_configuration_whose_scaling_was_edited(self, sam_factory, tmp_path):
        self.save(sam_factory(), tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "scaling": 0.7}))
        model = PeftModel.from_pretrained(sam_factory(), tmp_path)
        assert model.peft_config["default"].scaling == 0.7
        model.save_pretrained(tmp_path / "again")
        model.load_adapter(tmp_path / "again", "default")


class TestActiveTask:
    def test_travels_with_the_adapter(self, sam_factory, tmp_path):
        model = get_peft_model(sam_factory(), talora())
        model.set_task("vessels")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(sam_factory(), tmp_path)
        assert loaded.active_task == "vessels"
        model.set_task("organs")
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
        assert loaded.active_task == "vessels"
        model.save_pretrained(tmp_path)
        assert PeftModel.from_pretrained(sam_factory(), tmp_path).active_task == "organs"

    def test_through_transformers(self, sam_factory, tmp_path):
        sam = sam_factory()
        sam.add_adapter(talora(), "one")
        set_task(sam, "vessels")
        sam.save_pretrained(tmp_path)
        other, pixels = sam_factory(), torch.randn(1, 3, 32, 32)
        other.load_adapter(str(tmp_path))
        outputs = [model.eval().vision_encoder(pixels).last_hidden_state for model in (sam, other)]
        torch.testing.assert_close(*outputs)
        set_task(other, "organs")
        assert (other.vision_encoder(pixels).last_hidden_state - outputs[0]).abs().max() > 1e-3

    def test_as_an_argument(self, sam):
        assert get_peft_model(sam, talora(active_task="vessels")).active_task == "vessels"
        with pytest.raises(ValueError, match=r"`active_task` must be one of the tasks \['organs', .*got 'bones'"):
            talora(active_task="bones")

    def test_it_is_one_of_the_model_s(self, sam):
        msam = MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth")})
        with pytest.raises(ValueError, match=r"one of the tasks \['depth'\], got 'edges'"):
            get_peft_model(msam, TALoraConfig(active_task="edges"))


def test_stock_tools_read_the_file(sam, tmp_path):
    get_peft_model(sam, talora()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    extra = [name for name in tensors if "settings" in name]
    assert len(extra) == 1 and tensors[extra[0]].numel() == 0 and '["organs", "vessels"]' in extra[0]
