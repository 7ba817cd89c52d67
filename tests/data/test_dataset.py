import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from shared_folder import PHOTOS

from peft_talora.data import (
    Augmentation,
    MultiTaskDataset,
    collate,
    collate_own_size,
    detect_tasks,
    load_multitask_dataset,
)
from peft_talora.kinds import doubts
from peft_talora.losses import task_loss
from peft_talora.metrics import MultiTaskMetrics
from peft_talora.msam.processing import MSamProcessor, image_array
from peft_talora.msam.tasks import TaskSpec

datasets = pytest.importorskip("datasets")

HEIGHT, WIDTH = 24, 32
FEATURES = {
    "image": datasets.Image(),
    "segmentation": datasets.Array2D((HEIGHT, WIDTH), "int64"),
    "depth": datasets.Array3D((1, HEIGHT, WIDTH), "float32"),
    "normal": datasets.Array3D((3, HEIGHT, WIDTH), "float32"),
    "saliency": datasets.Array2D((HEIGHT, WIDTH), "uint8"),
}


def make_row(seed):
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(3, HEIGHT, WIDTH))
    return {
        "image": PilImage.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)),
        "segmentation": rng.integers(-1, 4, (HEIGHT, WIDTH)),
        "depth": rng.uniform(1, 5, (1, HEIGHT, WIDTH)).astype(np.float32),
        "normal": (normal / np.linalg.norm(normal, axis=0)).astype(np.float32),
        "saliency": rng.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8),
    }


def make_dataset(rows, columns=tuple(FEATURES)):
    values = {column: [row[column] for row in rows] for column in columns}
    return datasets.Dataset.from_dict(
        values, features=datasets.Features({column: FEATURES[column] for column in columns})
    )


@pytest.fixture(scope="module")
def dataset():
    return make_dataset([make_row(seed) for seed in range(3)])


def make_tasks():
    return {
        "semantic": TaskSpec("semantic", 4),
        "depth": TaskSpec("depth"),
        "normals": TaskSpec("normals"),
        "saliency": TaskSpec("binary"),
    }


def test_detected_tasks(dataset):
    tasks = detect_tasks(dataset)
    assert tasks == make_tasks()
    assert list(detect_tasks(dataset, ["normals", "semantic"])) == ["normals", "semantic"]
    named = detect_tasks(dataset, ["semantic"], {"semantic": ["a", "b", "c", "d", "e"]})
    assert named["semantic"].num_channels == 5
    assert named["semantic"].class_names == ["a", "b", "c", "d", "e"]


def test_largest_label_of_any_split_counts():
    rows = [make_row(0), make_row(1)]
    rows[1]["segmentation"][3, 3], rows[1]["segmentation"][4, 4] = 9, 255
    splits = datasets.DatasetDict(train=make_dataset(rows[:1]), test=make_dataset(rows[1:]))
    assert detect_tasks(splits)["semantic"].num_channels == 10


def test_column_of_one_split_is_enough():
    rows = [make_row(0)]
    splits = datasets.DatasetDict(train=make_dataset(rows, ["image", "depth"]), test=make_dataset(rows))
    assert "saliency" in detect_tasks(splits)


def test_column_without_any_label():
    row = make_row(0)
    row["segmentation"][:] = -1
    with pytest.warns(UserWarning, match="'semantic'.*'segmentation'"):
        assert detect_tasks(make_dataset([row]), ["semantic"])["semantic"].num_channels == 1


def test_what_cannot_be_detected(dataset):
    with pytest.raises(ValueError, match=r"'edges' needs the column 'edge'.*'depth', 'image'"):
        detect_tasks(dataset, ["depth", "edges"])
    with pytest.raises(ValueError, match=r"unknown task 'colour'.*semantic"):
        detect_tasks(dataset, ["colour"])
    with pytest.raises(ValueError, match=r"no column 'image'.*'depth'"):
        detect_tasks(dataset.select_columns(["depth"]))
    with pytest.raises(ValueError, match=r"no labels.*segmentation"):
        detect_tasks(dataset.select_columns(["image"]))


def test_rows_are_what_the_processor_makes(dataset):
    processor = MSamProcessor(32, make_tasks())
    rows = MultiTaskDataset(dataset, make_tasks(), processor)
    source = make_row(1)
    labels = {
        "semantic": source["segmentation"],
        "depth": source["depth"],
        "normals": source["normal"],
        "saliency": source["saliency"],
    }
    expected = processor(source["image"], labels)
    found = rows[1]
    assert torch.equal(found["pixel_values"], expected["pixel_values"][0])
    assert found["original_size"].tolist() == [HEIGHT, WIDTH]
    for name in labels:
        assert torch.equal(found["labels"][name], expected["labels"][name][0]), name


def test_images_are_normalised_as_the_processor_says(dataset):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    rows = MultiTaskDataset(dataset, make_tasks(), MSamProcessor(WIDTH, image_mean=mean, image_std=std))
    image = np.asarray(make_row(0)["image"]) / 255
    expected = torch.tensor((image - mean) / std).permute(2, 0, 1).float()
    torch.testing.assert_close(rows[0]["pixel_values"][:, :HEIGHT], expected, rtol=0, atol=1e-5)


def test_missing_columns_and_nulls_are_unlabelled():
    rows = [make_row(0), {**make_row(1), "segmentation": None, "depth": None}]
    data = make_dataset(rows, ["image", "segmentation", "depth"])
    assert detect_tasks(data)["semantic"].num_channels == 4
    batch = collate([MultiTaskDataset(data, make_tasks(), MSamProcessor(32))[index] for index in range(2)])
    assert set(batch) == {"pixel_values", "labels"}
    for name, spec in make_tasks().items():
        losses = [
            task_loss(spec, torch.randn(1, spec.num_channels, 8, 8), batch["labels"][name][i : i + 1]).item()
            for i in range(2)
        ]
        assert (losses[0] > 0) == (name in ("semantic", "depth"))
        assert losses[1] == 0


def test_images_of_other_modes_and_float_images():
    row = make_row(0)
    rgba = {**row, "image": row["image"].convert("RGBA")}
    floats = {**row, "image": (np.array(row["image"]) / 255).transpose(2, 0, 1).astype(np.float32)}
    features = datasets.Features({"image": datasets.Array3D((3, HEIGHT, WIDTH), "float32")})
    processor = MSamProcessor(32)
    tasks = {"depth": TaskSpec("depth")}
    expected = MultiTaskDataset(make_dataset([row]), tasks, processor)[0]["pixel_values"]
    assert torch.equal(MultiTaskDataset(make_dataset([rgba]), tasks, processor)[0]["pixel_values"], expected)
    array = datasets.Dataset.from_dict({"image": [floats["image"]]}, features=features)
    assert torch.equal(MultiTaskDataset(array, tasks, processor)[0]["pixel_values"], expected)


def test_flip():
    labels = {
        "depth": torch.rand(1, 4, 6) + 1,
        "normals": torch.randn(3, 4, 6),
        "semantic": torch.randint(0, 4, (4, 6)),
    }
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    flip = Augmentation(scales=(1.0,), flip_probability=1.0)
    found_image, found = flip(np.random.default_rng(0), image, labels, make_tasks())
    assert (found_image == image[:, ::-1]).all()
    assert torch.equal(found["depth"], labels["depth"].flip(-1))
    assert torch.equal(found["semantic"], labels["semantic"].flip(-1))
    assert torch.equal(found["normals"], labels["normals"].flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None])


def test_scale_crop_moves_image_and_labels_together_and_brings_them_closer():
    """The image, the classes and the depth all show the column they came from."""
    height, width, scale = 60, 90, 1.5
    columns = torch.arange(width).expand(height, width)
    image = np.stack([columns.numpy().astype(np.uint8)] * 3, axis=-1)
    labels = {"semantic": columns.clone(), "depth": columns[None].float() + 1}
    specs = {"semantic": TaskSpec("semantic", width), "depth": TaskSpec("depth")}
    zoom = Augmentation(scales=(scale,), flip_probability=0.0)
    starts = set()
    for seed in range(5):
        found_image, found = zoom(np.random.default_rng(seed), image, labels, specs)
        assert found_image.shape == image.shape
        assert found["depth"].shape == (1, height, width)
        shown = found_image[..., 0].astype(float)
        assert np.abs(shown - found["semantic"].numpy()).max() <= 1
        assert np.abs(shown - (found["depth"][0].numpy() * scale - 1)).max() <= 1
        assert shown.max() - shown.min() == pytest.approx(width / scale - 1, abs=1)
        starts.add(shown.min())
    assert len(starts) > 1


def test_randomness_depends_on_seed_epoch_and_row_alone(dataset):
    def rows(seed=0, epoch=0):
        data = MultiTaskDataset(dataset, make_tasks(), MSamProcessor(32), Augmentation(), seed=seed)
        data.set_epoch(epoch)
        return data

    def same(a, b):
        return torch.equal(a["pixel_values"], b["pixel_values"]) and all(
            torch.equal(a["labels"][name], b["labels"][name]) for name in a["labels"]
        )

    first = rows(epoch=3)
    forwards = [first[index] for index in range(3)]
    resumed = pickle.loads(pickle.dumps(rows(epoch=3)))
    assert all(same(resumed[index], forwards[index]) for index in (2, 0, 1))
    assert not all(same(rows(epoch=e)[0], forwards[0]) for e in range(3))
    assert not all(same(rows(seed=s, epoch=3)[0], forwards[0]) for s in range(1, 4))


def test_impossible_datasets(dataset):
    processor = MSamProcessor(32)
    with pytest.raises(ValueError, match="unknown task 'far'"):
        MultiTaskDataset(dataset, {"far": TaskSpec("depth")}, processor)
    with pytest.raises(ValueError, match="'depth' is of the kind 'depth', got 'binary'"):
        MultiTaskDataset(dataset, {"depth": TaskSpec("binary")}, processor)
    with pytest.raises(ValueError, match="no column 'image'"):
        MultiTaskDataset(dataset.select_columns(["depth"]), {"depth": TaskSpec("depth")}, processor)
    with pytest.raises(ValueError, match=r"0\.5"):
        Augmentation(scales=(0.5,))
    with pytest.raises(IndexError):
        MultiTaskDataset(dataset, {"depth": TaskSpec("depth")}, processor)[3]


def test_load_folder_of_parquet(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    splits = load_multitask_dataset(folder)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1}
    assert detect_tasks(splits) == make_tasks()


def test_load_what_save_to_disk_wrote(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(validation=dataset).save_to_disk(tmp_path / "dict")
    assert len(load_multitask_dataset(str(tmp_path / "one"))["train"]) == 3
    with pytest.raises(ValueError, match=r"no split 'train', only \['validation'\]"):
        load_multitask_dataset(tmp_path / "dict")


def test_load_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_multitask_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_multitask_dataset("./nowhere")
    with pytest.raises(ValueError, match="no parquet"):
        load_multitask_dataset(tmp_path)

    def not_found(name):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(FileNotFoundError, match=r"'someone/nothing'.*no such dataset"):
        load_multitask_dataset("someone/nothing")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos are not in ../shared")
def test_real_photos():
    splits = load_multitask_dataset(PHOTOS)
    tasks = detect_tasks(splits)
    assert list(tasks) == ["semantic", "depth", "normals"]
    assert tasks["semantic"].num_channels == 19
    rows = MultiTaskDataset(splits["train"], tasks, MSamProcessor(64), Augmentation(), seed=1)
    batch = collate([rows[index] for index in range(4)])
    labelled = {
        name: spec.task_kind.labelled(batch["labels"][name], spec.ignore_index).flatten(1).any(1).tolist()
        for name, spec in tasks.items()
    }
    assert labelled["semantic"] == [True, True, False, False]
    assert labelled["depth"] == labelled["normals"] == [False, False, True, True]
    normals = batch["labels"]["normals"].norm(dim=1)
    assert ((normals - 1).abs().lt(1e-4) | normals.eq(0)).all()


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_collate_names_the_row_without_labels(rows):
    pixels = torch.zeros(3, 8, 8)
    labels = [{"depth": torch.ones(1, 8, 8)}, {}]
    with pytest.raises(ValueError, match=f"row {rows.index(1)} of the batch has no labels of 'depth'"):
        collate([{"pixel_values": pixels, "labels": labels[row]} for row in rows])


def test_the_processor_that_was_given_prepares_the_images():
    class Inverted(MSamProcessor):
        def pixel_batch(self, arrays):
            batch = super().pixel_batch([255 - array for array in arrays])
            return batch

    rows, tasks = make_dataset([make_row(0)]), {"depth": TaskSpec("depth")}
    given = Inverted(32, tasks={"other": TaskSpec("depth")})
    item = MultiTaskDataset(rows, tasks, given)[0]
    plain = MultiTaskDataset(rows, tasks, MSamProcessor(32))[0]
    assert not torch.equal(item["pixel_values"], plain["pixel_values"])
    assert torch.equal(item["labels"]["depth"], plain["labels"]["depth"])


@pytest.mark.parametrize("to_square", [False, True])
def test_labels_lie_where_their_image_does(to_square):
    """Padded or stretched: an image that is its own depth map, which the processor prepares as it does the dataset's rows."""
    assert HEIGHT != WIDTH
    rng = np.random.default_rng(0)
    grey = np.repeat(np.repeat(rng.integers(50, 200, (HEIGHT // 4, WIDTH // 4), dtype=np.uint8), 4, 0), 4, 1)
    image, depth = np.stack([grey] * 3, axis=-1), grey[None].astype("float32")
    tasks = {"depth": TaskSpec("depth")}
    processor = MSamProcessor(64, tasks, image_mean=[0, 0, 0], image_std=[1, 1, 1], to_square=to_square)
    item = MultiTaskDataset([{"image": image, "depth": depth}], tasks, processor)[0]
    batch = processor([image], [{"depth": depth}])
    assert torch.equal(item["labels"]["depth"], batch["labels"]["depth"][0])
    assert torch.equal(item["pixel_values"], batch["pixel_values"][0])
    label, pixels = item["labels"]["depth"][0], 255 * item["pixel_values"][0]
    assert ((label > 0).all() if to_square else (label == 0).any()) and (
        label[label > 0] - pixels[label > 0]
    ).abs().max() < 2


def test_an_image_is_converted_once(monkeypatch):
    from peft_talora.data import rows as module

    calls = []
    monkeypatch.setattr(module, "image_array", lambda image: calls.append(1) or image_array(image))
    monkeypatch.setattr("peft_talora.msam.processing.image_array", lambda image: calls.append(1) or image_array(image))
    MultiTaskDataset(make_dataset([make_row(0)]), {"depth": TaskSpec("depth")}, MSamProcessor(32))[0]
    assert calls == [1]


def test_metrics_at_the_labels_own_resolution():
    """As if the predictions of post_process were compared with the rows' own maps, by hand."""
    tasks = {"semantic": TaskSpec("semantic", 4), "depth": TaskSpec("depth")}
    rows = make_dataset([make_row(0), make_row(1)])
    processor = MSamProcessor(16, tasks)
    dataset = MultiTaskDataset(rows, tasks, processor, own_size=True)
    batch = collate_own_size([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    logits = {name: torch.randn(2, spec.num_channels, 8, 8) for name, spec in tasks.items()}
    metrics = MultiTaskMetrics(tasks)
    metrics.update_images(logits, batch["labels"], processor.restore)
    found = metrics.compute()

    sizes = [dataset[index]["original_size"] for index in range(2)]
    maps = processor.post_process(SimpleNamespace(logits=logits), sizes)
    errors, hits = [], []
    for index in range(2):
        depth = np.asarray(rows[index]["depth"], dtype=np.float64).reshape(sizes[index].tolist())
        known = np.isfinite(depth) & (depth > 0)
        errors.append(np.abs(maps[index]["depth"].numpy() - depth)[known])
        classes = np.asarray(rows[index]["segmentation"])
        known = (classes >= 0) & (classes != 255)
        hits.append((maps[index]["semantic"].numpy() == classes)[known])
    assert found["depth"]["abs_err"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)
    assert found["semantic"]["pixel_accuracy"] == pytest.approx(np.concatenate(hits).mean(), rel=1e-6)


class TestDoubtfulLabels:
    @pytest.fixture(autouse=True)
    def nothing_doubted_yet(self):
        doubts.forget()

    def warnings_of(self, mask):
        row = {**make_row(0), "saliency": mask}
        augment = Augmentation(scales=(4.0,))
        tasks = {"saliency": TaskSpec("binary")}
        dataset = MultiTaskDataset(make_dataset([row] * 6), tasks, MSamProcessor(32), augment=augment)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            items = [dataset[index]["labels"]["saliency"] for index in range(len(dataset))]
        return [str(warning.message) for warning in found], items

    def test_a_mask_of_0_and_255_is_warned_of_once(self):
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[8:16, 8:16] = 255
        (message,), _ = self.warnings_of(mask)
        assert "divide by 255" in message

    def test_a_crop_without_positives_is_no_reason(self):
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[:, ::2], mask[0, 1] = 255, 1
        found, items = self.warnings_of(mask)
        # most crops look as the mask of the test above
        assert sum(set(item.unique().tolist()) == {0, 255} for item in items) >= 3
        assert found == []
