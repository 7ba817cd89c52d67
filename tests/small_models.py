"""Small models and labels that several tests build."""

import torch
from peft.utils import ModulesToSaveWrapper
from transformers import SamConfig, SamModel


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


@torch.no_grad()
def move_saved_modules(model):
    """Move what is trained in full away from the SAM's weights, differently for every task and channel; the model."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
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
