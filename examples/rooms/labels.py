"""Dense labels, from one ray through each pixel's centre."""

from __future__ import annotations

import numpy as np

from .layout import Camera, Surface
from .tracing import Tracer, gather_hits


def instance_edges(instance: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W): 1 where a 4-neighbour belongs to another instance, on both sides of the boundary."""
    edge = np.zeros(instance.shape, bool)
    down, right = instance[1:] != instance[:-1], instance[:, 1:] != instance[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge.astype(np.uint8)


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
