"""A thermal camera: what surfaces emit and mirror in the long infrared, through an uncooled sensor, in false colours."""

from __future__ import annotations

import numpy as np
from rooms.layout import Camera, Surface
from rooms.tracing import Tracer

from .sampling import blur, first_hits, incidence, per_pixel

# black, indigo, magenta, orange, yellow, white: from cold to hot
PALETTE = np.array([[0, 0, 0], [45, 10, 120], [170, 20, 130], [240, 110, 30], [255, 210, 60], [255, 255, 255]])
# of the lens, as a share of the image's side; in pixels it grows with the image, as with a real lens
BLUR = 0.006
# kelvins: what pixels and columns of this one sensor add to every picture, and how much of each picture is noise
PIXEL_PATTERN, COLUMN_PATTERN, NOISE = 0.12, 0.2, (0.05, 0.25)
# the picture's colours span at least so many kelvins
NARROWEST_RANGE = 6.0


def draw_thermal(
    rng: np.random.Generator, surfaces: list[Surface], camera: Camera, tracer: Tracer, size: int
) -> np.ndarray:
    """Return the image (size, size, 3) uint8 of apparent temperatures in false colours.

    Every surface has a temperature of its own, with slow changes over it, and an emissivity. Neither says what class
    it is. What a surface does not emit it mirrors: its surroundings, which are as warm as the room, or the cold sky.
    """
    room, sky = rng.uniform(286, 300), rng.uniform(248, 278)
    # floor and walls are near the air's temperature; the floor comes first
    spread = np.array([5.0 if surface.label > 2 else 2.5 for surface in surfaces])
    warmth = room + spread * rng.standard_normal(len(surfaces))
    unevenness = rng.uniform(0.02, 0.12, len(surfaces)) * spread
    # paint, wood and plastic, and here and there bare metal
    metal = rng.random(len(surfaces)) < 0.15
    emissivity = np.where(metal, rng.uniform(0.3, 0.6, len(surfaces)), rng.uniform(0.8, 0.97, len(surfaces)))

    rays, hits = first_hits(surfaces, camera, tracer, size)
    climb = np.clip(rays[:, 2] / np.linalg.norm(rays, axis=1), 0, 1)
    kelvins = surroundings(climb, room, sky)
    owner = hits["owner"]
    temperature = warmth[owner] + unevenness[owner] * slow_changes(surfaces, hits)
    share = directional_emissivity(emissivity[owner], incidence(hits))
    mirrored = surroundings(mirror_climb(hits), room, sky)
    kelvins[hits["index"]] = (share * temperature**4 + (1 - share) * mirrored**4) ** 0.25
    return false_colors(sense(rng, per_pixel(kelvins, size)))


def directional_emissivity(emissivity: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return what is not reflected (N,): Schlick's approximation, so that surfaces emit less at grazing angles.

    Args:
        emissivity: (N,) at normal incidence.
        cosine: (N,) of the angle between the normal and the direction to the camera.
    """
    return emissivity * (1 - (1 - cosine) ** 5)


def surroundings(climb: np.ndarray, room: float, sky: float) -> np.ndarray:
    """Return kelvins (N,) of what lies in directions that climb by `climb` (N,), the sine over the horizon."""
    return room + (sky - room) * np.sqrt(np.clip(climb, 0, 1))


def mirror_climb(hits: dict[str, np.ndarray]) -> np.ndarray:
    """Return the sine over the horizon (N,) of the mirrored rays."""
    rays = hits["rays"] / np.linalg.norm(hits["rays"], axis=1, keepdims=True)
    along = np.einsum("ij,ij->i", rays, hits["normals"])
    return rays[:, 2] - 2 * along * hits["normals"][:, 2]


def slow_changes(surfaces: list[Surface], hits: dict[str, np.ndarray]) -> np.ndarray:
    """Return smooth noise (N,) in [-1, 1] over each surface, in its own coordinates."""
    changes = np.empty(len(hits["owner"]))
    for number in np.unique(hits["owner"]):
        surface, here = surfaces[number], hits["owner"] == number
        local = (hits["points"][here] - surface.offset) @ surface.rotation
        changes[here] = surface.texture.noise(0.5 * local.astype(np.float32))
    return changes


def sense(rng: np.random.Generator, kelvins: np.ndarray) -> np.ndarray:
    """Return what the sensor reads (H, W): blurred, with its fixed pattern, a drift over the picture, and noise."""
    height, width = kelvins.shape
    blurred = blur(kelvins, BLUR * height)
    # the same in every picture of this camera
    sensor = np.random.default_rng(height)
    pattern = PIXEL_PATTERN * sensor.standard_normal((height, width))
    pattern += COLUMN_PATTERN * sensor.standard_normal(width)
    # the housing's warmth: more towards the corners
    y, x = (np.arange(side) / side - 0.5 for side in (height, width))
    drift = rng.uniform(-1.5, 1.5) * 2 * (y[:, None] ** 2 + x**2)
    return blurred + pattern + drift + rng.uniform(*NOISE) * rng.standard_normal((height, width))


def false_colors(kelvins: np.ndarray) -> np.ndarray:
    """Return RGB (H, W, 3) uint8: the palette from the coldest to the hottest half percent of the picture."""
    low, high = np.percentile(kelvins, (0.5, 99.5))
    middle, half = (low + high) / 2, max(high - low, NARROWEST_RANGE) / 2
    level = np.clip((kelvins - middle) / (2 * half) + 0.5, 0, 1) * (len(PALETTE) - 1)
    channels = [np.interp(level, np.arange(len(PALETTE)), channel) for channel in PALETTE.T]
    return (np.stack(channels, -1) + 0.5).astype(np.uint8)
