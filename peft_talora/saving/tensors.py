"""Whether saved weights are those of the model's adapter, name by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn

from .seal import CONFIG_FILE, WEIGHTS_FILE, check_sound, has_weights, read_json
from .settings import PEFT_PREFIX, split_settings

Shape = tuple[int, ...]
_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def known_to_fit() -> Iterator[None]:
    """Weights that PEFT loads inside the block passed [`check_tensors`] already."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


class TensorKind(NamedTuple):
    """What is known of a tensor without its values.

    Args:
        shape: Its sizes.
        is_floating_point: Whether it holds numbers that can be trained.
        required: Whether a saved adapter must have it.
    """

    shape: Shape
    is_floating_point: bool
    required: bool = True

    @classmethod
    def of(cls, tensor: torch.Tensor, required: bool = True) -> TensorKind:
        """The kind of a tensor."""
        return cls(tuple(tensor.shape), tensor.is_floating_point(), required)


def weightless_twin(model: nn.Module, config: PeftConfig) -> PeftModel:
    """A model like `model` with the adapter in place, on the meta device: no memory, and `model` is not touched.

    Args:
        model: A model that is made from its `config` alone; what it is tuned with does not matter.
        config: The adapter's configuration.
    """
    with torch.device("meta"):
        return PeftModel(type(model)(copy.deepcopy(model.config)), copy.deepcopy(config))


def adapter_tensors(twin: PeftModel) -> dict[str, TensorKind]:
    """The tensors that a saved adapter has, from a [`weightless_twin`]."""
    state, _ = split_settings(get_peft_model_state_dict(twin, save_embedding_layers=False))
    kinds = {name: TensorKind.of(value) for name, value in state.items()}
    for name, module in modules_saved(twin, "default"):
        for key, value in module.state_dict().items():
            # older files have parts that are saved no more
            kinds.setdefault(f"{name}.{key}", TensorKind.of(value, required=False))
    return kinds


def try_to_load(twin: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load tensors as PEFT will, with all its errors, into a [`weightless_twin`]."""
    set_peft_model_state_dict(twin, {name: value.to("meta") for name, value in tensors.items()})


def modules_saved(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """What is trained in full beside the adapter: `(name in a file, module)`."""
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            yield name, wrapper.modules_to_save[adapter_name]


def without_unsaved(model: nn.Module, adapter_name: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that PEFT is about to load, without parts of modules saved in full that adapters hold no more.

    Older files have the frozen heads of mask decoders; PEFT has renamed all that it loads, and these names are left.
    """
    unsaved = {f"{name}.{key}" for name, module in modules_saved(model, adapter_name) for key in module.state_dict()}
    return {name: value for name, value in state.items() if name not in unsaved}


def parse_tensors(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of a safetensors file.

    Args:
        content: The file's bytes.
        path: For messages.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_shapes(directory: Path) -> dict[str, Shape]:
    """The shapes of the weights in a saved adapter's directory, if they are as they were saved.

    Raises:
        ValueError: The weights are damaged; the message names their file.
    """
    path = directory / WEIGHTS_FILE
    content = path.read_bytes()
    tensors, _ = split_settings(parse_tensors(content, path))
    check_sound(has_weights(read_json(directory / CONFIG_FILE), content), path)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_sizes(what: str, sizes: Shape, shapes: Mapping[str, Shape], parameter: str) -> None:
    """Compare sizes that a configuration gives with a parameter's tensors.

    Args:
        what: How the message calls the sizes.
        sizes: Those of the configuration.
        shapes: The shapes of all saved tensors.
        parameter: The last part of the tensors' names.

    Raises:
        ValueError: There is no such tensor, or one has other sizes. The message names it.
    """
    tensors = {name: shape for name, shape in shapes.items() if name.endswith(f".{parameter}")}
    if not tensors:
        raise ValueError(f"none of the {len(shapes)} tensors is a {parameter}.")
    for name, shape in tensors.items():
        if shape != sizes:
            raise ValueError(
                f"the tensor '{name}' has another shape than in the configuration: {shape}, expected {sizes} of {what}."
            )


def check_tensors(whence: str | Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorKind]) -> None:
    """Refuse weights that do not fit; PEFT only warns about missing keys and drops what it does not know.

    Args:
        whence: How the message calls the weights.
        tensors: The weights.
        expected: As [`adapter_tensors`] gives them.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape, of integers where it should be of floating point
            numbers, or not finite. The message names it.
    """
    required = [name for name, kind in expected.items() if kind.required]
    _check_names(whence, tensors, required, expected)
    for name, (shape, is_floating_point, _) in expected.items():
        value = tensors.get(name)
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{whence}: the tensor '{name}' has another shape than in the model: {tuple(value.shape)}, expected "
                f"{shape}."
            )
        if value.is_floating_point() != is_floating_point:
            raise ValueError(f"{whence}: the tensor '{name}' has another type of numbers than in the model.")
    for name, value in tensors.items():
        _check_finite(whence, name, value)


def check_adapter_state(model: nn.Module, adapter_name: str, prefix: str, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse an adapter's state that PEFT is about to load into a model.

    Args:
        model: The model, with the adapter in place.
        adapter_name: Its name there.
        prefix: What the adapter's parameters begin with, such as "talora_".
        state: `{name in the model: tensor}`.

    Raises:
        ValueError: A tensor of the adapter is missing, unknown, or not finite. The message names it. Shapes are left to
            PEFT, which may be told to ignore them.
    """
    if _CHECKED.get():
        return
    in_model = model.state_dict()
    # a model with an injected adapter has no prefix, which PEFT takes away later
    stripped = {name: name.removeprefix(PEFT_PREFIX) for name in state if name not in in_model}
    state = {stripped[name] if stripped.get(name) in in_model else name: value for name, value in state.items()}
    required = {name for name in in_model if f".{prefix}" in name and name.endswith(f".{adapter_name}")}
    _check_names("The adapter", state, required, in_model)
    for name, value in state.items():
        _check_finite("The adapter", name, value)


def _check_names(
    whence: str | Path, names: Collection[str], required: Collection[str], known: Collection[str]
) -> None:
    problems = {
        "is missing": sorted(set(required) - set(names)),
        "does not belong to the model": sorted(set(names) - set(known)),
    }
    for problem, wrong in problems.items():
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"{whence}: the tensor '{wrong[0]}'{more} {problem}.")


def _check_finite(whence: str | Path, name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless all numbers of a tensor are finite; one without numbers (on the meta device) passes."""
    if value.device.type == "meta":
        return
    if value.element_size() == 1 and value.is_floating_point():
        value = value.float()  # types of 8 bits cannot be asked themselves
    if not torch.isfinite(value).all():
        raise ValueError(f"{whence}: the tensor '{name}' is not finite.")
