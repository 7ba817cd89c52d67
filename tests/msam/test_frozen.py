"""What of the mask decoders gets no loss: frozen in every way of loading, and in no adapter's file."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from process_groups import in_a_process_group
from safetensors.torch import load_file, save_file
from small_models import label_maps, make_sam, move_saved_modules
from torch import nn
from transformers import SamModel

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    save_adapter,
    task_to_sam,
)
from peft_talora.msam.frozen import SavedDecoder

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
CONFIGS = {
    "talora": lambda msam: TALoraConfig(r=2, init_weights=False),
    "convlora": lambda msam: ConvLoraConfig(r=2, init_weights=False),
    "lora": lambda msam: LoraConfig(
        r=2, target_modules=["qkv"], init_lora_weights=False, modules_to_save=default_modules_to_save(msam)
    ),
}
# of a SamMaskDecoder, which gives one channel from mask token 0
UNTRAINED = ("iou_prediction_head.", *(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)))


def make(**options):
    return MSamForMultiTask.from_sam(make_sam(), TASKS, **options)


def tuned(kind, **options):
    msam = make(**options)
    return move_saved_modules(get_peft_model(msam, CONFIGS[kind](msam))).eval()


def untrained(model):
    return {name: p for name, p in model.named_parameters() if any(f".{part}" in name for part in UNTRAINED)}


def check_frozen(model, copies=1):
    """`copies` of every task's decoder, and nothing in them is trainable that has no loss."""
    parameters = untrained(model)
    assert len(parameters) == 3 * copies * len(
        [n for n, _ in make_sam().mask_decoder.named_parameters() if n.startswith(UNTRAINED)]
    )
    assert not [name for name, parameter in parameters.items() if parameter.requires_grad]


def pixels(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model):
    return model(pixels()).logits


def assert_same(got, expected):
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4)


@in_a_process_group
def train_in_parallel(model):
    """Two steps under DDP, which complains in the second of a parameter that the first one left without a gradient."""
    parallel = nn.parallel.DistributedDataParallel(model.train())
    for _ in range(2):
        parallel(pixels(), labels=label_maps()).loss.backward()


@pytest.mark.parametrize("mode", ["prompt", "token"])
def test_only_what_gets_no_gradient_is_frozen(mode):
    msam = make(channel_mode=mode)
    for parameter in msam.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sum(value.square().sum() for value in msam(pixels()).logits.values()).backward()
    for decoder in msam.mask_decoders.values():
        parameters = dict(decoder.named_parameters())
        frozen = {name for name, p in parameters.items() if not p.requires_grad}
        assert frozen == {name for name, p in parameters.items() if p.grad is None}
        used = 1 if mode == "prompt" else len(decoder.output_hypernetworks_mlps)
        assert f"output_hypernetworks_mlps.{used - 1}.proj_in.weight" in parameters.keys() - frozen
        # every mask token counts: the first one attends to the others
        assert decoder.mask_tokens.weight.grad.abs().sum(1).min() > 0


class TestFrozen:
    def test_of_an_msam(self, tmp_path):
        msam = make()
        check_frozen(msam)
        assert any(p.requires_grad for p in msam.mask_decoders["depth"].parameters())
        msam.save_pretrained(tmp_path)
        assigned = make()
        assigned.load_state_dict(copy.deepcopy(msam.state_dict()), assign=True)
        emptied = make().to("meta").to_empty(device="cpu")
        copies = [copy.deepcopy(msam), pickle.loads(pickle.dumps(msam)), copy.deepcopy(msam).half().float()]
        for model in (msam, MSamForMultiTask.from_pretrained(tmp_path), assigned, emptied, *copies):
            model.requires_grad_(True)
            check_frozen(model)

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_with_an_adapter(self, kind, tmp_path):
        model = tuned(kind)
        check_frozen(model, copies=2)  # of the original modules and the saved ones
        model.set_adapter("default")
        check_frozen(model, copies=2)
        with model.disable_adapter():
            check_frozen(model, copies=2)
        check_frozen(model, copies=2)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.set_adapter("default")
            check_frozen(copied, copies=2)
            assert isinstance(copied.get_base_model().mask_decoders["depth"], SavedDecoder)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        model.set_adapter("default")
        check_frozen(model, copies=2)
        model.add_adapter("second", CONFIGS[kind](model.get_base_model()))
        model.set_adapter("second")
        check_frozen(model, copies=3)
        model.delete_adapter("default")
        check_frozen(model, copies=2)

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_a_loaded_adapter_trains_under_ddp(self, kind, tmp_path):
        tuned(kind).save_pretrained(tmp_path / "adapter")
        for low in (False, True):
            model = PeftModel.from_pretrained(make(), tmp_path / "adapter", is_trainable=True, low_cpu_mem_usage=low)
            model.set_adapter("default")
            check_frozen(model, copies=2)
        train_in_parallel(model)


class TestSaved:
    @staticmethod
    def load_all(directory, kind):
        """The adapter, loaded in every way."""
        yield MSamForMultiTask.from_adapter(directory, base_model=make())
        for low in (False, True):
            yield PeftModel.from_pretrained(make(), directory, low_cpu_mem_usage=low).eval()
        over = tuned(kind)
        over.load_adapter(directory, "default")  # as Trainer resumes
        yield over.eval()
        beside = tuned(kind)
        beside.load_adapter(directory, "second")
        beside.set_adapter("second")
        yield beside.eval()

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_a_file_holds_what_is_trained(self, kind, tmp_path):
        model = tuned(kind)
        save_adapter(model, tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert not [name for name in saved if any(part in name for part in UNTRAINED)]
        numbers = sum(value.numel() for value in saved.values() if value.is_floating_point())
        assert numbers == model.get_nb_trainable_parameters()[0]
        for loaded in self.load_all(tmp_path, kind):
            assert_same(predict(loaded), predict(model))

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_files_of_earlier_versions(self, kind, tmp_path):
        """They hold the whole decoders."""
        model = tuned(kind)
        save_adapter(model, tmp_path / "new")
        model.save_pretrained(tmp_path / "old")
        if kind == "lora":
            fields = json.loads((tmp_path / "new" / "msam.json").read_text())
            del fields["saved_by"]
            (tmp_path / "old" / "msam.json").write_text(json.dumps(fields))
        path, base = tmp_path / "old" / "adapter_model.safetensors", make()
        tensors = load_file(path)
        for name, value in base.mask_decoders.state_dict().items():
            if any(part in name for part in UNTRAINED):
                # weight decay has moved them
                tensors[f"base_model.model.mask_decoders.{name}"] = 0.9 * value
        assert len(tensors) > len(load_file(path))
        save_file(tensors, path, metadata={"format": "pt"})
        for loaded in self.load_all(tmp_path / "old", kind):
            assert_same(predict(loaded), predict(model))
            decoder = loaded.get_base_model().mask_decoders["depth"]
            for name, value in base.mask_decoders["depth"].state_dict().items():
                if name.startswith(UNTRAINED):
                    assert torch.equal(decoder.state_dict()[f"modules_to_save.{loaded.active_adapter}.{name}"], value)

    @pytest.mark.parametrize("mode", ["prompt", "token"])
    def test_merged_and_exported_models_are_whole(self, mode, tmp_path):
        model, base = tuned("talora", channel_mode=mode), make(channel_mode=mode)
        model.set_task("depth")
        expected = predict(model)["depth"]
        sam = task_to_sam(model, "depth")
        assert type(sam) is SamModel
        torch.testing.assert_close(sam(pixels(), multimask_output=False).pred_masks[:, 0], expected, rtol=0, atol=1e-4)
        merged = model.merge_and_unload()
        assert type(merged.mask_decoders["depth"]) is type(base.mask_decoders["depth"])
        state = merged.mask_decoders["depth"].state_dict()
        for name, value in base.mask_decoders["depth"].state_dict().items():
            assert torch.equal(state[name], value) == name.startswith(
                UNTRAINED if mode == "prompt" else UNTRAINED[:1]
            ), name
        merged.save_pretrained(tmp_path)
        assert_same(predict(MSamForMultiTask.from_pretrained(tmp_path)), predict(merged))
