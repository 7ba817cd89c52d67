"""Where things are: surfaces, the camera, and randomly furnished rooms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .shapes import CLASSES, SHAPES, random_rotation, random_size, shape_mesh
from .textures import FLOOR_TEXTURES, SURFACE_TEXTURES, WALL_TEXTURES, Texture, random_texture


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
