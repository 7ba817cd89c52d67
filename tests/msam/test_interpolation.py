"""SAM's position embeddings at another image size."""

import copy

import pytest
import torch

from peft_talora import MSamForMultiTask, TaskSpec
from peft_talora.msam.interpolation import encoder_state_for, resize_absolute, resize_relative

TASKS = {"depth": TaskSpec("depth")}


def make(sam, image_size=None):
    return MSamForMultiTask.from_sam(sam, TASKS, image_size=image_size)


@torch.no_grad()
def embed(encoder, pixels):
    return encoder(pixels).last_hidden_state


class TestAbsolute:
    def test_same_size_is_the_same_tensor(self):
        embedding = torch.randn(1, 6, 6, 4)
        assert resize_absolute(embedding, 6) is embedding

    def test_linear_ramps_stay_linear_ramps(self):
        # pixel centres (i + 0.5) / n are what both grids have in common
        def ramp(n):
            centres = (torch.arange(n) + 0.5) / n
            return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1)[None]

        resized = resize_absolute(ramp(16), 24)
        assert resized.shape == (1, 24, 24, 2)
        inner = slice(4, -4)  # the border is extrapolated as a constant
        torch.testing.assert_close(resized[:, inner, inner], ramp(24)[:, inner, inner], rtol=0, atol=5e-3)
        assert (resized[..., 0] - resized[..., 1].mT).abs().max() < 1e-5  # and y stays y

    def test_dtype_is_kept(self):
        assert resize_absolute(torch.randn(1, 4, 4, 2, dtype=torch.bfloat16), 6).dtype == torch.bfloat16

    def test_precision_is_kept(self):
        single, double = (
            resize_absolute(torch.ones(1, 4, 4, 2, dtype=d) / 3, 6) for d in (torch.float32, torch.float64)
        )
        assert (double - 1 / 3).abs().max() < 1e-12 < (single - 1 / 3).abs().max()


class TestRelative:
    def test_same_size_is_the_same_tensor(self):
        embedding = torch.randn(11, 4)
        assert resize_relative(embedding, 6) is embedding

    @pytest.mark.parametrize("grid", [3, 9, 12])
    def test_it_is_what_sams_attention_does_itself(self, sam, grid):
        attention = sam.vision_encoder.layers[1].attn
        expected = attention.get_rel_pos(grid, grid, attention.rel_pos_h)
        resized = resize_relative(attention.rel_pos_h, grid)
        assert resized.shape == (2 * grid - 1, attention.rel_pos_h.shape[1])
        torch.testing.assert_close(attention.get_rel_pos(grid, grid, resized), expected)


class TestFromSam:
    def test_same_size_is_sams_own_encoder(self, sam):
        pixels = torch.randn(2, 3, 32, 32)
        msam = make(sam)
        for name, value in sam.vision_encoder.state_dict().items():
            assert torch.equal(msam.vision_encoder.state_dict()[name], value), name
        assert torch.equal(embed(msam.vision_encoder, pixels), embed(sam.vision_encoder, pixels))

    @pytest.mark.parametrize("image_size", [48, 20])
    def test_another_size_is_sam_with_its_own_relative_attention(self, sam, image_size):
        # SAM's attention interpolates the relative positions at run time, only the absolute ones have to be replaced
        sam, pixels = sam.double(), torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
        msam = make(sam, image_size)
        assert msam.config.vision_config.image_size == image_size and msam.config.grid_size == image_size // 4
        assert msam.vision_encoder.layers[1].attn.rel_pos_h.shape[0] == 2 * (image_size // 4) - 1
        assert msam.vision_encoder.layers[0].attn.rel_pos_h.shape[0] == 5  # windows of 3 keep their size

        reference = copy.deepcopy(sam.vision_encoder)
        reference.pos_embed = torch.nn.Parameter(resize_absolute(sam.vision_encoder.pos_embed, image_size // 4))
        reference.patch_embed.image_size = (image_size, image_size)
        torch.testing.assert_close(embed(msam.vision_encoder, pixels), embed(reference, pixels), rtol=0, atol=1e-11)
        assert msam(pixels).logits["depth"].shape == (2, 1, image_size, image_size)

    def test_without_windows_all_layers_are_global(self, sam_factory):
        sam, pixels = sam_factory(window_size=0).double(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
        msam, reference = make(sam, 48), copy.deepcopy(sam.vision_encoder)
        reference.pos_embed = torch.nn.Parameter(resize_absolute(sam.vision_encoder.pos_embed, 12))
        reference.patch_embed.image_size = (48, 48)
        torch.testing.assert_close(embed(msam.vision_encoder, pixels), embed(reference, pixels), rtol=0, atol=1e-11)

    def test_there_and_back_by_config(self, sam, tmp_path):
        msam = make(sam, 48)
        msam.save_pretrained(tmp_path)
        loaded = MSamForMultiTask.from_pretrained(tmp_path)
        pixels = torch.randn(1, 3, 48, 48)
        torch.testing.assert_close(loaded(pixels).logits["depth"], msam(pixels).logits["depth"])

    def test_without_position_embeddings(self, sam_factory):
        sam = sam_factory(use_abs_pos=False, use_rel_pos=False)
        assert make(sam, 48)(torch.randn(1, 3, 48, 48)).logits["depth"].isfinite().all()

    @pytest.mark.parametrize("image_size", [30, 0, -4, 2, 32.0, True])
    def test_impossible_sizes_are_named(self, sam, image_size):
        with pytest.raises(
            ValueError, match=f"`image_size` must be a positive multiple of the patch size 4, got {image_size}"
        ):
            make(sam, image_size)

    def test_sam_is_not_changed(self, sam):
        before = copy.deepcopy(sam.state_dict())
        make(sam, 48)
        assert sam.config.vision_config.image_size == 32
        assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
        state = encoder_state_for(sam.config.vision_config, sam.vision_encoder)
        assert state.keys() == sam.vision_encoder.state_dict().keys()
