"""Directories that change as a whole: a killed save leaves the old files or the new ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# complete new files that were not all moved to their place when the process was killed
PENDING = ".pending"


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to write files into; when the block ends, they appear in `directory` together.

    One rename decides. Before it `directory` is as it was; after it the new files count, and whoever was killed before
    they were all moved is made up for by [`finish_pending`], which every load and every save calls first. Other files in
    `directory` stay.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    finish_pending(directory)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield aside
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        aside.chmod(0o777 & ~_umask())
        if directory.exists():
            os.rename(aside, directory / PENDING)
            finish_pending(directory)
        else:
            os.rename(aside, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finish_pending(directory: Path) -> None:
    """Move the files of an interrupted save to their place."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    for path in sorted(pending.iterdir()):
        os.replace(path, directory / path.name)
    pending.rmdir()
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
