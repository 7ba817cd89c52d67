"""Say what a data set holds: python -m peft_talora.data folder:PATH."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .detection import detect_tasks
from .loading import load_multitask_dataset
from .report import check_dataset, save_check_sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and draw a sheet; 1 where the data cannot be used, 2 where it cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m peft_talora.data", description="Read every image and label of a data set "
                                     "once, and say what they hold.")  # fmt: skip
    parser.add_argument("dataset", help="folder:PATH, coco:PATH, cityscapes:PATH, pascal_context:PATH, a folder of parquet "
                        "files, or a Hub id")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks alone (default: all that have labels)")
    parser.add_argument("--sheet", default="check.png", metavar="PNG", help="where a few rows of each split are drawn, with "
                        "their labels (default: %(default)s; '' for none)")  # fmt: skip
    parser.add_argument("--skip-bad-files", action="store_true", help="count the rows that cannot be read, and go on")
    parser.add_argument("--no-cache", action="store_true", help="read files again that have not changed")
    args = parser.parse_args(argv)
    try:
        splits = load_multitask_dataset(args.dataset)
        tasks = detect_tasks(splits, args.tasks)
        report, kept = check_dataset(splits, tasks, skip_bad_files=args.skip_bad_files, cache=not args.no_cache)
        print(report)
        if args.sheet:
            print(f"a few rows, labels drawn over them: {save_check_sheet(kept, report, args.sheet)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 1 if report.findings.errors else 0


if __name__ == "__main__":
    sys.exit(main())
