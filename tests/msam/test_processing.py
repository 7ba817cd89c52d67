from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shared_folder import PHOTOS
from transformers import SamImageProcessorPil

from peft_talora.losses import task_loss
from peft_talora.msam.configuration import MSamConfig
from peft_talora.msam.labels import label_tensor, resize_label
from peft_talora.msam.processing import MSamProcessor, post_process, reshaped_size
from peft_talora.msam.tasks import TaskSpec

SIZE = 64
TASKS = {
    "semantic": TaskSpec("semantic", 5),
    "mask": TaskSpec("binary"),
    "depth": TaskSpec("depth"),
    "normals": TaskSpec("normals"),
    "flow": TaskSpec("regression", 2),
}


def sam_processor(size=SIZE):
    return SamImageProcessorPil(size={"longest_edge": size}, pad_size={"height": size, "width": size})


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unlabelled(name, labels):
    spec = TASKS[name]
    return ~spec.task_kind.labelled(labels, spec.ignore_index)


def test_images_are_what_sams_processor_makes():
    images = [noise(37, 53), noise(100, 41, 1), noise(64, 64, 2), noise(9, 20, 3)]
    expected = sam_processor()(images, return_tensors="pt")
    found = MSamProcessor(SIZE)(images)
    assert found["pixel_values"].shape == (4, 3, SIZE, SIZE)
    for key in ("pixel_values", "original_sizes", "reshaped_input_sizes"):
        assert torch.equal(found[key], expected[key]), key


def test_own_mean_and_std():
    image = noise(64, 64)
    found = MSamProcessor(SIZE, image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 1.0, 2.0])(image)["pixel_values"][0]
    expected = (image.transpose(2, 0, 1) / 255 - [[[0.5]], [[0.25]], [[0.0]]]) / [[[0.5]], [[1.0]], [[2.0]]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_every_form_of_an_image_gives_the_same():
    image = noise(30, 50)
    floats = (image.astype(np.float32) / 255).transpose(2, 0, 1)
    rgba = Image.fromarray(image).convert("RGBA")
    forms = [image, Image.fromarray(image), rgba, floats, torch.from_numpy(floats), image.transpose(2, 0, 1)]
    pixels = MSamProcessor(SIZE)(forms)["pixel_values"]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])
    grey = Image.fromarray(image[..., 0])
    found = MSamProcessor(SIZE)([grey, np.stack([image[..., 0]] * 3, axis=-1)])["pixel_values"]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.full((3, 4, 4), 7.0), "to 7"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        ([], "empty"),
        (np.zeros((1, 2000, 3), np.uint8), "1 x 2000 pixels"),
    ],
)
def test_impossible_image(image, message):
    with pytest.raises(ValueError, match=message):
        MSamProcessor(SIZE)(image)


def test_size_is_rounded_as_sams_processor_does():
    processor = sam_processor(128)
    rng = np.random.default_rng(0)
    for height, width in [(288, 384), (375, 500), (500, 334), (128, 128), *rng.integers(1, 700, (40, 2)).tolist()]:
        expected = processor._get_preprocess_shape((height, width), 128)
        assert reshaped_size((height, width), 128) == expected


def test_classes_are_resized_as_pil_does_and_padded_with_unlabelled():
    labels = np.random.default_rng(0).integers(0, 5, (37, 53)).astype(np.int32)
    batch = MSamProcessor(SIZE, TASKS)(noise(37, 53), {"semantic": labels, "mask": labels % 2})
    height, width = batch["reshaped_input_sizes"][0].tolist()
    expected = np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    found = batch["labels"]["semantic"]
    assert found.dtype == torch.int64
    assert (found[0, :height, :width].numpy() == expected).all()
    assert (batch["labels"]["mask"][0, 0, :height, :width].numpy() == expected % 2).all()
    for name in ("semantic", "mask"):
        assert unlabelled(name, batch["labels"][name])[0, height:].all()


def test_missing_labels_and_padding_are_unlabelled():
    ones = {name: np.ones((spec.num_channels, 40, 20)) for name, spec in TASKS.items() if name != "semantic"}
    batch = MSamProcessor(SIZE, TASKS)([noise(40, 20), noise(20, 40)], [{**ones, "flow": None}, {}])
    assert set(batch["labels"]) == set(TASKS)
    for name, labels in batch["labels"].items():
        missing = unlabelled(name, labels)
        assert missing[1].all()
        assert missing[0, :, 32:].all()
        assert missing[0, :, :32].all() == (name in ("semantic", "flow"))
        assert labels.dtype == (torch.int64 if name == "semantic" else torch.float32)
        # and the losses agree
        assert task_loss(TASKS[name], torch.randn(1, TASKS[name].num_channels, 16, 16), labels[1:]).item() == 0
    assert batch["labels"]["flow"].isnan().all()


def test_holes_in_depth_do_not_bleed():
    depth = np.full((128, 128), 7.0)
    rng = np.random.default_rng(0)
    depth[rng.random(depth.shape) < 0.4] = 0
    depth[5, 5], depth[9, 9] = np.nan, -1
    depth[64:, 64:] = 0
    found = MSamProcessor(SIZE, {"depth": TASKS["depth"]})(noise(128, 128), {"depth": depth})["labels"]["depth"][0, 0]
    assert (found[33:, 33:] == 0).all()  # the hole stays one; at its edge the filter reaches labelled pixels
    assert (found[:32] > 0).float().mean() > 0.99
    torch.testing.assert_close(found[found > 0], torch.full_like(found[found > 0], 7.0))


def test_depth_is_a_mean():
    depth = torch.arange(64.0).expand(1, 64, 64) + 1
    half = resize_label(TASKS["depth"], depth, (32, 32))
    torch.testing.assert_close(half[0, :, 1:-1], (2 * torch.arange(32.0) + 1.5)[1:-1].expand(32, 30))


def test_normals_keep_unit_length_and_ignore_holes():
    normals = F.normalize(torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(0)), dim=0)
    normals[:, 10:30, 20:40] = 0
    normals[0, 0, 0] = torch.nan
    for size in [(25, 35), (75, 105), (50, 41)]:
        label = label_tensor("normals", TASKS["normals"], normals, (50, 70))
        found = resize_label(TASKS["normals"], label, size)
        length = found.norm(dim=0)
        assert ((length - 1).abs().lt(1e-5) | length.eq(0)).all()
        share = 20 * 20 / (50 * 70)
        assert 0.5 * share < length.eq(0).float().mean() < 1.2 * share
    opposite = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]).reshape(3, 1, 2)
    assert resize_label(TASKS["normals"], opposite, (1, 1)).eq(0).all()


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (64, 64), (100, 30)])
def test_label_round_trip(size):
    """A smooth label, taken as the logits, comes back through post_process."""
    height, width = size
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    depth = 2 + y + 0.5 * x
    normals = np.stack([np.sin(x), np.sin(y), -np.cos(x)])
    normals /= np.linalg.norm(normals, axis=0)
    classes = (x * 5).astype(np.int64)
    processor = MSamProcessor(SIZE, TASKS)
    batch = processor(noise(*size), {"depth": depth, "normals": normals, "semantic": classes})
    labels = batch["labels"]
    one_hot = F.one_hot(labels["semantic"].clamp(max=5), 6)[..., :5].movedim(-1, 1).float()
    output = SimpleNamespace(logits={"depth": labels["depth"], "normals": labels["normals"], "semantic": one_hot})
    (found,) = processor.post_process(output, batch["original_sizes"])
    assert found["depth"].shape == size
    assert np.abs(found["depth"].numpy() - depth).max() < 0.05
    assert np.abs(found["normals"].numpy() - normals).max() < 0.05
    assert found["semantic"].dtype == torch.int64
    assert (found["semantic"].numpy() == classes).mean() > 0.9


def test_post_process_is_sams_upscaling():
    sizes = [(37, 53), (90, 20)]
    logits = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    reshaped = [reshaped_size(size, SIZE) for size in sizes]
    expected = sam_processor().post_process_masks(logits.split(1), sizes, reshaped, binarize=False)
    found = post_process({"mask": logits}, TASKS, torch.tensor(sizes), SIZE)
    for index in range(2):
        torch.testing.assert_close(found[index]["mask"], expected[index][0, 0].sigmoid())


def test_post_process_forms():
    size = (30, 50)
    logits = {name: torch.randn(1, spec.num_channels, 16, 16) for name, spec in TASKS.items()}
    (found,) = post_process(logits, TASKS, [size], SIZE)
    assert found["semantic"].shape == size
    assert found["semantic"].dtype == torch.int64
    assert found["mask"].shape == size
    assert found["mask"].min() >= 0
    assert found["mask"].max() <= 1
    assert found["depth"].shape == size
    assert found["depth"].min() == 0
    torch.testing.assert_close(found["normals"].norm(dim=0), torch.ones(size))
    assert found["flow"].shape == (2, *size)


def test_rows_go_to_their_images():
    logits = {"depth": torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, 16, 16)}
    logits["mask"] = torch.zeros(1, 1, 16, 16)
    index = {"depth": torch.tensor([2, 0]), "mask": torch.tensor([1])}
    processor = MSamProcessor(SIZE, TASKS)
    output = SimpleNamespace(logits=logits, image_index=index)
    found = processor.post_process(output, [(10, 20), (20, 10), (16, 16)])
    assert [sorted(image) for image in found] == [["depth"], ["mask"], ["depth"]]
    torch.testing.assert_close(found[2]["depth"], torch.ones(16, 16))
    torch.testing.assert_close(found[0]["depth"], torch.full((10, 20), 2.0))
    only = processor.post_process(output, [(10, 20), (20, 10), (16, 16)], tasks=["mask"])
    assert [sorted(image) for image in only] == [[], ["mask"], []]
    with pytest.raises(ValueError, match=r"\['normals'\]"):
        processor.post_process(output, [(10, 20)] * 3, tasks=["normals"])


def test_post_process_counts_images():
    with pytest.raises(ValueError, match="'depth' has logits for 2 images, expected 1"):
        post_process({"depth": torch.zeros(2, 1, 4, 4)}, TASKS, [(4, 4)], SIZE)
    with pytest.raises(ValueError, match="'far'"):
        post_process({"far": torch.zeros(1, 1, 4, 4)}, TASKS, [(4, 4)], SIZE)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"depth": np.ones((4, 4))}, r"'depth'.*\(1, 30, 50\).*\(1, 4, 4\)"),
        ({"semantic": np.ones((30, 50))}, "'semantic'.*integer"),
        ({"semantic": np.full((30, 50), 5)}, "'semantic'.*5"),
        ({"far": np.ones((30, 50))}, r"\['far'\]"),
        ([{}, {}], "1 images and labels for 2"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(ValueError, match=message):
        MSamProcessor(SIZE, TASKS)(noise(30, 50), labels)


def test_labels_need_tasks():
    with pytest.raises(ValueError, match="knows no tasks"):
        MSamProcessor(SIZE)(noise(30, 50), {})


def test_saved_and_loaded(tmp_path):
    processor = MSamProcessor(SIZE, TASKS, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path / "new")
    again = MSamProcessor.from_pretrained(tmp_path / "new")
    assert again.to_dict() == processor.to_dict()
    assert list(again.tasks) == list(TASKS)
    sam_processor().save_pretrained(tmp_path / "sam")
    with pytest.raises(ValueError, match="SamImageProcessor"):
        MSamProcessor.from_pretrained(tmp_path / "sam")
    with pytest.raises(OSError):
        MSamProcessor.from_pretrained(tmp_path)


def test_loading_may_change_what_was_saved(tmp_path):
    MSamProcessor(SIZE, TASKS).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert MSamProcessor.from_pretrained(tmp_path, image_size=32, tasks={"depth": TaskSpec("depth")}).to_dict() == (
        MSamProcessor(32, {"depth": TaskSpec("depth")}).to_dict()
    )
    with pytest.raises(TypeError, match="sharpness"):
        MSamProcessor.from_pretrained(tmp_path, sharpness=2)


def test_from_model():
    config = MSamConfig(vision_config={"image_size": 96}, tasks=[{"name": "far", "kind": "depth"}])
    processor = MSamProcessor.from_model(SimpleNamespace(config=config))
    assert processor.image_size == 96
    assert processor.tasks == {"far": TaskSpec("depth")}


def test_batch_moves_as_a_whole():
    batch = MSamProcessor(SIZE, TASKS)(noise(30, 50), {}).to("meta", torch.float16)
    assert batch["pixel_values"].dtype == torch.float16
    assert all(labels.device.type == "meta" for labels in batch["labels"].values())
    assert batch["labels"]["depth"].dtype == torch.float32


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos are not in ../shared")
def test_real_photos():
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(next(PHOTOS.glob("*.parquet")))
    tasks = {"semantic": TaskSpec("semantic", 21), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
    column = {"semantic": "segmentation", "depth": "depth", "normals": "normal"}
    processor = MSamProcessor(128, tasks)
    for row in table.to_pylist():
        labels = {name: np.array(row[column[name]]) for name in tasks}
        batch = processor(np.array(row["image"]), labels)
        assert batch["reshaped_input_sizes"].tolist() == [[96, 128]]
        valid = labels["depth"] > 0
        depth = batch["labels"]["depth"]
        assert (depth[0, 0, 96:] == 0).all()
        if valid.any():
            assert depth[depth > 0].min() >= labels["depth"][valid].min() - 1e-4
            assert depth.max() <= labels["depth"].max() + 1e-4
            assert depth[depth > 0].mean() == pytest.approx(labels["depth"][valid].mean(), rel=0.05)
        seen = set(np.unique(labels["semantic"])) | {255}
        assert set(batch["labels"]["semantic"].unique().tolist()) <= seen


@pytest.mark.parametrize("size", [(333, 70), (33, 700)])
def test_large_images_are_restored_in_strips(size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(1, spec.num_channels, 16, 16, generator=generator) for name, spec in TASKS.items()}
    (whole,) = post_process(logits, TASKS, [size], SIZE)
    monkeypatch.setattr("peft_talora.msam.geometry._STRIP_VALUES", 2000)
    (strips,) = post_process(logits, TASKS, [size], SIZE)
    for name, values in whole.items():
        assert strips[name].dtype == values.dtype
        if name == "semantic":
            assert (strips[name] == values).float().mean() > 0.999
        else:
            torch.testing.assert_close(strips[name], values, rtol=1e-4, atol=1e-4)
