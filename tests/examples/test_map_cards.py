"""Maps as HTML: the pictures in it, decoded, and what the legends say."""

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from map_cards import cards, data_uri, layer
from PIL import Image
from predict import MASK_COLOR

from peft_talora import TaskSpec
from peft_talora.drawing import draw, palette

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)


def decode(address):
    return np.array(Image.open(BytesIO(b64decode(address.partition("base64,")[2]))))


def shown_map(html, task):
    return decode(re.search(f'data-task="{task}".*?<img src="([^"]+)"', html)[1])


def test_a_picture_comes_back_from_its_address():
    assert (decode(data_uri(IMAGE)) == IMAGE).all()


def test_a_map_is_laid_over_the_whole_picture_and_a_mask_where_it_is():
    depth = np.linspace(1, 3, 6).reshape(2, 3)
    found = layer(TaskSpec("depth"), depth, (1.0, 3.0))
    assert (found[..., :3] == draw(TaskSpec("depth"), depth, (1.0, 3.0))).all() and (found[..., 3] == 255).all()
    mask = np.array([[0.0, 0.2, 1.0]])
    assert layer(TaskSpec("binary"), mask, None).tolist() == [[[*MASK_COLOR, alpha] for alpha in (0, 51, 255)]]


def test_cards_hold_the_picture_and_the_maps():
    specs = {"depth": TaskSpec("depth"), "normals": TaskSpec("normals")}
    depth = np.random.default_rng(1).uniform(1, 3, (20, 28)).astype(np.float32)
    normals = np.random.default_rng(2).normal(size=(3, 20, 28)).astype(np.float32)
    html = cards(IMAGE, {"depth": depth, "normals": normals}, specs)
    low, high = np.percentile(depth, [2, 98])
    assert (shown_map(html, "depth")[..., :3] == draw(specs["depth"], depth, (low, high))).all()
    assert (shown_map(html, "normals")[..., :3] == draw(specs["normals"], normals)).all()
    assert f"<span>{low:.3g}</span><span>metres</span><span>{high:.3g}</span>" in html and "faces up" in html
    under = decode(re.search(r"--picture: url\(([^)]+)\)", html)[1])
    assert under.shape == IMAGE.shape and abs(under.mean() - IMAGE.mean()) < 3


def test_classes_are_named_as_they_are_frequent():
    spec = TaskSpec("semantic", 30, class_names=[f"<b>{index}</b>" for index in range(30)])
    values = np.zeros((20, 28), np.uint8)
    values[:2], values[0, :5] = 7, 3
    html = cards(IMAGE, {"semantic": values}, {"semantic": spec})
    found = re.findall(r'background: (#\w+)"></i>([^<]+)', html)
    colors = ["#" + bytes(palette(30)[index].tolist()).hex() for index in (0, 7, 3)]
    assert found == list(zip(colors, [f"&lt;b&gt;{index}&lt;/b&gt;" for index in (0, 7, 3)], strict=True))
    many = np.arange(560).reshape(20, 28).astype(np.int32) % 30
    assert "and 6 more" in cards(IMAGE, {"semantic": many}, {"semantic": spec})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TaskSpec("binary"), "<span>0</span><span>probability</span><span>1</span>"),
        (TaskSpec("regression", 1), "<span>1.99</span><span>value</span><span>2.01</span>"),
        (TaskSpec("regression", 2), '<div class="legend"></div>'),
    ],
)
def test_legends_of_other_kinds(spec, words):
    shape = (20, 28) if spec.kind == "binary" else (spec.num_channels, 20, 28)
    html = cards(IMAGE, {"other": np.full(shape, 0.5 if spec.kind == "binary" else 2.0, np.float32)}, {"other": spec})
    assert words in html
    if spec.kind == "binary":
        color = bytes(MASK_COLOR.astype(np.uint8).tolist()).hex()
        assert f"linear-gradient(to right, #{color}00, " in html and f", #{color}ff)" in html


def test_large_pictures_are_shown_smaller_with_the_legend_of_the_whole_map():
    image, values = np.zeros((40, 2100, 3), np.uint8), np.zeros((40, 2100), np.uint8)
    values[0, 1] = 2
    html = cards(image, {"semantic": values}, {"semantic": TaskSpec("semantic", 3)})
    assert shown_map(html, "semantic").shape == (20, 1024, 4) and "class 2" in html
