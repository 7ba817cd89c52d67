"""What a task may be called."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Set

from torch import nn

# Task names become keys of nn.ModuleDict, which refuses a key that is already one of its attributes.
_MODULE_DICT = nn.ModuleDict()


def validate_task_names(names: Iterable[str]) -> tuple[str, ...]:
    """Check an ordered collection of task names.

    Task names are keys of modules and parts of parameter names, hence they must be Python identifiers, no keyword and
    no attribute of ``torch.nn.ModuleDict`` (such as ``keys``, ``type`` or ``training``).

    Args:
        names: The names, in their order.

    Returns:
        The same names as a tuple.

    Raises:
        ValueError: If there is none, or one is not allowed or occurs twice; the message names it.
    """
    if isinstance(names, str):
        raise ValueError(f"expected a list of task names, got the string {names!r}")
    if not isinstance(names, Iterable) or isinstance(names, Set):
        raise ValueError(f"expected a list of task names, got {names!r}")
    names, known = tuple(names), set()
    if not names:
        raise ValueError("expected at least one task name, got none")
    for name in names:
        _check_name(name)
        if name in known:
            raise ValueError(f"task names must be unique, {name!r} occurs more than once in {list(names)}")
        known.add(name)
    return names


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"a task name must be a string, got {name!r} of type {type(name).__name__}")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"a task name must be a Python identifier and no keyword, got {name!r}")
    if hasattr(_MODULE_DICT, name):
        raise ValueError(f"a task cannot be called {name!r}: that is an attribute of torch.nn.ModuleDict")
