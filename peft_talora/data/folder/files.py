"""Which files of a folder are images, and which are their labels."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..images import SUFFIXES
from .checks import NAME
from .description import FolderDescription

# What systems and programs leave beside the files that a person sees: `._x.png`, `.ipynb_checkpoints`, `@eaDir`.
_HIDDEN = (".", "@", "__MACOSX")


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder.

    Args:
        images: ``{name: file}``, sorted by name.
        labels: ``{task: {name of the image: file}}`` of the tasks that have any.
        orphans: ``{task: label files that belong to no image}``.
    """

    images: dict[str, Path]
    labels: dict[str, dict[str, Path]]
    orphans: dict[str, list[Path]] = field(default_factory=dict)


def find_files(folder: Path, description: FolderDescription) -> FolderFiles:
    """Find images and labels; ValueError where there are none, or where it is not clear which file is meant."""
    tasks = description.tasks.items()
    candidates = {(name, pattern): find(folder, pattern) for name, task in tasks for pattern in task.files}
    images = _without_labels(find(folder, description.images), candidates.values())
    if not images:
        raise ValueError(f"{description.source}: images: no image file fits {description.images!r} in {str(folder)!r}")
    folder_files = FolderFiles(images, {})
    for name, task in tasks:
        files: dict[str, Path] = {}
        for pattern in reversed(task.files):
            files.update(candidates[name, pattern])
        files, orphans = _match(files, images, f"{description.source}: tasks.{name}.files")
        if files:
            folder_files.labels[name] = files
        elif not task.optional:
            example = next(iter(images))
            raise ValueError(
                f"{description.source}: tasks.{name}.files: no file in {str(folder)!r} fits "
                f"{' or '.join(map(repr, task.files))} and an image; for the image {example!r} one was expected at "
                f"{_expected(task.files[0], example)!r}"
                + (f", and {str(orphans[0])!r} belongs to no image" if orphans else "")
            )
        if orphans:
            folder_files.orphans[name] = orphans
    if not folder_files.labels:
        raise ValueError(
            f"{description.source}: tasks: {str(folder)!r} has label files for none of {list(description.tasks)}"
        )
    return folder_files


def find(folder: Path, pattern: str) -> dict[str, Path]:
    """{name: file} of all files that fit a pattern or lie in a subfolder, sorted by name.

    Upper and lower case are alike in what stands around the name, and so are the forms of unicode. Hidden files and folders do
    not count, linked ones do.
    """
    before, name, after = pattern.partition(NAME)
    start = folder / (before.rpartition("/")[0] if name else pattern)
    files: dict[str, Path] = {}
    for path in sorted(_walk(start)):
        if name:
            key = _between(path.relative_to(folder).as_posix(), before, after)
        else:
            key = path.relative_to(start).with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else ""
        if not key:
            continue
        if key in files:
            raise ValueError(f"{files[key]} and {path} have the same name: which one counts?")
        files[key] = path
    return files


def _between(path: str, before: str, after: str) -> str:
    """What stands between two parts of a path; nothing where it does not have them."""
    path, before, after = (unicodedata.normalize("NFC", text) for text in (path, before, after))
    name = path[len(before) : len(path) - len(after)]
    return name if name and plain(before + name + after) == plain(path) else ""


def plain(name: str) -> str:
    """A name without regard to upper and lower case and to how unicode composes its letters."""
    return unicodedata.normalize("NFC", name).casefold()


def _walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below, through links, but not round in circles."""
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith(_HIDDEN):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, here))
        elif entry.is_file():
            yield folder / entry.name


def _without_labels(images: dict[str, Path], labels: Iterable[Mapping[str, Path]]) -> dict[str, Path]:
    """Images without the labels beside them: files that are the label of something, whose name is a part of theirs."""
    shortest: dict[Path, int] = {}
    for files in labels:
        for name, path in files.items():
            shortest[path] = min(len(name), shortest.get(path, len(name)))
    return {name: path for name, path in images.items() if shortest.get(path, len(name)) >= len(name)}


def _match(files: Mapping[str, Path], images: Mapping[str, Path], where: str) -> tuple[dict[str, Path], list[Path]]:
    """({name of the image: label file}, files of no image): by the very name, else by what it looks like."""
    matched = {name: path for name, path in files.items() if name in images}
    others = {name: path for name, path in files.items() if name not in images}
    if not others:
        return matched, []
    looks: dict[str, list[str]] = {}
    for name in images:
        if name not in matched:
            looks.setdefault(plain(name), []).append(name)
    orphans = []
    for name, path in others.items():
        alike = looks.get(plain(name), [])
        if len(alike) > 1 or any(image in matched for image in alike):
            raise ValueError(
                f"{where}: {path} could belong to {' and '.join(map(repr, alike))}: name it like its image"
            )
        if alike:
            matched[alike[0]] = path
        else:
            orphans.append(path)
    return {name: matched[name] for name in images if name in matched}, orphans


def _expected(pattern: str, name: str) -> str:
    return pattern.replace(NAME, name) if NAME in pattern else f"{pattern}/{name}.png"
