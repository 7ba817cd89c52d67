"""What is trained and evaluated on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft_talora as pt
from peft_talora.data import Augmentation, MultiTaskDataset, detect_tasks, load_multitask_dataset
from peft_talora.data.splits import augmentation_for, evaluation_rows, few_labels

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
        augment: Random changes of what is trained on.
        validation: Rows by which the best adapter is chosen, where that is asked for; none of them is trained or tested on.
        source: What the rows are from.
        identity: What else a resumed run must have in common with the run before it.
        make_dataset: Makes items to train on of rows, as `MultiTaskDataset` does.
    """

    train: Any
    test: Any
    tasks: dict[str, pt.TaskSpec]
    augment: Augmentation = field(default_factory=Augmentation)
    validation: Any = None
    source: Any = None
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
        ValueError: There is no such task, or there are too few rows to hold some out for an evaluation.
    """
    names = args.tasks or names
    if args.dataset == "scenes":
        splits, classes = render_splits(args, image_size, evaluate_on)
        tasks = detect_tasks(splits[evaluate_on], names or list(SCENE_TASKS), {"semantic": classes})
        train, test, validation = splits.get("train"), splits[evaluate_on], splits.get("validation")
    else:
        splits = load_multitask_dataset(args.dataset)
        tasks = detect_tasks(splits, names)
        train, test, validation = divide(splits, evaluate_on, bool(args.keep_best))
    weigh(tasks, args.task_weights)
    return Data(
        train=None if train is None else some_rows(train, args.max_train_images),
        test=some_rows(test, args.max_test_images),
        tasks=tasks,
        augment=augmentation_for(splits, tuple(args.crop_scales), not args.no_flip),
        validation=None if validation is None else some_rows(validation, args.max_test_images),
        source=splits,
    )


def divide(splits: Mapping[str, Any], evaluate_on: str, choosing: bool) -> tuple[Any, Any, Any]:
    """Rows to train on, to evaluate on and, where something is chosen in between, to choose by: (train, test, validation).

    Nothing is trained on that is evaluated or chosen by, and what is tested on does not choose.
    """
    evaluation = evaluation_rows(splits, evaluate_on)
    # without rows for the choice there is one training set, with them a part of it
    choice = evaluation_rows(splits, "validation") if choosing else None
    for note in dict.fromkeys(evaluation.notes + (choice.notes if choice else [])):
        print(note)
    return (choice or evaluation).train, evaluation.rows, choice and choice.rows


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


def some_rows(rows: Any, most: int | None) -> Any:
    """At most so many rows, always the same; those for a smaller number are among those for a larger one."""
    return rows if most is None or len(rows) <= most else few_labels(rows, most)


def weigh(tasks: Mapping[str, pt.TaskSpec], given: Mapping[str, float]) -> None:
    """Give the tasks weights that sum to 1, in the proportions that were given or else the recipe's."""
    unknown = [name for name in given if name not in tasks]
    if unknown:
        raise ValueError(f"--task-weights: there is no task {unknown[0]!r}, only {list(tasks)}")
    weights = {name: given.get(name, TASK_WEIGHTS.get(name, 1.0)) for name in tasks}
    for name, spec in tasks.items():
        spec.weight = weights[name] / sum(weights.values())
