"""What a data set holds, read once before anything is learnt from it, and what is wrong with it."""

from .findings import Findings
from .reading import examine_rows
from .report import DataReport, check_dataset
from .sheet import save_check_sheet
from .summary import SplitSummary, TaskSummary

__all__ = [
    "DataReport",
    "Findings",
    "SplitSummary",
    "TaskSummary",
    "check_dataset",
    "examine_rows",
    "save_check_sheet",
]
