"""mSAM against a plain loop over images, tasks and channels with transformers' own modules."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from small_models import label_maps, move_saved_modules, train
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, SamModel

from peft_talora import (
    MSamConfig,
    MSamForMultiTask,
    MSamOutput,
    TALoraConfig,
    TALoraLayer,
    TaskSpec,
    auxiliary_loss,
    default_modules_to_save,
)
from peft_talora.losses import task_loss

NAMES = ("semantic", "depth", "normals")
CHANNELS = {"semantic": 3, "depth": 1, "normals": 3}


def specs():
    return {
        "semantic": TaskSpec("semantic", num_channels=3),
        "depth": TaskSpec("depth", weight=0.5),
        "normals": TaskSpec("normals", weight=2.0),
    }


def make(sam, tasks=None, **kwargs):
    return MSamForMultiTask.from_sam(sam.double(), tasks or specs(), **kwargs)


def tuned(sam, config=None, **changes):
    arguments = {"r_in": 4, "r_out": 3, "r_task": 2, "init_weights": False, **changes}
    model = get_peft_model(make(sam), config or TALoraConfig(**arguments), autocast_adapter_dtype=False)
    return move_saved_modules(model)


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def assert_same(got, expected, atol=1e-9):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol)


def differ(first, second):
    return (first - second).abs().max().item() > 1e-3


def task_parameters(model, task):
    """What is trained for one task alone, in the active adapter."""
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(rf"(mask_decoders|no_mask_embeds)\.{task}\.", name) and parameter.requires_grad
    }
    assert found
    return found


class Reference:
    """Each task a SAM of its own, W0 + dW_t in its qkv; each channel a dense prompt of its own."""

    def __init__(self, model, sam):
        self.model, self.sam = model, sam
        self.msam = model.get_base_model()

    def encoder_weights(self, t):
        weights = {}
        for index, layer in enumerate(self.msam.vision_encoder.layers):
            qkv = layer.attn.qkv
            if isinstance(qkv, TALoraLayer):
                G, U1, U2, U3 = (getattr(qkv, f"talora_{name}")["default"] for name in ("G", "U1", "U2", "U3"))
                delta = 0.5 * torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[t])
                weights[f"layers.{index}.attn.qkv.weight"] = self.sam_qkv(index) + delta
            for norm in ("layer_norm1", "layer_norm2"):
                for name, value in self.saved(getattr(layer, norm)).items():
                    weights[f"layers.{index}.{norm}.{name}"] = value
        return weights

    def sam_qkv(self, index):
        return self.sam.vision_encoder.layers[index].attn.qkv.weight.detach()

    @staticmethod
    def saved(wrapper):
        return dict(wrapper.modules_to_save["default"].named_parameters())

    def __call__(self, pixels):
        return {name: self.task(t, name, pixels) for t, name in enumerate(NAMES)}

    def task(self, t, name, pixels):
        embeds = self.saved(self.msam.no_mask_embeds[name])["weight"]
        decoder = self.saved(self.msam.mask_decoders[name])
        assert embeds.shape == (CHANNELS[name], 8)
        rows = []
        for image in pixels:
            encoder, weights = self.sam.vision_encoder, self.encoder_weights(t)
            embedding = functional_call(encoder, weights, (image[None],)).last_hidden_state
            rows.append(torch.stack([self.channel(embedding, embed, decoder) for embed in embeds]))
        return torch.stack(rows)

    def channel(self, embedding, embed, decoder):
        arguments = {
            "image_embeddings": embedding,
            "image_positional_embeddings": self.sam.get_image_wide_positional_embeddings(),
            "sparse_prompt_embeddings": None,
            "dense_prompt_embeddings": embed[None, :, None, None].expand_as(embedding),
            "multimask_output": False,
        }
        masks, _ = functional_call(self.sam.mask_decoder, decoder, kwargs=arguments)
        return masks[0, 0, 0]


class TestAgainstPlainSams:
    def test_logits_and_gradients(self, sam):
        model, pixels = tuned(sam), images().requires_grad_()
        expected = Reference(model, sam)(pixels)
        output = model(pixels)
        # the tasks differ in the encoder, and so do the channels of one task
        embeddings = model.encode(pixels)
        for one, other in (("semantic", "depth"), ("depth", "normals"), ("semantic", "normals")):
            assert differ(embeddings[one], embeddings[other])
        assert differ(expected["normals"][:, 0], expected["normals"][:, 1])
        assert {name: tuple(value.shape) for name, value in output.logits.items()} == {
            name: (2, CHANNELS[name], 32, 32) for name in NAMES
        }
        assert_same(output.logits, expected)
        assert output.loss is None and output.losses is None and output.image_index is None

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        cotangents = {name: torch.randn_like(value) for name, value in expected.items()}
        gradients = []
        for logits in (output.logits, expected):
            projection = sum((logits[name] * cotangents[name]).sum() for name in NAMES)
            gradients.append(torch.autograd.grad(projection, [pixels, *trained.values()]))
        kinds = ("talora_G", "talora_U1", "talora_U2", "talora_U3", "layer_norm1", "no_mask_embeds", "upscale_conv1")
        for name, got, want in zip(["pixels", *trained], *gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-8 * max(1.0, want.abs().max().item()), msg=name)
            assert want.abs().max() > 1e-3 or not any(kind in name for kind in ("pixels", *kinds)), name
        assert all(any(kind in name for name in trained) for kind in kinds)

    def test_one_task_per_image(self, sam):
        model, pixels = tuned(sam), images(4)
        tasks = ["normals", "semantic", "normals", "depth"]
        output = model(pixels, task_ids=tasks)
        expected = Reference(model, sam)(pixels)
        for name in NAMES:
            rows = [row for row, task in enumerate(tasks) if task == name]
            assert output.image_index[name].tolist() == rows
            torch.testing.assert_close(output.logits[name], expected[name][rows], rtol=0, atol=1e-9)

    def test_without_any_adapter_it_is_sam_without_prompts(self, sam):
        msam, pixels = make(sam), images()
        # all tasks and channels start as what SAM makes of no prompt at all
        expected = sam(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
        assert_same(predict(msam, pixels), {n: expected.expand(-1, CHANNELS[n], -1, -1) for n in NAMES})
        assert expected.std() > 1e-3


class TestEncoderCost:
    @staticmethod
    def count(model, call):
        """Images that each encoder layer, the patch embedding and the neck see during `call`."""
        encoder, seen = model.vision_encoder, []
        parts = [encoder.patch_embed, *encoder.layers, encoder.neck]
        handles = [
            part.register_forward_hook(lambda _, args, __, at=at: seen.append((at, args[0].shape[0])))
            for at, part in enumerate(parts)
        ]
        call()
        for handle in handles:
            handle.remove()
        assert [at for at, _ in seen] == list(range(5))  # every part once, in order
        return [rows for _, rows in seen]

    @pytest.mark.parametrize(
        ("layers", "expected"), [(None, [2, 6, 6, 6, 6]), ([1, 2], [2, 2, 6, 6, 6]), ([2], [2, 2, 2, 6, 6])]
    )
    def test_what_is_before_the_first_tuned_layer_runs_once(self, sam, layers, expected):
        model, pixels = tuned(sam, layers_to_transform=layers), images()
        assert self.count(model, lambda: model(pixels)) == expected
        assert self.count(model, lambda: model(pixels, tasks=["depth"])) == [2] * 5
        assert self.count(model, lambda: model(pixels, task_ids=["depth", "normals"])) == [2] * 5
        assert_same(predict(model, pixels), Reference(model, sam)(pixels))

    def test_without_tuned_layers_everything_runs_once(self, sam):
        pixels = images()
        msam = make(sam)
        assert self.count(msam, lambda: msam(pixels)) == [2] * 5
        model = tuned(sam)
        with model.disable_adapter():
            assert self.count(model, lambda: model(pixels)) == [2] * 5
        lora = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
        model = tuned(sam, lora)
        assert self.count(model, lambda: model(pixels)) == [2] * 5


class TestWhichTasks:
    def test_tasks(self, sam):
        model, pixels = tuned(sam), images()
        everything = predict(model, pixels)
        assert list(everything) == list(NAMES)
        for wanted in (["depth"], ["normals", "semantic"], list(NAMES)):
            got = predict(model, pixels, tasks=wanted)
            assert_same(got, {name: everything[name] for name in wanted})
        assert_same(predict(model, pixels, tasks="depth"), {"depth": everything["depth"]})

    def test_the_active_task_does_not_matter(self, sam):
        model, pixels = tuned(sam), images()
        everything = predict(model, pixels)
        model.set_task("normals")
        assert_same(predict(model, pixels), everything)
        with model.use_task("depth"):
            assert_same(predict(model, pixels), everything)
        assert model.active_task == "normals"

    def test_all_spellings_of_task_ids(self, sam):
        model, pixels = tuned(sam), images(3)
        expected = model(pixels, task_ids=["normals", "depth", "normals"])
        assert expected.logits["semantic"].shape == (0, 3, 32, 32)
        for ids in ([2, 1, 2], torch.tensor([2, 1, 2]), torch.tensor([2, 1, 2], dtype=torch.uint8), ("normals", 1, 2)):
            output = model(pixels, task_ids=ids)
            assert_same(output.logits, expected.logits)
            assert {n: i.tolist() for n, i in output.image_index.items()} == {
                "semantic": [], "depth": [1], "normals": [0, 2],
            }  # fmt: skip

    def test_task_ids_without_an_adapter(self, sam):
        msam, pixels = make(sam), images()
        everything = predict(msam, pixels)
        logits = predict(msam, pixels, task_ids=["normals", "depth"])
        torch.testing.assert_close(logits["normals"], everything["normals"][:1])
        torch.testing.assert_close(logits["depth"], everything["depth"][1:])

    def test_disabled_adapter_is_the_msam_it_was_made_from(self, sam):
        pixels = images()
        expected = predict(make(sam), pixels)
        model = tuned(sam)
        with model.disable_adapter():
            assert_same(predict(model, pixels), expected)
            logits = predict(model, pixels, task_ids=["depth", "normals"])
        torch.testing.assert_close(logits["normals"], expected["normals"][1:], rtol=0, atol=1e-9)
        assert differ(predict(model, pixels)["depth"], expected["depth"])


class TestLosses:
    def test_loss_is_the_weighted_sum_and_the_auxiliary_loss(self, sam):
        model, pixels, labels = tuned(sam, ortho_reg_weight=0.3), images(), label_maps()
        output = model(pixels, labels=labels)
        expected = {name: task_loss(spec, output.logits[name], labels[name]) for name, spec in specs().items()}
        assert_same(output.losses, expected, atol=1e-12)
        auxiliary = auxiliary_loss(model)
        assert auxiliary > 0.1 and min(expected.values()) > 0.01
        total = expected["semantic"] + 0.5 * expected["depth"] + 2.0 * expected["normals"] + auxiliary
        torch.testing.assert_close(output.loss, total, rtol=0, atol=1e-12)
        assert output.loss.shape == ()

    def test_only_wanted_tasks_count(self, sam):
        model, pixels, labels = tuned(sam), images(), label_maps()
        everything = model(pixels, labels=labels)
        output = model(pixels, labels=labels, tasks=["depth", "normals"])
        assert list(output.losses) == ["depth", "normals"]
        expected = 0.5 * everything.losses["depth"] + 2.0 * everything.losses["normals"]
        torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-12)
        labels["semantic"] = torch.full((2, 5, 5), 99)
        assert model(pixels, labels=labels, tasks=["depth", "normals"]).loss.item() == output.loss.item()
        with pytest.raises(ValueError, match=r"labels\['semantic'\]: 99 is neither"):
            model(pixels, labels=labels)

    def test_rows_of_other_tasks_are_ignored(self, sam):
        model, pixels, labels = tuned(sam), images(3), label_maps(3)
        ids = ["depth", "normals", "depth"]
        output = model(pixels, task_ids=ids, labels=labels)
        everything = model(pixels)
        rows = torch.tensor([0, 2])
        expected = task_loss(specs()["depth"], everything.logits["depth"][rows], labels["depth"][rows])
        torch.testing.assert_close(output.losses["depth"], expected, rtol=0, atol=1e-10)
        labels["depth"][1], labels["normals"][0], labels["normals"][2] = 1e9, float("nan"), float("inf")
        labels["semantic"] = torch.full((3, 5, 5), 99)  # no class, which would be an error where it counts
        assert model(pixels, task_ids=ids, labels=labels).loss.item() == pytest.approx(output.loss.item(), abs=1e-12)

    @pytest.mark.parametrize("how", ["no labels", "ignored", "absent"])
    def test_without_labels_a_task_has_loss_zero_and_zero_gradients(self, sam, how):
        model, pixels, labels = tuned(sam), images(), label_maps()
        arguments = {}
        if how == "no labels":
            del labels["normals"]
        elif how == "ignored":
            labels["normals"].zero_()
        else:
            arguments["task_ids"] = ["depth", "semantic"]
        output = model(pixels, labels=labels, **arguments)
        assert output.losses["normals"].item() == 0.0 and output.losses["depth"].item() > 0
        output.loss.backward()
        for name, parameter in task_parameters(model, "normals").items():
            assert parameter.grad is not None and not parameter.grad.any(), name
        # DDP waits for every trainable parameter: none of them may be left out
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert any(p.grad.any() for p in task_parameters(model, "depth").values())

    def test_a_batch_without_a_single_label(self, sam):
        model, pixels = tuned(sam), images()
        labels = {
            "semantic": torch.full((2, 8, 8), 255),
            "depth": torch.full((2, 1, 8, 8), float("nan")),
            "normals": torch.zeros(2, 3, 8, 8),
        }
        for given in (labels, {}):
            model.zero_grad()
            output = model(pixels, labels=given)
            assert output.loss.item() == 0.0
            output.loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None and not parameter.grad.any(), name

    def test_loss_does_not_depend_on_how_a_batch_is_split(self, sam):
        model, pixels, labels = tuned(sam), images(4), label_maps(4)
        labels["depth"][0, :, :15] = 0  # images with unequal numbers of labelled pixels
        whole = model(pixels, labels=labels).loss
        parts = [model(pixels[i : i + 2], labels={n: v[i : i + 2] for n, v in labels.items()}).loss for i in (0, 2)]
        torch.testing.assert_close(whole, sum(parts) / 2, rtol=0, atol=1e-10)

    def test_distributed_training_finds_no_unused_parameters(self, sam, tmp_path):
        # DDP complains in the step after one that left a parameter without a gradient
        model, pixels, labels = tuned(sam), images(), label_maps()
        model.train()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            for arguments in (
                {"labels": labels},
                {"labels": {"depth": labels["depth"]}},
                {"labels": labels, "task_ids": ["depth", "depth"]},
                {"labels": labels, "task_ids": [0, 2]},
                {"labels": {}},
                {"labels": labels},
            ):
                parallel(pixels, **arguments).loss.backward()
        finally:
            torch.distributed.destroy_process_group()


class TestImageEmbeddings:
    def test_encode_and_forward_are_the_whole(self, sam):
        model, pixels = tuned(sam), images()
        everything = predict(model, pixels)
        embeddings = model.encode(pixels)
        assert list(embeddings) == list(NAMES) and embeddings["depth"].shape == (2, 8, 8, 8)
        assert_same(predict(model, image_embeddings=embeddings), everything)
        subset = ["normals", "depth"]
        assert_same(
            predict(model, image_embeddings=model.encode(pixels, tasks=subset), tasks=subset),
            {name: everything[name] for name in subset},
        )
        assert_same(
            predict(model, image_embeddings=model.encode(pixels, "depth")["depth"], tasks="depth"),
            {"depth": everything["depth"]},
        )

    def test_a_tensor_with_task_ids(self, sam):
        model, pixels = tuned(sam), images(3)
        embeddings = model.encode(pixels)
        mixed = torch.stack([embeddings["normals"][0], embeddings["depth"][1], embeddings["normals"][2]])
        ids = ["normals", "depth", "normals"]
        output = model(image_embeddings=mixed, task_ids=ids)
        assert_same(output.logits, predict(model, pixels, task_ids=ids))
        assert output.image_index["normals"].tolist() == [0, 2]


class TestOutput:
    def test_return_dict_false(self, sam):
        model, pixels, labels = tuned(sam), images(), label_maps()
        output = model(pixels, labels=labels)
        assert isinstance(output, MSamOutput)
        loss, losses, logits = model(pixels, labels=labels, return_dict=False)
        torch.testing.assert_close(loss, output.loss)
        assert_same(losses, output.losses)
        assert_same(logits, output.logits)
        (logits,) = model(pixels, return_dict=False)
        assert_same(logits, output.logits)

    def test_post_process(self, sam):
        tasks = {**specs(), "edge": TaskSpec("binary"), "shape": TaskSpec("regression", num_channels=2)}
        msam = make(sam, tasks)
        predictions = msam.post_process(msam(images()), [(24, 36), (50, 10)])
        assert len(predictions) == 2
        for (height, width), image in zip([(24, 36), (50, 10)], predictions, strict=True):
            assert list(image) == list(tasks)
            assert image["semantic"].shape == (height, width) and image["semantic"].dtype == torch.long
            assert image["depth"].shape == (height, width) and image["depth"].min() >= 0
            assert image["normals"].shape == (3, height, width)
            torch.testing.assert_close(image["normals"].norm(dim=0), torch.ones(height, width).double())
            assert image["edge"].shape == (height, width) and 0 <= image["edge"].min() <= image["edge"].max() <= 1
            assert image["shape"].shape == (2, height, width)

    def test_post_process_of_mixed_tasks(self, sam):
        model = tuned(sam)
        predictions = model.post_process(model(images(3), task_ids=["depth", "normals", "depth"]), [(32, 32)] * 3)
        assert [list(image) for image in predictions] == [["depth"], ["normals"], ["depth"]]
        whole = model.post_process(model(images(3), tasks=["depth"]), [(32, 32)] * 3)
        torch.testing.assert_close(predictions[2]["depth"], whole[2]["depth"], rtol=0, atol=1e-9)


def lora_config(msam):
    return LoraConfig(r=2, target_modules=["qkv"], modules_to_save=default_modules_to_save(msam))


def talora_config(msam):
    return TALoraConfig(r=2)


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
    def test_compiles_to_one_graph(self, sam):
        model, pixels, labels = tuned(sam).eval(), images(), label_maps()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        arguments = {"tasks": ["depth", "normals"], "labels": labels}
        expected, output = model(pixels, **arguments), compiled(pixels, **arguments)
        assert_same(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)


def encoder_calls(model):
    """A list that grows with every call of the patch embedding or of a layer."""
    calls = []
    for module in (model.vision_encoder.patch_embed, *model.vision_encoder.layers):
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    return calls


class TestBadInput:
    def test_the_count_of_encoder_calls_counts(self, sam):
        model = make(sam)
        calls = encoder_calls(model)
        model(images())
        assert len(calls) == 4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tasks": ["depth"], "task_ids": [0, 1]}, r"either tasks \(\['depth'\]\) or task_ids"),
            ({"tasks": ["depth", "edges"]}, r"Unknown tasks \['edges'\].*\['semantic', 'depth', 'normals'\]"),
            ({"tasks": "edges"}, r"Unknown tasks \['edges'\]"),
            ({"tasks": []}, r"The model's tasks are \['semantic', 'depth', 'normals'\]"),
            ({"tasks": ["depth", "normals", "depth"]}, r"named twice in \['depth', 'normals', 'depth'\]"),
            ({"task_ids": ["depth"]}, r"1 .*batch .*2"),
            ({"task_ids": torch.tensor([0, 1, 2])}, r"3 .*batch .*2"),
            ({"task_ids": ["depth", "edges"]}, r"'edges'.*\['semantic', 'depth', 'normals'\]"),
            ({"task_ids": torch.tensor([0, 3])}, r"3 is out of range.*\['semantic', 'depth', 'normals'\]"),
            ({"task_ids": torch.tensor([0.0, 1.0])}, "must be integers"),
            ({"task_ids": "depth"}, "one task per"),
            ({"labels": {"edges": torch.zeros(2, 1, 4, 4)}}, r"unknown task 'edges'.*\['semantic', 'depth'"),
            ({"labels": {"depth": torch.zeros(2, 4, 4)}}, r"labels\['depth'\].*\(2, 1, H, W\), got \(2, 4, 4\)"),
            ({"labels": {"depth": torch.zeros(3, 1, 4, 4)}}, r"labels\['depth'\].*\(2, 1, H, W\), got \(3, 1, 4, 4\)"),
            ({"labels": {"semantic": torch.zeros(2, 4, 4)}}, r"labels\['semantic'\].*integer classes"),
            ({"labels": torch.zeros(2, 1, 4, 4)}, "labels must be a dict .* got Tensor"),
            ({"pixel_values": images(2, 40)}, r"\(batch, 3, 32, 32\), got \(2, 3, 40, 40\)"),
            ({"pixel_values": images()[0]}, r"\(batch, 3, 32, 32\), got \(3, 32, 32\)"),
            ({"pixel_values": images()[:, :1]}, r"\(batch, 3, 32, 32\), got \(2, 1, 32, 32\)"),
            ({"pixel_values": None}, "exactly one of pixel_values, image_embeddings and trunk_states"),
            (
                {"image_embeddings": torch.zeros(2, 8, 8, 8)},
                "exactly one of pixel_values, image_embeddings and trunk_states",
            ),
        ],
    )
    def test_forward(self, sam, arguments, message):
        arguments = {"pixel_values": images(), **arguments}
        models = [make(sam), tuned(sam)] if "task_ids" in arguments else [make(sam)]
        for model in models:
            calls = encoder_calls(model)
            with pytest.raises(ValueError, match=message):
                model(**arguments)
            assert not calls

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"image_embeddings": torch.zeros(2, 8, 8, 8)}, "one tensor, but 3 tasks are wanted"),
            (
                {"image_embeddings": torch.zeros(2, 8, 9, 9), "tasks": "depth"},
                r"\(batch, 8, 8, 8\), got \(2, 8, 9, 9\)",
            ),
            ({"image_embeddings": torch.zeros(8, 8, 8), "tasks": "depth"}, r"\(batch, 8, 8, 8\), got \(8, 8, 8\)"),
            ({"image_embeddings": {"depth": torch.zeros(2, 4, 8, 8)}}, r"image_embeddings\['depth'\].*\(2, 4, 8, 8\)"),
            ({"image_embeddings": {"depth": torch.zeros(2, 8, 8, 8)}}, r"no entry for \['semantic', 'normals'\]"),
            ({"image_embeddings": {"depth": torch.zeros(2, 8, 8, 8)}, "task_ids": [1, 1]}, "must be one tensor"),
            (
                {"image_embeddings": {n: torch.zeros(i + 1, 8, 8, 8) for i, n in enumerate(NAMES)}},
                r"one batch size, got \{'semantic': 1, 'depth': 2, 'normals': 3\}",
            ),
        ],
    )
    def test_embeddings(self, sam, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(sam)(**arguments)

    def test_from_sam(self, sam):
        with pytest.raises(TypeError, match=r"must be a SamModel .* got object"):
            MSamForMultiTask.from_sam(object(), specs())
        with pytest.raises(TypeError, match="got SamVisionEncoder"):
            MSamForMultiTask.from_sam(sam.vision_encoder, specs())
        with pytest.raises(ValueError, match="channel_mode"):
            make(sam, channel_mode="tokens")
        with pytest.raises(ValueError, match="at least one task"):
            MSamForMultiTask.from_sam(sam, {})
        with pytest.raises(ValueError, match="image_size"):
            make(sam, image_size=33)

    def test_adapter_of_a_sam_that_is_already_tuned(self, sam):
        sam.add_adapter(LoraConfig(target_modules=["qkv"]))
        with pytest.raises(ValueError, match="`sam` has an adapter"):
            make(sam)
