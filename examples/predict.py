"""Predict the maps of an adapter for your own pictures.

    python examples/predict.py --adapter runs/multitask IMAGE_OR_FOLDER... --output-dir predictions

Every picture gets a folder: for each task a coloured map, an overlay and the numbers at the picture's own resolution,
and an overview with legends. A contact sheet shows all pictures. Read from top to bottom: arguments, pictures, models,
drawing, the loop. Exit code: 0, 1 where pictures were skipped, 2 where nothing was done.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

import peft_talora as pt
from peft_talora.data.images import IMAGE_SUFFIXES, read_image
from peft_talora.drawing import color_range, draw
from peft_talora.msam.loading import checkpoint_type, load_sam
from peft_talora.msam.processing import check_sides
from peft_talora.saving.description import read_config, read_msam_fields
from peft_talora.saving.directory import written_aside

sys.path.insert(0, str(Path(__file__).parent))
from contact_sheet import save_sheet

SHEET = "contact_sheet.png"
SHEET_SIDE = 320  # longest side of a picture on the sheet, in pixels
MASK_COLOR = np.array([255.0, 120.0, 0.0])  # what an overlay paints a mask with


class Unusable(Exception):
    """What was asked for cannot be done at all; the message is for the user."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE_OR_FOLDER",
        help="folders are searched for pictures, with all below",
    )
    add_model_arguments(parser)
    add("--output-dir", type=Path, default=Path("predictions"), help="with several adapters a folder for each in it")
    add("--tasks", nargs="+", help="default: all that the adapter has")
    add("--batch-size", type=int, default=4)
    add("--sheet-rows", type=int, default=64, help="pictures on the contact sheet at most, the first ones")
    args = parser.parse_args(argv)
    for name in ("batch_size", "sheet_rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.output_dir.is_file():
        parser.error(f"--output-dir: {args.output_dir} is a file")
    check_model_arguments(parser, args)
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", action="append", metavar="[NAME=]PATH",
        help="a folder that training wrote, or a Hub id; repeat it for several adapters, each with its own tasks; "
        "default: runs/multitask")  # fmt: skip
    add("--base", help="the SAM; default: the one that the adapter was trained on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make `args.device` a device that is there, and `args.adapters` a {name: path or Hub id}."""
    try:
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {error}")
    args.adapters = name_adapters(parser, args.adapter or ["runs/multitask"])


def name_adapters(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, str]:
    """{name: path or Hub id}. One adapter without a name gets the name "": its output needs no folder of its own."""
    adapters: dict[str, str] = {}
    for value in given:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).resolve().name if len(given) > 1 else "", value
        elif not name or not path or Path(name).name != name:
            parser.error(f"--adapter: expected PATH or NAME=PATH with a name that can be a folder's, got {value!r}")
        if name in adapters:
            parser.error(f"--adapter: {adapters[name]} and {path} are both called {name!r}: write NAME={path}")
        adapters[name] = path
    return adapters


# --- Pictures -------------------------------------------------------------------------------------------------------


def find_pictures(given: list[Path], output_dir: Path) -> dict[str, Path]:
    """{name of its folder in the output: file}, without what lies in the output already."""
    files: list[tuple[Path, Path]] = []  # the name, without a suffix, and the file
    for path in given:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            inside = [file for file in inside if output_dir.resolve() not in file.resolve().parents]
            files += [(file.relative_to(path).with_suffix(""), file) for file in inside]
        else:
            files.append((Path(path.stem), path))
    pictures: dict[str, Path] = {}
    for name, file in files:
        if file.resolve() in {other.resolve() for other in pictures.values()}:
            continue
        unique = name.as_posix()
        number = 2
        while unique in pictures:
            unique, number = f"{name.as_posix()}-{number}", number + 1
        pictures[unique] = file
    return pictures


def read_batches(
    pictures: Mapping[str, Path], size: int, image_size: int, skip: Callable[[Path, str], None]
) -> Iterator[list]:
    """Lists of (name, image); pictures that cannot be read, or not be shown to the model, are given to `skip`."""
    batch = []
    for name, file in pictures.items():
        try:
            image = read_image(file)
            check_sides(image.shape[:2], image_size)
            batch.append((name, image))
        except ValueError as error:
            skip(file, str(error) if str(file) in str(error) else f"{file}: {error}")
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


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
    fields, _ = read_msam_fields(folder, read_config(folder))
    return [task["name"] for task in fields["tasks"]]


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
    base = base or read_config(folder).base_model_name_or_path
    return pt.MSamForMultiTask.from_adapter(folder, base_model=load_base(base) if base else None).to(device).eval()


@torch.inference_mode()
def predict(model, processor: pt.MSamProcessor, images: list[np.ndarray], tasks: list[str]) -> Iterator[dict]:
    """{task: array} of each image, at its resolution."""
    pixels = processor(images)["pixel_values"].to(model.device)
    logits = {name: values.float().cpu() for name, values in model(pixel_values=pixels, tasks=tasks).logits.items()}
    for index, image in enumerate(images):
        # one image after the other: at their own resolution all channels of all images could be too much at once
        one = SimpleNamespace(logits={name: values[index : index + 1] for name, values in logits.items()})
        maps = processor.post_process(one, [image.shape[:2]])[0]
        yield {name: values.numpy().astype(array_type(values)) for name, values in maps.items()}


def array_type(values: torch.Tensor) -> type:
    if values.is_floating_point():
        return np.float32
    return np.uint8 if values.max() < 256 else np.int32


# --- Drawing --------------------------------------------------------------------------------------------------------


def paint(spec: pt.TaskSpec, values: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is laid over an image, (H, W, 3), and how much of each pixel it covers, (H, W, 1): of a mask what is in it."""
    if spec.task_kind.limits is not None:
        return np.broadcast_to(MASK_COLOR, picture.shape), values[..., None]
    return picture.astype(np.float64), np.ones((*picture.shape[:2], 1))


def overlay(spec: pt.TaskSpec, image: np.ndarray, values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The map over the image, uint8 (H, W, 3)."""
    color, cover = paint(spec, values, picture)
    share = (0.5 if spec.task_kind.limits is None else 0.65) * cover
    return np.rint((1 - share) * image + share * color).astype(np.uint8)


def save_picture(folder: Path, name: str, image: np.ndarray, maps: Mapping, specs: Mapping[str, pt.TaskSpec]) -> None:
    """All files of a picture, together or not at all."""
    with written_aside(folder) as aside:
        for task, values in maps.items():
            picture = draw(specs[task], values, color_range(specs[task], [values]))
            Image.fromarray(picture).save(aside / f"{task}.png")
            Image.fromarray(overlay(specs[task], image, values, picture)).save(aside / f"{task}_overlay.png")
            np.savez_compressed(aside / f"{task}.npz", **{task: values})
        ranges = {task: color_range(specs[task], [values]) for task, values in maps.items()}
        save_sheet([thumbnail(name, image, maps, 2 * SHEET_SIDE)], specs, aside / "overview.png", ranges)


def thumbnail(name: str, image: np.ndarray, maps: Mapping[str, np.ndarray], side: int) -> tuple[str, np.ndarray, dict]:
    """A picture and its maps for a sheet; the maps keep their numbers, so that one colour scale can serve all rows."""
    factor = min(1.0, side / max(image.shape[:2]))
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))

    def shrink(values: np.ndarray) -> np.ndarray:
        channels = torch.from_numpy(values.reshape(1, -1, *values.shape[-2:]).astype(np.float32))
        resized = F.interpolate(channels, (height, width), mode="nearest-exact")[0].numpy().astype(values.dtype)
        return resized if values.ndim == 3 else resized[0]

    return name, small, {task: shrink(values) for task, values in maps.items()}


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

        for batch in read_batches(pictures, args.batch_size, processor.image_size, skip_one):
            results = predict(model, processor, [image for _, image in batch], tasks)
            for (name, image), maps in zip(batch, results, strict=True):
                save_picture(output / name, name, image, maps, specs)
                if len(rows) < args.sheet_rows:
                    rows.append(thumbnail(name, image, maps, SHEET_SIDE))
                done += 1
                progress.update()
    if rows:
        with written_aside(output) as aside:
            save_sheet(rows, specs, aside / SHEET)
    return done


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
    except (Unusable, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not done:
        print("error: no picture could be read, so that nothing was written", file=sys.stderr)
        return 2
    print(f"{len(pictures) - len(skipped)} of {len(pictures)} pictures are in {args.output_dir}, see {SHEET}")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
