"""Boundaries between instances."""

from __future__ import annotations

import numpy as np


def instance_edges(instance: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W): 1 where a 4-neighbour belongs to another instance, on both sides of the boundary."""
    edge = np.zeros(instance.shape, bool)
    down, right = instance[1:] != instance[:-1], instance[:, 1:] != instance[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge.astype(np.uint8)
