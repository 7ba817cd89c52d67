"""Splits of a folder, as the lists of data sets name them."""

import time

import pytest
from small_folders import SEMANTIC, describe, write_folder

from peft_talora.data.folder.rows import load_folder_dataset

NAMES = ["0", "1", "2", "3"]


def members(folder):
    return {
        split: [path.rpartition("/")[2].removesuffix(".png") for path in rows.data.table["image"].to_pylist()]
        for split, rows in load_folder_dataset(folder).items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "2\n3\n",
        "\ufeff2\r\n3\r\n",
        "# of the paper\n2.png\n\nimages/3.png\n",
        "images/2.png labels/2.png\nimages/3.png labels/3.png\n",
        "2 7\n3 -1\n",
        "2,3",
        "2 3",
        './2\n"3"\n',
        "images\\2.PNG\n3  # blurred\n",
    ],
)
def test_lists(tmp_path, text):
    folder = write_folder(tmp_path, splits={"test": "test.txt"})
    (folder / "test.txt").write_text(text, encoding="utf-8", newline="")
    assert members(folder) == {"train": ["0", "1"], "test": ["2", "3"]}


@pytest.mark.parametrize("listed", [["2", "3", "images/2.png"], "test.txt"])
def test_an_image_that_is_listed_twice_counts_once(tmp_path, listed):
    folder = write_folder(tmp_path, splits={"test": listed})
    (folder / "test.txt").write_text("2\n3\n2.png\n")
    with pytest.warns(UserWarning, match=r"splits\.test: 3 entries are 2 images, '2' is there twice"):
        assert members(folder) == {"train": ["0", "1"], "test": ["2", "3"]}


def test_names_with_blanks(tmp_path):
    folder = write_folder(tmp_path, splits={"test": "test.txt"})
    for part in ("images", "labels"):
        (folder / part / "3.png").rename(folder / part / "a leaf (2).png")
    (folder / "test.txt").write_text("a leaf (2)\n")
    assert members(folder) == {"train": ["0", "1", "2"], "test": ["a leaf (2)"]}


def test_a_missing_image_is_named(tmp_path):
    folder = write_folder(tmp_path, splits={"test": "test.txt"})
    (folder / "test.txt").write_text("2\nnowhere\n")
    with pytest.raises(ValueError, match=r"splits\.test: missing image 'nowhere' \(1 of 2"):
        load_folder_dataset(folder)


def test_an_image_in_two_splits_is_told(tmp_path):
    folder = write_folder(tmp_path, splits={"train": NAMES, "test": ["0"]})
    with pytest.warns(UserWarning, match="1 images are in more than one split, '0' in 'test' and 'train'"):
        load_folder_dataset(folder)


def test_subfolders_that_are_no_splits(tmp_path):
    folder = write_folder(tmp_path)
    for part in ("images", "labels"):
        for index, split in enumerate(("train", "train", "val", "extra")):
            (folder / part / split).mkdir(exist_ok=True)
            (folder / part / f"{index}.png").rename(folder / part / split / f"{index}.png")
    describe(folder, tasks=SEMANTIC, splits="subfolders", skip_splits=["extra"])
    assert members(folder) == {"train": ["0", "1"], "val": ["2"]}


def test_many_names_take_no_time(tmp_path):
    """Linear: a search for every name in a list of all took minutes."""
    from peft_talora.data.folder.splits import NameLookup

    images = {f"{index:06d}": tmp_path / f"images/{index:06d}.png" for index in range(20_000)}
    started = time.process_time()
    found = NameLookup(tmp_path, images).names(([f"{name}.png"] for name in images), "here")
    assert found == list(images) and time.process_time() - started < 10
