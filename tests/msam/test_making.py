"""Where an mSAM comes from, what of it is trained, and what stays of it in a file."""

import copy
import re

import pytest
import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from small_models import assert_same, differ, images, move_saved_modules
from small_msams import CHANNELS, NAMES, lora_config, make, predict, specs, talora_config, tuned
from torch import nn
from transformers import AutoConfig, AutoModel, SamModel

from peft_talora import (
    MSamConfig,
    MSamForMultiTask,
    TALoraConfig,
    default_modules_to_save,
)


class TestWhatIsTrained:
    def test_default_modules_to_save(self, sam):
        msam = make(sam)
        assert set(default_modules_to_save(msam)) == {
            *(f"{part}.{name}" for part in ("mask_decoders", "no_mask_embeds") for name in NAMES),
            *(f"vision_encoder.layers.{i}.layer_norm{n}" for i in range(3) for n in (1, 2)),
        }
        with pytest.raises(ValueError, match="got SamModel"):
            default_modules_to_save(sam)

    @pytest.mark.parametrize("config", [talora_config, lora_config])
    def test_trained_are_adapter_decoders_embeddings_and_block_norms(self, sam, config):
        msam = make(sam)
        model = get_peft_model(msam, config(msam))
        parts = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.")
                parts.add(
                    re.match(r"mask_decoders|no_mask_embeds|vision_encoder\.[a-z_]+(\.\d\.[a-z_0-9]+)?", name)[0]
                )
                assert "modules_to_save.default" in name or re.search(r"talora_\w+\.default|lora_[AB]\.default", name)
        blocks = {
            f"vision_encoder.layers.{i}.{part}" for i in range(3) for part in ("attn", "layer_norm1", "layer_norm2")
        }
        assert parts == {"mask_decoders", "no_mask_embeds", *blocks}
        neck = msam.vision_encoder.neck
        assert isinstance(neck.layer_norm1, nn.Module) and not isinstance(neck.layer_norm1, ModulesToSaveWrapper)
        assert not any(parameter.requires_grad for parameter in neck.parameters())

    def test_own_list_replaces_the_default(self, sam):
        assert len(tuned(sam).peft_config["default"].modules_to_save) == 12
        model = tuned(sam, modules_to_save=[])
        assert all("talora_" in name for name, p in model.named_parameters() if p.requires_grad)
        model = tuned(sam, modules_to_save=["mask_decoders.depth"])
        names = [n for n, p in model.named_parameters() if p.requires_grad and "talora_" not in n]
        assert names and all(".mask_decoders.depth.modules_to_save.default." in name for name in names)

    @pytest.mark.parametrize("config", [talora_config, lora_config])
    def test_added_adapter_gets_the_same(self, sam, config):
        msam = make(sam)
        model = get_peft_model(msam, config(msam))
        before = [name for name, p in model.named_parameters() if p.requires_grad]
        model.add_adapter("second", config(msam))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == before
        model.set_adapter("second")
        after = [name for name, p in model.named_parameters() if p.requires_grad]
        assert {name.replace("second", "default") for name in after} == set(before)

    def test_transformers_own_add_adapter(self, sam):
        msam, pixels = make(sam), images()
        before = predict(msam, pixels)
        msam.add_adapter(TALoraConfig(r=2, init_weights=False))
        assert isinstance(msam.mask_decoders["depth"], ModulesToSaveWrapper)
        logits = predict(msam, pixels)
        assert differ(logits["depth"], before["depth"]) and differ(logits["depth"], logits["semantic"][:, :1])
        mixed = predict(msam, pixels, task_ids=["depth", "normals"])
        torch.testing.assert_close(mixed["depth"], logits["depth"][:1], rtol=0, atol=1e-9)


class TestFromSam:
    def test_starts_with_copies_of_sams_weights(self, sam):
        msam = make(sam)
        no_mask = sam.prompt_encoder.no_mask_embed.weight
        for name in NAMES:
            assert torch.equal(msam.no_mask_embeds[name].weight, no_mask.expand(CHANNELS[name], -1))
            state = msam.mask_decoders[name].state_dict()
            assert all(torch.equal(state[key], value) for key, value in sam.mask_decoder.state_dict().items())
            assert state.keys() == sam.mask_decoder.state_dict().keys()

    def test_sam_is_not_changed_nor_shared(self, sam):
        sam = sam.double()
        before, config = copy.deepcopy(sam.state_dict()), copy.deepcopy(sam.config.to_dict())
        trainable = [p.requires_grad for p in sam.parameters()]
        msam = make(sam, image_size=48)
        with torch.no_grad():
            for parameter in msam.parameters():
                parameter.add_(1.0)
        assert sam.config.to_dict() == config
        assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
        assert [p.requires_grad for p in sam.parameters()] == trainable

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_dtype_and_device_and_mode_follow(self, sam, dtype):
        msam = MSamForMultiTask.from_sam(sam.to(dtype), specs())
        assert {p.dtype for p in msam.parameters()} == {dtype} and msam.device == sam.device
        assert not msam.training and MSamForMultiTask.from_sam(sam.train(), specs()).training
        meta = MSamForMultiTask.from_sam(sam.to("meta"), specs())
        assert {p.device.type for p in meta.parameters()} == {"meta"}

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementation_follows(self, sam, implementation):
        sam.set_attn_implementation(implementation)
        sam = SamModel._from_config(sam.config, attn_implementation=implementation)
        msam = make(sam)
        assert msam.config._attn_implementation == implementation
        assert type(msam.vision_encoder.layers[0].attn) is type(sam.vision_encoder.layers[0].attn)
        assert msam.mask_decoders["depth"].config._attn_implementation == implementation

    def test_from_a_path(self, sam, tmp_path):
        sam.save_pretrained(tmp_path)
        pixels = images().float()
        expected = predict(MSamForMultiTask.from_sam(sam, specs()), pixels)
        for path in (tmp_path, str(tmp_path)):
            msam = MSamForMultiTask.from_sam(path, specs())
            assert_same(predict(msam, pixels), expected, atol=1e-6)
            assert msam.name_or_path == str(tmp_path)
        model = get_peft_model(msam, TALoraConfig(r=2))
        assert model.peft_config["default"].base_model_name_or_path == str(tmp_path)

    def test_tasks_may_be_dicts_and_keep_their_order(self, sam):
        tasks = {"normals": {"kind": "normals"}, "a": {"kind": "semantic", "num_channels": 2}}
        assert list(make(sam, tasks).task_specs) == ["normals", "a"]


class TestFiles:
    @pytest.mark.parametrize("load", [MSamForMultiTask.from_pretrained, AutoModel.from_pretrained])
    def test_save_and_load(self, sam, tmp_path, load):
        msam, pixels = make(sam, image_size=48), images(size=48)
        perturbed = get_peft_model(msam, TALoraConfig(r=2))  # so that decoders differ
        move_saved_modules(perturbed)
        msam = perturbed.merge_and_unload()
        msam.save_pretrained(tmp_path)
        loaded = load(tmp_path, dtype=torch.float64)
        assert type(loaded) is MSamForMultiTask and not loaded.training
        assert loaded.config.task_names == msam.config.task_names == ["semantic"]
        assert_same(predict(loaded, pixels), predict(msam, pixels), atol=1e-12)

    def test_tasks_come_back_in_order(self, sam, tmp_path):
        msam, pixels = make(sam), images()
        with torch.no_grad():
            for parameter in msam.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        msam.save_pretrained(tmp_path)
        loaded, info = MSamForMultiTask.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert list(loaded.task_specs) == list(NAMES) and loaded.task_specs == specs()
        assert_same(predict(loaded, pixels), predict(msam, pixels), atol=1e-12)
        assert AutoConfig.from_pretrained(tmp_path).task_names == list(NAMES)

    def test_a_config_without_tasks_makes_no_model(self):
        with pytest.raises(ValueError, match="at least one task"):
            MSamForMultiTask(MSamConfig())


class TestKeepTasks:
    def test_of_an_untuned_model(self, sam):
        msam, pixels = move_saved_modules(tuned(sam)).unload(), images()
        with torch.no_grad():
            msam.mask_decoders["depth"].upscale_conv1.weight.mul_(1.5)
        expected = predict(msam, pixels)
        assert differ(expected["depth"], expected["semantic"][:, :1])
        msam.keep_tasks(["normals", "depth"])
        assert msam.config.task_names == ["depth", "normals"]
        assert_same(predict(msam, pixels), {name: expected[name] for name in ("depth", "normals")})

    @pytest.mark.parametrize("config", [talora_config, lora_config])
    def test_of_a_tuned_model_it_is_refused(self, sam, config):
        """Its adapter stays one of all tasks: kept tasks would get the updates of others, or files that do not load."""
        msam = make(sam)
        model, pixels = move_saved_modules(get_peft_model(msam, config(msam))), images()
        expected = predict(model, pixels)
        with pytest.raises(ValueError, match=r"without an adapter.*pass tasks=\['depth'\].*merge or unload"):
            model.keep_tasks(["depth"])
        assert_same(predict(model, pixels), expected)
        merged = model.merge_and_unload()
        merged.keep_tasks([merged.config.task_names[0]])
