"""All kinds of tasks by name."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable

from .kind import TaskKind

# ``{name: kind}``, and of every metric of theirs whether higher is better; [`collect`] fills both
KINDS: dict[str, TaskKind] = {}
HIGHER_IS_BETTER: dict[str, bool] = {}


def collect(package: str, folders: Iterable[str]) -> None:
    """Take in the kinds of all modules of a package: what each of them has in a dict ``TASK_KINDS``.

    Args:
        package: The package's name.
        folders: Where its modules are, its ``__path__``.

    Raises:
        ValueError: If two modules have a kind of one name.
    """
    for module in pkgutil.iter_modules(list(folders)):
        kinds = getattr(importlib.import_module(f"{package}.{module.name}"), "TASK_KINDS", {})
        for name, kind in kinds.items():
            if KINDS.setdefault(name, kind) is not kind:
                raise ValueError(f"{package}.{module.name}: there is another kind named {name!r} already")
    _sort(KINDS)
    for kind in KINDS.values():
        HIGHER_IS_BETTER.update(kind.higher_is_better)


def _sort(kinds: dict[str, TaskKind]) -> None:
    """Classes come first, then what has one channel, and last what has any number of them."""
    order = sorted(kinds.items(), key=lambda item: (not item[1].has_classes, item[1].channels or math.inf))
    kinds.clear()
    kinds.update(order)
