"""What every field of a description is checked with: messages quote what was given, at a bounded length."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

NAME = "{name}"

# An alias in YAML makes a value grow without end, and a file of kilobytes can hold one.
_QUOTE = reprlib.Repr()
_QUOTE.maxlevel, _QUOTE.maxdict, _QUOTE.maxlist, _QUOTE.maxtuple = 2, 12, 12, 12
_QUOTE.maxstring = _QUOTE.maxlong = _QUOTE.maxother = 120


def quoted(value: Any) -> str:
    """A value as a message quotes it, of bounded length."""
    return _QUOTE.repr(value)


def is_a(value: Any, kind: type) -> bool:
    """Whether a value has a type; True and False are no numbers, and neither are infinity and NaN."""
    if kind is bool:
        return isinstance(value, bool)
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def is_list_of(value: Any, kind: type, length: int | None = None) -> bool:
    """Whether a value is a list (of that length) whose items have a type."""
    right = isinstance(value, list | tuple) and (length is None or len(value) == length)
    return right and all(is_a(item, kind) for item in value)


def checked(fields: Mapping[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    """A field that is true or false, or a finite number."""
    value = fields.get(name, default)
    if value is not default and not is_a(value, kind):
        expected = "true or false" if kind is bool else "a number"
        place = f"{where}: {name}" if ": " not in where else f"{where}.{name}"
        raise ValueError(f"{place}: expected {expected}, got {quoted(value)}")
    return value


def checked_range(value: Any, where: str) -> tuple[float, float]:
    """A field of two numbers, the lower one first."""
    if not is_list_of(value, Real, 2) or value[0] >= value[1]:
        raise ValueError(f"{where}: expected two numbers, the lower one first, got {quoted(value)}")
    return float(value[0]), float(value[1])


def known_fields(values: Mapping[str, Any], known: Iterable[str], where: str, what: str = "") -> None:
    """ValueError for fields that do not exist."""
    unknown = [name for name in values if name not in tuple(known)]
    if unknown:
        raise ValueError(f"{where}: unknown fields {quoted(unknown)}, those{what} are {list(known)}")


def is_inside(value: Any) -> bool:
    """Whether a value is a path that cannot lead out of the folder that it is relative to."""
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 1000:
        return False
    path = PurePosixPath(value.replace("\\", "/"))
    outside = path.is_absolute() or PureWindowsPath(value).drive or value.startswith("~")
    return not outside and ".." not in path.parts


def checked_pattern(value: Any, where: str) -> str:
    """A subfolder, or a pattern with one ``{name}``."""
    if not is_inside(value) or value.count(NAME) > 1:
        raise ValueError(
            f"{where}: expected a subfolder, or a pattern with one {NAME}, below the dataset's folder; got {quoted(value)}"
        )
    return value
