"""Which rows are trained on, and which are evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .augmentation import Augmentation

VALIDATION_NAMES = ("validation", "val", "valid")
TEST_NAMES = ("test", "testing")

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Rows to train on, and rows of which none is among them.

    Args:
        train: Rows to train on.
        rows: Rows to evaluate on.
        name: The split they are, or how they were found.
        notes: What a user should hear of it.
    """

    train: Any
    rows: Any
    name: str
    notes: list[str] = field(default_factory=list)


def find_split(splits: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The split of one of these names, in whatever case; ValueError where there are two."""
    alike = [name for name in splits if name.casefold() in names]
    if len(alike) > 1:
        raise ValueError(f"the splits {alike} mean the same: keep one of them")
    return alike[0] if alike else None


def evaluation_rows(splits: Mapping[str, Any], wanted: str = "test") -> Evaluation:
    """What to train on and what to evaluate on: never the same rows.

    "test" is the test split, else the validation split (`val` and `valid` are the same), else a share of "train" that is held
    out. "validation", on which settings are chosen, is another split than that: where there is no second one, it is held
    out of "train", beside what is held out for a test.

    Args:
        splits: ``{name: rows}`` with a "train".
        wanted: "test" or "validation".

    Raises:
        ValueError: If two splits mean the same, or "train" is too small for holding something out.
    """
    if wanted not in ("test", "validation"):
        raise ValueError(f"expected 'test' or 'validation', got {wanted!r}")
    test, validation = find_split(splits, TEST_NAMES), find_split(splits, VALIDATION_NAMES)
    notes = []
    if test is None and validation is not None:
        test, validation = validation, None
        notes.append(f"There is no test split: {test!r} stands for it.")
    split = test if wanted == "test" else validation
    if split is not None:
        return Evaluation(splits["train"], splits[split], split, notes if wanted == "test" else [])
    train = splits["train"]
    if wanted == "validation" and test is None:
        # those that would be held out for a test
        train, _ = hold_out(train)
    train, rows = hold_out(train)
    notes.append(
        f"There is no {wanted} split: {len(rows)} of {len(splits['train'])} rows of 'train' are held out for it."
    )
    return Evaluation(train, rows, "held out of train", notes)


def hold_out(rows: Any) -> tuple[Any, Any]:
    """(the others, `HELD_OUT_SHARE` of the rows); which ones depends on their number alone.

    Raises:
        ValueError: If one of both would be empty.
    """
    number = max(1, round(HELD_OUT_SHARE * len(rows)))
    if number >= len(rows):
        raise ValueError(
            f"{len(rows)} rows are too few to hold {HELD_OUT_SHARE:.0%} of them out for an evaluation: give the data set a test split"
        )
    order = np.random.default_rng(0).permutation(len(rows))
    return select_rows(rows, sorted(order[number:].tolist())), select_rows(rows, sorted(order[:number].tolist()))


def few_labels(rows: Any, number: int) -> Any:
    """So many of the rows; the fewer are among the more.

    Raises:
        ValueError: If there are not that many.
    """
    if not 1 <= number <= len(rows):
        raise ValueError(f"asked for {number} of {len(rows)} rows")
    order = np.random.default_rng([0, len(rows)]).permutation(len(rows))
    return select_rows(rows, sorted(order[:number].tolist()))


def select_rows(rows: Any, indices: list[int]) -> Any:
    """Some rows, of `datasets` or of a list."""
    return [rows[index] for index in indices] if isinstance(rows, list | tuple) else rows.select(indices)


def augmentation_for(splits: Any, scales: tuple[float, ...] = (1.0, 1.2, 1.5), flip: bool = True) -> Augmentation:
    """Random changes that a data set allows: what its description says of flips counts.

    Args:
        splits: What `load_multitask_dataset` gave.
        scales: See [`Augmentation`].
        flip: Whether images may be flipped at all.
    """
    description = getattr(splits, "description", None)
    tasks = {} if description is None else description.tasks
    return Augmentation(
        scales=tuple(scales),
        flip_probability=0.5 if flip and (description is None or description.flip) else 0.0,
        flip_pairs={name: task.flip_pairs for name, task in tasks.items() if task.flip_pairs is not None},
        mirrored={name: task.own["mirrored"] for name, task in tasks.items() if "mirrored" in task.own},
    )
