"""Small models and labels that several tests build."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
)

# what the mask decoders of all small models have in common
DECODER = {"num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 8}


def make_sam(image_size: int = 32, patch_size: int = 4, hidden_size: int = 16, **vision) -> SamModel:
    """A tiny SamModel with windowed (padded) and global layers.

    A SAM from a bare config has encoder weights of about 1e-10 and a positional encoding that is noise, so that any
    test of the encoder would pass; here every weight matters.
    """
    vision_config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "window_size": 3,
        "global_attn_indexes": [1],
        "output_channels": 8,
        "num_pos_feats": 4,
        "scale": 1.0,
        **vision,
    }
    prompt_config = {
        "hidden_size": 8,
        "image_size": image_size,
        "patch_size": patch_size,
        "image_embedding_size": image_size // patch_size,
        "mask_input_channels": 4,
    }
    decoder_config = {"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 8}
    sam = SamModel(
        SamConfig(vision_config=vision_config, prompt_encoder_config=prompt_config, mask_decoder_config=decoder_config)
    )
    return _randomised(sam)


@torch.no_grad()
def _randomised(model: nn.Module, scale: float = 0.3) -> Any:
    """The model with weights of which every one matters, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = 0.0 if parameter.ndim > 1 else 0.5
        parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    # positional encodings are buffers, and one in SAM's checkpoints
    for name, buffer in model.named_buffers():
        if name.endswith("positional_embedding"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def make_sam_hq(image_size: int = 32, **vision) -> SamHQModel:
    """A tiny SamHQModel, as [`make_sam`]; two global layers, so that the first one's states are not the last ones."""
    vision_config = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 4,
        "window_size": 3,
        "global_attn_indexes": [1, 3],
        "output_channels": 8,
        "num_pos_feats": 4,
        **vision,
    }
    prompt_config = {"hidden_size": 8, "image_size": image_size, "patch_size": 4, "mask_input_channels": 4}
    decoder_config = {**DECODER, "hidden_size": 8, "vit_dim": vision_config["hidden_size"]}
    return _randomised(
        SamHQModel(
            SamHQConfig(
                vision_config=vision_config, prompt_encoder_config=prompt_config, mask_decoder_config=decoder_config
            )
        )
    )


def make_sam2(image_size: int = 64, **backbone) -> Sam2Model:
    """A tiny Sam2Model: four stages, windows of 4, 4, 6 (padded) and 3, one global block, queries pooled between stages."""
    grid = image_size // 4
    backbone_config = {
        "hidden_size": 8,
        "image_size": [image_size, image_size],
        "blocks_per_stage": [1, 2, 3, 1],
        "embed_dim_per_stage": [8, 16, 24, 32],
        "num_attention_heads_per_stage": [1, 2, 2, 4],
        "window_size_per_stage": [4, 4, 6, 3],
        "global_attention_blocks": [5],
        "window_positional_embedding_background_size": [5, 5],
        **backbone,
    }
    vision_config = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **backbone_config},
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
        "fpn_hidden_size": 16,
    }
    prompt_config = {"hidden_size": 16, "image_size": image_size, "patch_size": 16, "mask_input_channels": 4}
    return _randomised(
        Sam2Model(
            Sam2Config(
                vision_config=vision_config,
                prompt_encoder_config=prompt_config,
                mask_decoder_config={**DECODER, "hidden_size": 16},
            )
        )
    )


def sam3_vision_config(image_size: int = 32, **backbone) -> dict[str, Any]:
    """The vision encoder of [`make_sam3`] and [`make_sam3_tracker`]: windowed (padded) and global layers."""
    grid = image_size // 4
    return {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": image_size,
            "pretrain_image_size": 20,
            "patch_size": 4,
            "window_size": 3,
            "global_attn_indexes": [1],
            **backbone,
        },
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
    }


def make_sam3_tracker(image_size: int = 32, **backbone) -> Sam3TrackerModel:
    """A tiny Sam3TrackerModel; its encoder has three levels, as that of SAM 3's checkpoints."""
    vision_config = {**sam3_vision_config(image_size, **backbone), "scale_factors": [4.0, 2.0, 1.0]}
    prompt_config = {"hidden_size": 16, "image_size": image_size, "patch_size": 4, "mask_input_channels": 4}
    return _randomised(
        Sam3TrackerModel(
            Sam3TrackerConfig(
                vision_config={"model_type": "sam3_vision_model", **vision_config},
                prompt_encoder_config=prompt_config,
                mask_decoder_config={**DECODER, "hidden_size": 16},
            )
        )
    )


def make_sam3(image_size: int = 32) -> Sam3Model:
    """A tiny Sam3Model: the same encoder, with the text encoder, the DETR and the mask decoder of the detector."""
    part = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    return _randomised(
        Sam3Model(
            Sam3Config(
                vision_config=sam3_vision_config(image_size),
                text_config=text_config,
                geometry_encoder_config=part,
                detr_encoder_config=part,
                detr_decoder_config={**part, "num_queries": 5},
                mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
            )
        )
    )


# {family of SAMs that mSAM takes: what makes a small one}
MAKERS = {"sam": make_sam, "sam_hq": make_sam_hq, "sam2": make_sam2, "sam3_tracker": make_sam3_tracker}
# those that most tests do not run on
OTHER_FAMILIES = [name for name in MAKERS if name != "sam"]


def side_of(family: str) -> int:
    """The side of the images that a small model of a family takes, in pixels."""
    return 64 if family == "sam2" else 32


@torch.no_grad()
def move_saved_modules(model):
    """Move what is trained in full away from the SAM's weights, differently for every task and channel; the model."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def label_maps(batch: int = 2, num_classes: int = 3, size: int = 20) -> dict[str, torch.Tensor]:
    """Labels of the tasks semantic, depth and normals, everything labelled."""
    generator = torch.Generator().manual_seed(2)
    return {
        "semantic": torch.randint(0, num_classes, (batch, size, size), generator=generator),
        "depth": 0.5 + torch.rand(batch, 1, size, size, generator=generator),
        "normals": torch.randn(batch, 3, size, size, generator=generator),
    }


def train(model: nn.Module, loss: Callable[[], torch.Tensor], steps: int, lr: float = 1e-2) -> list[float]:
    """The loss before each of a few steps of Adam on what is trainable."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def adapter_size(config: PeftConfig, hidden_size: int, layers: int, heads: int) -> int:
    """How many numbers an adapter of an image encoder of these sizes trains, and saves; without memory for it."""
    vision = SamVisionConfig(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = get_peft_model(SamVisionModel(vision), config, autocast_adapter_dtype=False)
    assert all(p.device.type == "meta" for p in model.parameters())
    trainable = model.get_nb_trainable_parameters()[0]
    assert sum(value.numel() for value in get_peft_model_state_dict(model).values()) == trainable
    return trainable


def serve_in_threads(serve: Callable[[Any, Callable], bool], keys: Iterable, rounds: int) -> list[bool]:
    """Whether `serve(key, meet)` was true in all rounds, for each key in a thread of its own.

    All threads call `meet()` equally often; it returns when all of them have. What a thread raises is raised here.
    """
    keys = list(keys)
    barrier = threading.Barrier(len(keys), timeout=60)

    def run(key):
        try:
            # a list: also a thread with a wrong round goes on, the others wait for it
            answers = [serve(key, barrier.wait) for _ in range(rounds)]
            return all(answers)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(keys)) as pool:
        return list(pool.map(run, keys))


def images(batch=2, size=32, dtype=torch.float64, seed=1):
    """The same random images in every test, (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def differ(first, second):
    """Whether two tensors differ by more than rounding."""
    return (first - second).abs().max().item() > 1e-3


def assert_same(got, expected, atol=1e-9):
    """`{name: tensor}` twice, in the same order."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
