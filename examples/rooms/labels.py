"""Dense labels, from one ray through each pixel's centre."""

from __future__ import annotations

import numpy as np

from .edges import instance_edges
from .layout import Camera, Surface
from .tracing import Tracer, gather_hits


def draw_labels(surfaces: list[Surface], camera: Camera, tracer: Tracer, size: int) -> dict[str, np.ndarray]:
    """Return the labels of `render_scene`, from one ray through each pixel's centre."""
    rays = camera.rays(size)
    triangle, distance = tracer(camera.position, rays)
    hits = gather_hits(surfaces, camera, tracer, rays, triangle, distance, textured=False)
    normal = np.zeros((size * size, 3), np.float32)
    normal[hits["index"]] = hits["normals"] @ camera.axes.T
    instance = np.where(triangle >= 0, tracer.owner[triangle] + 1, 0).astype(np.uint8).reshape(size, size)
    labels = np.array([0, *(s.label for s in surfaces)], np.uint8)
    return {
        "segmentation": labels[instance],
        "depth": distance.astype(np.float32).reshape(size, size),
        "normal": normal.reshape(size, size, 3),
        "saliency": (labels[instance] >= 3).astype(np.uint8),
        "edge": instance_edges(instance),
        "instance": instance,
    }
