"""Which rows are trained and evaluated on, and how much the tasks count."""

import shutil
from itertools import combinations

import numpy as np
import pytest
from training.data import divide, load_data, some_rows, weigh
from training.options import parse_args

from peft_talora.data import Augmentation
from peft_talora.msam.tasks import parse_tasks


def splits(*names):
    return {name: [f"{name} {number}" for number in range(20)] for name in names}


class TestSplits:
    @pytest.mark.parametrize(
        "names", [("train",), ("train", "test"), ("train", "val"), ("train", "validation", "test")]
    )
    @pytest.mark.parametrize("evaluate_on", ["test", "validation"])
    @pytest.mark.parametrize("choosing", [False, True])
    def test_nothing_is_trained_on_that_is_evaluated(self, names, evaluate_on, choosing):
        train, rows, validation = divide(splits(*names), evaluate_on, choosing)
        assert train and rows and not set(train) & set(rows) and (validation is None) != choosing
        if choosing:
            assert validation and not set(train) & set(validation)

    @pytest.mark.parametrize(
        "names", [("train",), ("train", "test"), ("train", "val"), ("train", "validation", "test")]
    )
    def test_what_chooses_never_tests(self, names):
        test = divide(splits(*names), "test", False)[1]
        trained, validation, _ = divide(splits(*names), "validation", False)
        _, again, best = divide(splits(*names), "test", True)
        assert test == again and best == validation
        assert not any(set(one) & set(other) for one, other in combinations((test, trained, validation), 2))

    def test_what_was_held_out_is_told(self, capsys):
        divide(splits("train", "valid"), "test", True)
        told = capsys.readouterr().out.splitlines()
        assert told[0] == "There is no test split: 'valid' stands for it." and "2 of 20 rows of 'train'" in told[1]

    def test_of_a_folder(self, data_folder, tmp_path):
        args = parse_args(["--dataset", data_folder, "--keep-best", "miou"])
        data = load_data(args, 32)
        assert [len(rows) for rows in (data.train, data.validation, data.test)] == [6, 2, 3]
        assert load_data(parse_args(["--dataset", data_folder]), 32).validation is None
        for split in ("train", "test"):
            shutil.copy(f"{data_folder}/{split}-00000-of-00001.parquet", tmp_path)
        data = load_data(parse_args(["--dataset", str(tmp_path), "--keep-best", "miou"]), 32)
        assert [len(rows) for rows in (data.train, data.validation, data.test)] == [5, 1, 3]

    def test_no_more_images_than_asked_for(self, data_folder):
        numbers = ["--max-train-images", "4", "--max-test-images", "1"]
        data = load_data(parse_args(["--dataset", data_folder, "--keep-best", "miou", *numbers]), 32)
        assert [len(rows) for rows in (data.train, data.validation, data.test)] == [4, 1, 1]


class TestAugmentation:
    def load(self, *arguments):
        return load_data(parse_args(list(arguments)), 32).augment

    def test_what_the_options_say(self, data_folder):
        assert self.load("--dataset", data_folder) == Augmentation((1.0, 1.2, 1.5), 0.5)
        assert self.load("--dataset", data_folder, "--no-flip", "--crop-scales", "1") == Augmentation((1.0,), 0.0)

    @pytest.mark.parametrize("flip", [True, False])
    def test_what_a_folder_says_of_flips(self, tmp_path, flip):
        from PIL import Image

        for folder in ("images", "semantic"):
            (tmp_path / folder).mkdir()
            for number in range(12):
                values = np.full((8, 8), number % 3, "uint8")
                Image.fromarray(values).save(tmp_path / folder / f"{number}.png")
        (tmp_path / "dataset.yaml").write_text(
            f"images: images\nflip: {str(flip).lower()}\ntasks:\n  semantic:\n    class_names: [a, b, c]\n"
            "    flip_pairs: [[b, c]]\n"
        )
        found = self.load("--dataset", f"folder:{tmp_path}")
        assert found.flip_probability == (0.5 if flip else 0.0) and dict(found.flip_pairs) == {"semantic": ((1, 2),)}


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
