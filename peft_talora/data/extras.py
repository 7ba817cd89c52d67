"""Libraries that only some sources of data need."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_datasets() -> ModuleType:
    """Hugging Face `datasets`; ImportError that says how to get it."""
    return _import("datasets", "data is loaded", "data")


def import_coco_masks() -> ModuleType:
    """``pycocotools.mask``; ImportError that says how to get it."""
    return _import("pycocotools.mask", "COCO annotations are read", "coco")


def _import(name: str, purpose: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{purpose} with {package}, which is not installed: pip install 'peft-talora[{extra}]' (or pip install {package})"
        ) from error
