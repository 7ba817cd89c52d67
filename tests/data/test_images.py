import numpy as np
import pytest
from PIL import Image

from peft_talora.data.images import read_image, read_values

RGB = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = read_image(saved(tmp_path, Image.fromarray(RGB), exif=exif))
    assert (found == np.rot90(RGB, -1)).all()


def test_modes(tmp_path):
    grey = RGB[..., 0]
    assert (read_image(saved(tmp_path, Image.fromarray(grey))) == grey[..., None]).all()
    sixteen = saved(tmp_path, Image.fromarray(grey.astype(np.uint16) * 257))
    assert (read_image(sixteen) == grey[..., None]).all()
    assert (read_values(sixteen) == grey.astype(int) * 257).all()
    floats = saved(tmp_path, Image.fromarray(grey.astype(np.float32) / 255), "x.tif")
    assert (read_image(floats) == grey[..., None]).all()
    np.save(tmp_path / "x.npy", RGB / 255)
    assert (read_image(tmp_path / "x.npy") == RGB).all()


@pytest.mark.parametrize("value_range", [(0, 4095), (0, 65535), (0.0, 1.0), None])
def test_a_range_is_for_pictures_of_more_than_8_bits(tmp_path, value_range):
    assert (read_image(saved(tmp_path, Image.fromarray(RGB)), value_range) == RGB).all()
    np.save(tmp_path / "x.npy", RGB)
    assert (read_image(tmp_path / "x.npy", value_range) == RGB).all()
    sixteen = saved(tmp_path, Image.fromarray(RGB[..., 0].astype(np.uint16) * 16), "y.png")
    if value_range == (0, 4095):
        assert np.abs(read_image(sixteen, value_range)[..., 0].astype(int) - RGB[..., 0]).max() <= 1


def test_what_is_transparent_is_white(tmp_path):
    alpha = np.zeros((5, 4, 1), dtype=np.uint8)
    alpha[0] = 255
    found = read_image(saved(tmp_path, Image.fromarray(np.concatenate([RGB, alpha], axis=-1))))
    assert (found[0] == RGB[0]).all() and (found[1:] == 255).all()


def test_a_palette_is_colours_in_pictures_and_numbers_in_labels(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8), mode="L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = saved(tmp_path, image)
    assert read_values(path).tolist() == [[0, 1], [1, 2]]
    assert read_image(path)[1].tolist() == [[40, 50, 60], [70, 80, 90]]


def test_damaged_files_are_named(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB.repeat(50, 0)))
    path.write_bytes(path.read_bytes()[:60])
    for read in (read_image, read_values):
        with pytest.raises(ValueError, match=r"x\.png cannot be read as a"):
            read(path)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o\.npy cannot be read"):
        read_values(tmp_path / "o.npy")
