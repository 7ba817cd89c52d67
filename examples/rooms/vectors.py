"""Rows of vectors."""

from __future__ import annotations

import numpy as np


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot products (N,) of the rows of two (N, 3) arrays; einsum beats a sum over so short an axis."""
    return np.einsum("ij,ij->i", a, b)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of (N, 3) to length one; zero rows stay zero."""
    return vectors / np.sqrt(np.maximum(dot(vectors, vectors), 1e-30))[:, None]
