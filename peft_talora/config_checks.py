"""Checks that the configurations of both tuners share."""

from __future__ import annotations

from typing import Any


def check_positive_int(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError unless 0 <= `value` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")


def normalise_targets(config: Any) -> None:
    """PEFT's conventions for `target_modules`, `exclude_modules` and the arguments that need a list of names."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            setattr(config, name, set(getattr(config, name)))
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and not config.layers_to_transform and config.layers_to_transform != 0:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
