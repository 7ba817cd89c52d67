"""Clones of public sets become folder datasets: shown on generated clones of the same layouts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("datasets")
pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import real_data
from real_sets import nuclei, pictures, street, surfaces
from scipy.io import savemat

from peft_talora.data import detect_tasks, load_multitask_dataset

RNG = np.random.default_rng(0)
INTRINSICS = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # JPEG at full quality moves a flat colour by a step or two
    Image.fromarray(values).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))


def noise(height: int, width: int, brightness: int = 40) -> np.ndarray:
    return RNG.integers(0, brightness, (height, width, 1), np.uint8).repeat(3, -1)


def disc(height: int, width: int, y: int, x: int, radius: float) -> np.ndarray:
    return np.hypot(*(np.indices((height, width)) - np.array([y, x])[:, None, None])) <= radius


def make_nuclei(clone: Path) -> None:
    for number in range(10):
        # four of them not fluorescence: bright grey, or coloured
        picture = 200 - noise(40, 60) if number < 2 else noise(40, 60)
        if number in (2, 3):
            picture[..., 1] = 160
        folder = clone / "stage1_train" / f"{number:02d}{'ab' * 31}"
        save(folder / "images" / f"{folder.name}.png", np.dstack([picture, np.full((40, 60), 255, np.uint8)]))
        for index, (y, x) in enumerate([(10, 10), (25, 40)]):
            save(folder / "masks" / f"{index}.png", disc(40, 60, y, x, 6).astype(np.uint8) * 255)


def make_leaves(clone: Path) -> None:
    root = clone / "segmentation" / "dataset"
    for split, names in (("train", ["1", "2"]), ("val", ["3"]), ("test", ["4"])):
        for name in names:
            colors = np.zeros((64, 96, 3), np.uint8)
            colors[:, 16:] = (0, 176, 0)
            colors[disc(64, 96, 20, 60, 3)] = (255, 0, 0)
            save(root / "images" / split / f"{name}.jpg", noise(64, 96, 255))
            save(root / "annotations" / split / f"{name}_mask.png", colors)


def make_street(clone: Path) -> None:
    tags = [tag for names in street.GROUPS.values() for tag in names.split()]
    listed = np.empty((1, len(tags)), object)
    listed[0] = [np.array([tag]) for tag in tags]
    clone.mkdir(exist_ok=True)
    savemat(clone / "label_list.mat", {"label_list": listed})
    for number in range(1, 8):
        person = np.zeros((80, 50), np.uint8)
        person[10:70, 15:35] = tags.index("coat")
        person[10:20, 15:35] = tags.index("skin")
        save(clone / "photos" / f"{number:04d}.jpg", noise(80, 50, 255))
        (clone / street.ANNOTATIONS).mkdir(parents=True, exist_ok=True)
        savemat(clone / street.ANNOTATIONS / f"{number:04d}.mat", {"groundtruth": person})
    # labelled as a whole only
    save(clone / "photos" / "0008.jpg", noise(80, 50, 255))


def make_room(clone: Path, frames: int = 60) -> None:
    (clone / "data").mkdir(parents=True)
    np.savetxt(clone / "data" / "camera-intrinsics.txt", INTRINSICS)
    for number in range(frames):
        stem = clone / "data" / f"frame-{number:06d}"
        pose = np.eye(4)
        pose[0, 3] = 0.002 * number
        # a wall across, two metres ahead, of which a corner is out of the sensor's reach
        depth = np.full((48, 64), 2000, np.uint16)
        depth[:8, :8] = 65535 if number % 2 else 0
        save(stem.with_suffix(".color.jpg"), noise(48, 64, 255))
        save(stem.with_suffix(".depth.png"), depth)
        np.savetxt(stem.with_suffix(".pose.txt"), np.full((4, 4), -np.inf) if number == 10 else pose)


MAKERS = {"nuclei": make_nuclei, "leaves": make_leaves, "street": make_street, "room": make_room}


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """``convert(name, *more)``: the dataset that the command makes from a generated clone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def main(name, *more):
        clone, out = tmp_path / "clone", tmp_path / "out"
        if not clone.exists():
            MAKERS[name](clone)
        real_data.main([name, str(clone), str(out), *more])
        return load_multitask_dataset(f"folder:{out}")

    return main


@pytest.mark.parametrize("name", MAKERS)
def test_every_set_is_a_folder_dataset_with_terms_and_three_splits(name, convert, tmp_path, capsys):
    splits = convert(name, "--size", "32")
    assert list(splits) == ["train", "validation", "test"]
    described = yaml.safe_load((tmp_path / "out" / "dataset.yaml").read_text())
    assert described["license"] == real_data.SETS[name].license
    assert described["source"] == real_data.SETS[name].repository
    tasks = detect_tasks(splits)
    assert list(tasks) == list(real_data.SETS[name].tasks)
    seen = [{Path(path).name for path in rows.with_format(None).to_dict()["image"]} for rows in splits.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    for rows in splits.values():
        for row in rows:
            assert max(row["image"].shape[:2]) <= 32
    assert f"{len(splits['test'])} test" in capsys.readouterr().out


def test_nuclei_are_tiled_as_they_are_and_every_nucleus_has_its_own_distance(convert):
    splits = convert("nuclei", "--size", "40", "--tiles", "9")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    tiles = {Path(path).stem: path for path in splits["train"].with_format(None).to_dict()["image"]}
    # both tiles of a picture are in one split
    assert all(name[:-1] + other in tiles for name in tiles for other in "01")
    row = splits["train"][0]
    np.testing.assert_array_equal(row["foreground"] > 0, disc(40, 40, 10, 10, 6) | disc(40, 40, 25, 40, 6))
    assert row["distance"].max() == pytest.approx(1)
    assert row["distance"][0, 10, 10] == pytest.approx(1)
    assert not row["distance"][0][row["foreground"] == 0].any()
    boundary = row["boundary"] > 0
    assert (row["distance"][0][boundary] < 0.3).all()
    assert boundary[10, 4]
    assert not boundary[10, 10]


def test_nuclei_that_touch_are_apart_in_boundary_and_distance():
    instances = np.zeros((11, 20), int)
    instances[:, 2:9] = 1
    instances[:, 9:16] = 2
    maps = nuclei.nucleus_maps(instances)
    np.testing.assert_array_equal(np.flatnonzero(maps["boundary"][5]), [2, 8, 9, 15])
    # distances of 1, 2, 3, 4, 3, 2, 1 over the largest; above and below the picture just ends
    once = np.round(255 * np.array([1, 2, 3, 4, 3, 2, 1]) / 4)
    np.testing.assert_array_equal(maps["distance"][0, 2:16], np.tile(once, 2))
    assert nuclei.nucleus_maps(np.ones((3, 3), int))["distance"].min() == 255


def test_splitting_by_microscope_trains_on_one_kind_only(convert, tmp_path):
    splits = convert("nuclei", "--size", "64", "--split", "microscope")
    kinds = {name: {nuclei.microscope(row["image"]) for row in rows} for name, rows in splits.items()}
    assert kinds == {"train": {"fluorescence"}, "validation": {"fluorescence"}, "test": {"brightfield", "stained"}}


def test_leaf_tiles_show_leaf_and_prefer_symptoms(convert):
    splits = convert("leaves", "--size", "16", "--tiles", "2")
    # the symptom lies in two tiles or fewer of each leaf
    for rows in splits.values():
        for row in rows:
            assert row["image"].shape == (16, 16, 3)
            assert row["leaf"].any()
            assert (row["leaf"] >= row["symptom"]).all()
        assert sum(row["symptom"].any() for row in rows) == len(rows) / 2


def test_street_parts_are_grouped_and_edges_thin(convert):
    row = convert("street", "--size", "40")["train"][0]
    classes = list(street.GROUPS)
    assert row["image"].shape == (40, 25, 3)
    assert set(np.unique(row["parts"])) == {classes.index(name) for name in ("background", "skin", "coat")}
    np.testing.assert_array_equal(row["saliency"] > 0, row["parts"] > 0)
    assert row["parts"][7, 12] == classes.index("skin")
    assert row["parts"][20, 12] == classes.index("coat")
    # on both sides of the shoulder and of the chin
    assert row["edge"][20].sum() == 4
    assert row["edge"][:, 12].sum() == 6


def test_a_tag_without_a_class_is_named(tmp_path):
    listed = np.empty((1, 1), object)
    listed[0, 0] = np.array(["crown"])
    savemat(tmp_path / "label_list.mat", {"label_list": listed})
    with pytest.raises(ValueError, match="'crown'"):
        street.class_lookup(tmp_path / "label_list.mat")
    assert len(street.CLASS_OF) == 59


def test_room_depth_is_as_measured_and_its_splits_lie_apart_in_time(convert):
    splits = convert("room", "--size", "32")
    row = splits["train"][0]
    assert row["image"].shape == (24, 32, 3)
    assert (row["depth"][0, :4, :4] == 0).all()
    np.testing.assert_allclose(row["depth"][0, 6:, 6:], 2)
    # a wall across the view; 8 bits leave half a per cent
    known = (row["normal"] != 0).any(0)
    assert known[8:18, 8:24].all()
    np.testing.assert_allclose(row["normal"][:, known].T, np.tile([0, 0, -1.0], (known.sum(), 1)), atol=0.01)
    numbers = {
        name: [int(Path(path).stem[6:]) for path in rows.with_format(None).to_dict()["image"]]
        for name, rows in splits.items()
    }
    assert min(numbers["validation"]) - max(numbers["train"]) >= 5
    assert min(numbers["test"]) - max(numbers["validation"]) >= 5
    # the camera was lost there
    assert 10 not in numbers["train"]


def test_normals_of_a_tilted_plane_are_exact():
    normal = np.array([0.3, -0.5, -0.8])
    normal /= np.linalg.norm(normal)
    y, x = np.indices((48, 64))
    rays = np.stack([(x - 32) / 60, (y - 24) / 60, np.ones_like(x)], -1)
    depth = normal[2] * 2 / (rays @ normal)
    found = surfaces.surface_normals(depth, INTRINSICS)
    known = found.any(-1)
    assert known.mean() > 0.7
    np.testing.assert_allclose(found[known], np.broadcast_to(normal, found[known].shape), atol=1e-6)
    assert not surfaces.surface_normals(np.where(x < 32, 1.0, 2.0), INTRINSICS)[:, 30:34].any()


def test_fused_depth_fills_holes_and_refuses_what_disagrees():
    depth = np.full((48, 64), 2.0)
    depth[20, 30] = 0
    nearer = np.eye(4)
    nearer[2, 3] = 0.1  # from the other camera's coordinates to these: it stood 10 cm further on
    other, wrong = np.full((48, 64), 1.9), np.full((48, 64), 1.5)
    fused = surfaces.fuse_depth(depth, [(other, nearer), (wrong, np.eye(4))], INTRINSICS)
    np.testing.assert_allclose(fused[22:30, 20:40], 2)
    # the two that see the hole say 2.0 and 1.5
    assert fused[20, 30] in (pytest.approx(1.75), pytest.approx(1.5), pytest.approx(2.0))
    assert surfaces.fuse_depth(np.zeros((4, 4)), [], INTRINSICS).max() == 0


def test_tiles_cover_a_picture_once_or_more_and_lie_in_it():
    for height, width in ((40, 60), (128, 128), (129, 300), (20, 300)):
        covered = np.zeros((height, width), int)
        for here in pictures.tiles(height, width, 64):
            assert covered[here].shape == (min(64, height), min(64, width))
            covered[here] += 1
        assert covered.min() >= 1


def test_another_folder_is_no_clone_and_nothing_is_written(tmp_path):
    (tmp_path / "clone").mkdir()
    with pytest.raises(FileNotFoundError, match=r"stage1_train.*git clone"):
        real_data.main(["nuclei", str(tmp_path / "clone"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_failure_on_the_way_leaves_nothing(tmp_path):
    make_nuclei(tmp_path / "clone")
    mask = next((tmp_path / "clone").rglob("masks/1.png"))
    save(mask, np.zeros((7, 7), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        real_data.main(["nuclei", str(tmp_path / "clone"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_arguments_that_cannot_be_are_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for more, message in (
        (["street", "clone", str(tmp_path / "new"), "--split", "microscope"], "'microscope'"),
        (["street", "clone", str(tmp_path / "new"), "--size", "0"], "--size"),
        (["street", "clone", str(tmp_path / "full")], "not empty"),
        (["cats", "clone", str(tmp_path / "new")], "nuclei"),
    ):
        with pytest.raises(SystemExit):
            real_data.main(more)
        assert message in capsys.readouterr().err
