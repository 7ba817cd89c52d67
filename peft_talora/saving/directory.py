"""Directories that change as a whole: a killed save leaves the old files or the new ones."""

from __future__ import annotations

import contextlib
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
    `directory` stay. A killed process may leave the unfinished files behind, in a hidden folder that nothing reads.

    Raises:
        FileExistsError: `directory` is a file.
    """
    if directory.is_file():
        raise FileExistsError(f"'{directory}' is a file, not a directory.")
    directory = Path(os.path.realpath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    finish_pending(directory)
    # inside a directory that exists: it may be a mount point, and nothing can be renamed from one volume to another
    place = directory if directory.exists() else directory.parent
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=place))
    try:
        yield aside
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        aside.chmod(0o777 & ~_umask())
        if directory.exists():
            os.rename(aside, directory / PENDING)
            _sync(directory)
            finish_pending(directory)
        else:
            os.rename(aside, directory)
            _sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finish_pending(directory: Path) -> None:
    """Move the files of an interrupted save to their place. Several processes may do so at once."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):  # another process was here first
        names = sorted(path.name for path in pending.iterdir())
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.replace(pending / name, directory / name)
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
