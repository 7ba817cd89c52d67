"""The rendered rooms: labels agree with the geometry they were made from, files with what was rendered."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("embreex")
datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import scenes  # noqa: E402

SIZE = 48
SEEDS = range(6)


@pytest.fixture(scope="module")
def rendered() -> list[dict]:
    """Scenes, each with the surfaces and the camera it was made from and the world points behind its pixels."""
    rows = []
    for seed in SEEDS:
        row = scenes.render_scene(seed, SIZE)
        # The geometry is drawn first, so the same seed gives it again.
        surfaces, camera = scenes.random_scene(np.random.default_rng(seed))
        rays = camera.rays(SIZE).reshape(SIZE, SIZE, 3)
        points = camera.position + row["depth"][..., None] * rays
        rows.append({**row, "surfaces": surfaces, "camera": camera, "rays": rays, "points": points})
    return rows


@pytest.fixture(autouse=True)
def isolated_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_same_seed_same_scene_other_seed_other_scene(rendered):
    again, other = scenes.render_scene(0, SIZE), scenes.render_scene(1, SIZE)
    for name, values in again.items():
        np.testing.assert_array_equal(values, rendered[0][name])
    assert (again["image"] != other["image"]).mean() > 0.5


def test_size_changes_the_sampling_not_the_scene(rendered):
    coarse, fine = rendered[0]["depth"], scenes.render_scene(0, 3 * SIZE)["depth"]
    # With an odd factor the pixels' centres coincide.
    np.testing.assert_allclose(fine[1::3, 1::3], coarse, atol=1e-4)


def test_splits_and_seeds_share_no_scene():
    states = {
        tuple(scenes.scene_seed(split, index, seed).generate_state(4))
        for split in scenes.SPLITS
        for index in range(50)
        for seed in (0, 1)
    }
    assert len(states) == len(scenes.SPLITS) * 50 * 2


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'val'"):
        scenes.scene_seed("val", 0)
    with pytest.raises(ValueError, match="'val'"):
        scenes.load_scenes("val", 2)


def test_types_and_ranges(rendered):
    for row in rendered:
        assert row["image"].shape == row["normal"].shape == (SIZE, SIZE, 3)
        assert row["depth"].dtype == row["normal"].dtype == np.float32
        for name in ("image", "segmentation", "saliency", "edge", "instance"):
            assert row[name].dtype == np.uint8
        # Neither black nor burnt out, and more than one tone.
        assert 40 < row["image"].mean() < 225
        assert row["image"].std() > 10


def test_depth_lies_on_the_analytic_surfaces(rendered):
    checked = set()
    for row in rendered:
        for number, surface in enumerate(row["surfaces"], start=1):
            points = row["points"][row["instance"] == number]
            local = (points - surface.offset) @ surface.rotation
            kind = scenes.CLASSES[surface.label]
            if kind in ("floor", "wall"):
                gap = local[:, 2]
            elif kind == "sphere":
                gap = np.linalg.norm(local, axis=1) - surface.size[0]
            elif kind == "box":
                gap = (np.abs(local) - surface.size).max(1)
            elif kind == "torus":
                ring = np.hypot(local[:, 0], local[:, 1]) - surface.size[0]
                gap = np.hypot(ring, local[:, 2]) - surface.size[1]
            elif kind == "capsule":
                ends = np.clip(local[:, 2], -surface.size[1], surface.size[1])
                gap = np.linalg.norm(local - np.stack([0 * ends, 0 * ends, ends], 1), axis=1) - surface.size[0]
            else:
                continue
            # Flat faces are exact; round ones are meshes, whose facets lie up to a few millimetres inside.
            np.testing.assert_allclose(gap, 0, atol=1e-5 if kind in ("floor", "wall", "box") else 6e-3)
            checked.add(kind)
    assert checked >= {"floor", "wall", "box", "sphere", "torus", "capsule"}


def test_sphere_and_floor_normals_in_camera_coordinates(rendered):
    for row in rendered:
        to_camera = row["camera"].axes.T
        for number, surface in enumerate(row["surfaces"], start=1):
            here = row["instance"] == number
            if scenes.CLASSES[surface.label] == "floor":
                expected = np.broadcast_to([0, 0, 1] @ to_camera, (here.sum(), 3))
                np.testing.assert_allclose(row["normal"][here], expected, atol=1e-5)
            elif scenes.CLASSES[surface.label] == "sphere":
                expected = (row["points"][here] - surface.offset) @ to_camera / surface.size[0]
                # The silhouette, where normals are kept from turning away, is left out.
                inner = np.einsum("ij,ij->i", expected, row["normal"][here]) > 0.9
                assert inner.mean() > 0.8
                np.testing.assert_allclose(row["normal"][here][inner], expected[inner], atol=0.1)


def test_normals_agree_with_depth_differences(rendered):
    for row in rendered:
        points = row["points"] @ row["camera"].axes.T
        same = row["instance"][1:-1, 1:-1] > 0
        for shifted in (np.s_[:-2, 1:-1], np.s_[2:, 1:-1], np.s_[1:-1, :-2], np.s_[1:-1, 2:]):
            same &= row["instance"][shifted] == row["instance"][1:-1, 1:-1]
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        # x right, y down, z forward: down x across points back at the camera.
        found = np.cross(down, across)[same]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        cosine = np.einsum("ij,ij->i", found, row["normal"][1:-1, 1:-1][same])
        # Edges within an object, such as a box's, are where differences are wrong.
        assert (cosine > 0.95).mean() > 0.9


def test_normals_are_unit_vectors_that_face_the_camera(rendered):
    for row in rendered:
        hit = row["instance"] > 0
        np.testing.assert_allclose(np.linalg.norm(row["normal"][hit], axis=1), 1, atol=1e-5)
        assert not row["normal"][~hit].any()
        assert not row["depth"][~hit].any()
        assert (row["depth"][hit] > 0).all()
        rays = row["rays"] @ row["camera"].axes.T
        assert np.einsum("ij,ij->i", row["normal"][hit], rays[hit]).max() <= 1e-5


def test_edges_are_where_neighbours_differ(rendered):
    instance, edge = rendered[0]["instance"], rendered[0]["edge"]
    for y in range(SIZE):
        for x in range(SIZE):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(i, j) for i, j in around if 0 <= i < SIZE and 0 <= j < SIZE]
            assert edge[y, x] == any(instance[place] != instance[y, x] for place in inside)


def test_classes_follow_instances_and_saliency_follows_classes(rendered):
    seen = set()
    for row in rendered:
        labels = np.array([0, *(surface.label for surface in row["surfaces"])])
        np.testing.assert_array_equal(row["segmentation"], labels[row["instance"]])
        np.testing.assert_array_equal(row["saliency"], row["segmentation"] >= 3)
        seen |= set(np.unique(row["segmentation"]))
    assert seen == set(range(len(scenes.CLASSES)))


def test_objects_rest_on_the_floor_inside_the_room_apart(rendered):
    resting = []
    for row in rendered:
        room = row["surfaces"][0].vertices.max(0)
        solids = [surface for surface in row["surfaces"] if surface.label >= 3]
        for surface in solids:
            low, high = surface.vertices.min(0), surface.vertices.max(0)
            assert (low >= -1e-9).all()
            assert (high[:2] <= room[:2] + 1e-9).all()
            resting.append(low[2] < 1e-9)
    assert np.mean(resting) > 0.7


@pytest.mark.parametrize("kind", scenes.SURFACE_TEXTURES)
def test_textures_stay_between_their_colors(kind):
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32)
    for _ in range(5):
        texture = scenes.random_texture(rng, [kind], 0.6)
        color = texture(points)
        assert color.shape == (500, 3)
        # The grain adds up to 5 %, and the faint shading of plain paint may leave the range by a few per cent.
        low, high = texture.colors.min(0), texture.colors.max(0)
        margin = 0.06 * high + 0.06 * (high - low)
        assert ((color >= low - margin) & (color <= high + margin)).all()
        assert np.ptp(color, axis=0).max() > 0


def test_load_scenes_renders_once_and_returns_what_was_rendered(tmp_path, monkeypatch):
    first = scenes.load_scenes("validation", 2, SIZE, seed=3, cache_dir=tmp_path).with_format("numpy")
    expected = scenes.render_scene(scenes.scene_seed("validation", 1, 3), SIZE)
    for name in ("image", "segmentation", "saliency", "edge", "instance"):
        np.testing.assert_array_equal(first[1][name], expected[name])
    np.testing.assert_array_equal(first[1]["depth"][0], expected["depth"])
    np.testing.assert_array_equal(first[1]["normal"].transpose(1, 2, 0), expected["normal"])

    monkeypatch.setattr(scenes, "render_scene", lambda *args: pytest.fail("rendered again"))
    again = scenes.load_scenes("validation", 2, SIZE, seed=3, cache_dir=tmp_path).with_format("numpy")
    np.testing.assert_array_equal(again[0]["image"], first[0]["image"])


def test_columns_can_be_chosen(tmp_path):
    rows = scenes.load_scenes("pretrain", 1, SIZE, cache_dir=tmp_path, columns=("image", "instance"))
    assert rows.column_names == ["image", "instance"]


def test_command_line_writes_a_directory_for_load_dataset(tmp_path, capsys):
    folder, sheet = tmp_path / "rooms", tmp_path / "preview.png"
    counts = ["--train", "2", "--test", "1", "--size", "32", "--num-proc", "1"]
    scenes.main(["--output", str(folder), "--preview", str(sheet), *counts])
    assert sorted(path.name for path in folder.iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    assert sheet.stat().st_size > 0
    assert "2 scenes" in capsys.readouterr().out
    splits = datasets.load_dataset(str(folder))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "test": 1}
    row = splits["train"].with_format("numpy")[0]
    assert row["image"].shape == (32, 32, 3)
    assert row["depth"].shape == (1, 32, 32)
    assert row["normal"].shape == (3, 32, 32)
    assert row["segmentation"].shape == (32, 32)


def test_nothing_to_do_is_an_error(capsys):
    with pytest.raises(SystemExit):
        scenes.main([])
    assert "--preview" in capsys.readouterr().err
