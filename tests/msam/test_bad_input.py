"""What an mSAM is not made for is refused before the encoder runs."""

import pytest
import torch
from peft import LoraConfig
from small_models import images
from small_msams import NAMES, make, specs, tuned

from peft_talora import (
    MSamForMultiTask,
)


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
