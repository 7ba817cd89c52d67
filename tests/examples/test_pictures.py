"""predictions.png: what stands where, in which colours."""

from types import SimpleNamespace

import numpy as np
import pictures
import pytest
from peft import get_peft_model
from small_models import make_sam
from small_training import make_row
from training.shown import load_maps, predict_shown, save_maps, shown_items, shown_size

import peft_talora as pt
from peft_talora.drawing import color_range, draw

TASKS = {
    "semantic": pt.TaskSpec("semantic", num_channels=3, class_names=["floor", "wall", "thing"]),
    "depth": pt.TaskSpec("depth"),
    "normals": pt.TaskSpec("normals"),
}


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(*arguments)`: {title of a column: its pictures} of draw_predictions, and all other words."""

    def draw_it(*arguments):
        figures = []
        monkeypatch.setattr(pictures.plt, "close", figures.append)
        pictures.draw_predictions(*arguments)
        (figure,) = figures
        titles = [text.get_text() for text in figure.texts]
        shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
        words = [text.get_text() for axis in figure.axes if axis.legend_ for text in axis.legend_.get_texts()]
        words += [child.get_xlabel() for axis in figure.axes for child in axis.child_axes]
        return SimpleNamespace(figure=figure, titles=titles, pictures=shown, words=words)

    return draw_it


@pytest.fixture
def model():
    msam = pt.MSamForMultiTask.from_sam(make_sam(), TASKS)
    return get_peft_model(msam, pt.TALoraConfig(r=2))


def test_the_other_models_columns_stand_beside_the_models_own(model, drawn, tmp_path):
    processor, rows = pt.MSamProcessor.from_model(model), [make_row(seed, side=20) for seed in range(2)]
    items = shown_items(rows, TASKS, processor)
    own = predict_shown(model, items)
    other = [{name: values[..., ::-1, :].copy() for name, values in maps.items()} for maps in own]
    found = drawn(model, processor, rows, TASKS, tmp_path / "p.png", {"decoders only": other, "unknown": None})
    columns = ["truth", "decoders only", "prediction"]
    assert found.titles == ["image", "semantic", *columns, "depth", *columns, "normals", *columns]
    assert {" floor", " wall", " thing", "metres"} <= set(found.words)
    assert (tmp_path / "p.png").stat().st_size > 1000
    # two images, then truth, other and own of both, task after task
    grid = iter(found.pictures[2:])
    for name, spec in TASKS.items():
        truth = [item["labels"][name] for item in items]
        scale = color_range(spec, truth)
        for column in (truth, [maps[name] for maps in other], [maps[name] for maps in own]):
            for values in column:
                np.testing.assert_array_equal(next(grid), draw(spec, values, scale), err_msg=name)
    assert next(grid, None) is None


@pytest.mark.parametrize(("to_square", "shape"), [(False, (24, 32)), (True, (32, 32))])
def test_the_truth_is_where_the_image_lies(drawn, tmp_path, to_square, shape):
    tasks = {"depth": pt.TaskSpec("depth")}
    model = get_peft_model(pt.MSamForMultiTask.from_sam(make_sam(), tasks), pt.TALoraConfig(r=2))
    processor = pt.MSamProcessor(32, tasks, to_square=to_square)
    rows = [
        {"image": np.zeros((12, 16, 3), "uint8"), "depth": np.linspace(1, 2, 192, dtype="float32").reshape(1, 12, 16)}
    ]
    image, truth, *_ = drawn(model, processor, rows, tasks, tmp_path / "p.png").pictures
    label = shown_items(rows, tasks, processor)[0]["labels"]["depth"][..., : shape[0], :]
    assert image.shape == (12, 16, 3) and truth.shape == (*shape, 3)
    np.testing.assert_array_equal(truth, draw(tasks["depth"], label, color_range(tasks["depth"], [label])))


def test_pictures_touch_whatever_their_shape(model, drawn, tmp_path):
    rows = [make_row(0, side=20), {"image": np.zeros((3, 10, 40), "float32")}]
    processor = pt.MSamProcessor.from_model(model)
    found = drawn(model, processor, rows, TASKS, tmp_path / "p.png")
    assert "decoders only" not in found.titles
    boxes = [axis.get_position() for axis in found.figure.axes[:2]]
    width, height = found.figure.get_size_inches() * found.figure.dpi
    shapes = [(box.width * width / (box.height * height)) for box in boxes]
    assert shapes == pytest.approx([1.0, 4.0], rel=0.05)
    gap = (boxes[0].y0 - boxes[1].y1) * height
    assert 0 < gap < 10


def test_large_images_are_predicted_at_the_pictures_size():
    assert shown_size({"original_size": (1000, 2000)}) == (128, 256)
    assert shown_size({"original_size": (3, 5000)}) == (1, 256)
    assert shown_size({"original_size": (30, 20)}) == (30, 20)


def test_kept_maps(model, tmp_path):
    items = shown_items([make_row(0, side=20), make_row(1, side=20)], TASKS, pt.MSamProcessor.from_model(model))
    maps, path = predict_shown(model, items), tmp_path / "maps.npz"
    assert load_maps(path) is None
    save_maps(path, maps)
    loaded = load_maps(path)
    assert [list(found) for found in loaded] == [list(TASKS)] * 2
    for found, expected in zip(loaded, maps, strict=True):
        for name in TASKS:
            np.testing.assert_array_equal(found[name], expected[name])
    path.write_bytes(path.read_bytes()[:100])
    assert load_maps(path) is None
