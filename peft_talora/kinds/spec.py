"""What is known about one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from ..tuner.checks import is_int, is_number
from .kind import PixelLoss, TaskKind
from .registry import KINDS


@dataclass
class TaskSpec:
    """One task of an mSAM.

    Args:
        kind: "semantic" or "parts" (classes), "binary" (a mask; saliency and edges too), "depth" (metres), "normals"
            (unit vectors) or "regression" (any values). It fixes the loss, the metrics, the activation and the
            picture.
        num_channels: Output channels N: the classes of "semantic" and "parts" or the values of "regression", required
            there; 1 for "binary" and "depth" and 3 for "normals".
        weight: Factor of the task's loss.
        ignore_index: Label of unlabelled pixels of "semantic", "parts" and "binary"; negative ones are unlabelled too. Of
            more than 255 classes 255 is one, and it becomes -1: then the negative ones alone are unlabelled.
        class_names: Names of the channels.
        loss: Another loss than the kind's own: "structure" (weighted cross entropy and IoU) for "binary".

    Raises:
        ValueError: If the values are not possible or contradict each other.
    """

    kind: str
    num_channels: int = cast(int, None)  # None becomes what the kind fixes
    weight: float = 1.0
    ignore_index: int = 255
    class_names: list[str] | None = None
    loss: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown task kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        self.num_channels = self._checked_channels()
        if not is_number(self.weight) or self.weight < 0:
            raise ValueError(f"weight must be a finite number >= 0, got {self.weight!r}")
        if not is_int(self.ignore_index):
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        if self.task_kind.has_classes and self.ignore_index == 255 < self.num_channels:
            self.ignore_index = -1
        self.class_names = self._checked_class_names()
        if self.loss is not None and self.loss not in self.task_kind.other_losses:
            known = [None, *self.task_kind.other_losses]
            raise ValueError(f"the loss of a {self.kind} task must be one of {known}, got {self.loss!r}")

    @property
    def task_kind(self) -> TaskKind:
        """What the kind fixes."""
        return KINDS[self.kind]

    @property
    def pixel_loss(self) -> PixelLoss:
        """The loss of a pixel, see [`TaskKind`]."""
        return self.task_kind.pixel_loss if self.loss is None else self.task_kind.other_losses[self.loss]

    @property
    def padding(self) -> float:
        """The value of unlabelled pixels in every label map that the package makes."""
        return self.ignore_index if self.task_kind.padding is None else self.task_kind.padding

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them; `loss` only where it is not the kind's own."""
        return {name: value for name, value in asdict(self).items() if name != "loss" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """The task with these fields; ValueError for one that does not exist, and for what the constructor refuses."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown task fields {unknown}, expected some of {known}")
        if "kind" not in values:
            raise ValueError(f"a task needs a 'kind', one of {', '.join(KINDS)}; got only {list(values)}")
        return cls(**values)

    def _checked_channels(self) -> int:
        fixed = self.task_kind.channels
        if self.num_channels is None:
            if fixed is None:
                raise ValueError(f"a {self.kind} task needs num_channels")
            return fixed
        if not is_int(self.num_channels, 1):
            raise ValueError(f"num_channels must be an integer >= 1, got {self.num_channels!r}")
        if fixed is not None and self.num_channels != fixed:
            raise ValueError(f"a {self.kind} task has num_channels={fixed}, got {self.num_channels}")
        return self.num_channels

    def _checked_class_names(self) -> list[str] | None:
        if self.class_names is None:
            return None
        names = self.class_names
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a list of strings, got {names!r}")
        if len(names) != self.num_channels:
            raise ValueError(f"got {len(names)} class_names for num_channels={self.num_channels}")
        return list(names)
