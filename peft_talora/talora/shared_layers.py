"""Which layers have an update that all tasks share: `TALoraConfig.shared_layers`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..saving.settings import PEFT_PREFIX
from ..tuner.checks import is_int
from ..tuner.layer_index import as_indices, layer_index

if TYPE_CHECKING:
    from .config import TALoraConfig


def checked_indices(config: TALoraConfig) -> list[int] | None:
    """`shared_layers`, sorted, each once; None where there are none.

    Raises:
        ValueError: They are no indices, or not among `layers_to_transform`.
    """
    indices = as_indices(config.shared_layers)
    if not all(is_int(index, 0) for index in indices):
        raise ValueError(f"`shared_layers` must be indices of layers, 0 or more, got {config.shared_layers!r}.")
    adapted = as_indices(config.layers_to_transform)
    others = sorted(set(indices) - set(adapted))
    # an empty list is no choice for PEFT
    if adapted and others:
        raise ValueError(
            f"`shared_layers` must be among the layers that are adapted, `layers_to_transform` {adapted}, but {others} are not."
        )
    return sorted(set(indices)) or None


def is_shared(config: TALoraConfig, name: str) -> bool:
    """Whether all tasks share the update of the layer of this name, in a model or in a file."""
    if config.shared_layers is None:
        return False
    return layer_index(name.removeprefix(PEFT_PREFIX), config.layers_pattern) in as_indices(config.shared_layers)


def check_layers_of(config: TALoraConfig, model: nn.Module) -> bool:
    """Check `shared_layers` against a model that is about to get the adapter: whether any layer is to tell tasks apart.

    Raises:
        ValueError: One of them gets no adapter; the message names those that do.
    """
    if config.shared_layers is None:
        return True
    found = {layer_index(name, config.layers_pattern) for name in _adapted_names(config, model)}
    known = sorted(index for index in found if index is not None)
    unknown = [index for index in as_indices(config.shared_layers) if index not in known]
    if unknown:
        raise ValueError(
            f"`shared_layers` must be layers of the {type(model).__name__} that are adapted, but {unknown} are not: those are "
            f"{known or 'in no list of layers'}."
        )
    return bool(found - set(as_indices(config.shared_layers)))


def _adapted_names(config: TALoraConfig, model: nn.Module) -> list[str]:
    """The names of the modules that the adapter is for, as PEFT will choose them."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | BaseTunerLayer)]
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config = copy.copy(config)
        config.target_modules = ".*"
    return [name for name in names if check_target_module_exists(config, name)]
