"""What the tests of the training script share: a tiny SAM on disk, few scenes, and short runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def base(sam_factory, tmp_path):
    sam_factory().save_pretrained(tmp_path / "sam")
    return str(tmp_path / "sam")


@pytest.fixture
def scenes_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A dataset without a scene to be rendered: 6 rows to train on, 2 to validate and 3 to test on."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    for number, (split, rows) in enumerate({"train": 6, "validation": 2, "test": 3}.items()):
        made = datasets.Dataset.from_list([make_row(100 * number + row) for row in range(rows)])
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def arguments(base):
    """``arguments(output_dir, *more)``: a command line; later options win over earlier ones."""
    numbers = ["--num-train", "8", "--num-test", "3", "--steps", "2", "--batch-size", "4", "--rank", "4"]
    return lambda output, *more: ["--base", base, "--output-dir", str(output), *numbers, *more]


@pytest.fixture
def run(arguments, scenes_cache, fresh_accelerator):
    """``run(output_dir, *more)``: the metrics that a run of the script leaves."""
    import train_multitask as script

    def main(output, *more):
        script.main(arguments(output, *more))
        return json.loads((Path(output) / "metrics.json").read_text())

    return main
