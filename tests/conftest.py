"""Small models for all tests."""

import pytest
import torch
from transformers import SamConfig, SamModel
from transformers.utils import logging

logging.disable_progress_bar()
# the models here are so small that a second thread only waits
torch.set_num_threads(1)


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
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sam.parameters():
            mean = 0.0 if parameter.ndim > 1 else 0.5
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return sam.eval()


@pytest.fixture
def sam() -> SamModel:
    return make_sam()


@pytest.fixture
def sam_factory():
    return make_sam


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
