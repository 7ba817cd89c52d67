"""What an adapter's configuration takes over from an mSAM, and checks against it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft.config import PeftConfig
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

MSAM_MODEL_TYPE = "msam"
DEFAULT_ADAPTER = "default"


def is_msam(model: nn.Module) -> bool:
    """Whether `model` is an MSamForMultiTask."""
    return getattr(getattr(model, "config", None), "model_type", None) == MSAM_MODEL_TYPE


def default_modules_to_save(msam: nn.Module) -> list[str]:
    """Full names of what is trained beside an adapter: no-mask embeddings, mask decoders, encoder LayerNorms.

    These are the parts of mSAM that the paper trains (arXiv 2403.10971, section 3.1); the neck's norms stay frozen. Pass the
    list to PEFT's own configurations:

        LoraConfig(target_modules=["qkv"], modules_to_save=default_modules_to_save(msam))

    Args:
        msam: The `MSamForMultiTask`, before it gets an adapter.

    Raises:
        ValueError: `msam` is another model.
    """
    if not is_msam(msam):
        raise ValueError(f"default_modules_to_save needs an MSamForMultiTask, got {type(msam).__name__}.")
    if DEFAULT_ADAPTER in msam.config.task_names:
        warnings.warn(
            f"A task is called '{DEFAULT_ADAPTER}', as PEFT calls an adapter: its own tuners take that part out of the names that they "
            "save, and could not load them again. For them call the task otherwise.",
            stacklevel=2,
        )
    return _trained_parts(msam)


def _trained_parts(msam: nn.Module) -> list[str]:
    names = [f"{part}.{task}" for task in msam.config.task_names for part in ("no_mask_embeds", "mask_decoders")]
    layers = msam.family.layers
    for index in range(len(msam.get_submodule(layers))):
        names += [f"{layers}.{index}.layer_norm{number}" for number in (1, 2)]
    return names


def task_of_module(model: nn.Module, name: str) -> str | None:
    """The task that a module of a model belongs to, by the module's name; None outside of the decoders of an mSAM."""
    part, _, rest = name.partition(".")
    return rest.partition(".")[0] if is_msam(model) and part == "mask_decoders" else None


def msam_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a saved adapter has to know to build the mSAM again from its SAM, and to know that SAM again."""
    backbone = config.family.backbone(config.vision_config)
    return {
        "tasks": [dict(task) for task in config.tasks],
        "channel_mode": config.channel_mode,
        "image_size": config.image_size,
        "base_model_type": config.base_model_type,
        "base": {name: _as_in_files(getattr(backbone, name)) for name in config.family.base_fields},
    }


def _as_in_files(value: Any) -> Any:
    """A tuple is a list there."""
    return [_as_in_files(item) for item in value] if isinstance(value, list | tuple) else value


def check_same_msam(fields: Mapping[str, Any], config: PreTrainedConfig, base_name: str | None = None) -> None:
    """Raise ValueError unless an adapter with these [`msam_fields`] is one of an mSAM with this configuration.

    Args:
        fields: The adapter's. Those of older files have no "base", which is not compared then.
        config: The `MSamConfig` of the model.
        base_name: The SAM that the adapter was trained on, for the message.
    """
    model_fields = msam_fields(config)
    check_same_family(fields, config.base_model_type, base_name)
    base, saved_base = model_fields["base"], fields.get("base")
    saved_base = saved_base if isinstance(saved_base, dict) else {}
    different = [name for name in base if name in saved_base and saved_base[name] != base[name]]
    if different:
        values = [", ".join(f"{name}={sizes[name]}" for name in different) for sizes in (saved_base, base)]
        raise ValueError(
            f"The adapter was trained on another SAM{f', {base_name!r}' if base_name else ''}: that has {values[0]}, "
            f"the base model '{config._name_or_path or type(config).__name__}' has {values[1]}."
        )
    names = [task["name"] for task in fields["tasks"]]
    if names != list(config.task_names):
        raise ValueError(
            f"The adapter's tasks are {names}, those of the base model {list(config.task_names)}: they must be the same, "
            "in the same order."
        )
    for saved_task, task in zip(fields["tasks"], model_fields["tasks"], strict=True):
        if saved_task != {name: task.get(name) for name in saved_task}:
            raise ValueError(f"The adapter's task '{task['name']}' is {saved_task}, that of the base model {task}.")
    for name in ("channel_mode", "image_size"):
        if fields.get(name, model_fields[name]) != model_fields[name]:
            raise ValueError(
                f"The adapter was trained with {name}={fields[name]}, the base model has {model_fields[name]}."
            )


def check_same_family(fields: Mapping[str, Any], base_model_type: str, base_name: str | None = None) -> None:
    """Raise ValueError unless an adapter with these [`msam_fields`] is one for a base of this family.

    Args:
        fields: The adapter's. Older files do not say it, and are those of a SAM.
        base_model_type: That of the base.
        base_name: The SAM that the adapter was trained on, for the message.
    """
    saved_type = fields.get("base_model_type", "sam")
    if saved_type != base_model_type:
        raise ValueError(
            f"The adapter was trained on a '{saved_type}' model{f', {base_name!r}' if base_name else ''}, the base model is a "
            f"'{base_model_type}' model."
        )


def prepare_for_msam(peft_config: PeftConfig, model: nn.Module) -> None:
    """Fill `tasks`, `modules_to_save` and `msam` from an mSAM where they are None; refuse what contradicts it."""
    if not is_msam(model):
        if peft_config.msam is not None:
            raise ValueError(
                f"The adapter was made for an MSamForMultiTask with the tasks "
                f"{[task['name'] for task in peft_config.msam['tasks']]}, but the model is a {type(model).__name__}. "
                "Load it with MSamForMultiTask.from_adapter(...)."
            )
        return
    if hasattr(peft_config, "tasks"):
        if peft_config.tasks is None:
            peft_config.tasks = list(model.config.task_names)
        _check_same_tasks(peft_config.tasks, model)
    if peft_config.msam is not None:
        check_same_msam(peft_config.msam, model.config, peft_config.base_model_name_or_path)
    else:
        peft_config.msam = msam_fields(model.config)
    if peft_config.modules_to_save is None:
        peft_config.modules_to_save = _trained_parts(model)
    _check_copied(peft_config.modules_to_save, model)


def _check_same_tasks(tasks: list[str], model: nn.Module) -> None:
    if list(tasks) != list(model.config.task_names):
        raise ValueError(
            f"The tasks of the adapter, {list(tasks)}, are not those of the model, {list(model.config.task_names)}, in the "
            "same order."
        )


def _check_copied(names: list[str], model: nn.Module) -> None:
    """Refuse what is to be trained in full, in a copy, where it is sharded: no shard's hooks are copied with it."""
    for name, module in model.named_modules():
        is_copied = any(f".{name}".endswith(f".{saved}") for saved in names)
        if is_copied and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise ValueError(
                f"'{name}' is sharded and in modules_to_save, of which an adapter trains a copy: call fully_shard after "
                "get_peft_model, or leave it out of modules_to_save."
            )
