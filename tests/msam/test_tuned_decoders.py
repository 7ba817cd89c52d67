"""Tuned layers inside a task's decoder are those of that task, whatever the model is called for."""

import copy

import pytest
import torch
from peft import get_peft_model
from process_groups import in_a_process_group
from small_models import assert_same, images, label_maps, make_sam, move_saved_modules
from torch import nn
from torch.func import functional_call

from peft_talora import MSamForMultiTask, TALoraConfig, TALoraLayer, TaskSpec, save_adapter, task_to_sam

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
CHANNELS = {"semantic": 3, "depth": 1, "normals": 3}
IN_DECODERS = ["q_proj", "v_proj"]


def tuned(targets=("qkv", *IN_DECODERS), modules_to_save=(), mode="prompt"):
    msam = MSamForMultiTask.from_sam(make_sam().double(), TASKS, channel_mode=mode)
    saved = None if modules_to_save is None else list(modules_to_save)
    config = TALoraConfig(r=3, init_weights=False, target_modules=list(targets), modules_to_save=saved)
    return move_saved_modules(get_peft_model(msam, config, autocast_adapter_dtype=False)).eval()


def reference(model, embeddings):
    """The logits of every task: its decoder with W0 + dW_t, the sum written out, in the place of the tuned weights."""
    msam, logits = model.get_base_model(), {}
    for t, name in enumerate(TASKS):
        decoder, weights = msam.mask_decoders[name], {}
        for key, layer in decoder.named_modules():
            if isinstance(layer, TALoraLayer):
                G, U1, U2, U3 = (getattr(layer, f"talora_{factor}")["default"] for factor in ("G", "U1", "U2", "U3"))
                delta = 0.5 * torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[t])
                weights[f"{key}.weight"] = layer.base_layer.weight + delta
                weights[f"{key}.bias"] = layer.base_layer.bias
        assert len(weights) > 8
        plain = make_sam().double().mask_decoder
        rows = []
        for embed in msam.no_mask_embeds[name].weight:
            masks, _ = functional_call(
                plain,
                weights,
                kwargs={
                    "image_embeddings": embeddings[name],
                    "image_positional_embeddings": msam.get_image_wide_positional_embeddings(),
                    "sparse_prompt_embeddings": None,
                    "dense_prompt_embeddings": embed[None, :, None, None],
                    "multimask_output": False,
                },
            )
            rows.append(masks[:, 0, 0])
        logits[name] = torch.stack(rows, dim=1)
    return logits


def test_values_and_gradients():
    model, pixels = tuned(), images()
    output, expected = model(pixels).logits, reference(model, model.encode(pixels))
    assert_same(output, expected)
    assert (expected["depth"] - expected["normals"][:, :1]).abs().max() > 1e-3
    trained = [p for p in model.parameters() if p.requires_grad]
    cotangents = {name: torch.randn_like(value) for name, value in expected.items()}
    found = [
        torch.autograd.grad(sum((logits[name] * cotangents[name]).sum() for name in TASKS), trained)
        for logits in (output, expected)
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("targets", [("qkv", *IN_DECODERS), IN_DECODERS])
@pytest.mark.parametrize("mode", ["prompt", "token"])
@torch.no_grad()
def test_every_way_of_calling_gives_the_same(mode, targets):
    model, pixels = tuned(targets, mode=mode), images(3)
    expected, embeddings = model(pixels).logits, model.encode(pixels)
    if mode == "prompt":
        assert_same(expected, reference(model, embeddings))
    ids = ["normals", "depth", "normals"]
    for task in TASKS:
        model.set_task(task)
        assert_same(model(pixels).logits, expected)
        assert_same(model(pixels, task_chunk=1).logits, expected)
        assert_same(
            model(pixels, tasks=["normals", "semantic"]).logits, {n: expected[n] for n in ("normals", "semantic")}
        )
        assert_same(model(image_embeddings=embeddings).logits, expected)
        assert_same(model(image_embeddings=embeddings["depth"], tasks="depth").logits, {"depth": expected["depth"]})
        mixed = torch.stack([embeddings[name][row] for row, name in enumerate(ids)])
        for arguments in ({"pixel_values": pixels}, {"image_embeddings": mixed}):
            logits = model(**arguments, task_ids=ids).logits
            assert_same(
                logits,
                {
                    "semantic": expected["semantic"][:0],
                    "depth": expected["depth"][1:2],
                    "normals": expected["normals"][::2],
                },
            )
        for block in ("depth", ids):
            with model.use_task(block):
                assert_same(model(pixels).logits, expected)
    for copied in (copy.deepcopy(model), model.get_base_model()):
        assert_same(copied(pixels).logits, expected)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, pixels = tuned(), images()
    save_adapter(model, tmp_path)
    loaded = MSamForMultiTask.from_adapter(tmp_path, base_model=make_sam().double())
    loaded.set_task("normals")
    assert_same(loaded(pixels).logits, model(pixels).logits, atol=1e-6)


@pytest.mark.parametrize("targets", [("qkv", *IN_DECODERS), IN_DECODERS])
@torch.no_grad()
def test_merged_and_exported(targets):
    model, pixels = tuned(targets), images()
    expected = model(pixels).logits
    model.set_task("semantic")
    exported = task_to_sam(model, "depth")
    torch.testing.assert_close(
        exported(pixels, multimask_output=False).pred_masks[:, 0], expected["depth"], rtol=0, atol=1e-9
    )
    model.set_task("normals")
    model.merge_adapter()
    assert_same(model(pixels, tasks=["normals"]).logits, {"normals": expected["normals"]})
    model.unmerge_adapter()
    assert_same(model(pixels).logits, expected)
    merged = model.merge_and_unload()
    assert_same(merged(pixels).logits, {"normals": expected["normals"]})
    assert not [module for module in merged.modules() if isinstance(module, TALoraLayer)]


@in_a_process_group
def test_distributed_training_finds_no_unused_parameters():
    model, labels = tuned().train(), label_maps()
    parallel = nn.parallel.DistributedDataParallel(model)
    for ids in (["depth", "depth"], ["semantic", "normals"], None):
        parallel(images(), labels=labels, task_ids=ids).loss.backward()
