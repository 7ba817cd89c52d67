"""What the numbers of label files mean, and what they cannot mean."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_folders import SEMANTIC, mask, write_folder

from peft_talora.data.folder.rows import load_folder_dataset
from peft_talora.kinds import doubts

CLASSES = {"files": "labels", "class_names": ["background", "object"]}
UNIT = np.array([0.6, 0.0, -0.8], "float32")


@pytest.fixture(autouse=True)
def _nothing_doubted_yet():
    doubts.forget()


def first(folder, column):
    return load_folder_dataset(folder)["train"][0][column]


def normals(values):
    return np.asarray(values)[:, None, None].repeat(12, 1).repeat(16, 2)


class TestClasses:
    def test_grey_as_three_channels(self, tmp_path):
        folder = write_folder(tmp_path, label=lambda m: np.stack([m] * 3, -1))
        assert (first(folder, "segmentation") == mask()).all()

    def test_colours(self, tmp_path):
        fields = {**CLASSES, "colors": {"background": [0, 0, 0], "object": [[200, 0, 0], [0, 200, 0]]}}
        colours = np.array([[0, 0, 0], [200, 0, 0]], "uint8")
        folder = write_folder(tmp_path, {"semantic": fields}, label=lambda m: colours[m])
        assert (first(folder, "segmentation") == mask()).all()
        folder = write_folder(tmp_path / "unnamed", label=lambda m: colours[m])
        with pytest.raises(ValueError, match=r"colors: \{class: \[r, g, b\]\}"):
            first(folder, "segmentation")

    def test_counted_from_1(self, tmp_path):
        folder = write_folder(tmp_path, label=lambda m: m + 1)
        with pytest.raises(ValueError, match="`first_class: 1`"):
            first(folder, "segmentation")
        folder = write_folder(tmp_path, {"semantic": {**CLASSES, "first_class": 1}}, label=lambda m: m + 1)
        assert (first(folder, "segmentation") == mask()).all()

    def test_soft_numbers_are_refused(self, tmp_path):
        folder = write_folder(tmp_path, label=lambda m: m * np.float32(0.9), suffix="npy")
        with pytest.raises(ValueError, match=r"class ids are whole numbers, this map holds 0\.9"):
            first(folder, "segmentation")

    def test_jpeg_is_refused(self, tmp_path):
        folder = write_folder(tmp_path, suffix="jpg")
        with pytest.raises(ValueError, match="save it as PNG"):
            first(folder, "segmentation")

    def test_ids_of_instances_are_refused(self, tmp_path):
        folder = write_folder(tmp_path, label=lambda m: m.astype("uint16") * 7003)
        with pytest.raises(ValueError, match="ids of instances"):
            first(folder, "segmentation")

    def test_a_void_of_16_bits(self, tmp_path):
        void = lambda m: np.where(m == 1, 65535, 0).astype("uint16")  # noqa: E731
        with pytest.raises(ValueError, match=r"`ignore: \[65535\]`"):
            first(write_folder(tmp_path, label=void), "segmentation")
        folder = write_folder(tmp_path, {"semantic": {**CLASSES, "ignore": 65535}}, label=void)
        assert (first(folder, "segmentation") == np.where(mask() == 1, -1, 0)).all()

    def test_black_and_white_is_doubted(self, tmp_path):
        with pytest.warns(UserWarning, match=r"class_map: \{0: 0, 255: 1\}"):
            first(write_folder(tmp_path, label=lambda m: m * 255), "segmentation")

    def test_what_the_doubt_advises_helps(self, tmp_path, recwarn):
        fields = {**CLASSES, "class_map": {0: 0, 255: 1}}
        folder = write_folder(tmp_path, {"semantic": fields}, label=lambda m: m * 255)
        assert (first(folder, "segmentation") == mask()).all() and not recwarn.list

    @pytest.mark.parametrize(
        ("fields", "numbers", "expected"),
        [
            ({"class_map": {0: 0, 100: 0, 255: 1}}, [0, 100, 255, 7], [0, 0, 1, -1]),
            ({"class_map": {0: 0, 100: 1}}, [0, 100, 255, 7], [0, 1, -1, -1]),
            ({"class_map": {0: 0, 255: 1}, "ignore": [7]}, [0, 7, 255, 7], [0, -1, 1, -1]),
            ({"class_map": {-1: 0, 1: 1}}, [-1, 1, 0, -7], [0, 1, -1, -1]),
            ({"class_map": {-1: 0, 1: 1}}, [-1.0, 1.0, float("nan"), float("inf")], [0, 1, -1, -1]),
            ({"num_classes": 254, "class_names": None, "first_class": 1}, [1, 254, 255, 0], [0, 253, -1, -1]),
            ({"num_classes": 255, "class_names": None, "first_class": 1}, [1, 254, 255, 0], [0, 253, 254, -1]),
            ({"ignore": -3.4028235e38}, [0, 1, np.finfo("float32").min, 1], [0, 1, -1, 1]),
        ],
    )
    def test_which_numbers_are_unlabelled(self, tmp_path, fields, numbers, expected):
        fields = {name: value for name, value in {**CLASSES, **fields}.items() if value is not None}
        values = np.array(numbers, "float32" if isinstance(numbers[-1], float) or numbers[2] < -9 else "int16")
        folder = write_folder(tmp_path, {"semantic": fields}, label=lambda m: np.resize(values, m.shape), suffix="npy")
        assert first(folder, "segmentation")[0, :4].tolist() == expected

    @pytest.mark.parametrize("field", [{"ignore": [255]}, {"ignore": 0}, {"first_class": 1}])
    def test_a_class_map_that_contradicts_the_rest(self, tmp_path, field):
        fields = {**CLASSES, "class_map": {0: 0, 255: 1}, **field}
        with pytest.raises(ValueError, match=f"tasks.semantic.*{next(iter(field))}.*leave it out"):
            load_folder_dataset(write_folder(tmp_path, {"semantic": fields}))

    @pytest.mark.parametrize(
        ("suffix", "options", "what"),
        [
            ("webp", {}, "lossy WebP"),
            ("webp", {"lossless": True}, None),
            ("tif", {"compression": "jpeg"}, "JPEG or WebP inside of a TIFF"),
            ("tif", {"compression": "tiff_lzw"}, None),
        ],
    )
    def test_other_lossy_files_are_refused(self, tmp_path, suffix, options, what):
        folder = write_folder(tmp_path, number=1)
        (folder / "labels/0.png").unlink()
        Image.fromarray(mask()).save(folder / f"labels/0.{suffix}", **options)
        if what is None:
            assert (first(folder, "segmentation") == mask()).all()
        else:
            with pytest.raises(ValueError, match=rf"labels/0\.{suffix}.*{what}.*save it as PNG"):
                first(folder, "segmentation")

    def test_several_pages_are_refused(self, tmp_path):
        folder = write_folder(tmp_path, number=1)
        (folder / "labels/0.png").unlink()
        page = Image.fromarray(mask())
        page.save(folder / "labels/0.tif", save_all=True, append_images=[page])
        with pytest.raises(ValueError, match=r"labels/0\.tif.*it has 2 pages"):
            first(folder, "segmentation")

    def test_a_class_map_that_fits_nothing_is_doubted(self, tmp_path):
        folder = write_folder(tmp_path, {"semantic": {**CLASSES, "class_map": {7: 0, 26: 1}}})
        with pytest.warns(UserWarning, match="no pixel has one of the numbers of the 2 classes"):
            first(folder, "segmentation")


class TestMasks:
    @pytest.mark.parametrize(("threshold", "side"), [(128, "above"), (0, "below")])
    def test_a_threshold_that_leaves_nothing_is_doubted(self, tmp_path, threshold, side):
        folder = write_folder(tmp_path, {"spot": {"kind": "binary", "files": "labels", "threshold": threshold}})
        with pytest.warns(UserWarning, match=f"`threshold: {threshold}` is {side} every number"):
            first(folder, "spot")

    def test_minus_one_and_one(self, tmp_path):
        label = lambda m: np.where(m == 1, 1, -1)  # noqa: E731
        folder = write_folder(tmp_path, {"spot": {"kind": "binary", "files": "labels"}}, label=label, suffix="npy")
        with pytest.raises(ValueError, match="`threshold: 0`"):
            first(folder, "spot")
        fields = {"kind": "binary", "files": "labels", "threshold": 0.5}
        assert (first(write_folder(tmp_path, {"spot": fields}, label=label, suffix="npy"), "spot") == mask()).all()

    def test_probabilities(self, tmp_path):
        folder = write_folder(
            tmp_path, {"spot": {"kind": "binary", "files": "labels"}}, label=lambda m: m * 0.9, suffix="npy"
        )
        with pytest.raises(ValueError, match=r"say `threshold`.*0\.5 for probabilities"):
            first(folder, "spot")


def save_16_bits(path, values):
    """A PNG of 16 bits with channels (H, W, 2 or 3), which Pillow reads and does not write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


class TestNumbers:
    @pytest.mark.parametrize(
        ("task", "fields", "channels"),
        [
            ("flow", {"kind": "regression", "num_channels": 3, "scale": 1 / 64, "offset": -512}, 3),
            ("depth", {"scale": 0.001}, 2),
        ],
    )
    def test_16_bits_in_several_channels_are_refused(self, tmp_path, task, fields, channels):
        folder = write_folder(tmp_path, {task: {"files": "labels", **fields}}, number=1)
        save_16_bits(folder / "labels/0.png", np.full((12, 16, channels), 2000))
        with pytest.raises(ValueError, match=r"labels/0\.png.*16 bits in several channels.*\.npy"):
            first(folder, task)

    def test_normals_of_16_bits(self, tmp_path):
        folder = write_folder(tmp_path, {"normals": {"files": "labels"}}, number=1)
        save_16_bits(folder / "labels/0.png", np.moveaxis(normals((UNIT + 1) * 32767.5), 0, -1).astype(int))
        np.testing.assert_allclose(first(folder, "normal"), normals(UNIT), atol=0.01)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_channels_that_are_equal_stay_channels(self, tmp_path, suffix):
        black = lambda m: np.zeros((*m.shape, 3), "uint8")  # noqa: E731
        folder = write_folder(tmp_path, {"normals": {"files": "labels"}}, label=black, suffix=suffix)
        assert first(folder, "normal").shape == (3, 12, 16) and not first(folder, "normal").any()
        fields = {"kind": "regression", "num_channels": 4, "files": "labels"}
        folder = write_folder(
            tmp_path / "four", {"numbers": fields}, label=lambda m: np.full((*m.shape, 4), 7, "uint8"), suffix=suffix
        )
        assert (first(folder, "numbers") == 7).all() and first(folder, "numbers").shape == (4, 12, 16)

    @pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "0.5"])
    def test_scales_of_distances(self, tmp_path, scale):
        folder = write_folder(tmp_path, {"depth": {"files": "labels", "scale": scale}})
        with pytest.raises(ValueError, match=r"tasks\.depth\.scale: expected a number"):
            load_folder_dataset(folder)

    @pytest.mark.parametrize(("change", "range_"), [((1, 0.5), [0, 1]), ((1, 127.5), [0, 255])])
    def test_normals_that_were_moved_to_above_zero(self, tmp_path, change, range_):
        values = normals(((UNIT + change[0]) * change[1]).astype("float64"))
        folder = write_folder(tmp_path, {"normals": {"files": "labels"}}, label=lambda m: values, suffix="npy")
        with pytest.raises(ValueError, match=rf"range: \[{range_[0]}, {range_[1]}\]"):
            first(folder, "normal")
        fields = {"files": "labels", "range": range_}
        folder = write_folder(tmp_path, {"normals": fields}, label=lambda m: values, suffix="npy")
        np.testing.assert_allclose(first(folder, "normal"), normals(UNIT), atol=1e-5)

    def test_normals_of_other_lengths(self, tmp_path):
        values = normals(UNIT * 3)
        folder = write_folder(tmp_path, {"normals": {"files": "labels"}}, label=lambda m: values, suffix="npy")
        with pytest.raises(ValueError, match="`normalize: true`"):
            first(folder, "normal")
        fields = {"files": "labels", "normalize": True}
        folder = write_folder(tmp_path, {"normals": fields}, label=lambda m: values, suffix="npy")
        np.testing.assert_allclose(first(folder, "normal"), normals(UNIT), atol=1e-5)

    def test_holes_in_normals_of_jpeg_stay_holes(self, tmp_path):
        picture = np.full((48, 64, 3), [204, 128, 26], "uint8")
        picture[16:32, 24:40] = 0
        folder = write_folder(
            tmp_path, {"normals": {"files": "labels"}}, number=1, label=lambda m: picture, suffix="jpg"
        )
        Image.new("RGB", (64, 48)).save(folder / "images/0.png")
        found = first(folder, "normal")
        assert not found[:, 16:32, 24:40].any() and np.abs(found[:, :4]).sum() > 0


@pytest.mark.parametrize("field", ["images", "files"])
@pytest.mark.parametrize("place", ["../outside", "/etc", "~/x", "a/../../b", "c:/x"])
def test_nothing_outside_of_the_folder_is_read(tmp_path, field, place):
    folder = (
        write_folder(tmp_path / "d", images=place)
        if field == "images"
        else write_folder(tmp_path / "d", {"semantic": {**SEMANTIC["semantic"], "files": place}})
    )
    with pytest.raises(ValueError, match="below the dataset's folder"):
        load_folder_dataset(folder)


def test_aliases_that_grow_without_end_are_quoted_shortly(tmp_path):
    folder = write_folder(tmp_path)
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    rows += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (folder / "dataset.yaml").write_text("\n".join(rows) + "\ntasks: *i\n")
    with pytest.raises(ValueError) as error:
        load_folder_dataset(folder)
    assert len(str(error.value)) < 2000
