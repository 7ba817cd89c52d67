"""Shows `task_ids` to whoever inspects the signature of a base model's forward.

transformers' Trainer drops the columns of a dataset that it does not find there; without `task_ids` it would train the first
task only, in silence. A forward of the instance would not do: nn.DataParallel, which the Trainer uses, copies it to its replicas.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, SupportsIndex

from torch import nn

from .hooks import names_task_ids


class _ShowsTaskIds:
    """Base of the classes below, by which they are known."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # copies and files know the model's own class
        reduced = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[2],), *reduced[2:]


def _new(cls: type) -> Any:
    return object.__new__(_class_with_task_ids(cls))


@functools.cache
def _class_with_task_ids(cls: Any) -> type:
    """A subclass that differs in the signature of its forward alone; a hook takes the argument out before it."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    signature = inspect.signature(cls.forward)
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    # **kwargs comes last
    shown = signature.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))
    setattr(forward, "__signature__", shown)  # noqa: B010
    members = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (_ShowsTaskIds, cls), members)


def show_task_ids(model: nn.Module) -> None:
    """Add `task_ids` to the signature of `model.forward`, unless it is there."""
    if not names_task_ids(model):
        model.__class__ = _class_with_task_ids(type(model))  # type: ignore[arg-type]


def hide_task_ids(model: nn.Module) -> None:
    """Undo [`show_task_ids`]."""
    if type(model).__mro__[1] is _ShowsTaskIds:
        model.__class__ = type(model).__mro__[2]
