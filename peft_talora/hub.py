"""Saved mSAM adapters: everything needed to get the model back from a SAM lies in one directory, here or on the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from .msam.adapter import msam_fields
from .msam.modeling import MSamForMultiTask
from .saving.adapter import MSAM_FILE, SavedAdapter
from .saving.card import model_card
from .saving.directory import written_aside
from .saving.loading import load_saved
from .saving.seal import CONFIG_FILE, WEIGHTS_FILE, seal

# starts of PEFT's LoRA that change the base by chance or by data ("pissa" and "olora" change it the same way again)
RANDOM_STARTS = ("pissa_niter", "corda", "loftq", "lora_ga")


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    metrics: dict[str, Any] | None = None,
    dataset: str | None = None,
    license: str = "apache-2.0",
    hub_id: str | None = None,
) -> Path:
    """Save the active adapter of a tuned mSAM, with everything that [`load_adapter`] needs beside the SAM.

    A save that fails, or is killed, leaves the adapter that `directory` held before, or the new one. A checksum of the
    weights is saved too; those that PEFT's own `save_pretrained` writes have none.

    Args:
        model: The PeftModel around an `MSamForMultiTask`.
        directory: Where to; created where missing, other files in it stay.
        metrics: `{task: {metric: value}}` for the model card.
        dataset: What the metrics were measured on, for the model card.
        license: The adapter's, as the Hub names licences; for the model card.
        hub_id: The adapter's name on the Hub, if it gets one; for the model card.

    Returns:
        The directory.

    Raises:
        TypeError: The model is not around an `MSamForMultiTask`.
        ValueError: The model has an adapter that could not be loaded again, such as one on top of another; or `metrics` has
            another form.
        FileExistsError: `directory` is a file.
    """
    msam = _msam_of(model)
    _check_metrics(metrics)
    directory = Path(directory)
    with written_aside(directory) as aside:
        _save_active(model, aside)
        sealed = aside / CONFIG_FILE
        if getattr(model.peft_config[model.active_adapter], "msam", None) is None:
            sealed = aside / MSAM_FILE
            sealed.write_text(json.dumps(msam_fields(msam.config)), encoding="utf-8")
        seal(sealed, weights=aside / WEIGHTS_FILE)
        _check_loads_again(aside, msam, directory)
        card = model_card(model, aside / WEIGHTS_FILE, metrics, dataset=dataset, license=license, hub_id=hub_id)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return directory


def push_adapter(
    model: PeftModel,
    hub_id: str,
    metrics: dict[str, Any] | None = None,
    dataset: str | None = None,
    license: str = "apache-2.0",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Save the active adapter of a tuned mSAM to the Hub, in one commit: the files of [`save_adapter`].

    PEFT's own `model.push_to_hub(hub_id)` uploads an adapter that loads as well, with a model card that says less.

    Args:
        model: The PeftModel around an `MSamForMultiTask`.
        hub_id: The repository, "user/name"; created where missing.
        metrics: `{task: {metric: value}}` for the model card.
        dataset: What the metrics were measured on, for the model card.
        license: The adapter's, as the Hub names licences.
        private: Whether a new repository is private; the Hub's default when None.
        token: Your access token; the one that you are logged in with when None.
        revision: The branch, created where missing; the main one when None.
        create_pr: Open a pull request instead of changing the branch.
        commit_message: The commit's first line.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        TypeError: The model is not around an `MSamForMultiTask`.
        ValueError: The model has one adapter on top of another, or `metrics` has another form.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused it. HFValidationError: `hub_id` can be no repository.
    """
    # before there is an empty repository
    _msam_of(model)
    _check_metrics(metrics)
    api = HfApi(token=token)
    hub_id = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(hub_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = save_adapter(model, Path(folder) / "adapter", metrics, dataset, license, hub_id)
        return api.upload_folder(
            repo_id=hub_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _msam_of(model: PeftModel) -> MSamForMultiTask:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel) or not isinstance(base, MSamForMultiTask):
        raise TypeError(
            "save_adapter and push_adapter take a PeftModel around an MSamForMultiTask, got "
            f"{'one around ' if isinstance(model, PeftModel) else ''}a {type(base).__name__}; use its save_pretrained or "
            "push_to_hub."
        )
    if len(model.active_adapters) != 1:
        raise ValueError(f"One adapter is saved, but {model.active_adapters} are active: call set_adapter first.")
    start = str(getattr(model.peft_config[model.active_adapter], "init_lora_weights", None))
    if start.startswith(RANDOM_STARTS):
        raise ValueError(
            f"init_lora_weights={start!r} changed the SAM's own weights, which are not saved, in a way that loading cannot "
            "repeat. Use another start, or convert the adapter with path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained."
        )
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.base_layer, BaseTunerLayer):
            raise ValueError(
                f"'{name}' has one adapter on top of another ({type(module).__name__} on "
                f"{type(module.base_layer).__name__}), which could not be loaded again: unload or merge the first one, or "
                "start from a fresh MSamForMultiTask.from_sam(...)."
            )
    return base


def _check_metrics(metrics: dict[str, Any] | None) -> None:
    if metrics is None:
        return
    if not isinstance(metrics, dict) or not all(isinstance(values, dict) for values in metrics.values()):
        raise ValueError(
            "`metrics` must be {task: {metric: value}}, such as {'depth': {'abs_err': 0.3}}, got "
            f"{metrics!r}; of a metrics.json that is its entry 'tasks'."
        )


def _save_active(model: PeftModel, directory: Path) -> None:
    """Save the active adapter; PEFT puts one that is not named "default" into a folder of its name."""
    name = model.active_adapter
    # PEFT would look for the base model's configuration on the Hub to see whether its vocabulary grew
    model.save_pretrained(directory, selected_adapters=[name], save_embedding_layers=False)
    folder = directory / name
    if name != "default":
        for path in folder.iterdir():
            path.rename(directory / path.name)
        folder.rmdir()


def _check_loads_again(aside: Path, msam: MSamForMultiTask, directory: Path) -> None:
    """Refuse to save what [`load_adapter`] would refuse to load."""
    try:
        SavedAdapter.read(aside).check_fits(msam)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).replace(str(aside), str(directory))
        raise ValueError(f"This adapter could not be loaded again, so it is not saved: {reason}") from error


def load_adapter(
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
    """Load a saved mSAM adapter.

    What does not fit is refused before the base model is touched. Weights in pickle files are never read. Reading writes
    nothing into the directory.

    Args:
        path_or_hub_id: A directory that `save_pretrained` or [`save_adapter`] wrote, or its name on the Hub.
        base_model: A `SamModel` (or a model of the other families), an `MSamForMultiTask`, or the name or path of one. The
            adapter's own base when None.
            One of another name than the adapter's own, both on the Hub, is a warning. An `MSamForMultiTask` is itself
            tuned, and cast and moved where that is asked for; a `SamModel` is not changed.
        is_trainable: Whether to train the adapter further; it is frozen otherwise.
        revision: The version on the Hub.
        verify: Refuse weights that are not as they were saved, by their checksum. False accepts what you changed by
            hand, where it fits the model. Weights without a checksum are accepted anyway. The configuration has none: it
            may be edited, as far as its values fit the weights.
        cache_dir: huggingface_hub's cache, if not its usual one.
        token: Your access token for the Hub; the one that you are logged in with when None.
        adapter_name: The adapter's name in the model.
        dtype: The type of the base model's numbers, such as `torch.bfloat16` or "bfloat16"; as it is when None. The adapter's
            own stay float32 in half precision, as in PEFT.
        device_map: A device for the whole model; or as in transformers "auto", or a dict of modules and devices, which
            accelerate dispatches. Where the base model is when None.

    Returns:
        The PeftModel around an `MSamForMultiTask`. The task that was active when the adapter was saved is active again.

    Raises:
        FileNotFoundError: The directory, a file in it, or the base model is missing, here and on the Hub.
        ValueError: The adapter is not one of an mSAM; a newer version of this package saved it; the weights are damaged or
            were changed; a tensor is missing, unknown, of another shape, or not finite; or it does not fit the base model:
            other tasks, another order of them, another image size or channel mode, a SAM of other sizes; or the base model
            has an adapter already.
        TypeError: `base_model` is something else.
    """
    return load_saved(
        MSamForMultiTask,
        path_or_hub_id,
        base_model=base_model,
        is_trainable=is_trainable,
        revision=revision,
        verify=verify,
        cache_dir=cache_dir,
        token=token,
        adapter_name=adapter_name,
        dtype=dtype,
        device_map=device_map,
    )
