"""Saved mSAM adapters: everything needed to get the model back from a SAM lies in one directory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import SamModel

from .files import finish_pending, written_aside
from .model_card import model_card
from .msam.loading import checkpoint_type
from .msam.modeling import MSamForMultiTask
from .msam.tasks import parse_tasks
from .msam_adapter import MSAM_MODEL_TYPE, msam_fields

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# what mSAM needs, beside an adapter whose configuration has no field for it (PEFT's own tuners)
MSAM_FILE = "msam.json"
MSAM_FIELDS = ("tasks", "channel_mode", "image_size")


def save_adapter(model: PeftModel, directory: str | Path, metrics: dict[str, Any] | None = None) -> Path:
    """Save the active adapter of a tuned mSAM, with everything that [`load_adapter`] needs beside the SAM.

    A save that fails, or is killed, leaves the adapter that `directory` held before, or the new one.

    Args:
        model: The PeftModel around an `MSamForMultiTask`.
        directory: Where to; created where missing, other files in it stay.
        metrics: `{task: {metric: value}}` for the model card.

    Returns:
        The directory.
    """
    msam = model.get_base_model()
    if not isinstance(msam, MSamForMultiTask):
        raise TypeError(
            f"save_adapter saves a PeftModel around an MSamForMultiTask, got one around a {type(msam).__name__}; use "
            "its save_pretrained."
        )
    directory = Path(directory)
    with written_aside(directory) as aside:
        _save_active(model, aside)
        if getattr(model.peft_config[model.active_adapter], "msam", None) is None:
            (aside / MSAM_FILE).write_text(json.dumps(msam_fields(msam.config), indent=2) + "\n")
        (aside / "README.md").write_text(model_card(model, aside / WEIGHTS_FILE, metrics))
    return directory


def _save_active(model: PeftModel, directory: Path) -> None:
    """Save the active adapter; PEFT puts one that is not named "default" into a folder of its name."""
    name = model.active_adapter
    model.save_pretrained(directory, selected_adapters=[name])
    folder = directory / name
    if name != "default":
        for path in folder.iterdir():
            path.rename(directory / path.name)
        folder.rmdir()


def load_adapter(
    path_or_hub_id: str | Path,
    base_model: SamModel | MSamForMultiTask | str | Path | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Load a saved mSAM adapter.

    Args:
        path_or_hub_id: A directory that `save_pretrained` or [`save_adapter`] wrote, or its name on the Hub.
        base_model: A `SamModel`, an `MSamForMultiTask`, or the name or path of one. The adapter's own base when None.
        is_trainable: Whether to train the adapter further; it is frozen otherwise.
        revision: The version on the Hub.

    Returns:
        The PeftModel around an `MSamForMultiTask`.

    Raises:
        FileNotFoundError: The directory, or a file in it, is missing.
        ValueError: The adapter is not one of an mSAM, or does not fit the base model.
    """
    directory = _adapter_directory(path_or_hub_id, revision)
    config = _read_config(directory)
    fields = _read_msam_fields(directory, config)
    msam = _base_msam(base_model, config, fields, directory)
    _check_weights(directory / WEIGHTS_FILE, _expected_shapes(msam, config))
    return PeftModel.from_pretrained(msam, directory, is_trainable=is_trainable)


def _adapter_directory(path_or_hub_id: str | Path, revision: str | None) -> Path:
    path = Path(path_or_hub_id)
    if not path.is_dir():
        if path.exists():
            raise FileNotFoundError(f"An adapter is a directory, but '{path}' is a file.")
        path = _download(str(path_or_hub_id), revision)
    finish_pending(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"'{path_or_hub_id}' is no saved adapter: it has no {name}.")
    return path


def _download(hub_id: str, revision: str | None) -> Path:
    files = [CONFIG_FILE, WEIGHTS_FILE, MSAM_FILE]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"'{hub_id}' is neither a local directory nor an adapter that could be loaded from the Hub: {error}"
        ) from error


def _read_config(directory: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(directory)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} cannot be read: {error}") from error


def _read_msam_fields(directory: Path, config: PeftConfig) -> dict[str, Any]:
    fields, file = getattr(config, "msam", None), directory / CONFIG_FILE
    if fields is None and (directory / MSAM_FILE).is_file():
        file = directory / MSAM_FILE
        try:
            fields = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if fields is None:
        raise ValueError(
            f"'{directory}' is an adapter, but not one of an MSamForMultiTask: neither its {CONFIG_FILE} has a field "
            f"`msam` nor is there a {MSAM_FILE}. Load it with PeftModel.from_pretrained."
        )
    missing = [name for name in MSAM_FIELDS if name not in fields]
    if missing:
        raise ValueError(f"{file} does not say the {missing} of the MSamForMultiTask.")
    return fields


def _base_msam(base_model: Any, config: PeftConfig, fields: dict[str, Any], directory: Path) -> MSamForMultiTask:
    if base_model is None:
        base_model = config.base_model_name_or_path
        if not base_model:
            raise ValueError(
                f"'{directory}' does not say which SAM it was trained on: pass base_model=, a SamModel or the name or "
                "path of one."
            )
    if isinstance(base_model, str | Path) and checkpoint_type(base_model) == MSAM_MODEL_TYPE:
        base_model = MSamForMultiTask.from_pretrained(base_model)
    if isinstance(base_model, MSamForMultiTask):
        _check_same_msam(base_model, fields)
        return base_model
    return MSamForMultiTask.from_sam(
        base_model, fields["tasks"], image_size=fields["image_size"], channel_mode=fields["channel_mode"]
    )


def _check_same_msam(msam: MSamForMultiTask, fields: dict[str, Any]) -> None:
    own = {**msam_fields(msam.config), "tasks": msam.task_specs}
    theirs = {**fields, "tasks": parse_tasks(fields["tasks"])}
    if list(own["tasks"].items()) != list(theirs["tasks"].items()):
        raise ValueError(f"The adapter's tasks are {theirs['tasks']}, those of the base model {own['tasks']}.")
    for name in ("channel_mode", "image_size"):
        if own[name] != theirs[name]:
            raise ValueError(f"The adapter was trained with {name}={theirs[name]}, the base model has {own[name]}.")


def _expected_shapes(msam: MSamForMultiTask, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that the adapter has on this model, from a twin without weights: `msam` is not touched."""
    with torch.device("meta"):
        twin = PeftModel(MSamForMultiTask(copy.deepcopy(msam.config)), copy.deepcopy(config))
    state = get_peft_model_state_dict(twin, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}


def _check_weights(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """PEFT only warns about missing keys and drops what it does not know."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            broken = [name for name in found if not torch.isfinite(file.get_tensor(name)).all()]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    problems = {
        "is missing": sorted(expected.keys() - found.keys()),
        "does not belong to the model": sorted(found.keys() - expected.keys()),
        "has another shape than in the model": [n for n in expected if found.get(n, expected[n]) != expected[n]],
        "is not finite": broken,
    }
    for problem, names in problems.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{path}: the tensor '{names[0]}'{more} {problem}.")
