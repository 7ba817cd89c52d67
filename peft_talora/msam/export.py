"""One task of an mSAM as a plain model of its base's family."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from .decoder import token_config
from .loading import check_plain
from .modeling import MSamForMultiTask


@torch.no_grad()
def task_to_sam(model: PeftModel | MSamForMultiTask, task: str, sam: PreTrainedModel | None = None) -> PreTrainedModel:
    """Make a `SamModel` of one task with one output channel: no prompt, and its mask is the task's map.

    Of an mSAM on another base it is a `SamHQModel`, a `Sam2Model` or a `Sam3TrackerModel`; of the latter two the fallback to
    other masks (`dynamic_multimask_via_stability`) is off.

    `sam(pixel_values, multimask_output=False).pred_masks[:, 0]` are the task's logits (B, 1, 4h, 4w). The encoder is
    merged, the decoder and the no-mask embedding are the task's. The weights for prompts (points, boxes, masks) are those
    of `sam`; without it they are untrained, and prompts mean nothing.

    Args:
        model: A tuned mSAM, or an mSAM. It is not changed.
        task: The task's name.
        sam: The SAM whose prompt weights are taken.

    Raises:
        TypeError: `model` is no mSAM, or `sam` is of another family.
        ValueError: The task is unknown or has several output channels; or the model is quantised, sharded or offloaded.
    """
    msam = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(msam, MSamForMultiTask):
        raise TypeError(f"task_to_sam needs an MSamForMultiTask, got {type(msam).__name__}.")
    if task not in msam.task_specs:
        raise ValueError(f"Unknown task '{task}'. The model's tasks are {list(msam.task_specs)}.")
    channels = msam.task_specs[task].num_channels
    model_class = msam.family.model_class
    if channels != 1:
        raise ValueError(f"A {model_class.__name__} has one output channel, the task '{task}' has {channels}.")
    if sam is not None and not isinstance(sam, model_class):
        raise TypeError(
            f"The prompt weights must be those of a {model_class.__name__}, got `sam` of the type {type(sam).__name__}."
        )
    check_plain(msam, "The mSAM", "a SamModel has plain weights, so export it from one that is not.")
    if isinstance(model, PeftModel):
        msam = _merged(model, task)
    exported = model_class(_plain_config(msam)).to(dtype=msam.dtype, device=msam.device)
    msam.family.export_parts(msam, exported)
    if sam is not None:
        exported.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
    exported.vision_encoder.load_state_dict(msam.vision_encoder.state_dict())
    exported.shared_image_embedding.load_state_dict(msam.shared_image_embedding.state_dict())
    exported.prompt_encoder.no_mask_embed.weight.copy_(msam.no_mask_embeds[task].weight)
    exported.mask_decoder.load_state_dict(msam.mask_decoders[task].state_dict())
    return exported.eval()


def _merged(model: PeftModel, task: str) -> MSamForMultiTask:
    """A merged copy for the task; a stock LoRA has the same weights for all tasks."""
    model = copy.deepcopy(model)
    if any(getattr(module, "merged", False) for module in model.modules()):
        model.unmerge_adapter()
    if hasattr(model.base_model, "set_task"):
        model.base_model.set_task(task)
    return model.merge_and_unload()


def _plain_config(msam: MSamForMultiTask) -> PreTrainedConfig:
    decoder = copy.deepcopy(msam.config.mask_decoder_config)
    if msam.config.decodes_tokens:
        decoder = token_config(decoder, 1)
    config = msam.family.plain_config(msam.config, decoder)
    config._attn_implementation = msam.config._attn_implementation
    return config
