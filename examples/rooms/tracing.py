"""What rays hit, and the normals there."""

from __future__ import annotations

import numpy as np
import trimesh
from trimesh.ray.ray_pyembree import RayMeshIntersector

from .layout import Camera, Surface
from .shapes import shape_normals
from .vectors import dot, unit

# four rays a pixel
SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


class Tracer:
    """First hits on a list of surfaces.

    `owner` (F,) is the index of each triangle's surface; `normal` (F, 3) and `plane` (F,) are the triangles' planes
    in metres, normal @ x = plane.
    """

    def __init__(self, surfaces: list[Surface]) -> None:
        counts = [len(s.vertices) for s in surfaces]
        starts = np.cumsum([0, *counts[:-1]])
        vertices = np.concatenate([s.vertices for s in surfaces])
        faces = np.concatenate([s.faces + start for s, start in zip(surfaces, starts, strict=True)])
        self.owner = np.repeat(np.arange(len(surfaces)), [len(s.faces) for s in surfaces])
        corner, second, third = (vertices[faces[:, i]] for i in range(3))
        normal = np.cross(second - corner, third - corner)
        self.normal = unit(normal)
        self.plane = dot(self.normal, corner)
        self.rays = RayMeshIntersector(trimesh.Trimesh(vertices, faces, process=False))

    def __call__(self, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the triangles (N,) first hit, -1 for none, and distances (N,) in units of the directions' length.

        The distance comes from the triangle's plane in float64: Embree itself works in float32.
        """
        hit = self.rays.intersects_first(np.broadcast_to(origin, directions.shape), directions)
        normal = self.normal[hit]
        slope = dot(normal, directions)
        distance = (self.plane[hit] - normal @ origin) / np.where(slope == 0, 1, slope)
        return hit, np.where(hit >= 0, distance, 0)


def surface_normals(surface: Surface, points: np.ndarray, facets: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Return smooth world normals (N, 3) that face the camera.

    Args:
        surface: What was hit.
        points: (N, 3) hit points in world coordinates, in metres.
        facets: (N, 3) unit normals of the triangles that were hit.
        rays: (N, 3) directions from the camera.
    """
    facets = np.where(dot(facets, rays)[:, None] > 0, -facets, facets)
    local = (points - surface.offset) @ surface.rotation
    normals = shape_normals(surface.label, surface.size, local, facets @ surface.rotation) @ surface.rotation.T
    # At the silhouette of a round shape the smooth normal may turn away from the camera: keep it at a right angle.
    away = np.maximum(dot(normals, rays), 0) / dot(rays, rays)
    return unit(normals - away[:, None] * rays)


def gather_hits(
    surfaces: list[Surface],
    camera: Camera,
    tracer: Tracer,
    rays: np.ndarray,
    triangle: np.ndarray,
    distance: np.ndarray,
    textured: bool = True,
) -> dict[str, np.ndarray]:
    """Collect what was hit, ordered by surface.

    Returns:
        index (N,) into the rays, owner (N,) into the surfaces, points, normals, rays and color (N, 3) and shine (N,).
    """
    index = np.flatnonzero(triangle >= 0)
    index = index[np.argsort(tracer.owner[triangle[index]], kind="stable")]
    owner = tracer.owner[triangle[index]]
    rays = rays[index]
    points = camera.position + distance[index, None] * rays
    hits = {"index": index, "owner": owner, "points": points, "rays": rays, "normals": np.empty_like(points)}
    hits["color"], hits["shine"] = np.empty_like(points), np.empty(len(index))
    ends = np.searchsorted(owner, np.arange(len(surfaces) + 1))
    for surface, start, stop in zip(surfaces, ends[:-1], ends[1:], strict=True):
        if start == stop:
            continue
        part = slice(start, stop)
        facets = tracer.normal[triangle[index[part]]]
        hits["normals"][part] = surface_normals(surface, points[part], facets, rays[part])
        if textured:
            local = ((points[part] - surface.offset) @ surface.rotation).astype(np.float32)
            hits["color"][part], hits["shine"][part] = surface.texture(local), surface.texture.shine
    return hits
