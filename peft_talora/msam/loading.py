"""Loading the SAM that an mSAM starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .families import FAMILIES, family_of_checkpoint, family_of_model


def load_sam(name_or_path: str | Path) -> PreTrainedModel:
    """Load a SAM of one of the families from a directory or from the Hub.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is a checkpoint of another model; transformers alone would fill a SAM with random weights.
    """
    model_type = checkpoint_type(name_or_path)
    family = family_of_checkpoint(model_type)
    if family is None:
        others = ", ".join(f"'{known}'" for known in FAMILIES if known != "sam")
        raise ValueError(
            f"'{name_or_path}' is a checkpoint of a '{model_type}' model, not of a 'sam' model or one of {others}."
        )
    source = _source(name_or_path)
    try:
        return family.model_class.from_pretrained(source)
    except OSError as error:
        raise _not_found(name_or_path, error) from error


def image_size_of(sam: PreTrainedModel) -> int:
    """The side in pixels of the images that a SAM of one of the families takes.

    Raises:
        ValueError: It is of none.
    """
    family = family_of_model(sam)
    if family is None:
        raise ValueError(f"A {type(sam).__name__} is no SAM, expected one of {', '.join(FAMILIES)}.")
    return family.image_size(sam.config.vision_config)


def checkpoint_type(name_or_path: str | Path) -> str:
    """The model type of a checkpoint: "sam", "msam", or that of another model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    source = _source(name_or_path)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    except OSError as error:
        raise _not_found(name_or_path, error) from error


def _source(name_or_path: str | Path) -> str:
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no SAM checkpoint: the directory '{path}' does not exist.")
    return name


def _not_found(name_or_path: str | Path, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(f"'{name_or_path}' is no SAM checkpoint, neither a directory nor on the Hub: {error}")


def check_plain(model: nn.Module, name: str, instead: str) -> None:
    """Refuse a model whose weights cannot be copied: they are quantised, sharded, or not in memory.

    Args:
        model: The model. All of it may be on the meta device, for a twin without weights.
        name: How the message calls it.
        instead: What to do, for a model with these weights: a sentence with a place for "quantization_config" or the like.

    Raises:
        ValueError: It has such weights.
    """
    state = model.state_dict()
    on_meta = [key for key, value in state.items() if value.device.type == "meta"]
    if on_meta and (len(on_meta) < len(state) or any(hasattr(module, "_hf_hook") for module in model.modules())):
        raise ValueError(f"{name} is offloaded ('{on_meta[0]}' is not in memory): {instead.format('device_map')}")
    for key, value in state.items():
        if type(value) is not torch.Tensor or not value.is_floating_point():
            kind = type(value).__name__ if type(value) is not torch.Tensor else value.dtype
            raise ValueError(
                f"{name} is quantised or sharded ('{key}' is a {kind}): {instead.format('quantization_config')}"
            )
