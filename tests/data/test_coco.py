"""COCO annotations of hand-made outlines, against masks that were drawn by hand."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from peft_talora.data import MultiTaskDataset, check_dataset, collate, detect_tasks, load_multitask_dataset
from peft_talora.data.splits import evaluation_rows
from peft_talora.msam.processing import MSamProcessor

pytest.importorskip("datasets")
pytest.importorskip("pycocotools")

SIZE = HEIGHT, WIDTH = 20, 30


def outline(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def rle(mask):
    flat = mask.flatten(order="F").astype(int)
    counts, value = [], 0
    while flat.size:
        run = int((flat != value).argmax()) if (flat != value).any() else flat.size
        counts.append(run)
        flat, value = flat[run:], 1 - value
    return {"counts": counts, "size": list(mask.shape)}


CROWD = np.zeros(SIZE, dtype=bool)
CROWD[14:18, 20:28] = True
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "category_id": 5, "segmentation": outline(2, 2, 12, 12), "area": 100, "iscrowd": 0},
    {"id": 2, "image_id": 7, "category_id": 9, "segmentation": outline(6, 6, 10, 10), "area": 16, "iscrowd": 0},
    {"id": 3, "image_id": 7, "category_id": 9, "segmentation": rle(CROWD), "area": 32, "iscrowd": 1},
    {"id": 4, "image_id": 7, "category_id": 5, "segmentation": [], "bbox": [20, 2, 4, 3], "area": 12, "iscrowd": 0},
]


def write(file, images, annotations=ANNOTATIONS):
    file.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": 0, "name": "things"}, {"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 99, dtype=np.uint8)).save(file)


@pytest.fixture
def annotations(tmp_path):
    write(tmp_path / "annotations.json", [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}])
    picture(tmp_path / "a.png")
    picture(tmp_path / "images/b.png")
    return tmp_path / "annotations.json"


def test_outlines_become_classes_saliency_and_edges(annotations):
    splits = load_multitask_dataset(f"coco:{annotations}")
    assert splits.tasks["semantic"].class_names == ["background", "cat", "dog"]
    classes = np.zeros(SIZE, dtype=int)
    classes[2:12, 2:12], classes[6:10, 6:10], classes[CROWD] = 1, 2, 2
    known = np.ones(SIZE, dtype=bool)
    known[2:5, 20:24] = False
    row, empty = splits["train"]
    assert (row["segmentation"] == np.where(known, classes, -1)).all()
    assert (row["saliency"] == np.where(known, classes > 0, -1)).all()
    inner = np.zeros(SIZE, dtype=bool)
    inner[3:11, 3:11] = True
    inner[5:11, 5:11] = False  # around the dog, where the cat ends
    cat = (classes == 1) & ~CROWD
    expected = cat & ~inner
    expected[5, 5] = expected[5, 10] = expected[10, 5] = expected[10, 10] = False
    expected[6:10, 6:10] = True
    expected[7:9, 7:9] = False
    assert (row["edge"] == np.where(known & ~CROWD, expected, -1)).all()
    assert not any(empty[column].any() for column in ("segmentation", "saliency", "edge"))


def test_batches_and_workers(annotations):
    splits = load_multitask_dataset(f"coco:{annotations}")
    rows = MultiTaskDataset(splits["train"], {"edges": splits.tasks["edges"]}, MSamProcessor(16))
    rows = pickle.loads(pickle.dumps(rows))
    assert set(collate([rows[0], rows[1]])["labels"]) == {"edges"}


def test_splits_of_roboflow_and_of_coco(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / "r" / split / "_annotations.coco.json", [{"id": 7, "file_name": "a.png"}])
        picture(tmp_path / "r" / split / "a.png")
        write(
            tmp_path / f"c/annotations/instances_{split.removesuffix('id')}2017.json",
            [{"id": 7, "file_name": "a.png"}],
        )
        picture(tmp_path / f"c/{split.removesuffix('id')}2017/a.png")
    assert set(load_multitask_dataset(f"coco:{tmp_path}/r")) == {"train", "valid"}
    splits = load_multitask_dataset(f"coco:{tmp_path}/c")
    assert set(splits) == {"train", "val"} and evaluation_rows(splits).name == "val"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": []}, "boxes alone"),
        ({"category_id": 3}, "category 3, which is not there"),
        ({"image_id": None, "category_id": None}, "category None"),
    ],
)
def test_annotations_that_are_none(annotations, changes, message):
    write(annotations, [{"id": 7, "file_name": "a.png"}], [{**ANNOTATIONS[0], **changes}])
    with pytest.raises(ValueError, match=message):
        load_multitask_dataset(f"coco:{annotations}")


def test_files_that_are_not_there(annotations, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_multitask_dataset(f"coco:{tmp_path}/nothing.json")
    write(annotations, [{"id": 7, "file_name": "gone.png"}])
    with pytest.raises(FileNotFoundError, match=r"annotations\.json: the image 'gone\.png' is in none of"):
        load_multitask_dataset(f"coco:{annotations}")
    write(annotations, [{"id": 7, "file_name": "../../etc/x.png"}])
    with pytest.raises(ValueError, match="relative to a folder"):
        load_multitask_dataset(f"coco:{annotations}")
    annotations.write_text("[]")
    with pytest.raises(ValueError, match="holds no COCO annotations"):
        load_multitask_dataset(f"coco:{annotations}")


def test_a_mask_of_another_size_names_file_and_annotation(annotations):
    other = {**ANNOTATIONS[0], "segmentation": {"counts": [0, 12], "size": [3, 4]}}
    write(annotations, [{"id": 7, "file_name": "a.png"}], [other])
    with pytest.raises(
        ValueError, match=r"annotation 1 of .*a\.png has no mask: its mask is 4 x 3, its image 30 x 20"
    ):
        load_multitask_dataset(f"coco:{annotations}")["train"][0]


def test_a_check_sees_that_the_outlines_have_changed(annotations, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def labelled(outlines):
        write(annotations, [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}], outlines)
        splits = load_multitask_dataset(f"coco:{annotations}")
        report, _ = check_dataset(splits, detect_tasks(splits), progress=False)
        return report.splits["train"].tasks["saliency"].positive

    # 100 of the cat, among which is the dog, and 32 of the crowd; then the cat has 5 x 5, and the dog 15 pixels beside it
    assert labelled(ANNOTATIONS) == 132
    smaller = {**ANNOTATIONS[0], "segmentation": outline(2, 2, 7, 7), "area": 25}
    assert labelled([smaller, *ANNOTATIONS[1:]]) == 25 + 15 + 32


@pytest.mark.parametrize(("size", "turned"), [((40, 60), False), ((2, 3), False), ((30, 20), True)])
def test_outlines_for_another_size_are_refused(annotations, size, turned):
    entry = {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    write(annotations, [entry])
    assert load_multitask_dataset(f"coco:{annotations}")["train"][0]["segmentation"].any()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.zeros((*size[::-1], 3) if turned else (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(annotations.parent / "a.png", **({"exif": exif} if turned else {}))
    # stored as the file says, or not; upright it is of another size
    message = rf"outlines of .*a\.png are for 30 x 20 pixels, its image {size[1]} x {size[0]}"
    with pytest.raises(ValueError, match=message + (r", turned as its EXIF" if turned else "")):
        load_multitask_dataset(f"coco:{annotations}")["train"][0]


def test_a_category_with_two_meanings_is_refused(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / "a.png")
        write(tmp_path / split / "_annotations.coco.json", [{"id": 7, "file_name": "a.png"}])
    assert set(load_multitask_dataset(f"coco:{tmp_path}")) >= {"train"}
    file = tmp_path / "valid/_annotations.coco.json"
    file.write_text(file.read_text().replace('"cat"', '"CAT"').replace('"dog"', '"cat"').replace('"CAT"', '"dog"'))
    with pytest.raises(ValueError, match=r"category 9 is 'cat', in .*train.* it is 'dog'"):
        load_multitask_dataset(f"coco:{tmp_path}")
