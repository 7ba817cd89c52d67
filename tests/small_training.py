"""What tests of the training script share: rows, batches in float64, and gradients."""

import numpy as np

from peft_talora.data import collate


def double_batch(rows):
    """A batch of a dataset's items, for a model in float64."""
    batch = collate(rows)
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def gradients(model):
    """{parameter: a copy of its gradient}."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_row(seed, side=32):
    """A row of noise, all of it labelled for classes (0 to 2), depth and normals."""
    random = np.random.default_rng(seed)
    normals = random.normal(size=(3, side, side))
    return {
        "image": random.random((3, side, side)).astype("float32"),
        "segmentation": random.integers(0, 3, (side, side)),
        "depth": random.uniform(1, 5, (1, side, side)).astype("float32"),
        "normal": (normals / np.linalg.norm(normals, axis=0)).astype("float32"),
    }
