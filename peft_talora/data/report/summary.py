"""What all rows of a split hold together."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...kinds import TaskSpec


@dataclass
class TaskSummary:
    """The labels of one task in one split.

    Attributes:
        spec: The task.
        images: How many images could be read.
        labelled_images: How many have a labelled pixel.
        unlabelled: The number of the first row that has none.
        pixels: Pixels of all images.
        labelled_pixels: Those that are labelled.
        counts: {class: pixels}, of classes.
        positive: Positive pixels, of masks.
        low: The smallest value, of values.
        high: The largest one.
        medians: The median of each labelled image, of values.
        lengths: The median length in each labelled image, of directions.
    """

    spec: TaskSpec
    images: int = 0
    labelled_images: int = 0
    unlabelled: int | None = None
    pixels: int = 0
    labelled_pixels: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    positive: int = 0
    low: float | None = None
    high: float | None = None
    medians: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def add(self, index: int, content: Mapping[str, Any]) -> None:
        """Count a row in: what `examine_label` gave of it."""
        self.images += 1
        self.pixels += content["pixels"]
        self.labelled_pixels += content["labelled"]
        if not content["labelled"]:
            self.unlabelled = index if self.unlabelled is None else self.unlabelled
            return
        self.labelled_images += 1
        self.counts.update({int(number): count for number, count in content.get("counts", {}).items()})
        self.positive += content.get("positive", 0)
        if "low" in content:
            self.low = content["low"] if self.low is None else min(self.low, content["low"])
            self.high = content["high"] if self.high is None else max(self.high, content["high"])
            self.medians.append(content["median"])
        if "length" in content:
            self.lengths.append(content["length"])

    @property
    def median(self) -> float | None:
        """The median of the images' medians."""
        return statistics.median(self.medians) if self.medians else None

    def class_name(self, number: int) -> str:
        """What a class is called."""
        names = self.spec.class_names
        return names[number] if names and 0 <= number < len(names) else str(number)


@dataclass
class SplitSummary:
    """One split.

    Attributes:
        rows: How many rows it has.
        tasks: {name: TaskSummary}.
        sizes: {(H, W): images}.
        errors: {row: why it cannot be read}.
        doubts: {row: [(of whom, why)]}.
        digests: {what stands for an image's content: the first row that has it}.
    """

    rows: int
    tasks: dict[str, TaskSummary]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    errors: dict[int, str] = field(default_factory=dict)
    doubts: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)


def summarize(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, TaskSpec]) -> SplitSummary:
    """Add up what `examine_rows` gave."""
    split = SplitSummary(len(rows), {name: TaskSummary(spec) for name, spec in tasks.items()})
    for index, row in enumerate(rows):
        if "error" in row:
            split.errors[index] = row["error"]
            continue
        split.sizes[tuple(row["size"])] += 1
        split.digests.setdefault(row["digest"], index)
        if row["doubts"]:
            split.doubts[index] = [tuple(doubt) for doubt in row["doubts"]]
        for name, content in row["tasks"].items():
            split.tasks[name].add(index, content)
    return split
