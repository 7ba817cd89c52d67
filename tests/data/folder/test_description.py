import pytest

from peft_talora.data.folder.description import parse_description, read_description

GOOD = {"semantic": {"class_names": ["a", "b"]}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"dataset: expected fields such as 'images'"),
        ({"task": GOOD}, r"dataset: unknown fields \['task'\].*'tasks'"),
        ({"tasks": GOOD, "license": ["MIT"]}, r"dataset: license: expected a text, got \['MIT'\]"),
        ({"images": "x"}, r"dataset: tasks: expected"),
        ({"tasks": {"a b": {"kind": "depth"}}}, r"tasks: a task name must be a Python identifier.*'a b'"),
        ({"tasks": {"far": {"files": "far"}}}, r"tasks\.far\.kind: unknown kind None, expected one of semantic"),
        ({"tasks": {"far": {"kind": "deep"}}}, r"tasks\.far\.kind: unknown kind 'deep'"),
        ({"tasks": {"depth": {"kind": "binary"}}}, r"tasks\.depth\.kind: a task named 'depth' is of the kind 'depth'"),
        (
            {"tasks": {"depth": {"class_names": ["a"]}}},
            r"tasks\.depth: unknown fields \['class_names'\].*of a depth task",
        ),
        ({"tasks": {"semantic": {}}}, r"tasks\.semantic\.class_names: expected a list"),
        ({"tasks": {"semantic": {"class_names": ["a"], "num_classes": 2}}}, r"tasks\.semantic: got 1 class_names for"),
        (
            {"tasks": {"semantic": {**GOOD["semantic"], "class_map": {7: 2}}}},
            r"class_map: class 2 is beyond the 2 classes",
        ),
        ({"tasks": {"semantic": {**GOOD["semantic"], "class_map": {"x": 1}}}}, r"class_map: expected"),
        (
            {"tasks": {"semantic": {**GOOD["semantic"], "ignore": "none"}}},
            r"tasks\.semantic\.ignore: expected a number",
        ),
        ({"tasks": {"depth": {"scale": "0.1m"}}}, r"tasks\.depth\.scale: expected a number, got '0\.1m'"),
        ({"tasks": {"depth": {"optional": 1}}}, r"tasks\.depth\.optional: expected true or false, got 1"),
        ({"tasks": {"depth": {"files": "../depth"}}}, r"tasks\.depth\.files: expected a subfolder"),
        ({"tasks": {"depth": {"files": "{name}/{name}"}}}, r"tasks\.depth\.files: .*one \{name\}"),
        ({"tasks": {"normals": {"axes": [1, 2, 1]}}}, r"tasks\.normals\.axes: expected three factors"),
        ({"tasks": {"flow": {"kind": "regression"}}}, r"tasks\.flow: a regression task needs num_channels"),
        ({"tasks": {"edges": {}, "edge": {"kind": "binary"}}}, r"more than one would have the column 'edge'"),
        ({"tasks": {"image": {"kind": "binary"}}}, r"more than one would have the column 'image'"),
        ({"tasks": GOOD, "splits": "random"}, r"splits: expected 'subfolders'"),
        ({"tasks": GOOD, "splits": {"test": 1.5}}, r"splits\.test: expected .* got 1\.5"),
        ({"tasks": GOOD, "splits": {"test": 0.5, "val": 0.5}}, r"splits: the fractions must leave something"),
        ({"tasks": GOOD, "splits": {"train": 0.9, "test": 0.2}}, r"splits: the fractions must leave something"),
    ],
)
def test_what_is_not_possible(values, message):
    with pytest.raises(ValueError, match=message):
        parse_description(values, "dataset")


def test_defaults():
    found = parse_description({"tasks": {**GOOD, "saliency": {}}}, "dataset")
    assert (found.images, found.splits) == ("images", {})
    # of a mask the file's numbers decide what 255 means
    assert found.tasks["semantic"].ignore == (255,) and found.tasks["saliency"].ignore == ()
    assert found.tasks["saliency"].files == ("saliency",) and found.tasks["saliency"].spec.kind == "binary"


def test_terms_and_source_are_for_people():
    plain, told = (parse_description({"tasks": GOOD, **more}, "d") for more in ({}, {"license": "MIT", "source": "a"}))
    assert plain == told


def test_number_255_is_a_class_where_there_are_that_many():
    found = parse_description({"tasks": {"semantic": {"num_classes": 300}}}, "dataset").tasks["semantic"]
    assert found.ignore == () and found.spec.ignore_index == -1


def test_yaml_that_is_none(tmp_path):
    (tmp_path / "dataset.yaml").write_text("tasks: [")
    with pytest.raises(ValueError, match=r"dataset\.yaml cannot be read"):
        read_description(tmp_path)
