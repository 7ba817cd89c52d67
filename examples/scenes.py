"""Rendered rooms with exact dense labels: data for the examples that needs no download.

A scene is a room (a floor, one to four walls of finite height) with four to nine solids under a lamp, seen by a
randomly placed camera and ray-traced with trimesh and Embree. The labels come from geometry and so are exact: classes,
instances, depth, surface normals, saliency and instance boundaries. Colours and textures are drawn independently of
the class, so that no task is solved by colour alone.

    python examples/scenes.py --output scenes --train 256 --test 64 --preview preview.png

writes ``scenes/train-00000-of-00001.parquet`` and ``scenes/test-00000-of-00001.parquet``, a directory that
``datasets.load_dataset("scenes")`` reads. The columns ``image``, ``segmentation``, ``depth`` and ``normal`` have the
names and axis order of the NYUv2 copy on the Hub (``tanganke/nyuv2``).
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from datasets import Array2D, Array3D, Dataset, Features, Image
from trimesh.ray.ray_pyembree import RayMeshIntersector

CLASSES = ("background", "floor", "wall", "box", "sphere", "cylinder", "cone", "torus", "capsule")
SHAPES = CLASSES[3:]
SPLITS = ("train", "validation", "test", "pretrain")
# Part of the cache's file names: raise it when the renderer changes what it draws.
VERSION = 1

SURFACE_TEXTURES = ("plain", "checker", "stripes", "noise", "bricks", "dots", "wood", "marble", "cells")
FLOOR_TEXTURES = ("plain", "checker", "stripes", "noise", "bricks", "cells", "wood", "marble")
WALL_TEXTURES = ("plain", "plain", "stripes", "noise", "bricks", "dots", "marble")
SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


# --- Textures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texture:
    """A solid texture: a pattern in object coordinates that blends two colours.

    Attributes:
        kind: One of `SURFACE_TEXTURES`.
        colors: (2, 3) linear RGB in [0, 1].
        frequency: Cells, stripes or rings per metre.
        direction: (3,) unit vector of stripes, rings and veins.
        waves: (3, 6) wave vectors of the smooth noise, in radians per metre.
        phase: (6,) phases of these waves in radians; the first three also shift the pattern's cells.
        unfold: (3, 2) map from object coordinates to the plane on which bricks are laid.
        aspect: Length of a brick over its height.
        shine: Strength of the highlight.
    """

    kind: str
    colors: np.ndarray
    frequency: float
    direction: np.ndarray
    waves: np.ndarray
    phase: np.ndarray
    unfold: np.ndarray
    aspect: float
    shine: float

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the (N, 3) linear RGB at the (N, 3) object coordinates, in metres."""
        blend = PATTERNS[self.kind](self, points)[:, None]
        grain = 1 + 0.1 * (_hash(np.floor(points * 60)) - 0.5)[:, None]
        return (self.colors[0] * (1 - blend) + self.colors[1] * blend) * grain

    def cells(self, points: np.ndarray) -> np.ndarray:
        """Scale and shift the points to unit cells; the shift keeps flat faces off the cells' borders."""
        return points * np.float32(self.frequency) + self.phase[:3]

    def noise(self, points: np.ndarray) -> np.ndarray:
        """Return smooth noise in [-1, 1]: a mean of plane waves, which is cheaper than lattice noise."""
        return np.sin(points @ self.waves + self.phase) @ np.full(6, 1.6 / 6, np.float32)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot products (N,) of the rows of two (N, 3) arrays; einsum beats a sum over so short an axis."""
    return np.einsum("ij,ij->i", a, b)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of (N, 3) to length one; zero rows stay zero."""
    return vectors / np.sqrt(np.maximum(_dot(vectors, vectors), 1e-30))[:, None]


def _hash(cells: np.ndarray) -> np.ndarray:
    """Return a pseudo-random value in [0, 1) for each row of integer cell coordinates (N, D)."""
    mixed = np.sin(cells @ np.array([12.9898, 78.233, 37.719], np.float32)[: cells.shape[1]]) * 437.585
    return mixed - np.floor(mixed)


def _checker(texture: Texture, points: np.ndarray) -> np.ndarray:
    return np.floor(texture.cells(points)).sum(1) % 2


def _stripes(texture: Texture, points: np.ndarray) -> np.ndarray:
    return ((texture.cells(points) @ texture.direction) % 1 < 0.5).astype(np.float32)


def _bricks(texture: Texture, points: np.ndarray) -> np.ndarray:
    plane = texture.cells(points) @ texture.unfold
    row = np.floor(plane[:, 1])
    along = plane[:, 0] / texture.aspect + 0.5 * (row % 2) + 0.2 * _hash(row[:, None])
    joint = (plane[:, 1] % 1 < 0.08) | (along % 1 < 0.08 / texture.aspect)
    return np.where(joint, 1.0, 0.35 * _hash(np.stack([row, np.floor(along)], 1))).astype(np.float32)


def _dots(texture: Texture, points: np.ndarray) -> np.ndarray:
    offset = texture.cells(points) @ texture.unfold % 1 - 0.5
    return (np.einsum("ij,ij->i", offset, offset) < 0.1).astype(np.float32)


def _wood(texture: Texture, points: np.ndarray) -> np.ndarray:
    along = points @ texture.direction
    radius = np.sqrt(np.maximum(_dot(points, points) - along**2, 0) + 0.02)
    return ((radius * texture.frequency * 2 + 0.5 * texture.noise(points) + 0.4 * along) % 1) ** 2


PATTERNS = {
    "plain": lambda texture, points: 0.1 + 0.1 * texture.noise(points),
    "checker": _checker,
    "stripes": _stripes,
    "noise": lambda texture, points: np.clip(0.5 + texture.noise(points), 0, 1),
    "bricks": _bricks,
    "dots": _dots,
    "wood": _wood,
    "marble": lambda texture, points: np.abs(
        np.sin(texture.cells(points) @ texture.direction * 2 + 3 * texture.noise(points))
    ),
    "cells": lambda texture, points: _hash(np.floor(texture.cells(points) * 3)),
}


def random_color(rng: np.random.Generator) -> np.ndarray:
    """Return a linear RGB colour (3,); every surface of a scene draws from this one distribution."""
    hue = np.abs((rng.random() * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    saturation, value = rng.uniform(0.0, 0.8), rng.uniform(0.25, 0.95)
    return ((value * (1 - saturation + saturation * np.clip(hue, 0, 1))) ** 2.2).astype(np.float32)


def random_texture(rng: np.random.Generator, kinds: Sequence[str], scale: float, flat: bool = False) -> Texture:
    """Draw a texture for a surface of about `scale` metres; `flat` lays bricks in the plane of the first two axes."""
    direction = rng.normal(size=3)
    frequency = rng.uniform(3, 6) / scale
    unfold = [[1, 0], [0, 1], [0, 0]] if flat else [[1, 0], [0.8, 0], [0, 1]]
    return Texture(
        kind=str(rng.choice(kinds)),
        colors=np.stack([random_color(rng), random_color(rng)]),
        frequency=float(frequency),
        direction=(direction / np.linalg.norm(direction)).astype(np.float32),
        waves=(rng.normal(size=(3, 6)) * frequency * rng.uniform(0.7, 3.5, 6)).astype(np.float32),
        phase=rng.uniform(0, 2 * np.pi, 6).astype(np.float32),
        unfold=np.array(unfold, np.float32),
        aspect=float(rng.uniform(1.5, 6)),
        shine=float(rng.choice([0, 0.15, 0.5])),
    )


# --- Geometry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """One instance: a mesh in world coordinates, its pose, and what is needed to shade it.

    Attributes:
        label: Index into `CLASSES`.
        size: The shape's measures in metres; see `shape_mesh`.
        rotation, offset: (3, 3) and (3,): world = rotation @ local + offset.
        vertices, faces: (V, 3) world coordinates in metres and (F, 3) indices.
        texture: Colours in local coordinates.
    """

    label: int
    size: tuple[float, ...]
    rotation: np.ndarray
    offset: np.ndarray
    vertices: np.ndarray
    faces: np.ndarray
    texture: Texture


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
    radial = _unit(points * np.array([1, 1, 0]))
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
    return _unit(normals)


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


# --- Scenes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (3,) metres.
        axes: (3, 3), rows: right, down and forward in world coordinates.
        slope: Tangent of half the field of view.
    """

    position: np.ndarray
    axes: np.ndarray
    slope: float

    def rays(self, size: int, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
        """Return (size**2, 3) world directions through the pixels, one metre deep each.

        A distance along such a ray, in units of its length, is therefore the planar depth.
        """
        grid = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(grid + shift[0] * 2 / size, grid + shift[1] * 2 / size)
        local = np.stack([x * self.slope, y * self.slope, np.ones_like(x)], -1).reshape(-1, 3)
        return local @ self.axes


def random_camera(rng: np.random.Generator, room: np.ndarray) -> Camera:
    """Place a camera near the room's border, looking down into the room (2,) metres."""
    side = rng.uniform(0, 2 * np.pi)
    position = np.append(room / 2 * (1 + 0.85 * np.array([np.cos(side), np.sin(side)])), rng.uniform(0.9, 1.9))
    target = np.append(room / 2 + rng.uniform(-0.5, 0.5, 2), rng.uniform(0.1, 0.6))
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    roll = rng.normal(0, np.deg2rad(4))
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    return Camera(position, np.stack([right, down, forward]), float(np.tan(np.deg2rad(rng.uniform(25, 35)))))


def panel(label: int, corner: Sequence[float], u: Sequence[float], v: Sequence[float], texture: Texture) -> Surface:
    """Return a rectangle from its corner and two perpendicular edges, all in metres; local axes follow the edges."""
    corner, u, v = (np.array(x, float) for x in (corner, u, v))
    axes = np.stack([u / np.linalg.norm(u), v / np.linalg.norm(v)], 1)
    rotation = np.concatenate([axes, np.cross(axes[:, 0], axes[:, 1])[:, None]], 1)
    vertices = np.stack([corner, corner + u, corner + u + v, corner + v])
    return Surface(label, (), rotation, corner, vertices, np.array([[0, 1, 2], [0, 2, 3]]), texture)


def random_walls(rng: np.random.Generator, room: np.ndarray) -> list[Surface]:
    """Put one to four walls of random heights around the room (2,) metres."""
    width, length = room
    sides = [
        ((0, 0, 0), (width, 0, 0)),
        ((width, 0, 0), (0, length, 0)),
        ((width, length, 0), (-width, 0, 0)),
        ((0, length, 0), (0, -length, 0)),
    ]
    height = rng.uniform(1.2, 2.8)
    chosen = np.sort(rng.permutation(4)[: rng.integers(1, 5)])
    texture = random_texture(rng, WALL_TEXTURES, 1.5, flat=True)
    walls = []
    for side in chosen:
        # Most rooms have one wallpaper, some have an accent wall.
        paper = random_texture(rng, WALL_TEXTURES, 1.5, flat=True) if rng.random() < 0.3 else texture
        rise = height if rng.random() < 0.7 else rng.uniform(1.0, 2.8)
        walls.append(panel(2, *sides[side], (0, 0, rise), paper))
    return walls


def random_object(rng: np.random.Generator, camera: Camera, room: np.ndarray, taken: list) -> Surface | None:
    """Try to rest one solid on a free spot of the floor in the camera's view.

    Args:
        rng: Source of randomness.
        camera: Its horizontal field of view bounds where the object may stand.
        room: (2,) the floor's extent in metres.
        taken: (x, y, radius) of the objects so far; extended on success.

    Returns:
        The object, or None where no free spot was found in a few tries.
    """
    kind = str(rng.choice(SHAPES))
    size, rotation = random_size(rng, kind), random_rotation(rng)
    vertices, faces = shape_mesh(kind, size)
    vertices = vertices @ rotation.T
    radius = np.linalg.norm(vertices[:, :2], axis=1).max()
    lift = rng.uniform(0.1, 0.6) if rng.random() < 0.08 else 0.0
    heading = np.arctan2(camera.axes[2, 1], camera.axes[2, 0])
    for _ in range(12):
        angle = heading + rng.uniform(-0.85, 0.85) * np.arctan(camera.slope)
        spot = camera.position[:2] + rng.uniform(1.5, 4.3) * np.array([np.cos(angle), np.sin(angle)])
        free = all(np.hypot(spot[0] - x, spot[1] - y) > radius + other for x, y, other in taken)
        if free and np.all(spot > radius) and np.all(spot < room - radius):
            taken.append((*spot, radius))
            offset = np.append(spot, lift - vertices[:, 2].min())
            label, texture = CLASSES.index(kind), random_texture(rng, SURFACE_TEXTURES, 0.6)
            return Surface(label, size, rotation, offset, vertices + offset, faces, texture)
    return None


def random_scene(rng: np.random.Generator) -> tuple[list[Surface], Camera]:
    """Draw a room, a camera and four to nine objects (fewer where the room is full)."""
    room = rng.uniform(3.6, 5.5, 2)
    floor = panel(1, (0, 0, 0), (room[0], 0, 0), (0, room[1], 0), random_texture(rng, FLOOR_TEXTURES, 1.5, flat=True))
    surfaces = [floor, *random_walls(rng, room)]
    camera, taken = random_camera(rng, room), []
    for _ in range(rng.integers(4, 10)):
        placed = random_object(rng, camera, room, taken)
        if placed is not None:
            surfaces.append(placed)
    return surfaces, camera


# --- Rendering ------------------------------------------------------------------------------------------------------


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
        self.normal = _unit(normal)
        self.plane = _dot(self.normal, corner)
        self.rays = RayMeshIntersector(trimesh.Trimesh(vertices, faces, process=False))

    def __call__(self, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the triangles (N,) first hit, -1 for none, and distances (N,) in units of the directions' length.

        The distance comes from the triangle's plane in float64: Embree itself works in float32.
        """
        hit = self.rays.intersects_first(np.broadcast_to(origin, directions.shape), directions)
        normal = self.normal[hit]
        slope = _dot(normal, directions)
        distance = (self.plane[hit] - normal @ origin) / np.where(slope == 0, 1, slope)
        return hit, np.where(hit >= 0, distance, 0)


@dataclass(frozen=True)
class Lamp:
    """A round lamp: position (3,) and radius in metres, and how its light splits from the ambient light."""

    position: np.ndarray
    radius: float
    strength: float
    ambient: float


def surface_normals(surface: Surface, points: np.ndarray, facets: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Return smooth world normals (N, 3) that face the camera.

    Args:
        surface: What was hit.
        points: (N, 3) hit points in world coordinates, in metres.
        facets: (N, 3) unit normals of the triangles that were hit.
        rays: (N, 3) directions from the camera.
    """
    facets = np.where(_dot(facets, rays)[:, None] > 0, -facets, facets)
    local = (points - surface.offset) @ surface.rotation
    normals = shape_normals(surface.label, surface.size, local, facets @ surface.rotation) @ surface.rotation.T
    # At the silhouette of a round shape the smooth normal may turn away from the camera: keep it at a right angle.
    away = np.maximum(_dot(normals, rays), 0) / _dot(rays, rays)
    return _unit(normals - away[:, None] * rays)


def shade(rng: np.random.Generator, lamp: Lamp, casters: Tracer | None, hits: dict) -> np.ndarray:
    """Return the (N, 3) linear radiance of the hit points: ambient, Lambert and a highlight, with soft shadows.

    Args:
        rng: Jitters the lamp, one shadow ray a point; pixels average four of them.
        lamp: The light.
        casters: What throws shadows; walls and floor bound the convex room around the lamp and never do.
        hits: points, normals, rays, color (N, 3) and shine (N,) of the points.
    """
    points, normals = hits["points"], hits["normals"]
    to_lamp = lamp.position + lamp.radius * _unit(rng.standard_normal(points.shape, np.float32)) - points
    squared = _dot(to_lamp, to_lamp)
    to_lamp /= np.sqrt(squared)[:, None]
    cosine = _dot(normals, to_lamp)
    lit = np.flatnonzero(cosine > 0)
    if casters is not None:
        blocked = casters.rays.intersects_any(points[lit] + 2e-3 * normals[lit], to_lamp[lit])
        lit = lit[~blocked]
    color = hits["color"] * (lamp.ambient * (0.75 + 0.25 * normals[:, 2:]))
    half = _unit(to_lamp[lit] - _unit(hits["rays"][lit]))
    gloss = hits["shine"][lit] * np.exp(40 * (_dot(half, normals[lit]) - 1))
    falloff = lamp.strength * 6 / (2 + squared[lit])
    color[lit] += falloff[:, None] * (hits["color"][lit] * cosine[lit, None] + gloss[:, None])
    return color


def draw_image(
    rng: np.random.Generator, surfaces: list[Surface], camera: Camera, tracer: Tracer, size: int
) -> np.ndarray:
    """Return the image (size, size, 3) uint8, averaged over 2x2 rays a pixel."""
    objects = [s for s in surfaces if s.label > 2]
    casters = Tracer(objects) if objects else None
    high = surfaces[0].vertices.max(0)[:2]
    lamp = Lamp(
        position=np.append(rng.uniform(0.15, 0.85, 2) * high, rng.uniform(1.9, 3.4)),
        radius=rng.uniform(0.05, 0.25),
        strength=rng.uniform(0.7, 1.3),
        ambient=rng.uniform(0.2, 0.5),
    )
    rays = np.concatenate([camera.rays(size, shift) for shift in SUBPIXELS])
    triangle, distance = tracer(camera.position, rays)
    zenith, horizon = random_color(rng), random_color(rng)
    climb = np.clip(rays[:, 2:] / np.linalg.norm(rays, axis=1, keepdims=True) + 0.3, 0, 1)
    radiance = horizon * (1 - climb) + zenith * climb
    hits = gather_hits(surfaces, camera, tracer, rays, triangle, distance)
    if len(hits["index"]):
        radiance[hits["index"]] = shade(rng, lamp, casters, hits)
    image = radiance.reshape(4, size, size, 3).mean(0)
    exposure = rng.uniform(0.22, 0.42) / max(image.mean(), 1e-3)
    image = np.clip(1.25 * (1 - np.exp(-image * exposure * 1.2)), 0, 1) ** (1 / 2.2)
    image = image * rng.uniform(0.95, 1.05, 3) + rng.uniform(0.003, 0.02) * rng.standard_normal(
        image.shape, np.float32
    )
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def gather_hits(
    surfaces: list[Surface],
    camera: Camera,
    tracer: Tracer,
    rays: np.ndarray,
    triangle: np.ndarray,
    distance: np.ndarray,
    textured: bool = True,
) -> dict[str, np.ndarray]:
    """Collect what was hit, ordered by surface: index (into the rays), points, normals, rays, color and shine."""
    index = np.flatnonzero(triangle >= 0)
    index = index[np.argsort(tracer.owner[triangle[index]], kind="stable")]
    owner = tracer.owner[triangle[index]]
    rays = rays[index]
    points = camera.position + distance[index, None] * rays
    hits = {"index": index, "points": points, "rays": rays, "normals": np.empty_like(points)}
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


def render_scene(seed: int | np.random.SeedSequence, size: int = 128) -> dict[str, np.ndarray]:
    """Render one scene; the same seed gives the same scene.

    Args:
        seed: Seed of `numpy.random.default_rng`.
        size: Side of the square image in pixels.

    Returns:
        image (H, W, 3) uint8 RGB; segmentation (H, W) uint8, indices into `CLASSES`; depth (H, W) float32, planar
        depth in metres, 0 where nothing is hit; normal (H, W, 3) float32, unit vectors towards the camera in its
        coordinates (x right, y down, z forward), zero where nothing is hit; saliency (H, W) uint8, 1 on objects; edge
        (H, W) uint8, 1 on both sides of a boundary between instances; instance (H, W) uint8: 0 nothing, 1 the floor,
        then the walls, then the objects.
    """
    rng = np.random.default_rng(seed)
    surfaces, camera = random_scene(rng)
    tracer = Tracer(surfaces)
    labels = draw_labels(surfaces, camera, tracer, size)
    return {"image": draw_image(rng, surfaces, camera, tracer, size), **labels}


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
    split: str, num_scenes: int | Sequence[int], size: int = 128, seed: int = 0, columns: Sequence[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Render the rows of a split.

    Args:
        split: One of `SPLITS`.
        num_scenes: How many scenes, or the indices of those wanted.
        size: Side of the image in pixels.
        seed: Seed of the whole dataset.
        columns: Columns to keep; all of them by default.

    Yields:
        The arrays of `render_scene`, with depth as (1, H, W) and normal as (3, H, W).
    """
    for index in range(num_scenes) if isinstance(num_scenes, int) else num_scenes:
        row = render_scene(scene_seed(split, index, seed), size)
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
    """
    scene_seed(split, 0, seed)
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    name = f"v{VERSION}-{num_scenes}x{size}px-seed{seed}" + (f"-{'-'.join(columns)}" if columns else "")
    path = folder / name / f"{split}-00000-of-00001.parquet"
    if not path.exists():
        write_scenes(path, split, num_scenes, size, seed, num_proc, columns)
    return Dataset.from_parquet(str(path), split=split)


# --- Command line ---------------------------------------------------------------------------------------------------


def preview(path: str, split: str, num_scenes: int = 8, size: int = 128, seed: int = 0) -> None:
    """Save a contact sheet: a row for each scene with its image, classes, depth, normals, saliency and edges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ("image", "segmentation", "depth", "normal", "saliency", "edge")
    figure, axes = plt.subplots(num_scenes, len(columns), figsize=(2 * len(columns), 2 * num_scenes), squeeze=False)
    for row, scene in zip(axes, make_scenes(split, num_scenes, size, seed), strict=True):
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
            write_scenes(path, split, count, args.size, args.seed, args.num_proc)
            print(f"{path}: {count} scenes, {path.stat().st_size / 2**20:.1f} MiB")
    if args.preview:
        preview(args.preview, next(iter(counts), "test"), size=args.size, seed=args.seed)


if __name__ == "__main__":
    main()
