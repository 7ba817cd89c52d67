"""Which layer of a model a module belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence


def layer_index(name: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The index of the layer that a module belongs to, as PEFT counts for `layers_to_transform`; None outside of lists.

    Where PEFT finds none, since the list is the model's own ("layers.0.attn.qkv"), it is the first number in the name.

    Args:
        name: The module's full name in its model.
        pattern: `layers_pattern`: the name of the layers' list, or several of which the first that fits counts; any list when None.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    expressions = [rf"(?:^|.*?\.)(?:{each})\.(?P<index>\d+)\." for each in patterns] or [
        r".*?\.[^.]*\.(?P<index>\d+)\.",
        r"(?:^|.*?\.)(?P<index>\d+)\.",
    ]
    for expression in expressions:
        found = re.match(expression, name)
        if found is not None:
            return int(found["index"])
    return None


def as_indices(indices: int | Sequence[int] | None) -> list[int]:
    """Indices of layers in a configuration, where PEFT takes one, several or none."""
    if indices is None:
        return []
    return list(indices) if isinstance(indices, list | tuple | set | range) else [indices]  # type: ignore[list-item]
