"""Checks of single values, wherever they enter."""

from __future__ import annotations

import re
import sys
from typing import TypeGuard


def is_int(value: object, at_least: int | None = None) -> TypeGuard[int]:
    """Whether `value` is an integer, no boolean, and not less than `at_least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not is_number(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def check_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if not is_int(value, 1):
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_probability(name: str, value: object) -> None:
    """Raise ValueError unless 0 <= `value` < 1."""
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_pattern(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"`{name}` must be names or a regular expression, got {value!r}: {error}.") from error
