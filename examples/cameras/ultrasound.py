"""An acoustic camera: echoes of interfaces and of rough surfaces, weaker with distance, in speckle, in grey."""

from __future__ import annotations

import numpy as np
from rooms.layout import Camera, Surface
from rooms.tracing import Tracer

from .sampling import blur, first_hits, incidence, per_pixel

# MRayl: the water that fills the room, and from soft rubber to hard plastic what is in it
WATER, IMPEDANCES = 1.48, (1.6, 4.0)
# the point spread of the array, down and across, as shares of the image's side
SPREAD = (0.006, 0.010)
# decibels that the grey levels span, and how far below the strongest echo the receiver's noise is
DYNAMIC_RANGE, NOISE = 50.0, (42.0, 50.0)


def draw_ultrasound(
    rng: np.random.Generator, surfaces: list[Surface], camera: Camera, tracer: Tracer, size: int
) -> np.ndarray:
    """Return the image (size, size, 3) uint8 of log-compressed echo amplitudes, equal in the three channels.

    An echo has a coherent part, from the interface to another acoustic impedance where it is met at a right angle and
    from the contours where the beam straddles two materials, and a diffuse part from the surface's roughness, which
    becomes speckle. Impedance and roughness do not say what class a surface has.
    """
    impedance = np.exp(rng.uniform(*np.log(IMPEDANCES), len(surfaces)))
    roughness = rng.uniform(0.05, 0.35, len(surfaces))
    lobe = rng.uniform(6, 30, len(surfaces))
    decibels_per_metre = rng.uniform(2, 4)

    _, hits = first_hits(surfaces, camera, tracer, size)
    owner, cosine = hits["owner"], incidence(hits)
    step = reflection(impedance[owner], WATER)
    range_ = np.linalg.norm(hits["points"] - camera.position, axis=1)
    # there and back; time gain makes up for spreading, not for what the medium swallows
    fading = 10 ** (-2 * decibels_per_metre * range_ / 20)
    specular, diffuse, faded = (np.zeros(4 * size * size) for _ in range(3))
    specular[hits["index"]] = fading * step * cosine ** lobe[owner]
    diffuse[hits["index"]] = fading * roughness[owner] * cosine
    faded[hits["index"]] = fading
    material = np.full(4 * size * size, np.log(WATER))
    material[hits["index"]] = np.log(impedance[owner])

    spread = tuple(share * size for share in SPREAD)
    contours = per_pixel(faded, size) * contour_reflection(blur(per_pixel(material, size), spread))
    coherent = blur(per_pixel(specular, size) + contours, spread)
    echo = np.abs(coherent + speckle(rng, per_pixel(diffuse, size), spread))
    return compress(rng, echo)


def reflection(impedance: np.ndarray, before: float) -> np.ndarray:
    """Return the amplitude (N,) that an interface between two impedances reflects at a right angle."""
    return np.abs(impedance - before) / (impedance + before)


def contour_reflection(log_impedance: np.ndarray) -> np.ndarray:
    """Return the amplitude (H, W) reflected where the impedance changes across the beam: dZ / 2Z for small steps."""
    down, across = np.gradient(log_impedance)
    return np.hypot(down, across) / 2


def speckle(rng: np.random.Generator, amplitude: np.ndarray, spread: tuple[float, float]) -> np.ndarray:
    """Return the complex sum (H, W) of many scatterers with random phases in every resolution cell.

    Args:
        rng: Draws the scatterers.
        amplitude: (H, W) the root mean square of the sum, where it changes slowly.
        spread: The point spread in pixels, down and across.
    """
    scatterers = rng.standard_normal((2, *amplitude.shape))
    field = blur(amplitude * (scatterers[0] + 1j * scatterers[1]) / np.sqrt(2), spread)
    # blurring white noise takes power away: give it back
    taken = np.prod([max(2 * np.sqrt(np.pi) * width, 1) for width in spread])
    return field * np.sqrt(taken)


def compress(rng: np.random.Generator, echo: np.ndarray) -> np.ndarray:
    """Return grey levels (H, W, 3) uint8: decibels below the strongest percent of the echoes, above noise."""
    strongest = max(np.percentile(echo, 99.5), 1e-9)
    noise = rng.standard_normal((2, *echo.shape)) * 10 ** (-rng.uniform(*NOISE) / 20)
    received = np.hypot(echo / strongest + noise[0], noise[1])
    decibels = 20 * np.log10(np.maximum(received, 1e-9))
    grey = np.clip(1 + decibels / DYNAMIC_RANGE, 0, 1)
    return np.repeat((grey * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=-1)
