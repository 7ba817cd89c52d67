"""What is trained and evaluated on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import peft_talora as pt
from peft_talora.data import MultiTaskDataset, detect_tasks, load_multitask_dataset

from .options import SCENE_TASKS

# the recipe's weights on NYUv2: the cosine loss of normals is small beside the others
TASK_WEIGHTS = {"normals": 4.0}


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on: rows of `datasets`, or lists of dicts.

    Attributes:
        train: Rows to train on.
        test: Rows to evaluate on.
        tasks: {name: TaskSpec}.
        validation: Rows by which the best adapter is chosen, where there are any.
        identity: What else a resumed run must have in common with the run before it.
        make_dataset: Makes items to train on of rows, as `MultiTaskDataset` does.
    """

    train: Any
    test: Any
    tasks: dict[str, pt.TaskSpec]
    validation: Any = None
    identity: dict[str, Any] = field(default_factory=dict)
    make_dataset: Callable[..., MultiTaskDataset] = MultiTaskDataset


def load_data(
    args: argparse.Namespace, image_size: int, names: list[str] | None = None, evaluate_on: str = "test"
) -> Data:
    """The rows and tasks that the options ask for.

    Args:
        args: The options.
        image_size: The side of rendered scenes in pixels.
        names: The tasks where the options do not name any; all that have labels when None.
        evaluate_on: The split that is evaluated.

    Raises:
        ValueError: There is no such task, or no validation split where one is needed.
    """
    names = args.tasks or names
    if args.dataset == "scenes":
        splits, classes = render_splits(args, image_size, evaluate_on)
        tasks = detect_tasks(splits[evaluate_on], names or list(SCENE_TASKS), {"semantic": classes})
    else:
        splits = load_multitask_dataset(args.dataset)
        tasks = detect_tasks(splits, names)
    validation = next((splits[name] for name in ("validation", "val") if name in splits), None)
    if args.keep_best and validation is None:
        raise ValueError(f"--keep-best needs a validation split, the dataset has {list(splits)}")
    weigh(tasks, args.task_weights)
    return Data(
        train=some_rows(splits["train"], args.max_train_images) if "train" in splits else None,
        test=some_rows(choose_split(splits, evaluate_on), args.max_test_images),
        tasks=tasks,
        validation=None if validation is None else some_rows(validation, args.max_test_images),
    )


def render_splits(args: argparse.Namespace, image_size: int, evaluate_on: str) -> tuple[dict[str, Any], list[str]]:
    """The splits of the rendered scenes that are needed, and the names of their classes."""
    from scenes import CLASSES, load_scenes

    numbers = {evaluate_on: args.max_test_images}
    if not args.eval_only:
        numbers["train"] = args.max_train_images
    if args.keep_best:
        numbers["validation"] = args.max_test_images
    splits = {name: load_scenes(name, n, size=image_size, seed=0, camera=args.camera) for name, n in numbers.items()}
    return splits, CLASSES


def choose_split(splits, wanted: str):
    """The rows to evaluate on: those of the test split never stand in for validation."""
    choices = ("test", "validation", "val") if wanted == "test" else ("validation", "val")
    found = next((splits[name] for name in choices if name in splits), None)
    if found is None:
        print(f"The dataset has no {wanted} split: the evaluation is on the images it is trained on.")
        return splits["train"]
    return found


def some_rows(rows, most: int | None):
    """At most so many rows, always the same; those for a smaller number are among those for a larger one."""
    if most is None or len(rows) <= most:
        return rows
    chosen = sorted(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most].tolist())
    return [rows[index] for index in chosen] if isinstance(rows, list) else rows.select(chosen)


def weigh(tasks: Mapping[str, pt.TaskSpec], given: Mapping[str, float]) -> None:
    """Give the tasks weights that sum to 1, in the proportions that were given or else the recipe's."""
    unknown = [name for name in given if name not in tasks]
    if unknown:
        raise ValueError(f"--task-weights: there is no task {unknown[0]!r}, only {list(tasks)}")
    weights = {name: given.get(name, TASK_WEIGHTS.get(name, 1.0)) for name in tasks}
    for name, spec in tasks.items():
        spec.weight = weights[name] / sum(weights.values())
