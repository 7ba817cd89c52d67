"""What every camera needs: the first hits of several rays a pixel, and a lens's blur."""

from __future__ import annotations

import numpy as np
from rooms.layout import Camera, Surface
from rooms.tracing import SUBPIXELS, Tracer, gather_hits
from rooms.vectors import dot


def first_hits(
    surfaces: list[Surface], camera: Camera, tracer: Tracer, size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Trace four rays a pixel: their directions (4 * size**2, 3) and what `gather_hits` collects."""
    rays = np.concatenate([camera.rays(size, shift) for shift in SUBPIXELS])
    triangle, distance = tracer(camera.position, rays)
    return rays, gather_hits(surfaces, camera, tracer, rays, triangle, distance, textured=False)


def incidence(hits: dict[str, np.ndarray]) -> np.ndarray:
    """Return the cosines (N,) of the angles between the surfaces' normals and the directions to the camera."""
    lengths = np.sqrt(dot(hits["rays"], hits["rays"]))
    return np.clip(-dot(hits["normals"], hits["rays"]) / lengths, 0, 1)


def per_pixel(values: np.ndarray, size: int) -> np.ndarray:
    """Average four rays a pixel: (4 * size**2,) to (size, size)."""
    return values.reshape(len(SUBPIXELS), size, size).mean(0)


def blur(image: np.ndarray, sigma: float | tuple[float, float]) -> np.ndarray:
    """Convolve (H, W), real or complex, with a Gaussian of `sigma` pixels, down and across; borders are mirrored."""
    for axis, width in enumerate(np.broadcast_to(sigma, 2)):
        reach = min(int(np.ceil(3 * width)), image.shape[axis] - 1)
        offsets = np.arange(-reach, reach + 1)
        weights = np.exp(-0.5 * (offsets / max(width, 1e-6)) ** 2)
        padded = np.pad(image, [(reach, reach) if axis == a else (0, 0) for a in range(2)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(offsets), axis=axis)
        image = windows @ (weights / weights.sum())
    return image
