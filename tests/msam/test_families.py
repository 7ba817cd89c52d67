"""An mSAM on every family of SAMs: what is promised for SAM holds for each of them, or is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import (
    MAKERS,
    label_maps,
    make_sam3_tracker,
    move_saved_modules,
    sam3_vision_config,
    side_of,
    train,
)
from torch import nn
from transformers import AutoModel, Sam3TrackerModel

from peft_talora import (
    ConvLoraConfig,
    MSamConfig,
    MSamForMultiTask,
    MSamProcessor,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    lean_attention,
    save_adapter,
)
from peft_talora.export import save_task_as_lora, task_to_sam
from peft_talora.msam.decoder import token_decoder_state
from peft_talora.msam.families import FAMILIES, Family

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
# an image size of the family that is not its base's
OTHER_SIZE = {"sam": 48, "sam_hq": 48, "sam2": 96, "sam3_tracker": 48}
HIGH_RESOLUTION = ["sam2", "sam3_tracker"]
every_family = pytest.mark.parametrize("family", MAKERS)


def make(family, dtype=torch.float64):
    return MAKERS[family]().to(dtype)


def images(family, batch=2, size=None, dtype=torch.float64):
    size = size or side_of(family)
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def make_msam(family, tasks=TASKS, **arguments):
    return MSamForMultiTask.from_sam(make(family), tasks, **arguments)


def tune(msam, **changes):
    """A tuned mSAM with nothing at its start, its tasks far from each other."""
    config = TALoraConfig(r=3, init_weights=False, **changes)
    return move_saved_modules(get_peft_model(msam, config, autocast_adapter_dtype=False)).eval()


def labels():
    return {name: label if name == "semantic" else label.double() for name, label in label_maps().items()}


@torch.no_grad()
def predict(model, pixels, **kwargs):
    return model(pixels, **kwargs).logits


@torch.no_grad()
def plain_masks(sam, pixels):
    """What the base predicts without prompts: mask token 0, without SAM 2's fallback to another one."""
    sam = copy.deepcopy(sam)
    sam.mask_decoder.dynamic_multimask_via_stability = False
    return sam(pixel_values=pixels, multimask_output=False).pred_masks[:, 0, 0]


def assert_same(got, expected, atol=1e-10):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=atol, msg=name)


def differ(first, second):
    return (first - second).abs().max().item() > 1e-3


class TestStart:
    @every_family
    def test_every_channel_is_the_bases_own_mask(self, family):
        sam, pixels = make(family), images(family)
        msam, expected = MSamForMultiTask.from_sam(sam, TASKS), plain_masks(sam, pixels)
        assert msam.config.base_model_type == family
        assert differ(expected, plain_masks(sam, pixels + 1)) and differ(expected[0], expected[1])
        for name, logits in predict(msam, pixels).items():
            for channel in range(TASKS[name].num_channels):
                torch.testing.assert_close(logits[:, channel], expected, rtol=1e-12, atol=1e-12)
        # a batch in training mode is no other model
        msam.train()
        torch.testing.assert_close(predict(msam, pixels)["depth"][:, 0], expected, rtol=1e-12, atol=1e-12)

    def test_the_embedding_for_no_memory_goes_where_the_base_adds_it(self):
        # SAM 3's own default has a fourth, coarser level: the base adds it there, and drops the level
        sam3 = make_sam3_tracker()
        config = copy.deepcopy(sam3.config)
        config.vision_config.scale_factors = [4.0, 2.0, 1.0, 0.5]
        with_coarse = Sam3TrackerModel(config).double().eval()
        with torch.no_grad():
            for parameter in with_coarse.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        pixels = images("sam3_tracker")
        msam = MSamForMultiTask.from_sam(with_coarse, TASKS)
        expected = plain_masks(with_coarse, pixels)
        torch.testing.assert_close(predict(msam, pixels)["depth"][:, 0], expected, rtol=1e-12, atol=1e-12)
        assert sam3_vision_config()["backbone_feature_sizes"] == config.vision_config.backbone_feature_sizes

    @pytest.mark.parametrize("family", HIGH_RESOLUTION)
    def test_token_mode_is_the_plain_decoder_with_a_token_per_channel(self, family):
        sam, pixels = make(family), images(family)
        msam = MSamForMultiTask.from_sam(sam, TASKS, channel_mode="token")
        plain = copy.deepcopy(sam)
        config = copy.deepcopy(sam.config.mask_decoder_config)
        config.num_multimask_outputs, config.dynamic_multimask_via_stability = 2, False
        config._attn_implementation = "sdpa"
        plain.mask_decoder = type(sam.mask_decoder)(config).double().eval()
        plain.mask_decoder.load_state_dict(token_decoder_state(sam.mask_decoder.state_dict(), 3))
        with torch.no_grad():
            # other tokens than copies of one, so that their order counts
            for decoder in (plain.mask_decoder, msam.mask_decoders["normals"]):
                decoder.mask_tokens.weight.mul_(torch.tensor([[1.0], [0.5], [-1.0]], dtype=torch.float64))
            masks = [
                plain(pixel_values=pixels, multimask_output=several).pred_masks[:, 0] for several in (False, True)
            ]
        got = predict(msam, pixels)["normals"]
        assert differ(got[:, 0], got[:, 1])
        torch.testing.assert_close(got, torch.cat(masks, dim=1), rtol=1e-11, atol=1e-11)

    def test_token_mode_of_sam_hq_is_refused(self):
        with pytest.raises(ValueError, match=r"channel_mode='token' is not possible with a SamHQModel.*'prompt'"):
            make_msam("sam_hq", channel_mode="token")

    @every_family
    def test_another_image_size(self, family):
        size = OTHER_SIZE[family]
        msam = make_msam(family, image_size=size)
        logits = predict(msam, images(family, size=size))["depth"]
        assert msam.config.image_size == size and logits.shape[-1] == 4 * msam.config.grid_size
        # the base itself at that size
        sam = task_to_sam(msam, "depth")
        torch.testing.assert_close(plain_masks(sam, images(family, size=size)), logits[:, 0], rtol=1e-11, atol=1e-11)
        with pytest.raises(ValueError, match=r"`image_size` must be a positive multiple of .*, got 50"):
            make_msam(family, image_size=50)
        with pytest.raises(ValueError, match=rf"pixel_values must have the shape \(batch, 3, {size}, {size}\)"):
            msam(images(family))


class TestTasks:
    @every_family
    @pytest.mark.parametrize("layers", [None, [2], [0]])
    def test_together_one_by_one_and_mixed(self, family, layers):
        model, pixels = tune(make_msam(family), layers_to_transform=layers), images(family, batch=3)
        expected = {name: predict(model, pixels, tasks=[name])[name] for name in TASKS}
        assert differ(expected["depth"], expected["normals"][:, :1])
        assert_same(predict(model, pixels), expected)
        assert_same(predict(model, pixels, task_chunk=2), expected)
        ids = ["normals", "depth", "normals"]
        mixed = model(pixels, task_ids=ids)
        for name, rows in mixed.image_index.items():
            torch.testing.assert_close(mixed.logits[name], expected[name][rows], rtol=1e-10, atol=1e-10)
        msam = model.get_base_model()
        assert_same(predict(model, None, image_embeddings=msam.encode(pixels)), expected)
        trunk = msam.encode_trunk(pixels)
        assert_same(predict(model, None, trunk_states=trunk), expected)
        got = predict(model, None, trunk_states=trunk, task_ids=ids)
        torch.testing.assert_close(got["depth"], expected["depth"][1:2], rtol=1e-10, atol=1e-10)

    @every_family
    def test_the_trunk_runs_once(self, family):
        msam = make_msam(family)
        layers = msam.get_submodule(msam.family.layers)
        model, rows = tune(msam, layers_to_transform=[2]), {}
        for index, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda module, args, output, index=index: rows.setdefault(index, []).append(len(output))
            )
        predict(model, images(family))
        assert rows == {index: [2] if index < 2 else [2 * len(TASKS)] for index in range(len(layers))}

    @every_family
    def test_what_is_trained(self, family):
        model = get_peft_model(make_msam(family), TALoraConfig(r=3), autocast_adapter_dtype=False)
        before = {name: p.clone() for name, p in model.named_parameters()}
        losses = train(model, lambda: model(images(family), labels=labels()).loss, steps=4)
        assert losses[-1] < losses[0]
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
        for part in ("talora_", "no_mask_embeds.depth", "mask_decoders.normals", "layer_norm1.modules_to_save"):
            assert any(part in name for name in moved), part
        assert not any(
            part in name for name in moved for part in ("iou_prediction_head", "pred_obj_score_head", "neck")
        )
        assert any("conv_s0" in name for name in moved) == (family in HIGH_RESOLUTION)
        # DDP waits for the gradient of everything that is trainable
        model.zero_grad()
        model(images(family), labels=labels()).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        logits = predict(model.eval(), images(family))
        assert differ(logits["depth"], logits["normals"][:, :1])

    @every_family
    @pytest.mark.parametrize("mixed", [False, True])
    def test_gradient_checkpointing(self, family, mixed):
        def gradients(checkpointing):
            torch.manual_seed(0)
            model = tune(make_msam(family)).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            arguments = {"task_ids": ["depth", "semantic"]} if mixed else {}
            model(images(family), labels=labels(), **arguments).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        assert_same(gradients(True), gradients(False), atol=1e-9)

    @every_family
    @pytest.mark.parametrize("kind", ["convlora", "lora"])
    def test_with_the_other_adapters(self, family, kind):
        msam = make_msam(family)
        saved = default_modules_to_save(msam)
        ends = ["qkv"] if family != "sam3_tracker" else ["attention.q_proj", "attention.v_proj"]
        config = (
            ConvLoraConfig(r=2, num_experts=3, init_weights=False)
            if kind == "convlora"
            else LoraConfig(r=2, target_modules=ends, modules_to_save=saved, init_lora_weights=False)
        )
        before = predict(msam, images(family))
        model = get_peft_model(msam, config, autocast_adapter_dtype=False).eval()
        after = predict(model, images(family))
        assert all(differ(after[name], before[name]) for name in TASKS)

    @every_family
    def test_inputs_that_do_not_fit_are_named(self, family):
        msam = make_msam(family)
        embeddings = msam.encode(images(family))["depth"]
        with pytest.raises(ValueError, match="image_embeddings"):
            msam(image_embeddings=torch.zeros(2, 3, 5, 5), tasks=["depth"])
        with pytest.raises(ValueError, match="trunk_states"):
            msam(trunk_states=torch.zeros(2, 3, 5, 5) if family != "sam" else torch.zeros(2, 8, 8, 5))
        if isinstance(embeddings, tuple):
            with pytest.raises(ValueError, match=rf"must be a tuple of {len(embeddings)} tensors.*got a tuple of 1"):
                msam(image_embeddings=embeddings[:1], tasks=["depth"])


class TestFiles:
    @every_family
    def test_save_pretrained(self, family, tmp_path):
        msam, pixels = make_msam(family), images(family)
        with torch.no_grad():
            for parameter in msam.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = predict(msam, pixels)
        msam.save_pretrained(tmp_path)
        for loaded in (MSamForMultiTask.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert type(loaded) is MSamForMultiTask and loaded.config.base_model_type == family
            assert_same(predict(loaded.double(), pixels), expected)

    def test_a_configuration_keeps_what_is_the_default_of_another_family(self, tmp_path):
        config = MSamConfig(
            base_model_type="sam3_tracker",
            tasks=TASKS,
            prompt_encoder_config={"image_size": 1024},
            mask_decoder_config={"hidden_size": 256},
        )
        config.save_pretrained(tmp_path)
        loaded = MSamConfig.from_pretrained(tmp_path)
        assert loaded.prompt_encoder_config.image_size == 1024 and loaded.to_dict() == config.to_dict()
        with pytest.raises(ValueError, match=r"`base_model_type` must be one of .*'sam3_tracker'.*, got 'sam4'"):
            MSamConfig(base_model_type="sam4", tasks=TASKS)

    @every_family
    def test_an_adapter(self, family, tmp_path):
        make(family).save_pretrained(tmp_path / "sam")
        size, pixels = OTHER_SIZE[family], images(family, size=OTHER_SIZE[family])
        msam = MSamForMultiTask.from_sam(tmp_path / "sam", TASKS, image_size=size).double()
        model = tune(msam)
        save_adapter(model, tmp_path / "adapter")
        model.save_pretrained(tmp_path / "plain")
        assert model.peft_config["default"].msam["base_model_type"] == family
        for directory in ("adapter", "plain"):
            for base in (None, make(family)):
                loaded = MSamForMultiTask.from_adapter(tmp_path / directory, base_model=base).double()
                assert_same(predict(loaded, pixels), predict(model, pixels), atol=1e-5)
        other = "sam" if family != "sam" else "sam2"
        match = rf"trained on a '{family}' model.*the base model is a '{other}' model"
        for base in (make(other), make_msam(other)):
            with pytest.raises(ValueError, match=match):
                MSamForMultiTask.from_adapter(tmp_path / "adapter", base_model=base)

    @pytest.mark.parametrize(("family", "video"), [("sam2", "sam2_video"), ("sam3_tracker", "sam3_tracker")])
    def test_published_checkpoints_name_the_video_model(self, family, video, tmp_path):
        make(family).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace(f'"model_type": "{family}"', f'"model_type": "{video}"'))
        msam = MSamForMultiTask.from_sam(tmp_path, TASKS).double()
        assert_same(predict(msam, images(family)), predict(make_msam(family), images(family)), atol=1e-4)

    @every_family
    def test_a_task_as_a_plain_model(self, family, tmp_path):
        sam, pixels = make(family), images(family)
        model = tune(make_msam(family))
        expected = predict(model, pixels)
        exported = task_to_sam(model, "depth", sam=sam)
        assert type(exported) is type(sam)
        exported.save_pretrained(tmp_path)
        loaded = type(sam).from_pretrained(tmp_path).double()
        for plain in (exported, loaded):
            masks = plain(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
            torch.testing.assert_close(masks, expected["depth"], rtol=1e-9, atol=1e-9)
        for name, value in sam.prompt_encoder.state_dict().items():
            if not name.startswith("no_mask_embed"):
                assert torch.equal(exported.prompt_encoder.state_dict()[name], value), name
        with pytest.raises(ValueError, match=rf"A {type(sam).__name__} has one output channel"):
            task_to_sam(model, "normals")
        with pytest.raises(TypeError, match=rf"must be those of a {type(sam).__name__}"):
            task_to_sam(model, "depth", sam=nn.Linear(1, 1))

    @pytest.mark.parametrize("family", HIGH_RESOLUTION)
    def test_a_task_of_token_mode_as_a_plain_model(self, family):
        pixels, model = images(family), tune(make_msam(family, channel_mode="token"))
        masks = task_to_sam(model, "depth")(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
        torch.testing.assert_close(masks, predict(model, pixels)["depth"], rtol=1e-9, atol=1e-9)

    @every_family
    def test_merged(self, family):
        model, pixels = tune(make_msam(family)), images(family)
        expected = predict(model, pixels)["normals"]
        model.set_task("normals")
        merged = model.merge_and_unload()
        assert list(merged.task_specs) == ["normals"]
        torch.testing.assert_close(predict(merged, pixels)["normals"], expected, rtol=1e-9, atol=1e-9)

    @every_family
    def test_a_task_as_stock_lora_on_the_base(self, family, tmp_path):
        model, pixels = tune(make_msam(family)), images(family)
        save_task_as_lora(model, "depth", tmp_path)
        plain = PeftModel.from_pretrained(make(family), tmp_path, autocast_adapter_dtype=False).eval()
        with torch.no_grad():
            got = plain.get_base_model().vision_encoder(pixels)
            model.set_task("depth")
            expected = model.get_base_model().vision_encoder(pixels)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=1e-9, atol=1e-9)


class TestProcessing:
    @every_family
    def test_images_and_labels_go_there_and_back(self, family, tmp_path):
        msam = make_msam(family)
        processor = MSamProcessor.from_model(msam)
        size, stretched = msam.config.image_size, family in HIGH_RESOLUTION
        assert processor.to_square == stretched
        generator = torch.Generator().manual_seed(3)
        picture = torch.randint(0, 256, (20, 40, 3), generator=generator, dtype=torch.uint8).numpy()
        classes = torch.arange(20)[:, None] // 10 + torch.arange(40) // 20
        batch = processor([picture], [{"semantic": classes}])
        assert batch["pixel_values"].shape == (1, 3, size, size)
        assert batch["original_sizes"].tolist() == [[20, 40]]
        assert batch["reshaped_input_sizes"].tolist() == [[size if stretched else size // 2, size]]
        # the lower half of the square is padding, or is not
        assert (batch["labels"]["semantic"][0, size // 2 :] == 255).all().item() != stretched
        one_hot = nn.functional.one_hot(batch["labels"]["semantic"] % 255, 3).permute(0, 3, 1, 2).double()
        restored = processor.restore(one_hot, (20, 40)).argmax(1)[0]
        assert (restored == classes).double().mean() > 0.9
        output = msam(batch["pixel_values"].double())
        ours, models = processor.post_process(output, [(20, 40)]), msam.post_process(output, [(20, 40)])
        for name in TASKS:
            assert ours[0][name].shape[-2:] == (20, 40) and torch.equal(ours[0][name], models[0][name])
        processor.save_pretrained(tmp_path)
        assert MSamProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()

    def test_normalisation_is_the_familys(self):
        white = torch.ones(3, 16, 16)
        means = {
            family: MSamProcessor.from_model(make_msam(family))(white)["pixel_values"][0, 0].max() for family in MAKERS
        }
        assert means["sam3_tracker"] == pytest.approx(1.0) and means["sam2"] == pytest.approx(means["sam"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_lean_attention_of_sam_hq(attention):
    sam, pixels = make("sam_hq"), images("sam_hq")
    sam.set_attn_implementation(attention)
    model = tune(MSamForMultiTask.from_sam(sam, TASKS))
    expected = predict(model, pixels)
    before = type(model.vision_encoder.layers[0].attn)
    assert type(lean_attention(model).vision_encoder.layers[0].attn) is not before
    # eager attention takes its softmax in float32
    assert_same(predict(model, pixels), expected, atol=1e-4 if attention == "eager" else 1e-10)
    assert type(lean_attention(model, enabled=False).vision_encoder.layers[0].attn) is before


@pytest.mark.parametrize("family", HIGH_RESOLUTION)
def test_lean_attention_has_nothing_to_spare(family):
    with pytest.raises(ValueError, match="lean_attention needs a model with SAM's vision encoder"):
        lean_attention(make_msam(family))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"must be a SamModel or a .*Sam2Model.*got Linear"):
        MSamForMultiTask.from_sam(nn.Linear(1, 1), TASKS)
    assert set(FAMILIES) == set(MAKERS) and all(isinstance(family, Family) for family in FAMILIES.values())
