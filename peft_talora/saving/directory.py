"""Directories that change as a whole: a killed save leaves the old files or the new ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# complete new files that were not all moved to their place when the process was killed
PENDING = ".pending"
# how often a reader starts again while another process saves
_ATTEMPTS = 20


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to write files into; when the block ends, they appear in `directory` together.

    One rename decides. Before it `directory` is as it was; after it the new files count: [`read_together`] finds them before
    they were all moved, and [`finish_pending`], which every save calls first, moves the rest. Other files in `directory`
    stay. A killed process may leave the unfinished files behind, in a hidden folder that nothing reads.

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
    aside = place / f".{directory.name}-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        yield aside
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
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
    """Move the files of an interrupted save to their place. Several processes may do so at once.

    Raises:
        PermissionError: The directory cannot be written.
    """
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


def read_together(directory: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of files as one save wrote them, those of an interrupted one included. Nothing is written.

    Args:
        directory: Where they are.
        names: Their names; one that does not exist is left out.

    Raises:
        FileNotFoundError: Other processes save so often that no two looks at the files were the same.
    """
    for _ in range(_ATTEMPTS):
        before = _states(directory, names)
        try:
            contents = {name: path.read_bytes() for name, (path, *_) in before.items()}
        except FileNotFoundError:
            continue  # it was just moved
        if _states(directory, names) == before:
            return contents
    raise FileNotFoundError(f"The files in '{directory}' do not stay: another process saves into it all the time.")


def _states(directory: Path, names: Sequence[str]) -> dict[str, tuple[Path, int, int, int]]:
    """Of each file that there is: where it lies, and what changes when it is replaced."""
    states = {}
    for name in names:
        for path in (directory / PENDING / name, directory / name):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = path.stat()
                if path.is_file():
                    states[name] = (path, status.st_ino, status.st_mtime_ns, status.st_size)
                    break
    return states


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
