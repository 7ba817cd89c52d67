"""Rendered rooms with exact dense labels: data for the examples that needs no download.

A scene is a room (a floor, one to four walls of finite height) with four to nine solids in it, seen by a randomly
placed camera and ray-traced with trimesh and Embree. The labels come from geometry and so are exact: classes,
instances, depth, surface normals, saliency and instance boundaries. The camera is one of `CAMERAS`: a photo camera, a
thermal one or an acoustic one ("ultrasound"), each with its own idea of a material. Materials are drawn independently
of the class, so that no task is solved by colour alone. The same seed is the same room, whatever looks at it.

    python examples/scenes.py --output scenes --train 256 --test 64 --camera thermal --preview preview.png

writes ``scenes/train-00000-of-00001.parquet`` and ``scenes/test-00000-of-00001.parquet``, a directory that
``datasets.load_dataset("scenes")`` reads. The columns ``image``, ``segmentation``, ``depth`` and ``normal`` have the
names and axis order of the NYUv2 copy on the Hub (``tanganke/nyuv2``).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import extras  # noqa: F401

# isort: split
import numpy as np
from datasets import Array2D, Array3D, Dataset, Features, Image

sys.path.insert(0, str(Path(__file__).parent))
from cameras import CAMERAS
from rooms.labels import draw_labels
from rooms.layout import random_scene
from rooms.shapes import CLASSES as CLASSES
from rooms.textures import SURFACE_TEXTURES as SURFACE_TEXTURES
from rooms.textures import random_texture as random_texture
from rooms.tracing import Tracer

SPLITS = ("train", "validation", "test", "pretrain")
# Part of the cache's file names: raise it when a camera changes what it draws.
VERSIONS = {"photo": 1, "thermal": 1, "ultrasound": 1}


def render_scene(seed: int | np.random.SeedSequence, size: int = 128, camera: str = "photo") -> dict[str, np.ndarray]:
    """Render one scene; the same seed gives the same scene.

    Args:
        seed: Seed of `numpy.random.default_rng`.
        size: Side of the square image in pixels.
        camera: One of `CAMERAS`; it changes the image alone, not the room nor the labels.

    Returns:
        image (H, W, 3) uint8 RGB; segmentation (H, W) uint8, indices into `CLASSES`; depth (H, W) float32, planar
        depth in metres, 0 where nothing is hit; normal (H, W, 3) float32, unit vectors towards the camera in its
        coordinates (x right, y down, z forward), zero where nothing is hit; saliency (H, W) uint8, 1 on objects; edge
        (H, W) uint8, 1 on both sides of a boundary between instances; instance (H, W) uint8: 0 nothing, 1 the floor,
        then the walls, then the objects.
    """
    draw_image = find_camera(camera)
    rng = np.random.default_rng(seed)
    surfaces, viewpoint = random_scene(rng)
    tracer = Tracer(surfaces)
    labels = draw_labels(surfaces, viewpoint, tracer, size)
    return {"image": draw_image(rng, surfaces, viewpoint, tracer, size), **labels}


def find_camera(name: str) -> Callable[..., np.ndarray]:
    """Return what draws a camera's image.

    Raises:
        ValueError: If `name` is not one of `CAMERAS`.
    """
    if name not in CAMERAS:
        raise ValueError(f"unknown camera {name!r}: expected one of {', '.join(CAMERAS)}")
    return CAMERAS[name]


# --- Datasets -------------------------------------------------------------------------------------------------------


def scene_features(size: int, columns: Sequence[str] | None = None) -> Features:
    """Return the columns of the dataset; images are PNG, maps are stored in their smallest exact type."""
    plane = functools.partial(Array2D, shape=(size, size), dtype="uint8")
    features = {
        "image": Image(),
        "segmentation": plane(),
        "depth": Array3D(shape=(1, size, size), dtype="float32"),
        "normal": Array3D(shape=(3, size, size), dtype="float32"),
        "saliency": plane(),
        "edge": plane(),
        "instance": plane(),
    }
    return Features({name: features[name] for name in columns or features})


def scene_seed(split: str, index: int, seed: int = 0) -> np.random.SeedSequence:
    """Return the seed of one scene; no two splits share a scene.

    Raises:
        ValueError: If `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.random.SeedSequence([seed, SPLITS.index(split), index])


def make_scenes(
    split: str,
    num_scenes: int | Sequence[int],
    size: int = 128,
    seed: int = 0,
    columns: Sequence[str] | None = None,
    camera: str = "photo",
) -> Iterator[dict[str, np.ndarray]]:
    """Render the rows of a split.

    Args:
        split: One of `SPLITS`.
        num_scenes: How many scenes, or the indices of those wanted.
        size: Side of the image in pixels.
        seed: Seed of the whole dataset.
        columns: Columns to keep; all of them by default.
        camera: One of `CAMERAS`.

    Yields:
        The arrays of `render_scene`, with depth as (1, H, W) and normal as (3, H, W).
    """
    for index in range(num_scenes) if isinstance(num_scenes, int) else num_scenes:
        row = render_scene(scene_seed(split, index, seed), size, camera)
        row["depth"], row["normal"] = row["depth"][None], row["normal"].transpose(2, 0, 1)
        yield {name: row[name] for name in columns or row}


def write_scenes(
    path: Path,
    split: str,
    num_scenes: int,
    size: int = 128,
    seed: int = 0,
    num_proc: int | None = None,
    columns: Sequence[str] | None = None,
    camera: str = "photo",
) -> None:
    """Render a split into a parquet file; the file appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rendering-", dir=path.parent) as scratch:
        rows = Dataset.from_generator(
            make_scenes,
            features=scene_features(size, columns),
            cache_dir=scratch,
            # A list is what `datasets` shares out between processes.
            gen_kwargs={
                "split": split,
                "num_scenes": list(range(num_scenes)),
                "size": size,
                "seed": seed,
                "columns": columns and tuple(columns),
                "camera": camera,
            },
            num_proc=num_proc if num_proc and num_proc < num_scenes else None,
        )
        aside = Path(scratch) / path.name
        rows.to_parquet(aside)
        os.replace(aside, path)


def default_cache_dir() -> Path:
    """Return the folder in which rendered scenes are kept: $XDG_CACHE_HOME/peft_talora/scenes, or ~/.cache/..."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_talora" / "scenes"


def load_scenes(
    split: str,
    num_scenes: int,
    size: int = 128,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    columns: Sequence[str] | None = None,
    camera: str = "photo",
) -> Dataset:
    """Return a split as a dataset, rendered on the first call and read from the cache after that.

    Args:
        split: One of `SPLITS`; different splits never share a scene.
        num_scenes: How many scenes.
        size: Side of the image in pixels.
        seed: Seed of the whole dataset.
        cache_dir: Folder for the parquet files; `default_cache_dir()` by default.
        num_proc: Processes that render.
        columns: Columns to keep; all of them by default.
        camera: One of `CAMERAS`.
    """
    scene_seed(split, 0, seed)
    find_camera(camera)
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    # photos have the names that they had when there was no other camera
    kind = "" if camera == "photo" else f"{camera}-"
    name = f"{kind}v{VERSIONS[camera]}-{num_scenes}x{size}px-seed{seed}" + (f"-{'-'.join(columns)}" if columns else "")
    path = folder / name / f"{split}-00000-of-00001.parquet"
    if not path.exists():
        write_scenes(path, split, num_scenes, size, seed, num_proc, columns, camera)
    return Dataset.from_parquet(str(path), split=split)


# --- Command line ---------------------------------------------------------------------------------------------------


def preview(path: str, split: str, num_scenes: int = 8, size: int = 128, seed: int = 0, camera: str = "photo") -> None:
    """Save a contact sheet: a row for each scene with its image, classes, depth, normals, saliency and edges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ("image", "segmentation", "depth", "normal", "saliency", "edge")
    figure, axes = plt.subplots(num_scenes, len(columns), figsize=(2 * len(columns), 2 * num_scenes), squeeze=False)
    for row, scene in zip(axes, make_scenes(split, num_scenes, size, seed, camera=camera), strict=True):
        maps = {"normal": scene["normal"].transpose(1, 2, 0) * [0.5, -0.5, -0.5] + 0.5, "depth": scene["depth"][0]}
        for axis, name in zip(row, columns, strict=True):
            style = {"cmap": "tab10", "vmin": 0, "vmax": 9} if name == "segmentation" else {"cmap": "viridis"}
            axis.imshow(maps.get(name, scene[name]), interpolation="nearest", **style)
            axis.set_axis_off()
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Render rooms with dense labels into parquet files.")
    parser.add_argument("--output", type=Path, help="folder for the parquet files")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, help=f"number of scenes of the {split} split")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole dataset")
    parser.add_argument("--camera", choices=tuple(CAMERAS), default="photo", help="what looks at the rooms")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="processes that render")
    parser.add_argument("--preview", help="save a contact sheet of eight scenes to this file")
    args = parser.parse_args(argv)
    if not args.preview and not args.output:
        parser.error("nothing to do: give --output, --preview or both")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if args.output:
        for split, count in counts.items():
            path = args.output / f"{split}-00000-of-00001.parquet"
            write_scenes(path, split, count, args.size, args.seed, args.num_proc, camera=args.camera)
            print(f"{path}: {count} scenes, {path.stat().st_size / 2**20:.1f} MiB")
    if args.preview:
        preview(args.preview, next(iter(counts), "test"), size=args.size, seed=args.seed, camera=args.camera)


if __name__ == "__main__":
    main()
