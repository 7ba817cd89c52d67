"""Which layers have an update that all tasks share: `TALoraConfig.shared_layers`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..tuner.checks import is_int
from ..tuner.config import TargetsConfig
from ..tuner.layer_index import as_indices, layer_index

Indices = int | Sequence[int] | None


def checked_indices(shared_layers: Indices, layers_to_transform: Indices) -> list[int] | None:
    """`shared_layers`, sorted, each once; None where there are none.

    Raises:
        ValueError: They are no indices, or not among `layers_to_transform`.
    """
    indices = as_indices(shared_layers)
    if not all(is_int(index, 0) for index in indices):
        raise ValueError(f"`shared_layers` must be indices of layers, 0 or more, got {shared_layers!r}.")
    adapted = as_indices(layers_to_transform)
    others = sorted(set(indices) - set(adapted))
    # an empty list is no choice for PEFT
    if adapted and others:
        raise ValueError(
            f"`shared_layers` must be among the layers that are adapted, `layers_to_transform` {adapted}, but {others} are not."
        )
    return sorted(set(indices)) or None


def any_tells_tasks_apart(config: TargetsConfig, shared_layers: list[int], model: nn.Module) -> bool:
    """Whether a model that is about to get an adapter will have a layer that is none of `shared_layers`.

    Raises:
        ValueError: One of them gets no adapter; the message names those that do.
    """
    found = {layer_index(name, config.layers_pattern) for name in _adapted_names(config, model)}
    known = sorted(index for index in found if index is not None)
    unknown = [index for index in shared_layers if index not in known]
    if unknown:
        raise ValueError(
            f"`shared_layers` must be layers of the {type(model).__name__} that are adapted, but {unknown} are not: those are "
            f"{known or 'in no list of layers'}."
        )
    return bool(found - set(shared_layers))


def _adapted_names(config: TargetsConfig, model: nn.Module) -> list[str]:
    """The names of the modules that the adapter is for, as PEFT will choose them."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | BaseTunerLayer)]
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config = copy.copy(config)
        config.target_modules = ".*"
    return [name for name in names if check_target_module_exists(config, name)]
