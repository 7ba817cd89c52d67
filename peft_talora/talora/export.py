"""One task of a TA-LoRA adapter as a stock LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

from ..msam.adapter import is_msam
from ..msam.families import side
from ..routing.requests import task_index
from ..saving.directory import written_aside
from ..saving.seal import WEIGHTS_FILE
from ..saving.settings import PEFT_PREFIX
from ..saving.tensors import modules_saved
from .layer import TALoraLinear


def task_to_lora(model: nn.Module, task: str | int) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Convert one task to a LoRA that gives the same encoder output.

    For one task dW_t = s U2 M_t^T U1^T is a product of two thin matrices (methods of TA-LoRA, section 3.2): with p <= q
    lora_A = U1^T and lora_B = s U2 M_t^T, else lora_A = s M_t^T U1^T and lora_B = U2; `lora_alpha` is the rank. What was
    trained in full comes along as `modules_to_save`: of an mSAM the encoder's LayerNorms, since its decoders do not fit a
    `SamModel`, of other models everything.

    Args:
        model: A PeftModel with an active TA-LoRA adapter, or a model with an injected one.
        task: The task's name or index.

    Returns:
        The LoRA configuration, and the weights under the names that PEFT saves them with.

    Raises:
        ValueError: There is no active TA-LoRA adapter, or it does not know the task; or an mSAM's image size is not that
            of its SAM, so that the encoder has other position embeddings than the SAM.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in base.named_modules() if isinstance(module, TALoraLinear)}
    adapter_name = _active_adapter(layers)
    layers = {
        name: layer for name, layer in layers.items() if adapter_name in layer.talora_G and _fits_base(base, name)
    }
    if not layers:
        raise ValueError(
            f"The adapter '{adapter_name}' has no TA-LoRA layer outside of the mask decoders, which a SAM does not have."
        )
    _check_image_size(base)
    state: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        index = task_index(task, layer.task_router.tasks[adapter_name])
        A, B = _lora_factors(layer, adapter_name, index)
        state |= {f"{PEFT_PREFIX}{name}.lora_A.weight": A, f"{PEFT_PREFIX}{name}.lora_B.weight": B}
    trained = {name: module for name, module in modules_saved(base, adapter_name) if _fits_base(base, name)}
    for name, module in trained.items():
        state |= {f"{PEFT_PREFIX}{name}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
    rank = min(min(layer.r_in[adapter_name], layer.r_out[adapter_name]) for layer in layers.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        exclude_modules=_also_matched(base, layers) or None,
        modules_to_save=list(trained) or None,
        task_type=base.peft_config[adapter_name].task_type,
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        inference_mode=True,
    )
    return config, state


def save_task_as_lora(model: nn.Module, task: str | int, directory: str | Path) -> Path:
    """Write one task as a LoRA adapter that PEFT loads on the same SAM without this package.

    Args:
        model: As in [`task_to_lora`].
        task: The task's name or index.
        directory: Where to; created where missing, other files in it stay.

    Returns:
        The directory.

    Raises:
        ValueError: As in [`task_to_lora`].
    """
    config, state = task_to_lora(model, task)
    with written_aside(Path(directory)) as aside:
        config.save_pretrained(aside)
        save_file(state, aside / WEIGHTS_FILE, metadata={"format": "pt"})
    return Path(directory)


def _active_adapter(layers: dict[str, TALoraLinear]) -> str:
    names = {name for layer in layers.values() for name in layer.active_adapters if name in layer.talora_G}
    if len(names) != 1:
        raise ValueError(f"One active TA-LoRA adapter is needed, the model has {sorted(names) or 'none'}.")
    return names.pop()


@torch.no_grad()
def _lora_factors(layer: TALoraLinear, adapter_name: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, d) and (k, r) with r = min(p, q)."""
    U1, U2 = layer.talora_U1[adapter_name], layer._padded_U2(adapter_name)
    core = layer._core(adapter_name, index)
    if core.shape[0] <= core.shape[1]:
        return U1.T.clone().contiguous(), U2 @ core.T
    return (U1 @ core).T.contiguous(), U2.clone()


def _fits_base(base: nn.Module, name: str) -> bool:
    """Whether the model that the LoRA is for has a module of this name: a SAM has no decoders of tasks."""
    return not (is_msam(base) and name.startswith(("mask_decoders.", "no_mask_embeds.")))


def _also_matched(base: nn.Module, names: Iterable[str]) -> list[str]:
    """Linear layers that are not tuned, although PEFT takes one of these full names for the end of theirs."""
    names = set(names)
    ends = tuple(f".{name}" for name in names)
    modules = base.named_modules()
    return [n for n, module in modules if isinstance(module, nn.Linear) and n not in names and n.endswith(ends)]


def _check_image_size(base: nn.Module) -> None:
    if not is_msam(base):
        return
    image_size, of_sam = base.config.image_size, side(base.config.prompt_encoder_config.image_size)
    if image_size != of_sam:
        raise ValueError(
            f"The mSAM works at image_size={image_size}, its SAM at {of_sam}: a LoRA cannot carry the resized position "
            "embeddings. Use task_to_sam, which gives a whole model."
        )
