"""The families of SAMs that an mSAM can be made from, one file each.

`sam` (SAM), `sam_hq` (SAM-HQ), `sam2` (SAM 2 and 2.1) and `sam3_tracker` (SAM 3's model for points and masks).
"""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from .family import Family, side

__all__ = ["FAMILIES", "Family", "family_of_checkpoint", "family_of_model", "side"]

# by the model type that `MSamConfig.base_model_type` records
FAMILIES: dict[str, Family] = {}

for _module in pkgutil.iter_modules(__path__):
    _family = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "FAMILY", None)
    if _family is not None:
        FAMILIES[_family.model_type] = _family


def family_of_model(sam: nn.Module) -> Family | None:
    """The family of a plain model; None where it is of none."""
    return next((family for family in FAMILIES.values() if isinstance(sam, family.model_class)), None)


def family_of_checkpoint(model_type: str) -> Family | None:
    """The family that a checkpoint of this model type is loaded as; None where there is none."""
    return next((family for family in FAMILIES.values() if model_type in family.checkpoint_types), None)
