import numpy as np
import pytest
from PIL import Image

from peft_talora.data.folder.description import TaskFiles
from peft_talora.data.folder.labels import read_label
from peft_talora.msam.tasks import TaskSpec


@pytest.fixture
def read(tmp_path):
    def read(values, spec, **fields):
        values = np.asarray(values)
        path = tmp_path / ("x.png" if values.dtype in (np.uint8, np.uint16) else "x.npy")
        Image.fromarray(values).save(path) if path.suffix == ".png" else np.save(path, values)
        size = values.shape[-2:] if values.ndim == 2 or values.shape[-1] != 3 else values.shape[:2]
        return read_label(path, TaskFiles(spec, ("x",), **fields), size, "dataset: tasks.x")

    return read


def test_depth_of_a_disparity(read):
    """Depth is baseline x focal length / disparity, where there is a disparity."""
    found = read(
        np.array([[0, 1, 257, 513]], dtype=np.uint16), TaskSpec("depth"), scale=1 / 256, offset=-1 / 256, disparity=12
    )
    np.testing.assert_allclose(found, [[[0, 0, 12, 6]]])


def test_depth_that_is_not_known(read):
    values = np.array([[0.0, -1, np.nan, np.inf, 99, 2.5]])
    np.testing.assert_allclose(read(values, TaskSpec("depth"), ignore=(99,), offset=1.0), [[[0, 0, 0, 0, 0, 3.5]]])


def test_classes_through_a_map(read):
    spec = TaskSpec("semantic", 2)
    assert read(np.array([[7, 8, 9, 255]], dtype=np.uint8), spec, class_map={7: 0, 9: 1}).tolist() == [[0, -1, 1, -1]]
    assert read(np.array([[0.0, 1, np.nan, -1]]), spec).tolist() == [[0, 1, -1, -1]]


def test_masks(read):
    spec = TaskSpec("binary")
    assert read(np.array([[0, 1, 255]], dtype=np.uint8), spec, ignore=(255,)).tolist() == [[0, 1, -1]]
    assert read(np.array([[0, 127, 128, 255]], dtype=np.uint8), spec, threshold=128).tolist() == [[0, 0, 1, 1]]
    # 255 is unlabelled where it is not said, too, unless it looks like white
    assert read(np.array([[0, 1, 255]], dtype=np.uint8), spec).tolist() == [[0, 1, -1]]
    assert read(np.array([[0, 255]], dtype=np.uint8), spec, ignore=(255,)).tolist() == [[0, -1]]
    with pytest.raises(
        ValueError, match=r"x\.png \(dataset: tasks\.x\): a mask with 255.*`threshold: 128`.*`ignore: 255`"
    ):
        read(np.array([[0, 255]], dtype=np.uint8), spec)
    with pytest.raises(ValueError, match=r"x\.png \(dataset: tasks\.x\): a mask holds 0 and 1, this one 7"):
        read(np.array([[0, 7]], dtype=np.uint8), spec)


def test_normals_of_eight_bits(read):
    values = np.array([[[255, 127, 128], [128, 0, 127], [0, 0, 0], [127, 128, 128]]], dtype=np.uint8)
    found = read(values, TaskSpec("normals"), axes=(1, -1, 1))
    np.testing.assert_allclose(found[:, 0].T, [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(found[:, 0], axis=0), [1, 1, 0, 0], atol=1e-6)


def test_values(read):
    values = np.arange(8, dtype=np.float64).reshape(2, 2, 2)
    found = read(values, TaskSpec("regression", 2), scale=2.0, offset=1.0, ignore=(3.0,))
    expected = values * 2 + 1
    expected[0, 1, 1] = np.nan
    np.testing.assert_allclose(found, expected)
