"""The thermal and the acoustic camera: the same rooms as the photos, and the physics that their names promise."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("embreex")
datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import scenes  # noqa: E402
from cameras import CAMERAS, sampling, thermal, ultrasound  # noqa: E402

SIZE = 48
OTHERS = ("thermal", "ultrasound")
PHOTO_MEANS = [[[182.3, 170.8, 192.3], [179.1, 153.4, 181.8]], [[164.7, 120.5, 146.3], [172.2, 134.8, 156.6]]]


@pytest.fixture(autouse=True)
def isolated_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def edge_strength(image: np.ndarray, here: np.ndarray) -> float:
    grey = image.mean(2)
    return np.hypot(*np.gradient(grey))[here].mean()


def one_sphere(depth: float = 2.0) -> tuple:
    """A ball of half a metre in front of a level camera, and nothing else."""
    from rooms.layout import Camera, Surface
    from rooms.shapes import CLASSES, shape_mesh
    from rooms.textures import random_texture
    from rooms.tracing import Tracer

    vertices, faces = shape_mesh("sphere", (0.5,))
    offset = np.array([0, depth, 0.0])
    texture = random_texture(np.random.default_rng(0), ["plain"], 0.6)
    ball = Surface(CLASSES.index("sphere"), (0.5,), np.eye(3), offset, vertices + offset, faces, texture)
    camera = Camera(np.zeros(3), np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]]), 0.5)
    return [ball], camera, Tracer([ball])


def test_photos_are_what_the_small_sam_was_pretrained_on():
    # means over quarters of the picture, as the first version of the renderer drew it; other machines round otherwise
    image = scenes.render_scene(scenes.scene_seed("pretrain", 0), SIZE)["image"].astype(float)
    means = image.reshape(2, 24, 2, 24, 3).mean((1, 3))
    np.testing.assert_allclose(means, PHOTO_MEANS, atol=0.5)


@pytest.mark.parametrize("camera", OTHERS)
def test_the_camera_changes_the_image_and_nothing_else(camera):
    photo, other = scenes.render_scene(3, SIZE), scenes.render_scene(3, SIZE, camera)
    again, next_one = scenes.render_scene(3, SIZE, camera), scenes.render_scene(4, SIZE, camera)
    for name in photo:
        assert np.array_equal(photo[name], other[name]) == (name != "image"), name
    np.testing.assert_array_equal(other["image"], again["image"])
    assert other["image"].shape == (SIZE, SIZE, 3)
    assert other["image"].dtype == np.uint8
    assert (other["image"] != next_one["image"]).mean() > 0.3


@pytest.mark.parametrize("camera", CAMERAS)
def test_contours_of_things_are_in_the_picture(camera):
    on, off = [], []
    for seed in range(4):
        row = scenes.render_scene(seed, 64, camera)
        inside = row["edge"] == 0
        on.append(edge_strength(row["image"], ~inside))
        off.append(edge_strength(row["image"], inside))
    # speckle has gradients everywhere
    assert np.mean(on) > (1.05 if camera == "ultrasound" else 1.5) * np.mean(off)


def test_an_unknown_camera_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'infrared'.*photo, thermal, ultrasound"):
        scenes.render_scene(0, SIZE, "infrared")
    with pytest.raises(ValueError, match="'infrared'"):
        scenes.load_scenes("test", 1, SIZE, cache_dir=tmp_path, camera="infrared")
    assert not list(tmp_path.iterdir())


def test_every_camera_has_files_of_its_own(tmp_path):
    for _ in range(2):
        for camera in CAMERAS:
            rows = scenes.load_scenes("test", 1, SIZE, cache_dir=tmp_path, camera=camera).with_format("numpy")
            expected = scenes.render_scene(scenes.scene_seed("test", 0), SIZE, camera)
            np.testing.assert_array_equal(rows[0]["image"], expected["image"])
    assert len(list(tmp_path.rglob("*.parquet"))) == len(CAMERAS)
    # photos that were rendered before there were other cameras are found
    assert (tmp_path / f"v1-1x{SIZE}px-seed0" / "test-00000-of-00001.parquet").exists()


def test_command_line_knows_the_cameras(tmp_path):
    scenes.main(["--output", str(tmp_path), "--test", "1", "--size", "32", "--num-proc", "1", "--camera", "thermal"])
    rows = datasets.load_dataset(str(tmp_path), split="test").with_format("numpy")
    np.testing.assert_array_equal(
        rows[0]["image"], scenes.render_scene(scenes.scene_seed("test", 0), 32, "thermal")["image"]
    )


def test_blur_is_a_convolution_with_a_gaussian():
    rng = np.random.default_rng(0)
    image, sigma = rng.random((9, 11)), 1.2
    steps = np.arange(-4, 5)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    mirrored = np.pad(image, 4, mode="reflect")
    expected = np.zeros_like(image)
    for y, down in zip(steps, weights, strict=True):
        for x, across in zip(steps, weights, strict=True):
            expected += down * across * mirrored[4 + y : 13 + y, 4 + x : 15 + x]
    np.testing.assert_allclose(sampling.blur(image, sigma), expected, atol=1e-12)
    np.testing.assert_array_equal(sampling.blur(image, 0), image)


def test_emission_and_reflection_are_one_and_fall_and_rise_with_the_angle():
    cosine = np.linspace(0, 1, 20)
    share = thermal.directional_emissivity(np.full(20, 0.9), cosine)
    # Fresnel's reflectance after Schlick, of which the emissivity is the rest
    np.testing.assert_allclose(1 - share, 0.1 + 0.9 * (1 - cosine) ** 5)
    assert (np.diff(share) >= 0).all()


def test_a_hot_ball_looks_cooler_towards_its_rim_and_mirrors_the_cold_sky_above(monkeypatch):
    seen = {}
    monkeypatch.setattr(thermal, "sense", lambda rng, kelvins: seen.setdefault("kelvins", kelvins))
    monkeypatch.setattr(thermal, "slow_changes", lambda surfaces, hits: np.zeros(len(hits["owner"])))
    hot = None
    for seed in range(20):
        seen.clear()
        thermal.draw_thermal(np.random.default_rng(seed), *one_sphere(), 65)
        hot = seen["kelvins"]
        if hot[32, 32] > hot[64, 32] + 5:
            break
    assert hot[32, 32] > hot[32, 46] > hot[32, 48]
    # equally far from the middle, above and below: the upper half mirrors the sky
    assert hot[32 + 14, 32] > hot[32 - 14, 32]


def test_the_sensor_has_the_same_fixed_pattern_in_every_picture():
    flat = np.full((SIZE, SIZE), 290.0)
    pictures = np.stack([thermal.sense(np.random.default_rng(seed), flat) for seed in range(40)])
    mean = pictures.mean(0) - pictures.mean()
    columns = mean.mean(0)
    # what is left of the noise after 40 pictures is a small part of the pattern
    assert columns.std() > 0.7 * thermal.COLUMN_PATTERN
    assert (mean - columns).std() > 0.7 * thermal.PIXEL_PATTERN
    assert not np.array_equal(pictures[0], pictures[1])


def test_colors_go_from_cold_to_hot_along_the_palette():
    ramp = np.linspace(280, 300, 101)[:, None]
    colors = thermal.false_colors(ramp)[:, 0]
    np.testing.assert_array_equal(colors[[0, -1]], [[0, 0, 0], [255, 255, 255]])
    assert (np.diff(colors.astype(int).sum(1)) >= 0).all()
    # hardly any contrast is not blown up to all colours
    assert np.ptp(thermal.false_colors(np.linspace(290, 290.5, 20)[:, None]), axis=0).max() < 100


def test_reflection_is_that_of_two_impedances():
    np.testing.assert_allclose(ultrasound.reflection(np.array([1.48, 4.44]), 1.48), [0, 0.5])
    ramp = np.log(np.linspace(2.0, 2.2, 21))[:, None] * np.ones(5)
    # the reflection of a small step dZ is dZ / 2Z
    np.testing.assert_allclose(ultrasound.contour_reflection(ramp)[10], 0.01 / 2.1 / 2, rtol=1e-3)


def test_fully_developed_speckle_has_rayleigh_amplitudes():
    field = ultrasound.speckle(np.random.default_rng(0), np.full((200, 200), 0.7), (1.0, 1.5))
    assert np.sqrt((np.abs(field) ** 2).mean()) == pytest.approx(0.7, rel=0.05)
    # mean over standard deviation of a Rayleigh distribution
    assert np.abs(field).mean() / np.abs(field).std() == pytest.approx(1.91, rel=0.05)
    # neighbours across look more alike than neighbours below
    power = np.abs(field) - np.abs(field).mean()
    assert (power[:, 1:] * power[:, :-1]).mean() > (power[1:] * power[:-1]).mean() > 0.1 * power.var()


def test_echoes_fade_with_distance_and_are_strongest_at_a_right_angle(monkeypatch):
    seen = []
    monkeypatch.setattr(ultrasound, "compress", lambda rng, echo: seen.append(echo))
    for depth in (2.0, 4.0):
        ultrasound.draw_ultrasound(np.random.default_rng(1), *one_sphere(depth), 65)
    near, far = seen
    assert near[30:35, 30:35].mean() > 1.5 * far[30:35, 30:35].mean()
    assert near[28:37, 28:37].mean() > near[28:37, 44:47].mean()
    assert near[0, 0] == 0


def test_loud_echoes_are_bright_and_silence_is_dark():
    echo = np.tile(np.logspace(-6, 0, 61), (30, 1))
    grey = ultrasound.compress(np.random.default_rng(0), echo)
    assert grey[:, -1].min() > 240
    assert grey[:, :5].mean() < 60
    assert (grey[..., 0] == grey[..., 2]).all()
