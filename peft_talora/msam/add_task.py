"""A new task on a trained adapter, which leaves the tasks that it has as they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..routing.names import validate_task_names
from ..talora.layer import TALoraLayer
from .adapter import is_msam
from .frozen import freeze, frozen, keep_frozen
from .growth import MSamGrowth
from .tasks import TaskSpec


def add_task(model: PeftModel, name: str, spec: TaskSpec | Mapping[str, Any] | None = None) -> None:
    """Add a task to a trained adapter; the tasks that it has stay as they are, to the last bit, while the new one is trained.

    Only what is the new task's own is trainable then: with TA-LoRA its row of U3, a parameter of its own, in every layer that
    tells tasks apart; its mask decoder and its no-mask embedding. All else is frozen: G, U1, U2 and the other rows, the other decoders and embeddings,
    the encoder's LayerNorms; neither weight decay nor momentum moves it. With Conv-LoRA or PEFT's own tuners all tasks share
    the encoder, and the new one gets a decoder and an embedding alone.

    The row starts as the mean of the others: dW_t is linear in it (arXiv 2403.10971, section 3.2), so that the new task starts
    with the mean of the trained updates, and the factors give the row a gradient wherever it starts. Decoder and embedding
    start as those of the SAM, as in `MSamForMultiTask.from_sam`.

    The model is changed in place. Make optimisers and `MSamProcessor`s after it. It is saved and loaded like any adapter; once
    loaded, `is_trainable=True` trains all tasks again.

    "To the last bit" is said of a model in use, as `from_adapter` loads it. What is being trained itself may differ in the last
    bit as soon as it is frozen, by whatever means: torch multiplies weights that require gradients in another order.

    Args:
        model: A PeftModel around an `MSamForMultiTask`, or with TA-LoRA on any other model.
        name: The new task's name; it is the last in the order of the tasks.
        spec: What the task is. For an mSAM alone: elsewhere a task is a name.

    Raises:
        TypeError: `model` is no PeftModel.
        ValueError: The name is taken, or not possible; `spec` is missing, not possible, or out of place; not exactly one
            adapter is active, an mSAM has several, or one is merged; the adapter knows no tasks; an mSAM's decoders have tuned
            layers, or are not its SAM's in the base model. Nothing has changed then.

    Example:
        ```py
        >>> model = MSamForMultiTask.from_adapter("my-adapter")
        >>> add_task(model, "edges", TaskSpec("binary"))
        >>> output = model(pixel_values, tasks=["edges"], labels={"edges": edges})
        ```
    """
    adapter_name = _one_adapter(model)
    base, config = model.get_base_model(), model.peft_config[adapter_name]
    layers = [m for m in base.modules() if isinstance(m, TALoraLayer) and adapter_name in m.talora_G]
    if not is_msam(base) and not layers:
        raise ValueError(
            f"The adapter '{adapter_name}' ({config.peft_type.value}) of a {type(base).__name__} knows no tasks: add_task is for "
            "TA-LoRA, and for the adapters of an MSamForMultiTask."
        )
    _check_name(name, base.config.task_names if is_msam(base) else config.tasks)
    if not is_msam(base) and spec is not None:
        raise ValueError(
            f"`spec` is for an MSamForMultiTask, whose tasks have decoders; on a {type(base).__name__} a task is a name alone, "
            f"add_task(model, {name!r}). Got {spec!r}."
        )
    growth = MSamGrowth(model, adapter_name, name, spec) if is_msam(base) else None
    layers_of_tasks = [layer for layer in layers if not layer.is_shared[adapter_name]]
    if not is_msam(base) and not layers_of_tasks:
        raise ValueError(
            f"All layers of the adapter '{adapter_name}' have one update for all tasks (TALoraConfig.shared_layers): on a "
            f"{type(base).__name__} '{name}' would be the same as the other tasks, with nothing to train."
        )
    _warn_of_no_gradient(layers_of_tasks, adapter_name)

    # from here on nothing is refused
    _freeze(base, adapter_name)
    for layer in layers_of_tasks:
        layer.add_task_row(adapter_name, layer.task_rows(adapter_name).mean(dim=0))
    if layers:
        layers[0].task_router.add_task(adapter_name, name)
        config.tasks, config.added_tasks = [*config.tasks, name], config.added_tasks + 1
    if growth is not None:
        growth.apply()
    config.inference_mode = False


def _one_adapter(model: Any) -> str:
    """The name of the adapter that gets the task."""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"add_task needs a PeftModel, as get_peft_model and MSamForMultiTask.from_adapter make it, got {type(model).__name__}."
            " An MSamForMultiTask without an adapter gets its tasks from from_sam(sam, tasks)."
        )
    base, active = model.get_base_model(), list(model.active_adapters)
    if len(active) != 1 or active[0] not in model.peft_config:
        raise ValueError(
            f"The active adapter gets the task, but the active ones are {active}: call set_adapter first."
        )
    if is_msam(base) and len(model.peft_config) > 1:
        raise ValueError(
            f"The MSamForMultiTask has the adapters {list(model.peft_config)}, and its tasks are those of all of them: "
            "delete_adapter the others first, or load the one in question into an mSAM of its own."
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in base.modules()):
        raise ValueError("The adapter is merged into the weights, for one task: call unmerge_adapter() first.")
    return active[0]


def _check_name(name: str, tasks: list[str]) -> None:
    validate_task_names([name])
    if name in tasks:
        raise ValueError(f"There is a task '{name}' already: the tasks are {list(tasks)}.")


def _warn_of_no_gradient(layers: list[TALoraLayer], adapter_name: str) -> None:
    """Warn where no row of U3 can get a gradient: a product of G, U1 and U2 is zero in every layer."""
    for layer in layers:
        factors = [getattr(layer, f"talora_{letter}")[adapter_name] for letter in ("G", "U1", "U2")]
        if all(factor.is_meta or bool(factor.any()) for factor in factors):
            return
    if layers:
        warnings.warn(
            f"The adapter '{adapter_name}' is not trained yet, the updates that tell tasks apart are zero: a new task trains its row of U3 alone, "
            "and would leave them zero. Train the adapter first, or make it with all tasks (TALoraConfig.tasks, or from_sam).",
            stacklevel=3,
        )


def _freeze(base: nn.Module, adapter_name: str) -> None:
    """Freeze everything. What is the adapter's stays so, although PEFT switches it on again with every set_adapter, and
    however it is loaded."""
    base.requires_grad_(False)
    for module in base.modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for part in module.adapter_layer_names:
            parameters = getattr(module, part, {})
            if adapter_name not in parameters:
                continue
            trained = parameters[adapter_name]
            if isinstance(trained, nn.Module):
                freeze(trained)
            elif isinstance(trained, nn.Parameter):
                parameters[adapter_name] = frozen(trained)
        keep_frozen(module)
