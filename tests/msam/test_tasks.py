import json

import pytest

from peft_talora.metrics import HIGHER_IS_BETTER, MultiTaskMetrics
from peft_talora.msam.tasks import KINDS, TaskSpec, parse_tasks, tasks_to_list


def test_fixed_channels_are_filled_in():
    assert TaskSpec("depth").num_channels == 1
    assert TaskSpec("binary", num_channels=1).num_channels == 1
    assert TaskSpec("normals").num_channels == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "colour"}, "'colour'.*semantic, parts, binary, depth, normals, regression"),
        ({"kind": "semantic"}, "semantic task needs num_channels"),
        ({"kind": "parts"}, "num_channels"),
        ({"kind": "regression"}, "num_channels"),
        ({"kind": "normals", "num_channels": 4}, "num_channels=3, got 4"),
        ({"kind": "semantic", "num_channels": 0}, "0"),
        ({"kind": "semantic", "num_channels": True}, "True"),
        ({"kind": "depth", "weight": -1.0}, "-1.0"),
        ({"kind": "depth", "weight": float("nan")}, "nan"),
        ({"kind": "depth", "ignore_index": 0.5}, "ignore_index.*0.5"),
        ({"kind": "semantic", "num_channels": 3, "class_names": ["a", "b"]}, "2 class_names for num_channels=3"),
        ({"kind": "semantic", "num_channels": 3, "class_names": "abc"}, "abc"),
        ({"kind": "depth", "wieght": 1.0}, "wieght"),
        ({"num_channels": 3}, "kind"),
    ],
)
def test_impossible_spec(values, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec.from_dict(values)


def test_dict_round_trip():
    spec = TaskSpec("semantic", 2, weight=0.5, ignore_index=-1, class_names=("sky", "sea"))
    values = json.loads(json.dumps(spec.to_dict()))
    assert TaskSpec.from_dict(values) == spec
    assert values["class_names"] == ["sky", "sea"]


def test_list_keeps_the_order_that_sorted_json_loses():
    tasks = {"semantic": TaskSpec("semantic", 4), "depth": {"kind": "depth", "weight": 2.0}}
    parsed = parse_tasks(tasks)
    text = json.dumps(tasks_to_list(parsed), sort_keys=True)
    again = parse_tasks(json.loads(text))
    assert list(again) == ["semantic", "depth"]
    assert again == parsed
    assert again["depth"].weight == 2.0


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"keys": TaskSpec("depth")}, "'keys'"),
        ({}, "at least one"),
        ([{"kind": "depth"}], "'name'"),
        ([{"name": "a", "kind": "depth"}, {"name": "a", "kind": "depth"}], "'a'"),
        ({"far": {"kind": "dpeth"}}, "'far'.*'dpeth'"),
        ({"far": "depth"}, "'far'"),
    ],
)
def test_impossible_tasks(tasks, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(tasks)


def test_every_kind_can_be_a_task():
    for kind, fixed in KINDS.items():
        spec = TaskSpec(kind, num_channels=None if fixed.channels else 5)
        assert spec.num_channels == (fixed.channels or 5)
        assert all(name in HIGHER_IS_BETTER for name in MultiTaskMetrics({"task": spec}).compute()["task"])
