"""What the tasks of an image share, and how many of them run at once."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from small_models import label_maps

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, use_task

TASKS = {
    "semantic": TaskSpec("semantic", num_channels=3),
    "depth": TaskSpec("depth", weight=0.5),
    "normals": TaskSpec("normals", weight=2.0),
}


def tuned(sam, **changes):
    config = TALoraConfig(r=3, init_weights=False, **changes)
    return get_peft_model(MSamForMultiTask.from_sam(sam.double(), TASKS), config, autocast_adapter_dtype=False)


def pixels(batch=2):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_tasks_in_chunks_give_the_same(sam, chunk):
    model, images, labels = tuned(sam), pixels(), label_maps()
    everything = model(images, labels=labels)
    everything.loss.backward()
    expected, rows = gradients(model), []
    model.vision_encoder.layers[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    output = model(images, labels=labels, task_chunk=chunk)
    output.loss.backward()
    assert_same(output.logits, everything.logits)
    assert_same(gradients(model), expected)
    assert rows == {1: [2, 2, 2], 2: [4, 2], 3: [6], 7: [6]}[chunk]
    assert_same(model.encode(images, task_chunk=chunk), model.encode(images))


@pytest.mark.parametrize("layers", [None, [1], [2]])
def test_one_trunk_for_passes_one_after_the_other(sam, layers):
    model, images, labels = tuned(sam, layers_to_transform=layers, modules_to_save=[]), pixels(), label_maps()
    joint = model(images, labels=labels)
    joint.loss.backward()
    expected, calls = gradients(model), []
    for index, layer in enumerate(model.vision_encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    with torch.no_grad():  # nothing in it is trained
        trunk = model.encode_trunk(images)
    first = layers[0] if layers else 0
    assert trunk.shape == (2, 8, 8, 16) and calls == list(range(first))
    for name in TASKS:
        output = model(trunk_states=trunk, tasks=[name], labels=labels)
        torch.testing.assert_close(output.logits[name], joint.logits[name], rtol=0, atol=1e-10)
        output.loss.backward()
    assert_same(gradients(model), expected)
    assert calls == list(range(first)) + 3 * list(range(first, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 2], [2]])
@pytest.mark.parametrize("targets", [["qkv"], ["proj"], ["qkv", "proj", "lin1", "lin2"], ["lin2"]])
def test_all_tasks_at_once_are_those_of_one_after_the_other(sam, targets, layers, checkpointing):
    model = tuned(sam, layers_to_transform=layers, target_modules=targets, talora_dropout=0.0)
    images, labels = pixels(), label_maps()
    model(images, labels=labels, task_chunk=1).loss.backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    output = model(images, labels=labels)
    output.loss.backward()
    assert_same(gradients(model), expected)
    assert_same(output.logits, model(images, task_chunk=1).logits)


def test_trunk_states_with_task_ids(sam):
    model, images = tuned(sam, layers_to_transform=[1]), pixels(3)
    ids = ["normals", "semantic", "normals"]
    output = model(trunk_states=model.encode_trunk(images), task_ids=ids)
    assert_same(output.logits, model(images, task_ids=ids).logits)


def test_without_a_task_aware_layer_the_trunk_is_everything_but_the_neck(sam):
    msam, images = MSamForMultiTask.from_sam(sam.double(), TASKS), pixels()
    model = get_peft_model(msam, ConvLoraConfig(init_weights=False), autocast_adapter_dtype=False).eval()
    embedding = model.vision_encoder(images).last_hidden_state
    torch.testing.assert_close(model.vision_encoder.neck(model.encode_trunk(images)), embedding, rtol=0, atol=0)
    assert_same(model(trunk_states=model.encode_trunk(images)).logits, model(images).logits)


class TestBadInput:
    @pytest.mark.parametrize("chunk", [0, -1, 1.5, True, "all"])
    def test_chunk(self, sam, chunk):
        model, calls = tuned(sam), []
        model.vision_encoder.patch_embed.register_forward_pre_hook(lambda *_: calls.append(1))
        for call in (model, model.encode):
            with pytest.raises(ValueError, match=f"`task_chunk` must be a positive number of tasks, got {chunk!r}"):
                call(pixels(), task_chunk=chunk)
        assert not calls  # no encoder work for nothing

    def test_trunk_states(self, sam):
        model = tuned(sam)
        with pytest.raises(
            ValueError, match=r"trunk_states must have the shape \(batch, 8, 8, 16\), got \(2, 8, 8, 8\)"
        ):
            model(trunk_states=torch.zeros(2, 8, 8, 8))
        with pytest.raises(ValueError, match="exactly one of"):
            model(pixels(), trunk_states=torch.zeros(2, 8, 8, 16))


def test_an_adapter_of_the_encoder_alone_with_the_tasks_in_another_order(sam):
    msam = MSamForMultiTask.from_sam(sam, TASKS)
    names = list(TASKS)
    inject_adapter_in_model(TALoraConfig(tasks=names[::-1], r=2, init_weights=False), msam.vision_encoder)
    images = torch.randn(2, 3, 32, 32)
    message = (
        r"'default' in the \w+ has the tasks \['normals', 'depth', 'semantic'\], the model around it has \['semantic'"
    )
    for given in ({}, {"tasks": ["depth"]}, {"task_ids": ["depth", "normals"]}):
        with pytest.raises(ValueError, match=message):
            msam(images, **given)


def test_an_adapter_of_the_encoder_alone(sam):
    msam = MSamForMultiTask.from_sam(sam, TASKS).eval()
    inject_adapter_in_model(TALoraConfig(tasks=list(TASKS), r=2, init_weights=False), msam.vision_encoder)
    images, logits = torch.randn(2, 3, 32, 32), {}
    with torch.no_grad():
        for name in TASKS:
            with use_task(msam, name):
                embeddings = msam.vision_encoder(images).last_hidden_state
            logits[name] = msam(image_embeddings=embeddings, tasks=[name]).logits[name]
        found = msam(images).logits
    for name, expected in logits.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
