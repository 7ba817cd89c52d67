"""A run's output directory: whose it is, that only one run writes into it, and what earlier runs left there."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft_talora.saving.directory import written_aside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MARKER = "run.json"
LOCK = ".run.lock"
SCRIPT = "peft_talora/examples/train_multitask.py"
CHECKPOINTS = "checkpoints"
CHECKPOINT_RECORD = "checkpoint.json"
BASELINE_CHECKPOINTS = "baseline_checkpoints"
BASELINE = "baseline.json"
BASELINE_MAPS = "baseline_maps.npz"
# what belongs to one run, and is put aside when another one begins
OF_A_RUN = (CHECKPOINTS, BASELINE_CHECKPOINTS, BASELINE, BASELINE_MAPS)


def new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def read_marker(directory: Path) -> dict[str, Any] | None:
    """What the run that `directory` belongs to says of itself; None where no run of this script wrote it."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("script") == SCRIPT else None


def write_marker(directory: Path, run: str, arguments: dict[str, Any]) -> None:
    marker = {"script": SCRIPT, "run": run, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "arguments": arguments}
    write_json(directory / MARKER, marker)


def mark(directory: Path, arguments: dict[str, Any]) -> None:
    """Make a folder this script's own before a run's files are in it; one that is a run's stays that run's."""
    if read_marker(directory) is None:
        write_marker(directory, new_run_id(), arguments)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file as a whole or not at all; numbers that are not finite become null."""
    with written_aside(path.parent) as aside:
        (aside / path.name).write_text(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    if isinstance(values, Path):
        return str(values)
    return None if isinstance(values, float) and values - values != 0 else values


@contextmanager
def claimed(directory: Path, overwrite: bool, resume: str | None) -> Iterator[None]:
    """Hold an output directory that is this script's to write into.

    Raises:
        FileExistsError: It has files that no run of this script wrote, and `overwrite` is not said.
        BlockingIOError: Another run writes there.
    """
    # a checkpoint to resume from says, too, whose it is
    if not overwrite and not (resume and any(directory.glob(f"*{CHECKPOINTS}/step-*/{CHECKPOINT_RECORD}"))):
        refuse_foreign(directory)
    with locked(directory):
        remove_leftovers(directory)
        yield


def refuse_foreign(directory: Path) -> None:
    """Refuse a folder with files that no run of this script wrote.

    Raises:
        FileExistsError: It is a file, or such a folder.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"--output-dir: {directory} is a file")
    if not directory.is_dir() or read_marker(directory) is not None:
        return
    files = sorted(path.name for path in directory.iterdir() if path.name != LOCK)
    if files:
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        raise FileExistsError(
            f"--output-dir: {directory} has files that no run of this script wrote ({shown}); choose another folder, or say "
            "--overwrite to have files of the same names replaced"
        )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it when the process ends, however that happens.

    It is made if it is not there, and removed again if nothing was written into it, as where a run was refused.

    Raises:
        BlockingIOError: Another process holds it.
    """
    is_new, path = not directory.exists(), directory / LOCK
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        if not _lock(lock):
            lock.seek(0)
            raise BlockingIOError(
                f"--output-dir: another run writes into {directory} (process {lock.read().strip() or 'unknown'}): wait for "
                "its end, or choose another folder"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        # the file stays where a run may begin again: removed, it could be held by one process and made anew by another
        try:
            yield
        finally:
            # whoever moved it, or put something into it since, keeps what is there
            with suppress(OSError):
                if is_new and os.listdir(directory) == [LOCK]:
                    path.unlink()
                    directory.rmdir()


def _lock(file: Any) -> bool:
    if fcntl is None:
        return True
    try:
        # lockf rather than flock: processes that load data do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        # some network disks have no locks
        print(f"{file.name} cannot be locked ({error}): see to it that no other run writes there")
    return True


def remove_leftovers(directory: Path) -> None:
    """Remove what killed saves left unfinished. Nobody else may be saving."""
    unfinished = re.compile(rf"\.{re.escape(directory.resolve().name)}-([0-9a-f]{{32}}|[a-z0-9_]{{8}})")
    for path in directory.iterdir():
        if path.is_dir() and unfinished.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path) -> Path | None:
    """Move what belongs to an earlier run out of the way of a new one: its checkpoints' new place, if it had any.

    It goes to names that end in .old, .old-2 and so on: what lies there already stays.
    """
    present = [name for name in OF_A_RUN if (directory / name).exists()]
    endings = (".old" if number == 1 else f".old-{number}" for number in range(1, 10**6))
    ending = next(end for end in endings if not any((directory / f"{name}{end}").exists() for name in OF_A_RUN))
    for name in present:
        os.rename(directory / name, directory / f"{name}{ending}")
    return directory / f"{CHECKPOINTS}{ending}" if CHECKPOINTS in present else None


def earlier_checkpoints(directory: Path) -> list[Path]:
    """The folders of checkpoints that [`set_aside`] made, the last one first."""
    found = [
        (re.fullmatch(rf"{CHECKPOINTS}\.old(?:-(\d+))?", path.name), path)
        for path in directory.glob(f"{CHECKPOINTS}.old*")
    ]
    numbered = [(int(match[1] or 1), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def tell_of_earlier(directory: Path, step: int) -> None:
    """Name the run that was set aside last where it had come further than this one, as after a restart by accident."""
    for aside in earlier_checkpoints(directory)[:1]:
        steps = [int(path.name.removeprefix("step-")) for path in aside.glob("step-*") if path.name[5:].isdecimal()]
        if max(steps, default=0) > step:
            print(
                f"{aside} has the checkpoints of an earlier run; --resume {aside / f'step-{max(steps)}'} resumes its last"
            )


def remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


class NotWritten(OSError):
    """Something could not be written."""


def disk_error(what: str, path: Path, error: BaseException) -> NotWritten:
    """An error that says which disk is full, where that is the reason, and what could not be written in any case."""
    place = path
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    while not os.path.ismount(place.resolve()) and place.resolve() != place.resolve().parent:
        place = place.resolve().parent
    return NotWritten(
        f"{what} {path} could not be written: {str(error).splitlines()[0]}; the disk at {place.resolve()} has "
        f"{usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.1f} MB left"
    )
