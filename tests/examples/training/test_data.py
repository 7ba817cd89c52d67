"""Which rows are trained and evaluated on, and how much the tasks count."""

import shutil

import pytest
from training.data import choose_split, load_data, some_rows, weigh
from training.options import parse_args

from peft_talora.msam.tasks import parse_tasks


def splits(*names):
    return {name: f"rows of {name}" for name in names}


class TestSplits:
    def test_the_one_that_is_evaluated(self):
        everything = splits("train", "validation", "test")
        assert choose_split(everything, "test") == "rows of test"
        assert choose_split(everything, "validation") == "rows of validation"
        assert choose_split(splits("train", "val"), "test") == "rows of val"

    def test_test_images_are_no_validation_images(self, capsys):
        assert choose_split(splits("train", "test"), "validation") == "rows of train"
        assert "no validation split" in capsys.readouterr().out

    def test_of_a_folder(self, data_folder, tmp_path):
        data = load_data(parse_args(["--dataset", data_folder]), 32)
        assert [len(rows) for rows in (data.train, data.validation, data.test)] == [6, 2, 3]
        for split in ("train", "test"):
            shutil.copy(f"{data_folder}/{split}-00000-of-00001.parquet", tmp_path)
        assert load_data(parse_args(["--dataset", str(tmp_path)]), 32).validation is None
        with pytest.raises(
            ValueError, match=r"--keep-best needs a validation split, the dataset has \['train', 'test'\]"
        ):
            load_data(parse_args(["--dataset", str(tmp_path), "--keep-best", "miou"]), 32)

    def test_no_more_images_than_asked_for(self, data_folder):
        data = load_data(
            parse_args(["--dataset", data_folder, "--max-train-images", "4", "--max-test-images", "1"]), 32
        )
        assert [len(rows) for rows in (data.train, data.validation, data.test)] == [4, 1, 1]


class TestSomeRows:
    def test_always_the_same_and_smaller_ones_within_larger_ones(self):
        rows = list(range(100))
        chosen = [some_rows(rows, number) for number in (5, 20, 60)]
        assert [len(some) for some in chosen] == [5, 20, 60]
        assert set(chosen[0]) < set(chosen[1]) < set(chosen[2]) and chosen[0] == some_rows(rows, 5)
        # not the first ones: files are often sorted by what they show
        assert chosen[0] == sorted(chosen[0]) != [0, 1, 2, 3, 4]
        assert some_rows(rows, None) == some_rows(rows, 100) == some_rows(rows, 1000) == rows


class TestWeights:
    def weights(self, given):
        tasks = parse_tasks({"depth": {"kind": "depth"}, "normals": {"kind": "normals"}, "edges": {"kind": "binary"}})
        weigh(tasks, given)
        return {name: spec.weight for name, spec in tasks.items()}

    def test_the_recipes(self):
        assert self.weights({}) == pytest.approx({"depth": 1 / 6, "normals": 4 / 6, "edges": 1 / 6})

    def test_given_ones(self):
        assert self.weights({"depth": 3, "normals": 1}) == pytest.approx({"depth": 0.6, "normals": 0.2, "edges": 0.2})

    def test_unknown_task(self):
        with pytest.raises(
            ValueError, match=r"--task-weights: there is no task 'deepth', only \['depth', 'normals', 'edges'\]"
        ):
            self.weights({"deepth": 1})

    def test_reach_the_loss(self, data_folder):
        data = load_data(parse_args(["--dataset", data_folder, "--task-weights", "semantic=2"]), 32)
        assert {name: spec.weight for name, spec in data.tasks.items()} == pytest.approx(
            {"semantic": 2 / 7, "depth": 1 / 7, "normals": 4 / 7}
        )
