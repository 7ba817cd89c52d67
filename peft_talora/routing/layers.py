"""The tuned layers of a model: searched for, or in its forward found again without a walk through all of its modules."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

# per model: how many tuned layers had been made when it was searched, and where in it which ones were
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[tuple[str, ...], Any]]]] = (
    weakref.WeakKeyDictionary()
)
_made = 0


def layer_made() -> None:
    """Say that there is a new tuned layer, somewhere, or a copy of one: models are searched again."""
    global _made
    _made += 1


def tuned_layers(model: nn.Module) -> list[Any]:
    """The layers of this package's tuners in `model`, each once."""
    return [layer for _, layer in _search(model)]


def layers_of_forward(model: nn.Module) -> list[Any]:
    """As [`tuned_layers`], of a model that looks for its own layers in every forward.

    What was found before is used as long as no tuned layer was made or copied since, and all of them are still in their
    places. It would miss one that was made before and is put into a place of its own.
    """
    if torch.compiler.is_compiling():
        return tuned_layers(model)
    made, found = _FOUND.get(model, (-1, []))
    # a model without any is searched every time: layers that were made elsewhere may have been put into it
    if made != _made or not found or any(_at(model, path) is not layer for path, layer in found):
        made, found = _made, [(tuple(name.split(".")) if name else (), layer) for name, layer in _search(model)]
        _FOUND[model] = (made, found)
    return [layer for _, layer in found]


def _search(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module) for name, module in model.named_modules() if getattr(module, "is_tuned_layer", False) is True
    ]


def _at(model: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        model = model._modules.get(name)
        if model is None:
            return None
    return model
