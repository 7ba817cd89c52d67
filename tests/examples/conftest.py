"""What the tests of the training script share: a tiny SAM on disk, few scenes, and short runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from small_models import make_sam
from small_training import make_row

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "tiny_sam")]


@pytest.fixture
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The path of a tiny SAM."""
    folder = tmp_path_factory.mktemp("base") / "sam"
    make_sam().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scenes_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A dataset without a scene to be rendered: 6 rows to train on, 2 to validate and 3 to test on."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    for number, (split, rows) in enumerate({"train": 6, "validation": 2, "test": 3}.items()):
        made = datasets.Dataset.from_list([make_row(100 * number + row) for row in range(rows)])
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def partly_labelled_folder(tmp_path_factory):
    """Rows of which two have classes, all but one depth, and one normals: 8 to train on, 3 to test on."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("partly")
    labelled = {"segmentation": {0, 5}, "depth": {0, 1, 2, 4, 5, 6, 7}, "normal": {3}}
    rows = [make_row(row) for row in range(8)]
    for column, numbers in labelled.items():
        for number, row in enumerate(rows):
            if number not in numbers:
                # what an array in `datasets` is whose every pixel is unlabelled
                row[column] = np.full_like(row[column], -1 if column == "segmentation" else 0)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list([make_row(300 + row) for row in range(3)]).to_parquet(
        folder / "test-00000-of-00001.parquet"
    )
    return str(folder)


@pytest.fixture
def arguments(base):
    """``arguments(output_dir, *more)``: a command line; later options win over earlier ones."""
    numbers = ["--num-train", "8", "--num-test", "3", "--steps", "2", "--batch-size", "4"]

    def command(output, *more):
        rank = [] if {"decoder", "full", "--init-from"} & set(more) else ["--rank", "4"]
        return ["--base", base, "--output-dir", str(output), *numbers, *rank, *more]

    return command


@pytest.fixture
def run(arguments, scenes_cache, fresh_accelerator):
    """``run(output_dir, *more)``: the metrics that a run of the script leaves."""
    import train_multitask as script

    def main(output, *more):
        script.main(arguments(output, *more))
        return json.loads((Path(output) / "metrics.json").read_text())

    return main


@pytest.fixture
def trainer(arguments):
    """``trainer(*more)``: what `train` sets up, in float64: (model, four rows of a batch); `load` gives the data."""
    import train_multitask as script
    from training.data import load_data
    from training.options import parse_args

    def build(*more, load=load_data):
        args = parse_args(arguments("unused", *more))
        data = load(args, 32)
        model = script.make_model(args, args.method, data.tasks)
        processor = script.pt.MSamProcessor.from_model(model.get_base_model())
        dataset = data.make_dataset(data.train, data.tasks, processor, seed=args.seed)
        return model.double().train(), [dataset[index] for index in range(4)]

    return build
