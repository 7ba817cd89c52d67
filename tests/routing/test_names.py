import pytest

from peft_talora.routing.names import validate_task_names


def test_order_is_kept():
    assert validate_task_names(["semantic", "depth", "a_1"]) == ("semantic", "depth", "a_1")


@pytest.mark.parametrize("name", ["two words", "1st", "", "a.b", "class", "keys", "type", "training", "_modules"])
def test_impossible_name_is_named(name):
    with pytest.raises(ValueError, match=repr(name).replace(".", r"\.")):
        validate_task_names(["depth", name])


def test_double_name_is_named():
    with pytest.raises(ValueError, match="'depth' occurs more than once"):
        validate_task_names(["depth", "normals", "depth"])


@pytest.mark.parametrize("names", [[], "depth", [3], {"depth", "edges"}])
def test_what_is_no_list_of_names(names):
    with pytest.raises(ValueError):
        validate_task_names(names)
