"""Generated data in the layouts of published datasets."""

import numpy as np
import pytest
from PIL import Image

from peft_talora.data import MultiTaskDataset, collate, detect_tasks, load_multitask_dataset
from peft_talora.msam.processing import MSamProcessor

datasets = pytest.importorskip("datasets")

SIZE = HEIGHT, WIDTH = 6, 8
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_cityscapes_as_it_is_unpacked(tmp_path):
    ids = RNG.integers(0, 34, SIZE, dtype=np.uint8)
    ids[0, :8] = [0, 6, 7, 11, 17, 22, 23, 24]
    ids[1, :2] = [33, 26]
    raw = RNG.integers(2, 20000, SIZE).astype(np.uint16)
    raw[0, 0] = 0
    for split in ("train", "val"):
        name = f"{split}/zurich/zurich_000001_000019"
        save(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", PICTURE)
        save(tmp_path / f"gtFine/{name}_gtFine_labelIds.png", ids)
        save(tmp_path / f"gtFine/{name}_gtFine_color.png", PICTURE)
        save(tmp_path / f"disparity/{name}_disparity.png", raw)
    splits = load_multitask_dataset(f"cityscapes:{tmp_path}")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1, "val": 1}
    assert splits.tasks["semantic"].class_names == [
        "flat",
        "construction",
        "object",
        "nature",
        "sky",
        "human",
        "vehicle",
    ]
    row = splits["train"][0]
    assert row["segmentation"][0].tolist() == [-1, -1, 0, 1, 2, 3, 4, 5]
    assert row["segmentation"][1, :2].tolist() == [6, 6]
    metres = 0.209313 * 2262.52 / ((raw.astype(float) - 1) / 256)
    metres[0, 0] = 0
    np.testing.assert_allclose(row["depth"][0], metres, rtol=1e-5)


def test_pascal_context(tmp_path):
    names = ["2008_000003", "2008_000009", "2010_000001"]
    semantic = RNG.integers(0, 21, SIZE, dtype=np.uint8)
    for name in names:
        save(tmp_path / f"JPEGImages/{name}.jpg", PICTURE)
        save(tmp_path / f"sal_distill/{name}.png", np.where(semantic > 10, 255, 3).astype(np.uint8))
        save(tmp_path / f"normals_distill/{name}.png", np.full((*SIZE, 3), [128, 128, 255], dtype=np.uint8))
    save(tmp_path / f"semseg/VOC12/{names[0]}.png", semantic)
    save(tmp_path / f"semseg/pascal-context/{names[0]}.png", 20 - semantic)
    save(tmp_path / f"semseg/pascal-context/{names[1]}.png", 20 - semantic)
    save(tmp_path / f"human_parts/{names[1]}.png", semantic // 3)
    lists = tmp_path / "ImageSets/Context"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(f"{names[0]}\n{names[1]}\n")
    (lists / "val.txt").write_text(f"{names[2]}\n")
    splits = load_multitask_dataset(f"pascal_context:{tmp_path}")
    tasks = detect_tasks(splits)
    assert {name: spec.num_channels for name, spec in tasks.items()} == {
        "semantic": 21, "parts": 7, "saliency": 1, "normals": 3
    }  # fmt: skip
    first, second = splits["train"]
    assert (first["segmentation"] == semantic).all() and (second["segmentation"] == 20 - semantic).all()
    assert first["parts"] is None and (second["parts"] == semantic // 3).all()
    assert (first["saliency"] == (semantic > 10)).all()
    np.testing.assert_allclose(first["normal"][:, 0, 0], [0, 0, 1], atol=0.01)
    rows = MultiTaskDataset(splits["validation"], tasks, MSamProcessor(8))
    labels = collate([rows[0]])["labels"]
    assert (labels["semantic"] == 255).all() and labels["normals"].any()


def test_seven_classes_of_cityscapes_as_rows(tmp_path, monkeypatch):
    """As in the schema of tanganke/nyuv2: float images, classes with -1, and "depth", here a disparity, as it is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shapes = {"image": (3, *SIZE), "segmentation": SIZE, "depth": (1, *SIZE)}
    features = datasets.Features({
        "image": datasets.Array3D(shapes["image"], "float32"),
        "segmentation": datasets.Array2D(SIZE, "int64"),
        "depth": datasets.Array3D(shapes["depth"], "float32"),
    })  # fmt: skip
    classes, disparity = RNG.integers(-1, 7, SIZE), RNG.uniform(0, 0.5, (1, *SIZE)).astype(np.float32)
    classes[0, 0] = 6
    rows = {"image": [PICTURE.transpose(2, 0, 1) / 255], "segmentation": [classes], "depth": [disparity]}
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows/train-00000-of-00001.parquet")
    splits = load_multitask_dataset(tmp_path / "rows")
    tasks = detect_tasks(splits)
    assert {name: spec.num_channels for name, spec in tasks.items()} == {"semantic": 7, "depth": 1}
    labels = MultiTaskDataset(splits["train"], tasks, MSamProcessor(8))[0]["labels"]
    np.testing.assert_allclose(labels["depth"][:, :HEIGHT], disparity)
    assert (labels["semantic"][:HEIGHT].numpy() == np.where(classes < 0, 255, classes)).all()
