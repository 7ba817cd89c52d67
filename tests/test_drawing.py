import numpy as np
import pytest
import torch

from peft_talora.drawing import UNLABELLED, color_range, draw, palette
from peft_talora.msam.tasks import TaskSpec

GREY = tuple(int(value) for value in UNLABELLED)


def at(picture, y, x):
    return tuple(int(value) for value in picture[y, x])


def test_palette_is_fixed_and_distinguishable():
    colors = palette(40).astype(float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e9 * np.eye(40)
    assert distance.min() > 60
    assert np.linalg.norm(colors - UNLABELLED, axis=1).min() > 60
    assert (palette(5) == palette(40)[:5]).all()
    assert palette(1000).shape == (1000, 3)


def test_classes():
    labels = torch.tensor([[0, 3, -1], [3, 255, 1]])
    picture = draw(TaskSpec("semantic", 4), labels)
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 3, 3)
    assert at(picture, 0, 1) == at(picture, 1, 0) == tuple(palette(4)[3])
    assert at(picture, 0, 0) == tuple(palette(1)[0])
    assert at(picture, 0, 2) == at(picture, 1, 1) == GREY
    assert (draw(TaskSpec("parts", 4), torch.full((2, 2), -1)) == UNLABELLED).all()


def test_probability():
    picture = draw(TaskSpec("binary"), np.array([[[0.0, 1.0, 0.25], [255.0, np.nan, -1.0]]]))
    assert [at(picture, 0, x) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (64, 64, 64)]
    assert [at(picture, 1, x) for x in range(3)] == [GREY] * 3


def test_depth_gets_lighter_with_distance():
    depth = np.linspace(1.0, 3.0, 50)[None]
    picture = draw(TaskSpec("depth"), depth)
    lightness = picture[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert lightness[0] < 30
    assert lightness[-1] > 200


def test_depth_range_is_shared_and_unlabelled_is_grey():
    spec = TaskSpec("depth")
    label = draw(spec, np.array([[1.0, 2.0, 0.0, np.nan]]), value_range=(0.0, 4.0))
    prediction = draw(spec, np.array([[2.0, 9.0, 4.0, 1.0]]), value_range=(0.0, 4.0))
    assert at(label, 0, 1) == at(prediction, 0, 0)
    assert at(prediction, 0, 1) == at(prediction, 0, 2)
    assert at(label, 0, 2) == at(label, 0, 3) == GREY
    assert (draw(spec, np.zeros((1, 2, 2))) == UNLABELLED).all()


def test_normals_have_the_usual_colours():
    # x right, y down, z away: facing the camera, to the right, up, unlabelled
    vectors = np.array([[0, 0, -1], [2, 0, 0], [0, -1, 0], [0, 0, 0], [np.nan, 0, 1]], dtype=float)
    picture = draw(TaskSpec("normals"), vectors.T[:, None, :])
    expected = [(128, 128, 255), (255, 128, 128), (128, 255, 128), GREY, GREY]
    assert [at(picture, 0, x) for x in range(5)] == expected


def test_regression():
    one = draw(TaskSpec("regression", 1), np.array([[[2.0, 4.0, np.nan]]]))
    assert [at(one, 0, x) for x in range(3)] == [(0, 0, 0), (255, 255, 255), GREY]
    four = draw(TaskSpec("regression", 4), np.array([0.0, 0.5, 1.0, 9.0]).reshape(4, 1, 1), value_range=(0.0, 1.0))
    assert at(four, 0, 0) == (0, 128, 255)
    two = draw(TaskSpec("regression", 2), np.array([0.0, 1.0]).reshape(2, 1, 1))
    assert at(two, 0, 0) == (0, 255, 0)


@pytest.mark.parametrize(("kind", "shape"), [("depth", (2, 4, 4)), ("normals", (4, 4)), ("binary", (1, 1, 4, 4))])
def test_wrong_shape_is_named(kind, shape):
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        draw(TaskSpec(kind), np.zeros(shape))


def test_colour_scales_leave_stray_pixels_out():
    depth = np.linspace(1, 2, 1000)[None]
    depth[0, :2] = 1e6, 0.0
    low, high = color_range(TaskSpec("depth"), [depth])
    assert 1 < low < 1.05 and 1.95 < high < 2
    assert color_range(TaskSpec("semantic", 3), [depth]) is None
    assert color_range(TaskSpec("depth"), [np.zeros((1, 4))]) is None


def test_a_scale_is_that_of_all_maps_together():
    first, second = np.array([[1.0, 2.0]]), np.array([[[np.nan, 5.0]]])
    assert color_range(TaskSpec("regression", 1), [first, second], (0, 100)) == (1.0, 5.0)


@pytest.mark.parametrize("level", [0.0, 2.0, -300.0])
def test_a_constant_map_does_not_look_like_noise(level):
    values = level + 1e-9 * np.random.default_rng(0).standard_normal((20, 20))
    picture = draw(TaskSpec("regression", 1), values).astype(int)
    assert picture.max() - picture.min() <= 15
    # and beside a constant truth a prediction is not all black and white
    scale = color_range(TaskSpec("regression", 1), [np.full((4, 4), level)])
    assert scale[0] < level < scale[1]


def test_large_maps_are_drawn_as_small_ones(monkeypatch):
    rng = np.random.default_rng(0)
    maps = [
        (TaskSpec("semantic", 5), rng.integers(-1, 5, (30, 7))),
        (TaskSpec("depth"), rng.uniform(0, 4, (30, 7))),
        (TaskSpec("normals"), rng.standard_normal((3, 30, 7))),
        (TaskSpec("regression", 4), rng.standard_normal((4, 30, 7))),
    ]
    whole = [draw(spec, values) for spec, values in maps]
    monkeypatch.setattr("peft_talora.drawing._STRIP_PIXELS", 20)
    for (spec, values), expected in zip(maps, whole, strict=True):
        assert (draw(spec, values) == expected).all()
