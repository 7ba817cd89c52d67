"""One real room, filmed with a depth camera: depth as measured, normals from several frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .pictures import read_rgb, shrink, shrink_labels
from .surfaces import fuse_depth, surface_normals
from .writing import Options, RealSet, Sample

ROOT = "data"
# every so many frames one is taken; they come 30 times a second
STRIDE = 5
# frames before and after that steady the depth for the normals
NEIGHBOURS = (-6, -4, -2, 2, 4, 6)
# shares of the film: between two splits some of it is left out, since frames in a row look alike
PERIODS = {"train": (0.0, 0.7), "validation": (0.75, 0.85), "test": (0.9, 1.0)}
# pixels of the depth camera that become one for the fusion
COARSER = 2


def samples(clone: Path, options: Options) -> Iterator[Sample]:
    """Yield frames with depth in millimetres and normals in 8 bits, those with a known pose."""
    frames = sorted((clone / ROOT).glob("frame-*.color.jpg"))
    intrinsics = np.loadtxt(clone / ROOT / "camera-intrinsics.txt")
    coarse = intrinsics / np.array([[COARSER], [COARSER], [1]])
    stems = [path.name.removesuffix(".color.jpg") for path in frames]
    for index in range(0, len(frames), STRIDE):
        split = next((name for name, (low, high) in PERIODS.items() if low <= index / len(frames) < high), None)
        pose = read_pose(clone, stems[index])
        if split is None or pose is None:
            continue
        image = shrink(read_rgb(frames[index]), options.size)
        depth = read_depth(clone, stems[index])
        near = [stems[index + step] for step in NEIGHBOURS if 0 <= index + step < len(frames)]
        others = [
            (read_depth(clone, stem)[::COARSER, ::COARSER], np.linalg.inv(pose) @ other)
            for stem in near
            if (other := read_pose(clone, stem)) is not None
        ]
        fused = fuse_depth(depth[::COARSER, ::COARSER], others, coarse)
        normals = encode_normals(surface_normals(fused, coarse))
        shape = image.shape[:2]
        labels = {
            "depth": np.round(shrink_labels(depth, shape) * 1000).astype(np.uint16),
            "normals": shrink_labels(normals, shape),
        }
        yield Sample(stems[index], split, image, labels)


def read_depth(clone: Path, stem: str) -> np.ndarray:
    """Return metres (H, W); 0 where nothing was measured."""
    with Image.open(clone / ROOT / f"{stem}.depth.png") as image:
        millimetres = np.asarray(image).astype(np.uint16)
    return np.where(millimetres == 65535, 0, millimetres / 1000)


def read_pose(clone: Path, stem: str) -> np.ndarray | None:
    """Return the (4, 4) map from the camera to the room; None where tracking was lost."""
    pose = np.loadtxt(clone / ROOT / f"{stem}.pose.txt")
    return pose if np.isfinite(pose).all() and abs(np.linalg.det(pose[:3, :3]) - 1) < 0.01 else None


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: -1 to 1 as 0 to 255, black where the normal is zero."""
    known = normals.any(-1, keepdims=True)
    return np.where(known, np.round((normals + 1) * 127.5), 0).astype(np.uint8)


ROOM = RealSet(
    repository="https://github.com/andyzeng/tsdf-fusion-python",
    license="BSD-2-Clause for the repository; the frames are of Microsoft's 7-Scenes, whose own terms hold",
    tasks={"depth": {"scale": 0.001}, "normals": {}},
    needs=(f"{ROOT}/camera-intrinsics.txt", f"{ROOT}/frame-000000.color.jpg"),
    samples=samples,
    splits=("time",),
)
