"""Kinds of tasks: a file for each, that holds all that is known of it. A new kind is a new file here, and nothing else."""

from .kind import Numbers, TaskKind
from .registry import HIGHER_IS_BETTER, KINDS, collect
from .spec import TaskSpec

__all__ = ["HIGHER_IS_BETTER", "KINDS", "Numbers", "TaskKind", "TaskSpec", "collect"]

collect(__name__, __path__)
