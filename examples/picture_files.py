"""Pictures on their way in, and the files of their maps on the way out.

What is written carries a mark, so that nothing else is ever overwritten.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from peft_talora.data import IMAGE_SUFFIXES, read_image

MARK = "peft_talora predict.py"

# the cap of `read_picture` stands for Pillow's own, which warns and refuses at sizes of its choice
Image.MAX_IMAGE_PIXELS = None


def find_pictures(given: Iterable[Path], output_dir: Path) -> dict[str, Path]:
    """{name of its folder in the output: file}, without what is hidden and what lies in the output already."""
    files: list[tuple[Path, Path]] = []  # the name, without a suffix, and the file
    for path in given:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            inside = [file for file in inside if output_dir.resolve() not in file.resolve().parents]
            names = [(file.relative_to(path), file) for file in inside]
            files += [(name.with_suffix(""), file) for name, file in names if not _is_hidden(name)]
        else:
            files.append((Path(path.stem), path))
    pictures: dict[str, Path] = {}
    known: set[Path] = set()
    for name, file in files:
        if file.resolve() in known:
            continue
        known.add(file.resolve())
        unique, number = name.as_posix(), 2
        while unique in pictures:
            unique, number = f"{name.as_posix()}-{number}", number + 1
        pictures[unique] = file
    return pictures


def _is_hidden(name: Path) -> bool:
    return any(part.startswith((".", "@")) for part in name.parts)


def read_picture(file: Path, max_megapixels: float) -> np.ndarray:
    """A picture as a person would see it, uint8 (H, W, 3).

    Raises:
        ValueError: It cannot be read, or has more pixels than that, which is known before they are unpacked.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Exception:  # the reader says what is wrong
        width, height = 0, 0
    if width * height > max_megapixels * 1e6:
        raise ValueError(
            f"{file} has {width} x {height} pixels, that is {width * height / 1e6:.0f} megapixels, and more than "
            f"{max_megapixels:g} are read only where --max-megapixels says so"
        )
    return read_image(file)


class OutputFiles:
    """How the files of a picture are called, of whatever tasks there are: no two of them share a name.

    A task has its map in TASK.png, its numbers in TASK.npz and its overlay in TASK_overlay.png. Tasks may be called
    "overview", or "depth_overlay" beside "depth": then the overview or the overlay gets another name.

    Args:
        tasks: The names of the tasks.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        taken: set[str] = set()

        def unique(stem: str, *ends: str) -> str:
            name, number = stem, 2
            # a file system may not tell upper from lower case
            while any((name + end).lower() in taken for end in ends):
                name, number = f"{stem}-{number}", number + 1
            taken.update((name + end).lower() for end in ends)
            return name

        stems = {task: unique(task, ".png", ".npz") for task in tasks}
        self.maps = {task: f"{stem}.png" for task, stem in stems.items()}
        self.numbers = {task: f"{stem}.npz" for task, stem in stems.items()}
        self.overlays = {task: unique(f"{task}_overlay", ".png") + ".png" for task in stems}
        self.overview = unique("overview", ".png") + ".png"

    def all(self) -> list[str]:
        """All names."""
        return [*self.maps.values(), *self.numbers.values(), *self.overlays.values(), self.overview]


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W, 3)."""
    mark = PngInfo()
    mark.add_text("Software", MARK)
    # a sixth larger than at the usual level, in a fifth of the time
    Image.fromarray(picture).save(path, compress_level=1, pnginfo=mark)


def save_numbers(path: Path, task: str, values: np.ndarray) -> None:
    """Write an array as ``numpy.savez`` does, under the task's name.

    Whole numbers are compressed. Others are not: that would take minutes for a large picture, and spare a tenth.
    """
    method = zipfile.ZIP_DEFLATED if np.issubdtype(values.dtype, np.integer) else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.comment = MARK.encode()
        with archive.open(f"{task}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """ValueError where one of these files exists, is not empty, and was written by no earlier prediction."""
    for path in (folder / name for name in names):
        if path.exists() and path.stat().st_size and not _is_marked(path):
            raise ValueError(f"{path} is there already and not from a prediction: --overwrite replaces it")


def _is_marked(path: Path) -> bool:
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment == MARK.encode()
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
