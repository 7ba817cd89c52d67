"""Solid textures; every surface of a scene draws its colours from one distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .vectors import dot

SURFACE_TEXTURES = ("plain", "checker", "stripes", "noise", "bricks", "dots", "wood", "marble", "cells")
FLOOR_TEXTURES = ("plain", "checker", "stripes", "noise", "bricks", "cells", "wood", "marble")
WALL_TEXTURES = ("plain", "plain", "stripes", "noise", "bricks", "dots", "marble")


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
    radius = np.sqrt(np.maximum(dot(points, points) - along**2, 0) + 0.02)
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
