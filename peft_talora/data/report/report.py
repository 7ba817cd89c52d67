"""The check of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kinds import TaskSpec
from ...msam.tasks import Tasks, parse_tasks
from ..rows import stored_rows
from ..splits import select_rows
from .findings import Findings, find_problems
from .reading import cache_file, examine_rows
from .summary import SplitSummary, summarize
from .table import in_words


@dataclass(frozen=True)
class DataReport:
    """What a data set holds. Printed, it is a table.

    Attributes:
        tasks: {name: TaskSpec}.
        splits: {split: SplitSummary}.
        findings: What is wrong or odd.
    """

    tasks: dict[str, TaskSpec]
    splits: dict[str, SplitSummary]
    findings: Findings

    def __str__(self) -> str:
        return in_words(self.splits, self.findings)

    def raise_errors(self) -> None:
        """Refuse a data set of which rows cannot be read, or from which nothing can be learnt.

        Raises:
            ValueError: With all of the errors.
        """
        if self.findings.errors:
            raise ValueError("the data cannot be used as it is. " + "; ".join(self.findings.errors))


def check_dataset(
    splits: Mapping[str, Any],
    tasks: Tasks,
    *,
    source: Any = None,
    skip_bad_files: bool = False,
    cache: bool = True,
    progress: bool = True,
) -> tuple[DataReport, dict[str, Any]]:
    """Read every image and label once, and say what they hold.

    Args:
        splits: ``{split: rows}``, as ``load_multitask_dataset`` gives them, or lists of dicts. Images of "train" are those
            that are learnt from.
        tasks: The tasks, as ``parse_tasks`` takes them.
        source: What ``load_multitask_dataset`` gave, where `splits` are parts of it.
        skip_bad_files: Leave out rows that cannot be read, instead of counting them as errors.
        cache: Keep what was found, so that files with the same time and size are not read again.
        progress: Whether to show a progress bar.

    Returns:
        The report, and the splits: the same, or without the rows that cannot be read.
    """
    tasks, source = parse_tasks(tasks), splits if source is None else source
    summaries = {}
    for split, rows in splits.items():
        file = (
            cache_file(_source(source, rows), split, tasks) if cache and not isinstance(rows, list | tuple) else None
        )
        summaries[split] = summarize(examine_rows(rows, tasks, split, file, progress), tasks)
    findings = find_problems(splits, summaries, source, skip_bad_files)
    kept = dict(splits)
    if skip_bad_files:
        for split, summary in summaries.items():
            if summary.errors:
                kept[split] = select_rows(splits[split], [i for i in range(summary.rows) if i not in summary.errors])
    return DataReport(tasks, summaries, findings), kept


def _source(source: Any, rows: Any) -> str:
    """What a data set is, for the name of a file: what its rows are made of beside the files that they name."""
    stored = stored_rows(rows)
    content = getattr(rows, "_fingerprint", None) if stored is None else [*stored[:1].values()]
    return repr([getattr(source, "content", None), content])
