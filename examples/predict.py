"""Predict the maps of an adapter for your own pictures.

    python examples/predict.py --adapter runs/multitask IMAGE_OR_FOLDER... --output-dir predictions

Every picture gets a folder: for each task a coloured map and the numbers at the picture's own resolution, an overlay (of
at most 2048 pixels), and an overview with legends. A contact sheet shows all pictures. Files that are not its own are never
overwritten without --overwrite. Read from top to bottom: models, predictions, drawing, the loop. Exit code: 0, 1 where
pictures were skipped, 2 where nothing was done.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import extras  # noqa: F401
from prediction_options import parse_args

if __name__ == "__main__":
    # what is wrong with them is said before the imports below, which take seconds
    parse_args()

import numpy as np
import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

import peft_talora as pt
from peft_talora.drawing import color_range, draw
from peft_talora.msam.loading import checkpoint_type, load_sam
from peft_talora.saving.adapter import SavedAdapter
from peft_talora.saving.directory import written_aside

sys.path.insert(0, str(Path(__file__).parent))
from contact_sheet import save_sheet
from picture_files import OutputFiles, find_pictures, read_picture, refuse_foreign, save_numbers, save_png
from prediction import Maps, Picture, make_picture, one_thread, predict, shrink_image, shrink_map
from tiles import predict_tiled

SHEET = "contact_sheet.png"
SHEET_SIDE = 320  # longest side of a picture on the sheet, in pixels
BATCH_PIXELS = 16_000_000  # of the pictures that go through the model together: larger ones go alone
MASK_COLOR = np.array([255.0, 120.0, 0.0])  # what an overlay paints a mask with


class Unusable(Exception):
    """What was asked for cannot be done at all; the message is for the user."""


# --- Models ---------------------------------------------------------------------------------------------------------


def adapter_folder(path_or_hub_id: str) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or path_or_hub_id.count("/") != 1:
        raise Unusable(f"--adapter: there is no folder {path_or_hub_id}")
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise Unusable(f"--adapter: {path_or_hub_id} is no folder, and the Hub does not give it: {error}") from error


def adapter_tasks(folder: Path) -> list[str]:
    """All tasks of an adapter."""
    tasks = SavedAdapter.read(folder).recipe["tasks"]
    return [task["name"] for task in tasks]


def choose_tasks(known: Mapping[str, list[str]], wanted: list[str] | None) -> dict[str, list[str]]:
    """Those of the wanted tasks that each adapter has; all of its tasks where none are named."""
    everything = list(dict.fromkeys(task for tasks in known.values() for task in tasks))
    missing = [task for task in wanted or [] if task not in everything]
    if missing:
        raise Unusable(f"--tasks: no adapter has {missing}, only {everything}")
    return {name: [task for task in tasks if wanted is None or task in wanted] for name, tasks in known.items()}


@functools.lru_cache(maxsize=1)
def load_base(name: str):
    """A base that several adapters share is read once."""
    return load_sam(name) if checkpoint_type(name) == "sam" else name


def load_model(folder: Path, base: str | None, device: torch.device):
    recorded = SavedAdapter.read(folder).config.base_model_name_or_path
    try:
        sam = load_base(base or recorded) if base or recorded else None
    except FileNotFoundError as error:
        where = "" if base else f" That is the SAM that {folder} was trained on: say with --base where it is now."
        raise FileNotFoundError(f"{error}{where}") from error
    return pt.MSamForMultiTask.from_adapter(folder, base_model=sam).to(device).eval()


# --- Pictures -------------------------------------------------------------------------------------------------------


def read_batches(
    pictures: Mapping[str, Path], size: int, load: Callable[[str, Path], Picture], skip: Callable[[Path, str], None]
) -> Iterator[list[Picture]]:
    """Lists of pictures; those that cannot be read are given to `skip`."""
    batch: list[Picture] = []
    for name, file in pictures.items():
        try:
            batch.append(load(name, file))
        except Exception as error:
            skip(file, reason(file, error))
        pixels = sum(picture.size[0] * picture.size[1] for picture in batch)
        if len(batch) == size or pixels > BATCH_PIXELS:
            yield batch
            batch = []
    if batch:
        yield batch


def reason(file: Path, error: Exception) -> str:
    """What went wrong with a picture, for the user."""
    what = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return what if str(file) in what else f"{file}: {what}"


def predict_each(
    model, pictures: Sequence[Picture], tasks: Sequence[str], skip: Callable[[Path, str], None]
) -> Iterator[tuple[Picture, Maps]]:
    """As `predict`; where a batch fails, its pictures go alone, so that one of them does not take the others with it."""
    try:
        yield from zip(pictures, predict(model, pictures, tasks), strict=True)
    except Exception as error:
        if len(pictures) == 1:
            skip(pictures[0].file, reason(pictures[0].file, error))
            return
        for picture in pictures:
            yield from predict_each(model, [picture], tasks, skip)


# --- Drawing --------------------------------------------------------------------------------------------------------


def paint(spec: pt.TaskSpec, values: np.ndarray | None, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is laid over an image, (H, W, 3), and how much of each pixel it covers, (H, W, 1): of a mask what is in it."""
    if spec.task_kind.limits is not None:
        return np.broadcast_to(MASK_COLOR, picture.shape), values[..., None]
    return picture.astype(np.float32), np.ones((*picture.shape[:2], 1), np.float32)


def overlay(spec: pt.TaskSpec, image: np.ndarray, values: np.ndarray | None, picture: np.ndarray) -> np.ndarray:
    """The map over the image, uint8 (H, W, 3)."""
    if spec.task_kind.limits is None:
        return ((image.astype(np.uint16) + picture + 1) // 2).astype(np.uint8)
    color, cover = paint(spec, values, picture)
    return np.rint((1 - 0.65 * cover) * image + 0.65 * cover * color).astype(np.uint8)


def save_picture(
    folder: Path, name: str, image: np.ndarray, maps: Mapping[str, np.ndarray], specs: Mapping[str, pt.TaskSpec]
) -> tuple[str, np.ndarray, dict]:
    """Write all files of a picture, together or not at all; the picture and its maps as a sheet shows them.

    Args:
        folder: Where they go.
        name: The picture's name, for the overview.
        image: The picture, uint8 (h, w, 3); it may be smaller than its maps.
        maps: {task: map}; each is asked for once.
        specs: {task: its TaskSpec}.
    """
    files = OutputFiles(maps)
    small = shrink_image(image, 2 * SHEET_SIDE)
    shown, ranges = {}, {}
    with written_aside(folder) as aside, ThreadPoolExecutor(1) as worker:
        for task in maps:
            values = maps[task]
            shown[task] = shrink_map(values, small.shape[:2])
            with one_thread():
                ranges[task] = color_range(specs[task], [values])
                drawn = worker.submit(draw, specs[task], values, ranges[task])
                save_numbers(aside / files.numbers[task], task, values)
                picture = drawn.result()
            covered = shrink_map(values, image.shape[:2]) if specs[task].task_kind.limits else None
            # of a large picture a map takes as much memory as all the rest
            del values, drawn
            saved = worker.submit(save_png, aside / files.maps[task], picture)
            over = overlay(specs[task], image, covered, shrink_map(picture, image.shape[:2], axes=(0, 1)))
            save_png(aside / files.overlays[task], over)
            saved.result()
            del saved, picture, covered, over
        try:
            save_sheet([(name, small, shown)], specs, aside / files.overview, ranges)
        except Exception as error:
            tqdm.write(f"{folder / files.overview} could not be drawn: {error}", file=sys.stderr)
    return name, small, shown


def thumbnail(name: str, image: np.ndarray, maps: Mapping[str, np.ndarray], side: int) -> tuple[str, np.ndarray, dict]:
    """A picture and its maps for a sheet; the maps keep their numbers, so that one colour scale can serve all rows."""
    small = shrink_image(image, side)
    return name, small, {task: shrink_map(values, small.shape[:2]) for task, values in maps.items()}


# --- All of it ------------------------------------------------------------------------------------------------------


def run_adapter(args: argparse.Namespace, folder: Path, tasks: list[str], output: Path, pictures, skip) -> int:
    """Predict all pictures with one adapter: how many there were."""
    model = load_model(folder, args.base, args.device)
    processor = pt.MSamProcessor.from_model(model)
    specs = {name: model.get_base_model().task_specs[name] for name in tasks}
    rows, done = [], 0
    with tqdm(total=len(pictures), desc=output.name, unit="picture") as progress:

        def skip_one(file: Path, why: str) -> None:
            skip(file, why)
            progress.update()

        def load(name: str, file: Path) -> Picture:
            if not args.overwrite:
                refuse_foreign(output / name, OutputFiles(tasks).all())
            return make_picture(name, file, read_picture(file, args.max_megapixels), processor, args.tile)

        def predicted(batch: list[Picture]) -> Iterator[tuple[Picture, Maps]]:
            if not args.tile:
                return predict_each(model, batch, tasks, skip_one)
            side = args.tile_side or processor.image_size
            predict_one = functools.partial(predict_tiled, model, processor, side, args.batch_size)
            return ((picture, Maps(tasks, functools.partial(predict_one, picture.image))) for picture in batch)

        for batch in read_batches(pictures, args.batch_size, load, skip_one):
            for picture, maps in predicted(batch):
                try:
                    row = save_picture(output / picture.name, picture.name, picture.view, maps, specs)
                except Exception as error:
                    skip_one(picture.file, reason(picture.file, error))
                    continue
                if len(rows) < args.sheet_rows:
                    rows.append(thumbnail(*row, SHEET_SIDE))
                done += 1
                progress.update()
    if rows:
        save_contact_sheet(args, output, rows, specs)
    return done


def save_contact_sheet(args: argparse.Namespace, output: Path, rows: list, specs: Mapping[str, pt.TaskSpec]) -> None:
    """The sheet is no reason to lose what was predicted."""
    try:
        if not args.overwrite:
            refuse_foreign(output, [SHEET])
        with written_aside(output) as aside:
            save_sheet(rows, specs, aside / SHEET)
    except Exception as error:
        print(f"there is no contact sheet: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    skipped: dict[Path, str] = {}

    def skip(file: Path, why: str) -> None:
        if file not in skipped:
            skipped[file] = why
            tqdm.write(f"skipped: {why}", file=sys.stderr)

    pictures = find_pictures(args.images, args.output_dir)
    try:
        if not pictures:
            raise Unusable(f"there is no picture in {', '.join(map(str, args.images))}")
        folders = {name: adapter_folder(path) for name, path in args.adapters.items()}
        tasks = choose_tasks({name: adapter_tasks(folder) for name, folder in folders.items()}, args.tasks)
        done = 0
        for name, folder in folders.items():
            if tasks[name]:
                done += run_adapter(args, folder, tasks[name], args.output_dir / name, pictures, skip)
            else:
                print(f"{folder} has none of the tasks {args.tasks}")
        if not done:
            raise Unusable("no picture could be read, so that nothing was written")
    except (Unusable, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(pictures) - len(skipped)} of {len(pictures)} pictures are in {args.output_dir}, see {SHEET}")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
