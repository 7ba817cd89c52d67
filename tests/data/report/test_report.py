"""What the check of a data set finds, once before anything is learnt."""

import re

import numpy as np
import pytest
from PIL import Image
from small_folders import describe

from peft_talora import TaskSpec
from peft_talora.data import check_dataset, detect_tasks, load_multitask_dataset, save_check_sheet
from peft_talora.data.__main__ import main
from peft_talora.data.report import reading
from peft_talora.drawing import palette

SIZE = (24, 32)
NORMAL = np.broadcast_to(np.array([0.6, 0.0, -0.8], "float32"), (*SIZE, 3))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(folder, number=12, **fields):
    """Twelve images with classes, spots, depth and normals, nothing wrong with them."""
    rng = np.random.default_rng(0)
    for part in ("images", "classes", "spots", "depth", "normal"):
        (folder / part).mkdir(parents=True)
    for index in range(number):
        classes = np.zeros(SIZE, np.uint8)
        classes[5:15, 5:20], classes[16:20, 5:20] = 1, 2
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(folder / f"images/{index:02}.png")
        Image.fromarray(classes).save(folder / f"classes/{index:02}.png")
        Image.fromarray((classes > 0).astype(np.uint8) * 255).save(folder / f"spots/{index:02}.png")
        np.save(folder / f"depth/{index:02}.npy", 2 + rng.random(SIZE).astype("float32"))
        np.save(folder / f"normal/{index:02}.npy", NORMAL)
    tasks = {
        "semantic": {"files": "classes", "class_names": ["background", "leaf", "stem"]},
        "spots": {"kind": "binary", "files": "spots", "threshold": 128},
        "depth": {"kind": "depth", "files": "depth"},
        "normals": {"files": "normal"},
    }
    for name, more in fields.pop("tasks", {}).items():
        tasks[name] |= more
    describe(folder, **{"splits": {"test": ["00", "01"], "val": ["10"]}, "tasks": tasks, **fields})
    return folder


def check(folder, **options):
    splits = load_multitask_dataset(f"folder:{folder}")
    return check_dataset(splits, detect_tasks(splits), progress=False, **options)


def test_what_is_right_is_counted(tmp_path):
    report, splits = check(write(tmp_path))
    assert not report.findings.errors and not report.findings.warnings and not report.findings.notes
    tasks = report.splits["train"].tasks
    semantic, spots, depth, normals = (tasks[name] for name in ("semantic", "spots", "depth", "normals"))
    assert report.splits["train"].rows == len(splits["train"]) == semantic.images == semantic.labelled_images == 9
    pixels = SIZE[0] * SIZE[1]
    assert semantic.counts == {0: 9 * (pixels - 210), 1: 9 * 150, 2: 9 * 60}
    assert (spots.positive, spots.labelled_pixels) == (9 * 210, 9 * pixels)
    assert 2 <= depth.low < 2.01 and 2.99 < depth.high <= 3 and depth.median == pytest.approx(2.5, abs=0.05)
    assert normals.lengths == pytest.approx([1] * 9, abs=1e-6)
    text = str(report)
    assert (
        "train: 9 images, 32 x 24" in text and "leaf 19.5 %" in text and "27.3 % positive" in text and "metres" in text
    )


FAULTS = {
    "no picture": (lambda d: (d / "classes/03.png").write_bytes(b"no png"), "errors", r"classes/03\.png cannot be read"),
    "another size": (
        lambda d: Image.fromarray(np.zeros((9, 9), np.uint8)).save(d / "classes/04.png"),
        "errors",
        r"classes/04\.png .*9 x 9 pixels, its image 32 x 24",
    ),
    "a class too high": (
        lambda d: Image.fromarray(np.full(SIZE, 9, np.uint8)).save(d / "classes/05.png"),
        "errors",
        r"classes/05\.png.*class id 9 is beyond the 3 classes",
    ),
    "normals from 0 to 1": (lambda d: np.save(d / "normal/07.npy", (NORMAL + 1) / 2), "errors", r"07\.npy.*`range: \[0, 1\]`"),
    "half an image": (
        lambda d: (d / "images/08.png").write_bytes((d / "images/08.png").read_bytes()[:99]),
        "errors",
        r"images/08\.png cannot be read",
    ),
    "a missing label": (lambda d: (d / "spots/06.png").unlink(), "notes", r"train: spots: 1 images have no label, such as row \d+ \(.*06\.png"),
    "a label of nothing": (
        lambda d: Image.fromarray(np.zeros(SIZE, np.uint8)).save(d / "spots/zz.png"),
        "notes",
        r"spots: 1 label files belong to no image, such as .*zz\.png",
    ),
    "twins": (
        lambda d: (d / "images/09.png").write_bytes((d / "images/00.png").read_bytes()),
        "warnings",
        r"1 pictures are in .* such as row \d+ \(.*0[09]\.png\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    plant, where, message = FAULTS[fault]
    plant(write(tmp_path))
    report, _ = check(tmp_path)
    found = getattr(report.findings, where)
    assert len(found) == 1
    assert re.search(message, found[0], re.DOTALL), found
    if where == "errors":
        with pytest.raises(ValueError, match=f"(?s){message}"):
            report.raise_errors()


FIELDS = {
    "a threshold above everything": ({"spots": {"threshold": 300}}, r"spots: 9 of 9 images.*`threshold: 300` is above every number"),
    "no positive": ({"spots": {"threshold": 300}}, r"train: spots: no labelled pixel is positive"),
    "a class map that fits nothing": ({"semantic": {"class_map": {7: 0, 8: 1, 9: 2}}}, r"no pixel has one of the numbers of the 3 classes"),
    "a class that is nowhere": ({"semantic": {"class_names": ["background", "leaf", "stem", "root"]}}, r"train: semantic: never seen: 'root'"),
    "one class alone": ({"semantic": {"class_map": {0: 0, 1: 0, 2: 0}}}, r"train: semantic: every labelled pixel is 'background' \(0\)"),
    "centimetres": ({"depth": {"scale": 100}}, r"train: depth: the median is 2[45]\d.* metres: is it in centimetres"),
    "millimetres": ({"depth": {"scale": 1000}}, r"train: .*depth.*: 9 of 9 images.*millimetres"),
    "one depth": ({"depth": {"scale": 1e-30, "offset": 1}}, r"train: depth: every labelled pixel is 1"),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_hardly_meant_is_doubted(tmp_path, field, recwarn):
    tasks, message = FIELDS[field]
    report, _ = check(write(tmp_path, tasks=tasks))
    assert any(re.search(message, warning) for warning in report.findings.warnings), report.findings
    assert not [warning for warning in recwarn if "tasks." in str(warning.message)], "told twice"


def test_nothing_labelled_is_an_error(tmp_path):
    report, _ = check(write(tmp_path, tasks={"semantic": {"class_map": {7: 0, 8: 1, 9: 2}}}))
    assert report.findings.errors == [
        "train: none of the 9 images is labelled for the task 'semantic': nothing can be learnt"
    ]


def test_what_no_split_wants_is_told(tmp_path):
    report, _ = check(write(tmp_path, splits={"train": ["00", "01"], "test": ["02"]}))
    assert report.findings.notes == ["9 images are in no split, such as '03'"]


def test_classes_of_the_test_split_alone(tmp_path):
    write(tmp_path)
    for index in (0, 1):
        Image.fromarray(np.full(SIZE, 2, np.uint8)).save(tmp_path / f"classes/{index:02}.png")
    for index in range(2, 12):
        Image.fromarray(np.eye(*SIZE, dtype=np.uint8)).save(tmp_path / f"classes/{index:02}.png")
    report, _ = check(tmp_path)
    assert report.findings.warnings == [
        "train: semantic: never seen: 'stem'",
        "test: semantic: 'stem' is there, and never in train",
    ]


def test_bad_rows_are_left_out_when_asked(tmp_path):
    FAULTS["half an image"][0](write(tmp_path))
    report, splits = check(tmp_path, skip_bad_files=True)
    report.raise_errors()
    assert len(splits["train"]) == 8 and len(splits["test"]) == 2
    assert report.findings.notes == ["train: 1 of 9 rows are left out, they cannot be read"]
    assert [splits["train"][index]["image"].shape for index in range(8)] == [(*SIZE, 3)] * 8


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    write(tmp_path)
    first, _ = check(tmp_path)
    calls = []
    monkeypatch.setattr(
        reading, "examine_row", lambda read, tasks, real=reading.examine_row: calls.append(1) or real(read, tasks)
    )
    second, _ = check(tmp_path)
    assert str(second) == str(first) and not calls
    check(tmp_path, cache=False)
    assert len(calls) == 12
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path / "classes/05.png")
    third, _ = check(tmp_path)
    assert len(calls) == 13 and third.splits["train"].tasks["semantic"].counts[2] == 8 * 60


def test_lists_of_dicts():
    image = np.zeros((*SIZE, 3), np.uint8)
    rows = [
        {"image": image + index, "normal": np.moveaxis(NORMAL, -1, 0) * scale} for index, scale in enumerate((1, 1, 3))
    ]
    report, splits = check_dataset(
        {"train": rows, "test": [{"image": "nowhere"}]}, {"normals": TaskSpec("normals")}, progress=False
    )
    assert report.splits["train"].tasks["normals"].lengths == pytest.approx([1, 1, 3])
    doubt = "1 of 3 images, the first one is row 2: normals are vectors of length 1"
    assert any(doubt in warning for warning in report.findings.warnings), report.findings.warnings
    assert len(report.findings.errors) == 1 and "test: 1 of 1 rows cannot be read" in report.findings.errors[0]
    assert splits["train"] is rows


def test_normals_of_other_numbers_in_rows():
    encoded = np.moveaxis((NORMAL + 1) / 2, -1, 0)
    rows = [{"image": np.zeros((*SIZE, 3), np.uint8), "normal": encoded}]
    report, _ = check_dataset({"train": rows}, {"normals": TaskSpec("normals")}, progress=False)
    assert "say `range: [0, 1]`" in report.findings.warnings[0]


def test_the_sheet_shows_labels_over_pictures(tmp_path):
    write(tmp_path / "data")
    report, splits = check(tmp_path / "data")
    path = save_check_sheet(splits, report, tmp_path / "new/check.png", rows_per_split=2)
    sheet = np.asarray(Image.open(path))
    # test 2, val 1, train 2 rows of 168 pixels below their titles, image and four tasks of 224 pixels
    # and a legend of three lines
    bottom = 18 + 5 * (18 + 168 + 6)
    assert sheet.shape == (bottom + 3 * 15 + 6, 6 + 5 * 230, 3)
    assert (sheet[bottom + 7 : -6 : 15, 701] == palette(3)).all(), "the classes' colours, the most frequent first"
    assert (sheet[bottom:, :230] == 255).all() and (sheet[bottom:, 236:460] != 255).any(), "depth has a scale"
    image, classes = (sheet[36:204, left : left + 224].astype(float) for left in (6, 236))
    assert np.abs(image - classes).mean() > 10, "labels are drawn over it"


@pytest.mark.parametrize(("fault", "code"), [(None, 0), ("half an image", 1)])
def test_the_command(tmp_path, capsys, fault, code):
    write(tmp_path / "data")
    if fault:
        FAULTS[fault][0](tmp_path / "data")
    assert (
        main([f"folder:{tmp_path / 'data'}", "--sheet", str(tmp_path / "check.png"), "--tasks", "depth", "semantic"])
        == code
    )
    output = capsys.readouterr().out
    assert "depth" in output and "spots" not in output and ("ERROR" in output) == bool(code)
    assert (tmp_path / "check.png").is_file()


def test_the_command_on_nothing(tmp_path, capsys):
    assert main([f"folder:{tmp_path / 'nowhere'}"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_black_and_white_class_maps():
    white = np.zeros(SIZE, "int64")
    white[:8] = 255
    rows = [{"image": np.zeros((*SIZE, 3), np.uint8), "segmentation": white}]
    report, _ = check_dataset({"train": rows}, detect_tasks(rows), progress=False)
    assert "there is nothing to tell apart; are unlabelled pixels (255) a class?" in report.findings.warnings[0]
