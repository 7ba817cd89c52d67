"""Directories, weights and bases that do not fit are refused by name."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from small_adapters import (
    TASKS,
    edit_json,
    forget_what_is_new,
    lora,
    make,
    rewrite,
    some_key,
    talora,
)
from torch import nn

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, save_adapter
from peft_talora.saving import loading

FROM_ADAPTER = MSamForMultiTask.from_adapter
pytestmark = pytest.mark.usefixtures("offline")


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
