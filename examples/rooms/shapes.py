"""The solids: meshes, smooth normals, and random sizes and poses."""

from __future__ import annotations

import numpy as np
import trimesh

from .vectors import unit

CLASSES = ("background", "floor", "wall", "box", "sphere", "cylinder", "cone", "torus", "capsule")
SHAPES = CLASSES[3:]


def revolve(
    radius: np.ndarray, height: np.ndarray, segments: int = 40, closed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a profile around the z axis.

    Args:
        radius: (P,) the profile's distance from the axis, in metres.
        height: (P,) its z, in metres.
        segments: Number of steps around the axis.
        closed: Whether the profile's last point is joined with its first, as for a torus.

    Returns:
        Vertices (P * segments, 3) and triangles (F, 3).
    """
    angle = np.arange(segments) * (2 * np.pi / segments)
    x, y = radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle)
    vertices = np.stack([x, y, np.broadcast_to(height[:, None], x.shape)], -1).reshape(-1, 3)
    rings = np.arange(len(radius) if closed else len(radius) - 1)[:, None]
    here, above = rings * segments, (rings + 1) % len(radius) * segments
    step = np.arange(segments)
    after = (step + 1) % segments
    a, b, c, d = here + step, here + after, above + after, above + step
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)]).reshape(-1, 3)
    return vertices, faces


def shape_mesh(kind: str, size: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) and triangles (F, 3) of a solid centred on the origin with its axis along z.

    Args:
        kind: One of `SHAPES`.
        size: In metres: box, its three half edges; sphere, (radius,); cylinder and cone, (radius, half height);
            torus, (ring radius, tube radius); capsule, (radius, half length of the straight part).
    """
    turn = np.linspace(-np.pi / 2, np.pi / 2, 22)
    if kind == "box":
        mesh = trimesh.creation.box(extents=2 * np.array(size))
        return np.asarray(mesh.vertices), np.asarray(mesh.faces)
    if kind == "sphere":
        return revolve(size[0] * np.cos(turn), size[0] * np.sin(turn))
    if kind == "cylinder":
        return revolve(size[0] * np.array([0, 1, 1, 0]), size[1] * np.array([-1, -1, 1, 1]))
    if kind == "cone":
        return revolve(size[0] * np.array([0, 1, 0]), size[1] * np.array([-1, -1, 1]))
    if kind == "torus":
        tube = np.arange(24) * (2 * np.pi / 24)
        return revolve(size[0] + size[1] * np.cos(tube), size[1] * np.sin(tube), closed=True)
    return revolve(size[0] * np.cos(turn), size[0] * np.sin(turn) + size[1] * np.sign(turn))


def shape_normals(label: int, size: tuple[float, ...], points: np.ndarray, facets: np.ndarray) -> np.ndarray:
    """Return the smooth outward unit normals (N, 3) of a shape at local surface points.

    Args:
        label: Index into `CLASSES`.
        size: The measures that `shape_mesh` takes.
        points: (N, 3) local coordinates in metres.
        facets: (N, 3) outward normals of the triangles that were hit; exact on flat faces.
    """
    kind = CLASSES[label]
    if kind in ("floor", "wall", "box"):
        return facets
    radial = unit(points * np.array([1, 1, 0]))
    axial = np.array([0, 0, 1.0])
    if kind == "sphere":
        normals = points
    elif kind == "cylinder":
        normals = np.where(np.abs(facets[:, 2:]) > 0.5, facets, radial)
    elif kind == "cone":
        # The side's normal leans up by the ratio of the radius to the full height.
        normals = np.where(facets[:, 2:] < -0.5, facets, radial * 2 * size[1] + axial * size[0])
    elif kind == "torus":
        normals = points - radial * size[0]
    else:
        normals = points - axial * np.clip(points[:, 2:], -size[1], size[1])
    return unit(normals)


def random_size(rng: np.random.Generator, kind: str) -> tuple[float, ...]:
    """Draw a solid's measures in metres, for a diameter of roughly 0.35 to 0.9 m."""
    scale = rng.uniform(0.18, 0.42)
    if kind == "box":
        return tuple(scale * rng.uniform(0.5, 1.1, 3))
    if kind == "sphere":
        return (scale * 0.95,)
    if kind == "cylinder":
        return scale * rng.uniform(0.45, 0.85), scale * rng.uniform(0.6, 1.25)
    if kind == "cone":
        return scale * rng.uniform(0.6, 1.0), scale * rng.uniform(0.7, 1.2)
    if kind == "torus":
        return scale * 0.95, scale * rng.uniform(0.25, 0.5)
    return scale * rng.uniform(0.4, 0.65), scale * rng.uniform(0.6, 1.0)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Draw a pose (3, 3): standing, lying or tilted, turned at random around the vertical."""
    tilt = rng.choice([0, np.pi / 2, rng.uniform(0.2, 1.3)], p=[0.45, 0.3, 0.25])
    turn, roll = rng.uniform(0, 2 * np.pi, 2)
    return _rotation(2, turn) @ _rotation(0, tilt) @ _rotation(2, roll)


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Return the (3, 3) rotation by `angle` radians around a coordinate axis."""
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix
