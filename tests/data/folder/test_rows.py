"""A folder of files, from its description to a batch, against the arrays that were written into the files."""

import json
import pickle

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from peft_talora.data import MultiTaskDataset, collate, detect_tasks, load_multitask_dataset
from peft_talora.data.folder import rows as folder_data
from peft_talora.msam.processing import MSamProcessor

pytest.importorskip("datasets")

SIZE = HEIGHT, WIDTH = 6, 8
NAMES = ["a", "b", "deep/c", "deep/d"]
CLASSES = ["floor", "wall", "chair"]
DESCRIPTION = {
    "images": "pictures",
    "tasks": {
        "semantic": {"files": "labels/{name}_labels.png", "class_names": CLASSES, "ignore": [9, 255]},
        "depth": {"files": "mm", "scale": 0.001},
        "normals": {"axes": [1, -1, 1]},
        "shadow": {"kind": "binary", "threshold": 100},
    },
    "splits": {"test": ["b"]},
}


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def make_truth(seed):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(3, *SIZE))
    return {
        "image": rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        "semantic": rng.choice(np.array([0, 1, 2, 9, 255], dtype=np.uint8), SIZE),
        "depth": rng.integers(0, 5000, SIZE).astype(np.uint16),
        "normals": (normals / np.linalg.norm(normals, axis=0)).astype(np.float32),
        "shadow": rng.integers(0, 256, SIZE, dtype=np.uint8),
    }


TRUTH = {name: make_truth(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path):
    for name, truth in TRUTH.items():
        save(tmp_path / "pictures" / f"{name}.png", truth["image"])
        save(tmp_path / "labels" / f"{name}_labels.png", truth["semantic"])
        save(tmp_path / "mm" / f"{name}.png", truth["depth"])
        save(tmp_path / "normals" / f"{name}.npy", truth["normals"] * np.array([1, -1, 1])[:, None, None])
        save(tmp_path / "shadow" / f"{name}.png", truth["shadow"])
    describe(tmp_path)
    return tmp_path


def describe(folder, **changes):
    (folder / "dataset.yaml").write_text(yaml.safe_dump({**DESCRIPTION, **changes}))


def change_task(folder, task, **fields):
    tasks = {name: dict(values) for name, values in DESCRIPTION["tasks"].items()}
    tasks[task] = {**tasks.get(task, {}), **fields}
    describe(folder, tasks=tasks)


def load(folder):
    return load_multitask_dataset(f"folder:{folder}")


def test_rows_are_what_the_files_say(folder):
    splits = load(folder)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "test": 1}
    for name, row in zip(["a", "deep/c", "deep/d"], splits["train"], strict=True):
        truth = TRUTH[name]
        assert (row["image"] == truth["image"]).all()
        assert (row["segmentation"] == np.where(truth["semantic"] > 2, -1, truth["semantic"].astype(int))).all()
        np.testing.assert_allclose(row["depth"], truth["depth"][None] / 1000, rtol=1e-6)
        np.testing.assert_allclose(row["normal"], truth["normals"], atol=1e-6)
        assert (row["shadow"] == (truth["shadow"] >= 100)).all()


def test_tasks_and_class_names_come_from_the_description(folder):
    tasks = detect_tasks(load(folder))
    assert {name: spec.kind for name, spec in tasks.items()} == {
        "semantic": "semantic", "depth": "depth", "normals": "normals", "shadow": "binary"
    }  # fmt: skip
    assert tasks["semantic"].class_names == CLASSES and tasks["semantic"].num_channels == 3
    splits = load(folder)
    wanted = detect_tasks(splits, ["depth", "semantic"], {"semantic": ["x", "y", "z", "more"]})
    assert list(wanted) == ["depth", "semantic"] and wanted["semantic"].class_names[-1] == "more"
    wanted["depth"].weight = 7.0
    assert splits.tasks["depth"].weight == 1.0
    with pytest.raises(ValueError, match=r"unknown task 'edges'.*'shadow'"):
        detect_tasks(splits, ["edges"])


def test_classes_of_one_split_are_those_of_its_files(folder):
    assert detect_tasks(load(folder)["train"], ["semantic"])["semantic"].num_channels == 3


def test_images_and_labels_in_one_place(tmp_path):
    for name in NAMES:
        save(tmp_path / f"{name}_rgb.png", TRUTH[name]["image"])
        save(tmp_path / f"{name}_mm.png", TRUTH[name]["depth"])
    describe(tmp_path, images="{name}_rgb.png", tasks={"depth": {"files": "{name}_mm.png"}}, splits={})
    rows = load(tmp_path)["train"]
    for name, row in zip(NAMES, rows, strict=True):
        assert (row["image"] == TRUTH[name]["image"]).all() and (row["depth"][0] == TRUTH[name]["depth"]).all()


def test_batches_and_labels_that_are_missing(folder):
    (folder / "mm/deep/c.png").unlink()
    splits = load(folder)
    tasks = detect_tasks(splits)
    rows = MultiTaskDataset(splits["train"], tasks, MSamProcessor(8))
    batch = collate([rows[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"]["depth"].flatten(1).gt(0).any(1).tolist() == [True, False, True]
    expected = torch.from_numpy(np.where(TRUTH["a"]["semantic"] > 2, 255, TRUTH["a"]["semantic"].astype(int)))
    assert torch.equal(batch["labels"]["semantic"][0, :HEIGHT], expected)
    assert torch.equal(batch["labels"]["shadow"][0, 0, :HEIGHT], torch.from_numpy(TRUTH["a"]["shadow"] >= 100).float())
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[1]["pixel_values"], rows[1]["pixel_values"])


def test_files_are_read_when_a_row_is_asked_for_and_once(folder, monkeypatch):
    reads = []
    read_image, read_label = folder_data.read_image, folder_data.read_label
    monkeypatch.setattr(folder_data, "read_image", lambda path, *a: reads.append(str(path)) or read_image(path, *a))
    monkeypatch.setattr(
        folder_data, "read_label", lambda path, *a, **k: reads.append(str(path)) or read_label(path, *a, **k)
    )
    splits = load(folder)
    tasks = detect_tasks(splits, ["depth"])
    rows = MultiTaskDataset(splits["train"], tasks, MSamProcessor(8))
    assert reads == []
    rows[0]
    assert reads == [str(folder / "pictures/a.png"), str(folder / "mm/a.png")]


class TestSplits:
    @staticmethod
    def names(folder, splits):
        describe(folder, splits=splits)
        with_paths = {split: rows.with_format(None) for split, rows in load(folder).items()}
        start = len(f"{folder}/pictures/")
        return {split: [path[start:-4] for path in rows["image"]] for split, rows in with_paths.items()}

    def test_none(self, folder):
        assert self.names(folder, {}) == {"train": NAMES}

    def test_lists_and_files(self, folder):
        (folder / "val.txt").write_text("deep/c\nb\n")
        assert self.names(folder, {"train": ["a"], "validation": "val.txt"}) == {
            "train": ["a"],
            "validation": ["deep/c", "b"],
        }

    def test_fractions(self, folder):
        found = self.names(folder, {"test": 0.5})
        assert len(found["test"]) == 2 and sorted(found["train"] + found["test"]) == NAMES
        assert found == self.names(folder, {"test": 0.5})
        found = self.names(folder, {"train": 0.75, "test": 0.25})
        assert len(found["test"]) == 1 and sorted(found["train"] + found["test"]) == NAMES

    def test_a_list_and_a_fraction(self, folder):
        found = self.names(folder, {"test": ["a"], "validation": 0.25})
        assert found["test"] == ["a"] and sorted(found["train"] + found["validation"]) == NAMES[1:]

    def test_subfolders(self, folder):
        (folder / "pictures").rename(folder / "all")
        for name, split in zip(NAMES, ["train", "train", "test", "train"], strict=True):
            save(folder / "pictures" / split / f"{name.removeprefix('deep/')}.png", TRUTH[name]["image"])
        (folder / "mm").rename(folder / "old")
        save(folder / "mm/train/a.png", TRUTH["a"]["depth"])
        describe(folder, splits="subfolders", tasks={"depth": {"files": "mm"}})
        splits = load(folder)
        assert {split: len(rows) for split, rows in splits.items()} == {"test": 1, "train": 3}
        assert (splits["train"][0]["depth"][0] == TRUTH["a"]["depth"]).all()


class TestFileErrors:
    def row_error(self, folder, index=0):
        with pytest.raises(ValueError) as error:
            load(folder)["train"][index]
        return str(error.value)

    def test_label_of_another_size(self, folder):
        save(folder / "mm/a.png", np.zeros((4, 5), dtype=np.uint16))
        message = self.row_error(folder)
        assert (
            str(folder / "mm/a.png") in message
            and "tasks.depth" in message
            and "5 x 4 pixels, its image 8 x 6" in message
        )

    def test_unreadable_files(self, folder):
        (folder / "labels/a_labels.png").write_bytes(b"no picture")
        assert "labels/a_labels.png cannot be read" in self.row_error(folder)
        (folder / "pictures/a.png").write_bytes(b"no picture")
        assert "pictures/a.png cannot be read" in self.row_error(folder)

    def test_class_beyond_the_list(self, folder):
        save(folder / "labels/a_labels.png", np.full(SIZE, 3, dtype=np.uint8))
        message = self.row_error(folder)
        assert "a_labels.png" in message and "class id 3 is beyond the 3 classes" in message

    def test_a_mask_that_is_none(self, folder):
        tasks = {"shadow": {"kind": "binary"}}
        describe(folder, tasks=tasks)
        assert "say `threshold`" in self.row_error(folder)

    def test_colours_where_numbers_belong(self, folder):
        save(folder / "mm/a.png", TRUTH["a"]["image"])
        assert "expected one number for each pixel, got an array of shape (6, 8, 3)" in self.row_error(folder)


class TestFolderErrors:
    def error(self, folder, kind=ValueError):
        with pytest.raises(kind) as error:
            load(folder)
        return str(error.value)

    def test_missing_image(self, folder):
        describe(folder, splits={"train": ["a", "gone"]})
        assert "dataset.yaml: splits.train: missing image 'gone' (1 of 2" in self.error(folder)
        describe(folder, splits={"train": "train.txt"})
        assert "splits.train: there is no file" in self.error(folder)
        describe(folder, images="nowhere")
        assert "images: no image file fits 'nowhere'" in self.error(folder)

    def test_no_file_of_a_task_anywhere(self, folder):
        change_task(folder, "depth", files="metres/{name}_d.png")
        message = self.error(folder)
        assert "tasks.depth.files" in message and "metres/a_d.png" in message
        change_task(folder, "depth", files="metres", optional=True)
        assert "depth" not in load(folder).tasks

    def test_no_train_split(self, folder):
        describe(folder, splits={"test": NAMES})
        assert "no split 'train', only ['test']" in self.error(folder)

    def test_no_image_left_for_a_split(self, folder):
        describe(folder, splits={"train": 0.9, "validation": 0.1})
        assert "splits.validation: no image is left for it, there are 4" in self.error(folder)

    def test_ambiguous_image(self, folder):
        save(folder / "pictures/a.bmp", TRUTH["a"]["image"])
        assert "have the same name" in self.error(folder)

    def test_no_folder_and_no_description(self, folder):
        assert "does not exist" in self.error(folder / "x", FileNotFoundError)
        (folder / "dataset.yaml").unlink()
        assert "dataset.yaml" in self.error(folder, FileNotFoundError)


def test_json_and_a_folder_without_the_prefix(folder):
    (folder / "dataset.yaml").unlink()
    (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    assert list(load_multitask_dataset(folder).tasks) == list(DESCRIPTION["tasks"])
