"""All channels of a task from one decoder pass, against transformers' own decoder."""

import copy

import pytest
import torch
from peft import get_peft_model
from small_models import label_maps, move_saved_modules, train
from torch.func import functional_call
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, save_adapter
from peft_talora.export import task_to_sam
from peft_talora.msam.decoder import MSamTokenDecoder, token_decoder_state

TASKS = {
    "semantic": TaskSpec("semantic", num_channels=5),
    "depth": TaskSpec("depth", weight=0.5),
    "normals": TaskSpec("normals", weight=2.0),
}


def make(sam, **kwargs):
    return MSamForMultiTask.from_sam(sam.double(), TASKS, channel_mode="token", **kwargs)


def tuned(sam, config=None):
    config = config or TALoraConfig(r=3, init_weights=False)
    return move_saved_modules(get_peft_model(make(sam), config, autocast_adapter_dtype=False).eval())


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def plain_decoder(decoder, weights, image_embeddings, position, no_mask):
    """SAM gives token 0 or all the others: its own decoder, asked for both."""
    sams = SamMaskDecoder(decoder.config).double()
    parts = [
        functional_call(
            sams,
            weights,
            kwargs={
                "image_embeddings": image_embeddings,
                "image_positional_embeddings": position.expand_as(image_embeddings),
                "sparse_prompt_embeddings": None,
                "dense_prompt_embeddings": no_mask.expand_as(image_embeddings),
                "multimask_output": multimask,
            },
        )[0][:, 0]
        for multimask in (False, True)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_decoder_against_sams_own(sam, channels):
    decoder = MSamTokenDecoder(sam.config.mask_decoder_config, channels).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    embeddings = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    position = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    no_mask = torch.randn(1, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    got = decoder(embeddings, position, no_mask)
    expected = plain_decoder(decoder, dict(decoder.named_parameters()), embeddings, position, no_mask)
    assert got.shape == (2, channels, 16, 24)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert all((got[:, 0] - got[:, c]).abs().max() > 1e-3 for c in range(1, channels))

    trained = {name: p for name, p in decoder.named_parameters() if "iou_prediction_head" not in name}
    inputs, cotangent = [embeddings, no_mask, *trained.values()], torch.randn_like(got)
    gradients = [torch.autograd.grad((masks * cotangent).sum(), inputs) for masks in (got, expected)]
    for name, one, other in zip(["embeddings", "no_mask", *trained], *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
        # a bias of a key's projection moves no softmax
        assert other.abs().max() > 1e-8 or name.endswith("k_proj.bias"), name


def test_channels_start_as_copies_of_mask_token_0(sam):
    state = sam.double().mask_decoder.state_dict()
    decoder = MSamTokenDecoder(sam.config.mask_decoder_config, 3).double()
    decoder.load_state_dict(token_decoder_state(state, 3))
    for channel in range(3):
        assert torch.equal(decoder.mask_tokens.weight[channel], state["mask_tokens.weight"][0])
        for name, value in decoder.output_hypernetworks_mlps[channel].named_parameters():
            assert torch.equal(value, state[f"output_hypernetworks_mlps.0.{name}"])
    assert len(decoder.output_hypernetworks_mlps) == len(decoder.mask_tokens.weight) == 3
    assert torch.equal(decoder.upscale_conv1.weight, state["upscale_conv1.weight"])
    assert sam.config.mask_decoder_config.num_multimask_outputs == 3  # the SAM's own configuration is as it was


class TestModel:
    def test_logits_of_every_task(self, sam):
        model, pixels = tuned(sam), images()
        msam = model.get_base_model()
        logits, embeddings = model(pixels).logits, model.encode(pixels)
        for name, spec in TASKS.items():
            decoder = msam.mask_decoders[name].modules_to_save["default"]
            no_mask = msam.no_mask_embeds[name].modules_to_save["default"].weight
            assert no_mask.shape == (1, 8)
            position = msam.get_image_wide_positional_embeddings()
            weights = dict(decoder.named_parameters())
            expected = plain_decoder(decoder, weights, embeddings[name], position, no_mask[:, :, None, None])
            assert logits[name].shape == (2, spec.num_channels, 32, 32)
            torch.testing.assert_close(logits[name], expected, rtol=0, atol=1e-10)
        assert (embeddings["depth"] - embeddings["normals"]).abs().max() > 1e-3

    def test_a_decoder_runs_once_for_a_task(self, sam):
        model, calls = tuned(sam), []
        for name, decoder in model.get_base_model().mask_decoders.items():
            decoder.register_forward_hook(lambda _, __, output, name=name: calls.append((name, tuple(output.shape))))
        model(images(3))
        assert calls == [(name, (3, spec.num_channels, 32, 32)) for name, spec in TASKS.items()]

    def test_one_task_per_image(self, sam):
        model, pixels = tuned(sam), images(3)
        everything = model(pixels).logits
        output = model(pixels, task_ids=["normals", "semantic", "normals"], labels=label_maps(3, num_classes=5))
        torch.testing.assert_close(output.logits["normals"], everything["normals"][[0, 2]], rtol=0, atol=1e-10)
        torch.testing.assert_close(output.logits["semantic"], everything["semantic"][[1]], rtol=0, atol=1e-10)
        assert output.logits["depth"].shape == (0, 1, 32, 32)
        output.loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)

    @pytest.mark.parametrize("config", [TALoraConfig(r=2), ConvLoraConfig()], ids=["talora", "convlora"])
    def test_training_parts_the_channels(self, sam, config):
        model = get_peft_model(make(sam), config, autocast_adapter_dtype=False).train()
        pixels, labels = images(), label_maps(num_classes=5)
        losses = train(model, lambda: model(pixels, labels=labels).loss, steps=12)
        assert losses[-1] < 0.95 * losses[0]
        semantic = model(pixels).logits["semantic"]
        assert (semantic[:, 0] - semantic[:, 1]).abs().max() > 1e-3

    @pytest.mark.slow
    def test_compiles_to_one_graph(self, sam_factory):
        model, pixels = tuned(sam_factory(num_hidden_layers=1)), images()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = model(pixels, tasks=["semantic"]).logits["semantic"]
        got = compiled(pixels, tasks=["semantic"]).logits["semantic"]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


class TestFiles:
    def test_model(self, sam, tmp_path):
        model = make(sam)
        with torch.no_grad():
            for parameter in model.mask_decoders.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded, pixels = MSamForMultiTask.from_pretrained(tmp_path, dtype=torch.float64), images()
        assert loaded.config.channel_mode == "token"
        expected = model(pixels).logits
        assert all(torch.equal(value, expected[name]) for name, value in loaded(pixels).logits.items())

    def test_adapter(self, sam, tmp_path):
        model, pixels = tuned(sam), images()
        base = copy.deepcopy(sam)
        save_adapter(model, tmp_path)
        loaded = MSamForMultiTask.from_adapter(tmp_path, base_model=base).eval()
        assert loaded.get_base_model().config.channel_mode == "token"
        expected = model(pixels).logits
        for name, value in loaded(pixels).logits.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)

    def test_adapter_on_an_msam_of_the_other_mode(self, sam, tmp_path):
        save_adapter(tuned(sam), tmp_path)
        with pytest.raises(ValueError, match="channel_mode"):
            MSamForMultiTask.from_adapter(tmp_path, base_model=MSamForMultiTask.from_sam(sam, TASKS))


def test_task_to_sam(sam, tmp_path):
    model, pixels = tuned(sam), images()
    exported = task_to_sam(model, "depth")
    exported.save_pretrained(tmp_path)
    expected = model(pixels, tasks=["depth"]).logits["depth"]
    for plain in (exported, SamModel.from_pretrained(tmp_path)):
        assert type(plain) is SamModel
        masks = plain(pixel_values=pixels, multimask_output=False).pred_masks
        torch.testing.assert_close(masks[:, 0], expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="'normals' has 3"):
        task_to_sam(model, "normals")
