"""mSAM against a plain loop over images, tasks and channels with transformers' own modules."""

import pytest
import torch
from peft import LoraConfig
from process_groups import in_a_process_group
from small_models import assert_same, differ, images, label_maps
from small_msams import CHANNELS, NAMES, Reference, make, predict, specs, task_parameters, tuned
from torch import nn

from peft_talora import (
    MSamOutput,
    TaskSpec,
    auxiliary_loss,
)
from peft_talora.losses import task_loss


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

    @in_a_process_group
    def test_distributed_training_finds_no_unused_parameters(self, sam):
        # DDP complains in the step after one that left a parameter without a gradient
        model, pixels, labels = tuned(sam), images(), label_maps()
        model.train()
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
