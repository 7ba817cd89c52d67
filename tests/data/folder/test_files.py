"""Which files of a folder are images and which are labels, on the disks of real people."""

import unicodedata

import numpy as np
import pytest
from PIL import Image
from small_folders import SEMANTIC, describe, mask, picture, write_folder

from peft_talora.data.folder.rows import load_folder_dataset


def names(splits, split="train"):
    return [path.rpartition("/")[2] for path in splits[split].data.table["image"].to_pylist()]


def test_hidden_files_and_folders_do_not_count(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "images/._0.png").write_bytes(b"\0\5\x16\7")
    for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (folder / "images" / hidden).mkdir()
        picture().save(folder / "images" / hidden / "0.png")
    splits = load_folder_dataset(folder)
    assert names(splits) == ["0.png", "1.png", "2.png", "3.png"] and len(splits["train"][:]["image"]) == 4


def test_linked_folders_count_and_circles_end(tmp_path):
    folder = write_folder(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("images", "labels"):
        (linked / name).symlink_to(folder / name)
    (folder / "images/again").symlink_to(folder / "images")
    describe(linked, tasks=SEMANTIC)
    assert names(load_folder_dataset(linked)) == ["0.png", "1.png", "2.png", "3.png"]


def test_labels_beside_images_are_no_images(tmp_path):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
        Image.fromarray(mask(index)).save(tmp_path / f"{index}_mask.png")
    describe(tmp_path, images="{name}.png", tasks={"spot": {"kind": "binary", "files": "{name}_mask.png"}})
    splits = load_folder_dataset(tmp_path)
    assert names(splits) == ["0.png", "1.png", "2.png"]
    assert all((row["spot"] == mask(index)).all() for index, row in enumerate(splits["train"]))


@pytest.mark.parametrize(
    ("image", "label"), [("Blatt.png", "blatt.PNG"), (unicodedata.normalize("NFC", "Bäume.png"), "Ba\u0308ume.png")]
)
def test_names_that_look_alike_belong_together(tmp_path, image, label):
    folder = write_folder(tmp_path, number=1)
    picture(2).save(folder / "images" / image)
    Image.fromarray(mask(2)).save(folder / "labels" / label, format="png")
    splits = load_folder_dataset(folder)
    rows = dict(zip(names(splits), splits["train"], strict=True))
    assert (rows[image]["segmentation"] == mask(2)).all()


def test_what_is_not_clear_is_named(tmp_path):
    folder = write_folder(tmp_path)
    picture().save(folder / "images/0.jpg")
    with pytest.raises(ValueError, match=r"0\.(jpg|png) and .*0\.(jpg|png) have the same name"):
        load_folder_dataset(folder)


def test_labels_of_no_image_are_known(tmp_path):
    folder = write_folder(tmp_path)
    Image.fromarray(mask()).save(folder / "labels/lost.png")
    assert [path.name for path in load_folder_dataset(folder).files.orphans["semantic"]] == ["lost.png"]


def test_the_turn_of_a_photo_counts_for_its_label(tmp_path):
    folder = write_folder(tmp_path, number=1)
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was held upright
    picture().save(folder / "images/0.png", exif=exif)
    with pytest.raises(ValueError, match="EXIF"):
        load_folder_dataset(folder)["train"][0]
    Image.fromarray(mask()).save(folder / "labels/0.png", exif=exif)
    row = load_folder_dataset(folder)["train"][0]
    assert row["image"].shape == (16, 12, 3)
    assert ((row["image"][..., 0] > 90) == (row["segmentation"] == 1)).all() and np.any(row["segmentation"])
