"""What is wrong with a data set, and what is likely to be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ..rows import place_of
from .summary import SplitSummary, TaskSummary

# So many broken rows are told of, and so many classes.
_SHOWN, _LISTED = 5, 8
# Rooms are smaller, streets hardly longer: in centimetres a room would be.
_FAR = 100.0


@dataclass
class Findings:
    """What to tell a user.

    Attributes:
        errors: Why nothing can be learnt, or a row cannot be read.
        warnings: What is possible, but hardly meant.
        notes: What is worth knowing.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_problems(
    splits: Mapping[str, Any], summaries: Mapping[str, SplitSummary], source: Any, skip_bad_files: bool
) -> Findings:
    """Look for what is odd.

    Args:
        splits: ``{split: rows}``.
        summaries: ``{split: what was found in them}``.
        source: What they are from; a folder knows which of its files were not used.
        skip_bad_files: Whether rows that cannot be read are left out; else they are errors.
    """
    findings = Findings()
    for split, summary in summaries.items():
        if summary.errors and skip_bad_files:
            number = len(summary.errors)
            findings.notes.append(f"{split}: {number} of {summary.rows} rows are left out, they cannot be read")
        elif summary.errors:
            findings.errors.append(_broken(split, summary))
        findings.warnings += _doubted(split, splits[split], summary)
    train = summaries.get("train")
    for name, task in train.tasks.items() if train else ():
        if task.images and not task.labelled_images:
            findings.errors.append(
                f"train: none of the {task.images} images is labelled for the task {name!r}: nothing can be learnt"
            )
        elif task.images:
            findings.warnings += [f"train: {name}: {odd}" for odd in _odd_labels(task)]
        others = {split: summary.tasks[name] for split, summary in summaries.items() if split != "train"}
        findings.warnings += _odd_elsewhere(name, task, others)
    findings.warnings += _twins(splits, summaries)
    findings.notes += [*_partners(splits, summaries), *_unused(source)]
    return findings


def _broken(split: str, summary: SplitSummary) -> str:
    shown = [f"\n    {error}" for error in list(summary.errors.values())[:_SHOWN]]
    more = len(summary.errors) - _SHOWN
    shown += [f"\n    and {more} more"] if more > 0 else []
    return f"{split}: {len(summary.errors)} of {summary.rows} rows cannot be read:{''.join(shown)}"


def _doubted(split: str, rows: Any, summary: SplitSummary) -> Iterator[str]:
    """Doubts that differ in their numbers alone are one."""
    alike: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for index, doubts in summary.doubts.items():
        for subject, doubt in doubts:
            alike.setdefault((subject, re.sub(r"\d[\d.]*", "#", doubt)), []).append((index, doubt))
    for (subject, _), cases in alike.items():
        index, doubt = cases[0]
        yield f"{split}: {subject}: {len(cases)} of {summary.rows} images, the first one is {place_of(rows, index)}: {doubt}"


def _odd_labels(task: TaskSummary) -> Iterator[str]:
    """What is odd in labels to learn from."""
    kind = task.spec.task_kind
    if kind.has_classes:
        if len(task.counts) == 1:
            number = next(iter(task.counts))
            yield f"every labelled pixel is {task.class_name(number)!r} ({number}): there is nothing to tell apart" + (
                f"; are unlabelled pixels ({task.spec.ignore_index}) a class? In black and white maps say `class_map: {{0: 0, 255: 1}}`"
                if task.labelled_pixels < task.pixels
                else ""
            )
        elif len(task.counts) < task.spec.num_channels:
            missing = [
                task.class_name(number) for number in range(task.spec.num_channels) if number not in task.counts
            ]
            yield f"never seen: {_listed(missing)}"
    elif kind.largest_label(task.spec.num_channels) == 1:
        if task.positive in (0, task.labelled_pixels):
            yield f"{'every' if task.positive else 'no'} labelled pixel is positive: there is nothing to tell apart"
    elif task.low is not None and task.low == task.high:
        yield f"every labelled pixel is {task.low:g}: there is nothing to tell apart"
    if kind.is_distance and task.median is not None and task.median > _FAR:
        yield (
            f"the median is {task.median:g} metres: is it in centimetres or millimetres? "
            "(for the files of a folder: `scale: 0.01` or `scale: 0.001`)"
        )


def _odd_elsewhere(name: str, train: TaskSummary, others: Mapping[str, TaskSummary]) -> Iterator[str]:
    for split, task in others.items():
        if task.images and not task.labelled_images:
            yield f"{split}: {name}: none of the {task.images} images is labelled"
        new = [task.class_name(number) for number in sorted(task.counts) if number not in train.counts]
        if new and train.counts:
            yield f"{split}: {name}: {_listed(new)} is there, and never in train"


def _twins(splits: Mapping[str, Any], summaries: Mapping[str, SplitSummary]) -> Iterator[str]:
    for (first, one), (second, other) in combinations(summaries.items(), 2):
        same = [(row, other.digests[digest]) for digest, row in one.digests.items() if digest in other.digests]
        if same:
            here, there = place_of(splits[first], same[0][0]), place_of(splits[second], same[0][1])
            yield f"{len(same)} pictures are in {first} and in {second}, such as {here} and {there}"


def _partners(splits: Mapping[str, Any], summaries: Mapping[str, SplitSummary]) -> Iterator[str]:
    """Images without labels."""
    for split, summary in summaries.items():
        for name, task in summary.tasks.items():
            if task.unlabelled is not None and task.labelled_images:
                example = place_of(splits[split], task.unlabelled)
                yield f"{split}: {name}: {task.images - task.labelled_images} images have no label, such as {example}"


def _unused(source: Any) -> Iterator[str]:
    """Labels without an image, and images that no split wants."""
    files = getattr(source, "files", None)
    for name, orphans in (files.orphans if files else {}).items():
        yield f"{name}: {len(orphans)} label files belong to no image, such as {orphans[0]}"
    left_out = getattr(source, "left_out", None)
    if left_out:
        yield f"{len(left_out)} images are in no split, such as {left_out[0]!r}"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(map(repr, names[:_LISTED])) + (f" and {more} more" if more > 0 else "")
