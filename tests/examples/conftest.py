"""What the tests of the training script share: a tiny SAM on disk, few scenes, and short runs."""

import json
import sys
from pathlib import Path

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
