"""A photograph: textures under a lamp, with soft shadows. The small SAM was pretrained on these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rooms.layout import Camera, Surface
from rooms.textures import random_color
from rooms.tracing import SUBPIXELS, Tracer, gather_hits
from rooms.vectors import dot, unit


@dataclass(frozen=True)
class Lamp:
    """A round lamp: position (3,) and radius in metres, and how its light splits from the ambient light."""

    position: np.ndarray
    radius: float
    strength: float
    ambient: float


def shade(rng: np.random.Generator, lamp: Lamp, casters: Tracer | None, hits: dict) -> np.ndarray:
    """Return the (N, 3) linear radiance of the hit points: ambient, Lambert and a highlight, with soft shadows.

    Args:
        rng: Jitters the lamp, one shadow ray a point; pixels average four of them.
        lamp: The light.
        casters: What throws shadows; walls and floor bound the convex room around the lamp and never do.
        hits: points, normals, rays, color (N, 3) and shine (N,) of the points.
    """
    points, normals = hits["points"], hits["normals"]
    to_lamp = lamp.position + lamp.radius * unit(rng.standard_normal(points.shape, np.float32)) - points
    squared = dot(to_lamp, to_lamp)
    to_lamp /= np.sqrt(squared)[:, None]
    cosine = dot(normals, to_lamp)
    lit = np.flatnonzero(cosine > 0)
    if casters is not None:
        blocked = casters.rays.intersects_any(points[lit] + 2e-3 * normals[lit], to_lamp[lit])
        lit = lit[~blocked]
    color = hits["color"] * (lamp.ambient * (0.75 + 0.25 * normals[:, 2:]))
    half = unit(to_lamp[lit] - unit(hits["rays"][lit]))
    gloss = hits["shine"][lit] * np.exp(40 * (dot(half, normals[lit]) - 1))
    falloff = lamp.strength * 6 / (2 + squared[lit])
    color[lit] += falloff[:, None] * (hits["color"][lit] * cosine[lit, None] + gloss[:, None])
    return color


def draw_photo(
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
