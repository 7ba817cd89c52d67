"""Which images belong to which split of a folder."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..images import SUFFIXES
from .checks import quoted
from .description import FolderDescription
from .files import plain


def split_names(folder: Path, description: FolderDescription, images: Mapping[str, Path]) -> dict[str, list[str]]:
    """{split: names of its images}; ValueError where the description does not fit the images."""
    where = f"{description.source}: splits"
    if isinstance(description.splits, str):
        return _subfolders(images, description.skip_splits, where)
    names, lookup = list(images), NameLookup(folder, images)
    splits = {}
    for split, value in description.splits.items():
        place = f"{where}.{split}"
        if isinstance(value, list | str):
            listed = [[name] for name in value] if isinstance(value, list) else read_lines(folder / value, place)
            splits[split] = _each_once(lookup.names(listed, place), place)
    _warn_of_twins(splits, where)
    splits = _split_fractions(description.splits, names, splits)
    empty = [split for split, members in splits.items() if not members]
    if empty:
        raise ValueError(f"{where}.{empty[0]}: no image is left for it, there are {len(names)}")
    return splits


def _each_once(names: list[str], where: str) -> list[str]:
    """A list's images, each once: one that is evaluated twice would count twice."""
    counts = Counter(names)
    if len(counts) < len(names):
        first = next(name for name, number in counts.items() if number > 1)
        warnings.warn(
            f"{where}: {len(names)} entries are {len(counts)} images, {first!r} is there twice: each counts once",
            stacklevel=2,
        )
    return list(counts)


def read_lines(file: Path, where: str) -> list[list[str]]:
    """A file of names: for each of its lines what may be a name, the most likely reading first.

    Each line is a name, with or without the file's suffix and folder. Comments begin with #. What follows the name after a
    blank, a tab or a comma is a label of it (or, if all of them are images, another name).
    """
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {str(file)!r}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {str(file)!r} is no text in UTF-8: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{where}: {str(file)!r} names no image")
    return [[line, line.split(" #")[0].strip()] for line in lines]


class NameLookup:
    """Finds images by what a list calls them.

    Args:
        folder: The dataset's folder.
        images: ``{name: file}``.
    """

    def __init__(self, folder: Path, images: Mapping[str, Path]) -> None:
        self._known: dict[str, set[str]] = {}
        self._names = images
        for name, path in images.items():
            within = path.relative_to(folder).as_posix()
            for key in {name, within, within[: -len(path.suffix)], path.name, path.stem}:
                self._known.setdefault(plain(key), set()).add(name)

    def names(self, listed: Iterable[list[str]], where: str) -> list[str]:
        """The images of a list, each entry being several readings of a line; ValueError for those that are missing."""
        found, missing = [], []
        for readings in listed:
            names = next((names for names in map(self._line, readings) if names), None)
            found.extend(names or [])
            if names is None:
                missing.append(readings[0])
        if missing:
            raise ValueError(
                f"{where}: missing image {quoted(missing[0])} ({len(missing)} of {len(missing) + len(found)} are missing)"
            )
        return found

    def _line(self, line: str) -> list[str] | None:
        name = self._one(line)
        if name is not None:
            return [name]
        words = line.replace(",", " ").split()
        if len(words) < 2:
            return None
        names = [self._one(word) for word in words]
        known = [name for name in names if name is not None]
        if len(known) == len(names):
            return list(dict.fromkeys(known))
        # an image and its label, or a flag of it
        rest = all(Path(word).suffix or word.lstrip("+-").isdigit() for word in words[1:])
        return [names[0]] if names[0] is not None and rest else None

    def _one(self, name: str) -> str | None:
        name = name.strip("\"'").removeprefix("./").replace("\\", "/")
        if name in self._names:
            return name
        stem, dot, suffix = name.rpartition(".")
        keys = [name, stem] if dot and f".{suffix.lower()}" in SUFFIXES else [name]
        for key in keys:
            found = self._known.get(plain(key), set())
            if len(found) == 1:
                return next(iter(found))
        return None


def _subfolders(images: Mapping[str, Path], skipped: tuple[str, ...], where: str) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in images:
        split, slash, _ = name.partition("/")
        if not slash:
            raise ValueError(f"{where}: the image {quoted(name)} lies in no subfolder that could be a split")
        if split not in skipped:
            splits.setdefault(split, []).append(name)
    return splits


def _warn_of_twins(splits: Mapping[str, list[str]], where: str) -> None:
    owners: dict[str, str] = {}
    twins = [
        (name, owners[name], split)
        for split, names in splits.items()
        for name in names
        if owners.setdefault(name, split) != split
    ]
    if twins:
        name, first, second = twins[0]
        warnings.warn(
            f"{where}: {len(twins)} images are in more than one split, {name!r} in {first!r} and {second!r}",
            stacklevel=4,
        )


def _split_fractions(
    described: Mapping[str, Any], names: list[str], listed: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Add the splits that are fractions of all images, and "train" with what is left where nobody names it.

    Who goes where follows from the sorted names alone.
    """
    taken = {name for split in listed.values() for name in split}
    free = [name for name in names if name not in taken]
    order = [free[index] for index in np.random.default_rng(0).permutation(len(free))]
    splits = dict(listed)
    for split, fraction in described.items():
        if split not in listed:
            number = max(1, round(fraction * len(names)))
            splits[split], order = sorted(order[:number]), order[number:]
    if "train" not in splits and order:
        splits = {"train": sorted(order), **splits}
    return splits
