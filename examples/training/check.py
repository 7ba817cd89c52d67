"""A look at all of the data before the first step."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from peft_talora.data import DataReport, check_dataset, save_check_sheet
from peft_talora.kinds import doubts

from . import folder
from .data import Data


def check_data(args: argparse.Namespace, data: Data) -> Data:
    """Print what the images and labels hold; without the rows that cannot be read where the options say so.

    With --check the program ends here.

    Raises:
        ValueError: A row cannot be read, or a task has nothing to learn from.
    """
    used = {"train": None if args.eval_only else data.train, "test": data.test, "validation": data.validation}
    splits = {name: rows for name, rows in used.items() if rows is not None}
    first = PartialState().is_main_process
    report, kept = check_dataset(
        splits, data.tasks, source=data.source, skip_bad_files=args.skip_bad_files, progress=first
    )
    if first:
        # before an error that points to it, where both go into one file
        print(report, flush=True)
    if args.check:
        stop(args, kept, report)
    if report.findings.errors:
        unreadable = not args.skip_bad_files and any(split.errors for split in report.splits.values())
        skip = "; --skip-bad-files leaves out rows that cannot be read" if unreadable else ""
        raise ValueError(f"the data cannot be used as it is: the lines above that begin with ERROR say why{skip}")
    # training reads the same labels again
    doubts.tell_no_more(
        subject for split in report.splits.values() for row in split.doubts.values() for subject, _ in row
    )
    return replace(data, **kept)


def stop(args: argparse.Namespace, splits: dict[str, Any], report: DataReport) -> None:
    """Draw some rows and end the program, with code 1 where the data cannot be used."""
    if PartialState().is_main_process:
        folder.mark(args.output_dir, {"--check": True})
        sheet = save_check_sheet(splits, report, args.output_dir / "check.png")
        print(f"some rows, labels drawn over them: {sheet}; nothing was trained")
    raise SystemExit(1 if report.findings.errors else 0)
