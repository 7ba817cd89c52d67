"""The vision encoder of an mSAM is called, like a SAM's: hooks, compilation, offloading and sharding see it."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from peft import LoraConfig, get_peft_model
from process_groups import in_a_process_group
from small_models import assert_same, images, label_maps, make_sam, move_saved_modules
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.sam.modeling_sam import SamVisionEncoder

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, task_to_sam

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
IDS = ["depth", "normals"]


def make(dtype=torch.float64):
    return MSamForMultiTask.from_sam(make_sam().to(dtype), TASKS)


def tune(msam, **changes):
    model = get_peft_model(msam, TALoraConfig(r=3, init_weights=False, **changes), autocast_adapter_dtype=False)
    return move_saved_modules(model).eval()


class TestDropIn:
    def test_it_is_sams_encoder(self):
        sam, msam = make_sam().double(), make()
        encoder, pixels = msam.vision_encoder, images()
        assert isinstance(encoder, SamVisionEncoder)
        assert list(encoder.state_dict()) == list(sam.vision_encoder.state_dict())
        expected = sam.vision_encoder(pixels)
        assert torch.equal(encoder(pixels).last_hidden_state, expected.last_hidden_state)
        assert torch.equal(encoder(pixel_values=pixels, return_dict=False)[0], expected.last_hidden_state)
        for name in ("output_hidden_states", "output_attentions"):
            own, sams = encoder(pixels, **{name: True}), sam.vision_encoder(pixels, **{name: True})
            own, sams = (output[name.removeprefix("output_")] for output in (own, sams))
            assert len(own) == len(sams) and all(torch.equal(a, b) for a, b in zip(own, sams, strict=True))
        with pytest.raises(ValueError, match="pixel_values"):
            encoder()

    @pytest.mark.parametrize("layers", [None, [1], [2]])
    def test_its_parts_are_the_whole(self, layers):
        model, pixels = tune(make(), layers_to_transform=layers), images()
        encoder = model.vision_encoder
        trunk = encoder(pixels, trunk_only=True)
        for index, name in enumerate(TASKS):
            model.set_task(name)
            whole = encoder(pixels).last_hidden_state
            assert torch.equal(encoder(trunk_states=trunk).last_hidden_state, whole)
            model.set_task("semantic")
            assert torch.equal(encoder(pixels, branches=[index]).last_hidden_state, whole)
        assert model.active_task == "semantic"

    def test_exported_models_are_plain(self):
        model, pixels = tune(make()), images()
        sam = task_to_sam(model, "depth")
        assert type(sam.vision_encoder) is SamVisionEncoder
        torch.testing.assert_close(sam(pixels, multimask_output=False).pred_masks[:, 0], model(pixels).logits["depth"])


class TestHooks:
    CALLS = (
        ({"tasks": ["depth"]}, [2]),
        ({}, [6]),
        ({"task_ids": IDS}, [2]),
        ({"task_chunk": 1}, [2, 2, 2, 2]),  # the trunk, and each task
    )

    @pytest.mark.parametrize(("arguments", "rows"), CALLS)
    def test_a_forward_hook_runs(self, arguments, rows):
        model, seen = tune(make()), []
        model.vision_encoder.register_forward_hook(
            lambda _, args, out: seen.append(len(out if isinstance(out, torch.Tensor) else out.last_hidden_state))
        )
        model(images(), **arguments)
        assert seen == rows

    def test_a_forward_hook_can_change_the_output(self):
        model, pixels = tune(make()), images()
        expected = model(image_embeddings={name: 2 * value for name, value in model.encode(pixels).items()}).logits

        def double(module, args, output):
            output["last_hidden_state"] = 2 * output.last_hidden_state
            return output

        model.vision_encoder.register_forward_hook(double)
        assert_same(model(pixels).logits, expected)

    def test_untuned_and_plain_lora(self):
        for model in (make(), get_peft_model(make(), LoraConfig(r=2, target_modules=["qkv"]))):
            calls = []
            model.vision_encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            model(images())
            assert calls == [1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"task_ids": IDS}, {"tasks": ["normals"]}])
def test_compiled(arguments):
    model, pixels, graphs = tune(make()), images(), []
    expected = model(pixels, **arguments).logits

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model.vision_encoder.compile(backend=backend, fullgraph=True)
    assert_same(model(pixels, **arguments).logits, expected)
    assert graphs
    number = len(graphs)
    assert_same(model(pixels, **arguments).logits, expected)
    assert len(graphs) == number


class TestOffloaded:
    PLACES = ("shared_image_embedding", "no_mask_embeds", "mask_decoders")

    def offloaded(self, folder, where="disk"):
        make(torch.float32).save_pretrained(folder / "msam")
        places = {"vision_encoder": where, **dict.fromkeys(self.PLACES, "cpu")}
        return MSamForMultiTask.from_pretrained(folder / "msam", device_map=places, offload_folder=folder / "offload")

    def test_encoder_on_disk(self, tmp_path):
        msam, pixels = self.offloaded(tmp_path), images(dtype=torch.float32)
        assert msam.vision_encoder.pos_embed.device.type == "meta"
        assert isinstance(msam.vision_encoder._hf_hook, AlignDevicesHook)
        for arguments in ({}, {"task_ids": IDS}):
            assert_same(msam(pixels, **arguments).logits, make(torch.float32)(pixels, **arguments).logits, atol=1e-5)


def shard(msam):
    fully_shard(msam.vision_encoder, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert any(isinstance(parameter, DTensor) for parameter in msam.vision_encoder.parameters())


@pytest.mark.parametrize("first", ["shard", "tune"])
@in_a_process_group
def test_fully_sharded(first):
    pixels, labels, found = images(), label_maps(), []
    for sharded in (False, True):
        torch.manual_seed(0)
        msam = make()
        # what is trained in full is copied, which a shard cannot be
        changes = {"modules_to_save": ["mask_decoders.depth"]} if first == "shard" else {}
        if sharded and first == "shard":
            shard(msam)
        model = get_peft_model(msam, TALoraConfig(r=3, init_weights=False, **changes), autocast_adapter_dtype=False)
        if sharded and first == "tune":
            shard(msam)
        output = model(pixels, labels=labels)
        output.loss.backward()
        model(pixels, task_ids=IDS, labels=labels).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()} | output.losses)
    assert_same(found[1], found[0])


@in_a_process_group
def test_norms_of_a_sharded_encoder_are_not_copied():
    msam = make()
    shard(msam)
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.0\.layer_norm1' is sharded.*after get_peft_model"):
        get_peft_model(msam, TALoraConfig(r=3))
