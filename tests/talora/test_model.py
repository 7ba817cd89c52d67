"""The tuner as PEFT and transformers use it: parameters, several adapters, files."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from small_models import adapter_size, differ, images
from torch import nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from peft_talora import TALoraConfig, TALoraLayer, TALoraLinear, set_task, use_task

FACTORS = ("G", "U1", "U2", "U3")


def config(tasks=("a", "b", "c"), **changes):
    return TALoraConfig(tasks=list(tasks), **{"r": 4, "r_task": 2, "init_weights": False, **changes})


def tuned(sam, *args, **changes):
    return get_peft_model(sam.double(), config(*args, **changes), autocast_adapter_dtype=False)


@torch.no_grad()
def predict(model, pixels, **kwargs):
    return model(pixel_values=pixels, **kwargs).pred_masks


# not 0: torch multiplies in another order where a weight requires a gradient
def assert_same(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestParameterCounts:
    """The numbers of the method on SAM's own sizes: d p + k q + T v + p q v per layer."""

    @pytest.mark.parametrize(
        ("hidden_size", "layers", "heads", "expected"),
        [(768, 12, 12, 1_228_944), (1024, 24, 16, 3_244_320), (1280, 32, 16, 5_374_336)],
        ids=["B", "L", "H"],
    )
    def test_adapter(self, hidden_size, layers, heads, expected):
        assert adapter_size(TALoraConfig(tasks=["a", "b", "c"]), hidden_size, layers, heads) == expected

    def test_mask_decoder(self):
        with torch.device("meta"):
            decoder = SamMaskDecoder(SamMaskDecoderConfig())
        assert sum(p.numel() for p in decoder.parameters()) == 4_058_340


class TestBareSam:
    def test_prompts_work_and_every_task_has_its_own_masks(self, sam):
        model, pixels = tuned(sam).eval(), images()
        boxes = torch.tensor([[[2.0, 3.0, 20.0, 25.0]], [[5.0, 5.0, 30.0, 12.0]]], dtype=torch.float64)
        masks = {}
        for task in ("a", "b", "c"):
            model.set_task(task)
            masks[task] = predict(model, pixels, input_boxes=boxes)
            assert differ(masks[task], predict(model, pixels))  # the prompt counts
        assert differ(masks["a"], masks["b"]) and differ(masks["b"], masks["c"])

    def test_only_the_adapter_is_trained(self, sam):
        model = tuned(sam)
        names = trainable(model)
        assert names == {
            f"base_model.model.vision_encoder.layers.{i}.attn.qkv.talora_{factor}.default"
            for i in range(3)
            for factor in FACTORS
        }
        model(pixel_values=images()).pred_masks.sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in names)
            assert parameter.grad is None or parameter.grad.abs().max() > 0

    def test_unload_gives_the_sam_back(self, sam):
        pixels, before = images(), None
        sam = sam.double()
        before = predict(sam, pixels)
        state = copy.deepcopy(sam.state_dict())
        model = tuned(sam)
        assert differ(predict(model, pixels), before)
        base = model.unload()
        assert base is sam and not any(isinstance(module, TALoraLayer) for module in base.modules())
        assert base.state_dict().keys() == state.keys()
        assert_same(predict(base, pixels), before)
        with pytest.raises(ValueError, match="no task-aware"):
            set_task(base, "a")

    def test_merge_and_unload_keeps_the_active_task(self, sam):
        model, pixels = tuned(sam).eval(), images()
        model.set_task("b")
        expected = predict(model, pixels)
        base = model.merge_and_unload()
        assert base is sam and not any(isinstance(module, TALoraLayer) for module in base.modules())
        assert_same(predict(base, pixels), expected, atol=1e-9)

    def test_merge_adapter_and_a_forward_for_another_task(self, sam):
        model, pixels = tuned(sam).eval(), images()
        model.set_task("b")
        expected = predict(model, pixels)
        model.merge_adapter()
        assert_same(predict(model, pixels), expected, atol=1e-9)
        assert_same(predict(model, pixels, task_ids=["b", "b"]), expected, atol=1e-9)
        with pytest.raises(ValueError, match=r"merged for the task 'b'.*'c'"):
            predict(model, pixels, task_ids=["b", "c"])
        model.unmerge_adapter()
        assert differ(predict(model, pixels, task_ids=["b", "c"])[1], expected[1])

    def test_disable_adapter_is_the_base(self, sam):
        pixels = images()
        before = predict(sam.double(), pixels)
        model = tuned(sam)
        with model.disable_adapter():
            assert_same(predict(model, pixels), before)
            assert_same(predict(model, pixels, task_ids=["a", "b"]), before)
        assert differ(predict(model, pixels), before)


class TestSeveralAdapters:
    def make(self, sam):
        model = tuned(sam, ("a", "b")).eval()
        model.add_adapter("other", config(("x", "b", "y"), r=3), autocast_adapter_dtype=False)
        return model

    def test_each_has_its_own_tasks(self, sam):
        model, pixels = self.make(sam), images()
        first = predict(model, pixels)
        assert model.active_task == "a"
        model.set_adapter("other")
        assert model.active_task == "x" and differ(predict(model, pixels), first)
        model.set_task("y")
        with pytest.raises(ValueError, match=r"'a'.*adapter 'other'"):
            predict(model, pixels, task_ids=["a", "a"])
        model.set_adapter("default")
        assert model.active_task == "a"
        assert_same(predict(model, pixels), first)
        model.set_adapter("other")
        assert model.active_task == "y"  # every adapter keeps its own

    def test_set_task_goes_to_all_that_know_it(self, sam):
        model = self.make(sam)
        model.set_task("b")
        assert model.active_task == "b"
        model.set_adapter("other")
        assert model.active_task == "b"
        model.set_task("x")
        model.set_adapter("default")
        assert model.active_task == "b"
        with pytest.raises(ValueError, match=r"Unknown task 'z'"):
            model.set_task("z")

    def test_only_the_active_one_is_trained(self, sam):
        model = self.make(sam)
        assert {name.rpartition(".")[2] for name in trainable(model)} == {"default"}
        model.set_adapter("other")
        assert {name.rpartition(".")[2] for name in trainable(model)} == {"other"}

    def test_delete_forgets_its_tasks(self, sam):
        model, pixels = self.make(sam), images()
        model.delete_adapter("other")
        assert not [name for name in model.state_dict() if "other" in name]
        with pytest.raises(ValueError, match=r"Unknown task 'x'.*\['a', 'b'\]"):
            model.set_task("x")
        # the name is free again, for other tasks
        model.add_adapter("other", config(("p", "q")), autocast_adapter_dtype=False)
        model.set_adapter("other")
        assert model.active_task == "p" and predict(model, pixels).isfinite().all()

    def test_added_to_other_layers(self, sam):
        model, pixels = tuned(sam, ("a", "b"), layers_to_transform=[0]).eval(), images()
        before = predict(model, pixels)
        model.add_adapter("late", config(("a", "c"), layers_to_transform=[2]), autocast_adapter_dtype=False)
        assert_same(predict(model, pixels), before)
        layers = [layer for layer in model.modules() if isinstance(layer, TALoraLinear)]
        assert [list(layer.talora_G) for layer in layers] == [["default"], ["late"]]
        assert not layers[1].talora_G["late"].requires_grad
        model.set_adapter("late")
        model.set_task("c")
        assert differ(predict(model, pixels), before)
        assert len({id(layer.task_router) for layer in layers}) == 1


class TestFiles:
    def test_state_dict_keys(self, sam):
        model = tuned(sam)
        state = get_peft_model_state_dict(model)
        # one entry holds no number: see saving/test_settings.py
        assert {name for name, value in state.items() if value.numel()} == {
            f"base_model.model.vision_encoder.layers.{i}.attn.qkv.talora_{factor}"
            for i in range(3)
            for factor in FACTORS
        }
        assert set_peft_model_state_dict(model, state).unexpected_keys == []

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_saved_adapter_gives_the_same_masks(self, sam, tmp_path, low_cpu_mem_usage):
        base = copy.deepcopy(sam.double())
        model, pixels = tuned(sam).eval(), images()
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(get_peft_model_state_dict(model))
        loaded = PeftModel.from_pretrained(
            base, tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage
        )
        loaded = loaded.double()
        assert loaded.peft_config["default"].tasks == ["a", "b", "c"] and not trainable(loaded)
        for ids in (["a", "a"], ["c", "b"]):
            assert_same(predict(loaded, pixels, task_ids=ids), predict(model, pixels, task_ids=ids))

    def test_loaded_to_be_trained_further(self, sam, tmp_path):
        base = copy.deepcopy(sam)
        tuned(sam).save_pretrained(tmp_path)
        assert len(trainable(PeftModel.from_pretrained(base, tmp_path, is_trainable=True))) == 12

    def test_load_adapter_beside_another(self, sam, sam_factory, tmp_path):
        other, pixels = tuned(sam_factory(), ("x", "y")).eval(), images()
        other.save_pretrained(tmp_path)
        model = tuned(sam).eval()
        model.load_adapter(tmp_path, "second", autocast_adapter_dtype=False)
        model.set_adapter("second")
        assert model.active_task == "x"
        assert_same(predict(model, pixels, task_ids=["x", "y"]), predict(other, pixels, task_ids=["x", "y"]), 1e-12)


class TestTransformersOwnMethods:
    def test_add_save_load_and_delete(self, sam, sam_factory, tmp_path):
        sam, pixels = sam.double(), images()
        before = predict(sam, pixels)
        sam.add_adapter(config())
        set_task(sam, "b")
        expected = predict(sam, pixels)
        assert differ(expected, before)
        sam.save_pretrained(tmp_path)

        loaded = sam_factory().double()
        loaded.load_adapter(str(tmp_path))
        with use_task(loaded, "b"):
            assert_same(predict(loaded, pixels), expected)
        with use_task(loaded, ["b", "c"]):
            mixed = predict(loaded, pixels)
        assert_same(mixed[0], expected[0], atol=1e-10)
        assert differ(mixed[1], expected[1])
        loaded.disable_adapters()
        assert_same(predict(loaded, pixels), before)
        loaded.enable_adapters()
        loaded.delete_adapter("default")
        assert_same(predict(loaded, pixels), before)

    def test_two_adapters_share_their_tasks(self, sam):
        sam.add_adapter(config(("a", "b")), adapter_name="one")
        sam.add_adapter(config(("b", "c")), adapter_name="two")
        set_task(sam, "b")
        routers = {id(m.task_router): m.task_router for m in sam.modules() if isinstance(m, TALoraLayer)}
        (router,) = routers.values()
        assert router.active == {"one": 1, "two": 0}


def test_repr_names_the_tuner():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 6)), config(target_modules=["0"]))
    assert "talora.TALoraLinear" in repr(model)
    assert model.get_layer_status()[0].module_type == "talora.TALoraLinear"
    assert model.get_model_status().adapter_model_type == "TALoraModel"
