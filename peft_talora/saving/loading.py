"""From a saved adapter, here or on the Hub, to a tuned mSAM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..msam.adapter import MSAM_MODEL_TYPE, check_same_family, is_msam
from ..msam.families import family_of_model
from ..msam.loading import checkpoint_type
from .adapter import MSAM_FILE, SavedAdapter
from .card import is_hub_id
from .placement import checked_dtype, place
from .recipe import MSAM_FIELDS
from .seal import CONFIG_FILE, WEIGHTS_FILE


def load_saved(
    msam_class: type[PreTrainedModel],
    path_or_hub_id: str | Path,
    base_model: PreTrainedModel | str | Path | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    verify: bool = True,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
) -> PeftModel:
    """Load a saved mSAM adapter; arguments and errors are those of [`peft_talora.hub.load_adapter`].

    Args:
        msam_class: `MSamForMultiTask`, which itself offers to load adapters.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"`adapter_name` must be a name without dots, got {adapter_name!r}.")
    dtype = checked_dtype(dtype)
    directory = _adapter_directory(path_or_hub_id, revision=revision, cache_dir=cache_dir, token=token)
    adapter = SavedAdapter.read(directory, verify)
    msam = _base_msam(msam_class, base_model, adapter)
    adapter.check_fits(msam)
    model = adapter.load_into(msam if dtype is None else msam.to(dtype), adapter_name, is_trainable)
    place(msam, device_map)
    return model


def _adapter_directory(path_or_hub_id: str | Path, **download: Any) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"An adapter is a directory, but '{path}' is a file.")
    return _download(str(path_or_hub_id), **download)


def _download(hub_id: str, **download: Any) -> Path:
    if not is_hub_id(hub_id):
        raise FileNotFoundError(f"There is no folder '{hub_id}'; it is no name of an adapter on the Hub either.")
    files = [CONFIG_FILE, WEIGHTS_FILE, MSAM_FILE]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files, **download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"There is no folder '{hub_id}'. An adapter of that name could not be loaded from the Hub either: {error}"
        ) from error


def _base_msam(msam_class: type[PreTrainedModel], base_model: Any, adapter: SavedAdapter) -> PreTrainedModel:
    trained_on = adapter.config.base_model_name_or_path
    if base_model is None:
        base_model = trained_on
        if not base_model:
            raise ValueError(
                f"'{adapter.directory}' does not say which SAM it was trained on: pass base_model=, a SAM or the name "
                "or path of one."
            )
    if isinstance(base_model, str | Path) and checkpoint_type(base_model) == MSAM_MODEL_TYPE:
        base_model = msam_class.from_pretrained(base_model)
    msam = base_model
    if not (isinstance(base_model, PreTrainedModel) and is_msam(base_model)):
        recipe = {name: adapter.recipe[name] for name in MSAM_FIELDS}
        try:
            family = None if isinstance(base_model, str | Path) else family_of_model(base_model)
            if family is not None:
                check_same_family(adapter.recipe, family.model_type, trained_on)
            msam = msam_class.from_sam(base_model, **recipe)
        except ValueError as error:
            raise ValueError(f"The mSAM of {adapter.recipe_file} could not be made: {error}") from error
    _check_untuned(msam)
    if is_hub_id(trained_on) and is_hub_id(msam.name_or_path) and trained_on != msam.name_or_path:
        warnings.warn(
            f"The adapter was trained on '{trained_on}', the base model is '{msam.name_or_path}'.", stacklevel=4
        )
    return msam


def _check_untuned(msam: nn.Module) -> None:
    names = [*getattr(msam, "peft_config", {})]
    if names or any(isinstance(module, BaseTunerLayer) for module in msam.modules()):
        raise ValueError(
            f"The base model has an adapter already ({', '.join(map(repr, names)) or 'tuned layers'}). To keep it beside the "
            "saved one, call load_adapter(directory, 'another name') of its PeftModel; else unload() it first, or pass the "
            "SAM."
        )
