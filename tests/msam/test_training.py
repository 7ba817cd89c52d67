"""Training an mSAM, and the one-task mSAM that is merged from it."""

import pytest
import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from small_models import MAKERS, OTHER_FAMILIES, assert_same, differ, images, label_maps, side_of, train
from small_msams import NAMES, lora_config, make, predict, specs, tuned

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TALoraLayer,
)


class TestMerge:
    def test_merge_and_unload_leaves_an_msam_of_the_active_task(self, sam):
        model, pixels = tuned(sam), images()
        expected = predict(model, pixels)
        model.set_task("normals")
        merged = model.merge_and_unload()
        assert type(merged) is MSamForMultiTask
        assert list(merged.task_specs) == merged.config.task_names == ["normals"]
        assert list(merged.mask_decoders) == list(merged.no_mask_embeds) == ["normals"]
        assert not any(isinstance(m, TALoraLayer | ModulesToSaveWrapper) for m in merged.modules())
        assert_same(predict(merged, pixels), {"normals": expected["normals"]})
        with pytest.raises(ValueError, match=r"Unknown tasks \['depth'\].*\['normals'\]"):
            merged(pixels, tasks=["depth"])

    def test_the_task_of_a_with_block_counts(self, sam):
        model, pixels = tuned(sam), images()
        expected = predict(model, pixels)
        with model.use_task("depth"):
            merged = model.merge_and_unload()
        (name,) = merged.task_specs
        assert_same(predict(merged, pixels), {name: expected[name]})

    def test_refused_merges_change_nothing(self, sam):
        model, pixels = tuned(sam), images()
        expected = predict(model, pixels)
        with model.use_task(["depth", "normals"]), pytest.raises(ValueError, match="Only one task can be merged"):
            model.merge_and_unload()
        assert_same(predict(model, pixels), expected)
        model.set_task("depth")
        model.merge_adapter()
        model.set_task("normals")
        # neither depth's weights with the decoder of normals, nor a silent change to the other task
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"merged for the task 'depth' already.*'normals'"):
                merge()
        model.unmerge_adapter()
        assert_same(predict(model, pixels), expected)

    def test_adapters_of_two_tasks_do_not_make_one_msam(self, sam):
        model = tuned(sam)
        model.add_adapter("second", TALoraConfig(r=2, modules_to_save=[]), autocast_adapter_dtype=False)
        model.set_task("depth")
        model.merge_adapter(adapter_names=["second"])
        model.set_task("normals")
        with pytest.raises(ValueError, match=r"the tasks \['depth', 'normals'\]"):
            model.merge_and_unload()

    def test_other_tasks_while_merged(self, sam):
        model, pixels = tuned(sam), images()
        expected = predict(model, pixels)
        model.set_task("depth")
        model.merge_adapter()
        assert_same(predict(model, pixels, tasks=["depth"]), {"depth": expected["depth"]})
        logits = predict(model, pixels, task_ids=["depth"] * 2)
        torch.testing.assert_close(logits["depth"], expected["depth"], rtol=0, atol=1e-9)
        for arguments in ({}, {"tasks": ["normals"]}, {"tasks": ["depth", "normals"]}, {"task_ids": [1, 2]}):
            with pytest.raises(ValueError, match="merged for the task 'depth'"):
                model(pixels, **arguments)
        model.unmerge_adapter()
        assert_same(predict(model, pixels), expected)

    def test_unload_keeps_all_tasks_and_what_was_trained_in_full(self, sam):
        # as with every PEFT tuner: modules_to_save stay, the update of the layers goes
        model, pixels = tuned(sam), images()
        before = predict(model, pixels)
        cores = {module: module.talora_G["default"] for module in model.modules() if isinstance(module, TALoraLayer)}
        saved = [core.detach().clone() for core in cores.values()]
        with torch.no_grad():
            for core in cores.values():
                core.zero_()
            expected = predict(model, pixels)
            for core, values in zip(cores.values(), saved, strict=True):
                core.copy_(values)
        msam = model.unload()
        assert list(msam.task_specs) == list(NAMES)
        assert not any(isinstance(m, TALoraLayer | ModulesToSaveWrapper) for m in msam.modules())
        assert_same(predict(msam, pixels), expected)
        assert differ(expected["depth"], before["depth"])

    def test_of_a_stock_lora_keeps_all_tasks(self, sam):
        msam, pixels = make(sam), images()
        model = tuned(sam, lora_config(msam))
        expected = predict(model, pixels)
        assert_same(predict(model.merge_and_unload(), pixels), expected)


class TestTraining:
    @pytest.mark.parametrize("task_ids", [None, ["normals", "depth"]])
    def test_gradient_checkpointing_gives_the_same_gradients(self, sam, task_ids):
        model, pixels, labels = tuned(sam).train(), images(), label_maps()
        gradients, calls = [], []
        model.vision_encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            model(pixels, labels=labels, task_ids=task_ids).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == 3  # the layer did run again
        plain, checkpointed = gradients
        assert plain.keys() == checkpointed.keys() and len(plain) > 50
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=1e-10, msg=name)

    def test_a_few_steps_lower_the_loss(self, sam):
        # four ranks for each of the three tasks
        model = get_peft_model(make(sam), TALoraConfig(r=12), autocast_adapter_dtype=False).train()
        pixels = images()
        labels = {
            "semantic": torch.ones(2, 8, 8, dtype=torch.long),
            "depth": torch.full((2, 1, 8, 8), 2.0),
            "normals": torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand(2, 3, 8, 8),
        }
        losses = train(model, lambda: model(pixels, labels=labels).loss, steps=30)
        assert losses[-1] < 0.5 * losses[0]

    def test_autocast(self, sam):
        model = get_peft_model(MSamForMultiTask.from_sam(sam, specs()), TALoraConfig(r=4, init_weights=False)).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images().float(), labels=label_maps())
        assert output.loss.dtype == torch.float32 and output.loss.isfinite()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    @pytest.mark.slow
    def test_compiles_to_one_graph(self, sam_factory):
        model, pixels, labels = tuned(sam_factory(num_hidden_layers=1)).eval(), images(), label_maps()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        arguments = {"tasks": ["depth", "normals"], "labels": labels}
        expected, output = model(pixels, **arguments), compiled(pixels, **arguments)
        assert_same(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", OTHER_FAMILIES)
    def test_the_other_families_compile_to_one_graph(self, family):
        model, pixels = tuned(MAKERS[family]()).eval(), images(size=side_of(family))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_same(compiled(pixels, tasks=["normals"]).logits, model(pixels, tasks=["normals"]).logits)
