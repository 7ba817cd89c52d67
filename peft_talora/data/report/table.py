"""A report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .findings import Findings
from .summary import SplitSummary, TaskSummary

_MOST_CLASSES = 12


def in_words(summaries: Mapping[str, SplitSummary], findings: Findings) -> str:
    """The table of all splits and tasks, and below it what was found."""
    lines = []
    for split, summary in summaries.items():
        lines.append(f"{split}: {summary.rows} images{_sizes(summary)}")
        rows = [["task", "labelled images", "labelled pixels", "what is in it"]]
        rows += [[name, *_cells(task, summary.rows)] for name, task in summary.tasks.items()]
        lines += [f"  {line}" for line in _aligned(rows)]
    for word, sentences in (("note", findings.notes), ("WARNING", findings.warnings), ("ERROR", findings.errors)):
        lines += [f"{word}: {sentence}" for sentence in sentences]
    return "\n".join(lines)


def _sizes(summary: SplitSummary) -> str:
    if not summary.sizes:
        return ""
    sides = [(width, height) for height, width in summary.sizes]
    small, large = min(sides, key=lambda side: side[0] * side[1]), max(sides, key=lambda side: side[0] * side[1])
    text = f"{small[0]} x {small[1]}"
    return f", {text}" if len(sides) == 1 else f", {text} to {large[0]} x {large[1]} pixels"


def _cells(task: TaskSummary, images: int) -> list[str]:
    if not task.images:
        return ["0", "", ""]
    return [
        f"{task.labelled_images} ({_percent(task.labelled_images, images)})",
        _percent(task.labelled_pixels, task.pixels),
        _content(task),
    ]


def _content(task: TaskSummary) -> str:
    kind = task.spec.task_kind
    if not task.labelled_images:
        return "nothing"
    if kind.has_classes:
        common = task.counts.most_common()
        shown = [
            f"{task.class_name(number)} {_percent(count, task.labelled_pixels)}"
            for number, count in common[:_MOST_CLASSES]
        ]
        more = f", {len(common) - _MOST_CLASSES} more" if len(common) > _MOST_CLASSES else ""
        return f"{len(common)} of {task.spec.num_channels} classes: {', '.join(shown)}{more}"
    if kind.largest_label(task.spec.num_channels) == 1:
        return f"{_percent(task.positive, task.labelled_pixels)} positive"
    if task.lengths:
        return f"vectors of length {min(task.lengths):.2f} to {max(task.lengths):.2f}"
    unit = f" {kind.unit}" if kind.unit not in (None, "value") else ""
    return f"{task.low:.4g} to {task.high:.4g}{unit}, median {task.median:.4g}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / max(whole, 1)
    # 0 % and 100 % are said where they are exact alone
    return (
        f"{share:.3g} %" if part in (0, whole) or 0.01 <= share <= 99.9 else ("> 99.9 %" if share > 50 else "< 0.01 %")
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
