"""Whether saved weights are those of the model's adapter, name by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

PEFT_PREFIX = "base_model.model."


class TensorKind(NamedTuple):
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    is_floating_point: bool


def adapter_tensors(model: nn.Module, config: PeftConfig) -> dict[str, TensorKind]:
    """The tensors that a saved adapter of `model` has, from a twin without weights: `model` is not touched.

    Args:
        model: A model that is made from its `config` alone, without an adapter.
        config: The adapter's configuration.
    """
    with torch.device("meta"):
        twin = PeftModel(type(model)(copy.deepcopy(model.config)), copy.deepcopy(config))
    state = get_peft_model_state_dict(twin, save_embedding_layers=False)
    return {name: TensorKind(tuple(value.shape), value.is_floating_point()) for name, value in state.items()}


def saved_tensors(path: Path) -> dict[str, TensorKind]:
    """The tensors in a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorKind(tuple(value.get_shape()), value.get_dtype().startswith(("F", "BF")))
                for name, value in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_weights(path: Path, expected: Mapping[str, TensorKind]) -> None:
    """Refuse weights that do not fit; PEFT only warns about missing keys and drops what it does not know.

    Args:
        path: A safetensors file.
        expected: As [`adapter_tensors`] gives it.

    Raises:
        ValueError: The file is damaged; or a tensor is missing, unknown, of another shape, of integers where it should
            be of floating point numbers, or not finite. The message names it.
    """
    found = saved_tensors(path)
    _check_names(path, found, expected)
    for name, (shape, is_floating_point) in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: the tensor '{name}' has another shape than in the model: {found[name].shape}, expected "
                f"{shape}."
            )
        if found[name].is_floating_point != is_floating_point:
            raise ValueError(f"{path}: the tensor '{name}' has another type of numbers than in the model.")
    with safe_open(path, "pt") as file:
        for name in found:
            _check_finite(path, name, file.get_tensor(name))


def check_adapter_state(
    model: nn.Module, adapter_name: str, prefix: str, state: Mapping[str, torch.Tensor], whence: str = "The adapter"
) -> None:
    """Refuse an adapter's state that PEFT is about to load into a model.

    Args:
        model: The model, with the adapter in place.
        adapter_name: Its name there.
        prefix: What the adapter's parameters begin with, such as "talora_".
        state: `{name in the model: tensor}`.
        whence: How the message calls the state.

    Raises:
        ValueError: A tensor of the adapter is missing, unknown, or not finite. The message names it. Shapes are left to
            PEFT, which may be told to ignore them.
    """
    own = model.state_dict()
    # a model with an injected adapter has no prefix, which PEFT takes away later
    stripped = {name: name.removeprefix(PEFT_PREFIX) for name in state if name not in own}
    state = {stripped[name] if stripped.get(name) in own else name: value for name, value in state.items()}
    wanted = {name for name in own if f".{prefix}" in name and name.endswith(f".{adapter_name}")}
    _check_names(whence, state, wanted | (own.keys() & state.keys()))
    for name, value in state.items():
        _check_finite(whence, name, value)


def _check_names(whence: str | Path, found: Mapping | set, expected: Mapping | set) -> None:
    problems = {
        "is missing": sorted(set(expected) - set(found)),
        "does not belong to the model": sorted(set(found) - set(expected)),
    }
    for problem, names in problems.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{whence}: the tensor '{names[0]}'{more} {problem}.")


def _check_finite(whence: str | Path, name: str, value: torch.Tensor) -> None:
    if value.element_size() == 1 and value.is_floating_point():
        value = value.float()  # types of 8 bits cannot be asked themselves
    if not torch.isfinite(value).all():
        raise ValueError(f"{whence}: the tensor '{name}' is not finite.")
