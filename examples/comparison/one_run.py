"""One run of a comparison: train_multitask.py on data as only a comparison needs it.

    python examples/comparison/one_run.py --evaluate-on validation --one-task-each depth normals --steps 100 ...

What is not in `--help` here goes to train_multitask.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_multitask
from training.data import Data, load_data
from training.options import OneLineParser
from training.stopping import run_script

from peft_talora.data import MultiTaskDataset
from peft_talora.data.splits import select_rows
from peft_talora.msam.labels import label_tensor

SPLITS = ("test", "validation")


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="one_run.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--evaluate-on", choices=SPLITS, default="test", help="the split that is evaluated")
    parser.add_argument("--one-task-each", nargs="+", metavar="TASK", help="image i keeps its labels of one of these tasks, the "
                        "next one in turn; images of tasks that are not trained are left out")  # fmt: skip
    return parser


class OneTaskEach(MultiTaskDataset):
    """Images that are labelled for one task each: number i for the task `names[i % len(names)]`.

    Those whose task is not wanted have no label and are left out.
    """

    def __init__(self, rows, tasks, processor, *, names: Sequence[str], **more):
        labelled = {index: names[index % len(names)] for index in range(len(rows))}
        self.labelled = [(index, name) for index, name in labelled.items() if name in tasks]
        kept = [index for index, _ in self.labelled]
        super().__init__(select_rows(rows, kept), tasks, processor, **more)

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        for name, label in item["labels"].items():
            if name != self.labelled[index][1]:
                item["labels"][name] = label_tensor(name, self.tasks[name], None, label.shape[-2:])
        return item


def load(own: argparse.Namespace, args: argparse.Namespace, image_size: int, names: list[str] | None = None) -> Data:
    """The training script's data, with the split and the labels of a comparison.

    Raises:
        ValueError: There are too few rows to hold some out for such a split, or a task has no image left.
    """
    data = load_data(args, image_size, names, own.evaluate_on)
    identity = {"--evaluate-on": own.evaluate_on, "--one-task-each": own.one_task_each}
    if not own.one_task_each:
        return replace(data, identity=identity)
    unlabelled = [name for name in data.tasks if name not in own.one_task_each[: len(data.train)]]
    if unlabelled:
        raise ValueError(
            f"--one-task-each {' '.join(own.one_task_each)}: no image keeps its labels of {unlabelled[0]!r}"
        )
    return replace(data, identity=identity, make_dataset=partial(OneTaskEach, names=own.one_task_each))


def main(argv: Sequence[str] | None = None) -> None:
    own, rest = make_parser().parse_known_args(argv)
    train_multitask.main(rest, partial(load, own))


if __name__ == "__main__":
    sys.exit(run_script(main))
