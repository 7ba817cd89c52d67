"""Conv-LoRA stands where the input is known to be a grid of tokens, and nowhere else in silence."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from peft_talora import ConvLoraConfig, ConvLoraLinear, MSamForMultiTask, TaskSpec
from peft_talora.convlora.grids import Place, place_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def config(**changes):
    return ConvLoraConfig(**{"init_weights": False, "num_experts": 3, **changes})


def module_names(model):
    return [name for name, _ in model.named_modules()]


def tuned_names(model):
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, ConvLoraLinear)]


class TestSam:
    @pytest.mark.parametrize("targets", [["qkv", "lin1", "lin2"], "all-linear", ".*lin1", ["proj", "out_proj"]])
    def test_a_decoder_s_layers_are_refused_by_name(self, sam, targets):
        names = module_names(sam)
        with pytest.raises(
            ValueError, match=r"the input of 'mask_decoder\..*(lin1|proj)' \(in a 'sam_mask_decoder'\)"
        ):
            get_peft_model(sam, config(target_modules=targets))
        assert module_names(sam) == names  # before anything is changed

    def test_all_layers_of_the_encoder(self, sam):
        targets = r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"
        model = get_peft_model(sam, config(target_modules=targets))
        assert len(tuned_names(model)) == 12
        model.vision_encoder(torch.randn(2, 3, 32, 32))
        excluded = config(target_modules=["qkv", "lin1"], exclude_modules="mask_decoder.*")
        assert len(tuned_names(get_peft_model(model.unload(), excluded))) == 6

    def test_an_msam_s_decoders(self, sam):
        msam = MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth")})
        with pytest.raises(ValueError, match=r"'mask_decoders\.depth\.\S*lin1'"):
            get_peft_model(msam, config(target_modules=["lin1"], modules_to_save=[]))

    def test_a_second_adapter(self, sam):
        model = get_peft_model(sam, config())
        with pytest.raises(ValueError, match=r"'mask_decoder\.\S*lin1'"):
            model.add_adapter("second", config(target_modules=["qkv", "lin1"]))

    def test_who_asks_is_held_to_it(self, sam):
        """With grid_size a decoder's layer may be adapted, but prompts times tokens do not pass as a grid."""
        model = get_peft_model(sam, config(target_modules=["lin1"], grid_size=(3, 5)))
        points = 32 * torch.rand(1, 4, 1, 2)
        with pytest.raises(ValueError, match=r"\(1, 4, 7, 8\) is no .* grid_size=\(3, 5\).* in a 'sam_mask_decoder'"):
            model(pixel_values=torch.randn(1, 3, 32, 32), input_points=points)


class TestTokens:
    PIXELS = (16, 64)
    GRID = (4, 16)

    @pytest.fixture
    def vit(self):
        return ViTModel(ViTConfig(**SIZES, image_size=self.PIXELS, patch_size=4)).eval()

    def targets(self, model):
        return [name for name in module_names(model) if name.endswith(("query", "q_proj"))]

    def test_the_grid_is_the_model_s(self, vit):
        pixels = torch.randn(2, 3, *self.PIXELS)
        states = vit.state_dict()
        outputs = []
        for asked in (None, self.GRID, (8, 8)):
            torch.manual_seed(0)
            base = ViTModel(vit.config).eval()
            base.load_state_dict(states)
            options = {"target_modules": self.targets(vit), "num_prefix_tokens": 1, "grid_size": asked}
            outputs.append(get_peft_model(base, config(**options)).eval()(pixels).last_hidden_state)
        assert torch.equal(outputs[0], outputs[1])
        assert (outputs[0] - outputs[2]).abs().max() > 1e-3

    def test_another_size_of_images_is_asked_for(self, vit):
        square = ViTModel(ViTConfig(**SIZES, image_size=24, patch_size=4)).eval()
        model = get_peft_model(square, config(target_modules=self.targets(square), num_prefix_tokens=1)).eval()
        # 4 x 16 tokens would fit 8 x 8
        with pytest.raises(
            ValueError, match=r"other 64 are no square grid \(the model's is 6 x 6, num_prefix_tokens=1\)"
        ):
            model(torch.randn(1, 3, *self.PIXELS), interpolate_pos_encoding=True)

    def test_registers_and_none(self):
        registers = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SIZES, image_size=16, patch_size=4, num_register_tokens=3)
        )
        siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=4, vision_use_head=False))
        for model, prefix in ((registers, 4), (siglip, 0)):
            options = {"target_modules": self.targets(model), "num_prefix_tokens": prefix}
            output = get_peft_model(model, config(**options))(pixel_values=torch.randn(1, 3, 16, 16))
            assert output.last_hidden_state.shape[1] == prefix + 16 and output.last_hidden_state.isfinite().all()

    def test_the_text_half_of_clip(self):
        halves = {**SIZES, "projection_dim": 16}
        vision = {**halves, "image_size": 16, "patch_size": 4}
        clip = CLIPModel(CLIPConfig(text_config={**halves, "vocab_size": 20}, vision_config=vision))
        with pytest.raises(ValueError, match=r"'text_model\.\S*q_proj' \(in a 'clip_text_model'\)"):
            get_peft_model(clip, config(target_modules=["q_proj"]))
        targets = r"vision_model\..*q_proj"
        model = get_peft_model(clip, config(target_modules=targets, num_prefix_tokens=1))
        name = tuned_names(model)[0]
        assert place_of(clip, name) == Place("clip_vision_model", True, (4, 4))


class TestOtherModels:
    """Nothing is known of them: the shapes of the contract hold, and a guess is said."""

    def test_a_square_is_guessed_aloud(self):
        model = get_peft_model(nn.Sequential(nn.Linear(10, 12)), config(target_modules=["0"]))
        with pytest.warns(
            UserWarning, match=r"64 tokens .* square grid, 8 x 8\. Say which .* grid_size in ConvLoraConfig"
        ):
            model(torch.randn(2, 64, 10))

    @pytest.mark.parametrize(("asked", "shape"), [((4, 16), (2, 64, 10)), (None, (2, 4, 16, 10))])
    def test_no_guess(self, asked, shape, recwarn):
        model = get_peft_model(nn.Sequential(nn.Linear(10, 12)), config(target_modules=["0"], grid_size=asked))
        model(torch.randn(shape))
        assert not [warning for warning in recwarn if "grid" in str(warning.message)]
