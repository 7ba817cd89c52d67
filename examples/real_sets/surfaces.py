"""Measured depth from several frames, and the normals of the surface that it shows."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import ndimage

# measurements of one point agree within this share of its depth, and a surface's points with the next ones
AGREEMENT, JUMP = 0.03, 0.04
# over how many pixels to each side a surface's slope is measured, and normals are averaged
REACH, WINDOW = 3, 5


def fuse_depth(depth: np.ndarray, others: list[tuple[np.ndarray, np.ndarray]], intrinsics: np.ndarray) -> np.ndarray:
    """Return metres (H, W): the median of what several frames measured; 0 where none did.

    Args:
        depth: (H, W) metres of the frame, 0 where unknown.
        others: Depth (H, W) of other frames, and the (4, 4) maps from their cameras to this one.
        intrinsics: (3, 3) of all of them.
    """
    known = np.where(depth > 0, depth, np.nan)
    seen = [known]
    for other, motion in others:
        points = back_project(other, intrinsics)[other > 0] @ motion[:3, :3].T + motion[:3, 3]
        warped = project(points, intrinsics, depth.shape)
        # something else in front, or behind
        warped[np.abs(warped - known) > AGREEMENT * known] = np.nan
        seen.append(warped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        fused = np.nanmedian(np.stack(seen), axis=0)
    return np.nan_to_num(fused)


def back_project(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Return the points (H, W, 3) in metres: x right, y down, z forward."""
    y, x = np.indices(depth.shape)
    return np.stack(
        [
            (x - intrinsics[0, 2]) / intrinsics[0, 0] * depth,
            (y - intrinsics[1, 2]) / intrinsics[1, 1] * depth,
            depth,
        ],
        axis=-1,
    )


def project(points: np.ndarray, intrinsics: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the depth (H, W) of the nearest of the points (N, 3) in each pixel, NaN where there is none."""
    points = points[points[:, 2] > 0]
    pixels = points @ intrinsics.T
    x, y = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int).T
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    depth = np.full(shape, np.inf)
    np.minimum.at(depth, (y[inside], x[inside]), points[inside, 2])
    return np.where(np.isinf(depth), np.nan, depth)


def surface_normals(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Return unit normals (H, W, 3) that face the camera; zero where they are not known, and where depth jumps."""
    points = back_project(depth, intrinsics)
    padded = np.pad(points, ((REACH, REACH), (REACH, REACH), (0, 0)))
    shifted = {
        (dy, dx): padded[REACH + dy :, REACH + dx :][: depth.shape[0], : depth.shape[1]]
        for dy, dx in ((-REACH, 0), (REACH, 0), (0, -REACH), (0, REACH))
    }
    across = shifted[0, REACH] - shifted[0, -REACH]
    down = shifted[REACH, 0] - shifted[-REACH, 0]
    normals = np.cross(down, across)
    smooth = depth > 0
    for neighbour in shifted.values():
        smooth &= (neighbour[..., 2] > 0) & (np.abs(neighbour[..., 2] - depth) < JUMP * REACH / 2 * depth)
    normals = np.where(smooth[..., None], unit(normals), 0)
    averaged = ndimage.uniform_filter(normals, (WINDOW, WINDOW, 0), mode="constant")
    return np.where(smooth[..., None], unit(averaged), 0)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale (..., 3) to length one; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
