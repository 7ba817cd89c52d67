"""What the colours of the sheet mean."""

from collections import Counter

import numpy as np
import pytest

from peft_talora import TaskSpec
from peft_talora.data.report.legend import LINE, legend
from peft_talora.data.report.summary import TaskSummary
from peft_talora.drawing import draw, palette


def pixels(*summaries, value_range=None):
    return np.asarray(legend(summaries, value_range, 200))


def classes(counts, names=("floor", "wall", "chair")):
    spec = TaskSpec("semantic", num_channels=len(names), class_names=list(names))
    return TaskSummary(spec, counts=Counter(counts))


def test_classes_that_are_seen_in_any_split_the_most_frequent_first():
    drawn = pixels(classes({0: 5, 2: 9}), classes({2: 1}))
    assert drawn.shape == (2 * LINE, 200, 3)
    assert (drawn[[7, LINE + 7], 5] == palette(3)[[2, 0]]).all()
    # the names are written beside them
    renamed = pixels(classes({0: 5, 2: 10}, ("floor", "wall", "table")))
    assert (renamed[:LINE, 12:] != drawn[:LINE, 12:]).any() and (renamed[LINE:] == drawn[LINE:]).all()


def test_many_classes():
    names = [f"class {index}" for index in range(24 + 9)]
    drawn = pixels(classes(dict.fromkeys(range(len(names)), 1), names))
    assert len(drawn) == (24 + 1) * LINE and (drawn[-LINE:] < 255).any()


def test_a_scale_has_its_ends_written_below_it():
    depth = TaskSummary(TaskSpec("depth"))
    near, far = (pixels(depth, value_range=(1.0, end)) for end in (3.0, 4.0))
    assert (near[0, [0, -1]] == draw(depth.spec, np.array([[1.0, 3.0]]), (1.0, 3.0))[0]).all()
    # the left end is the same, the right one is not
    assert (near[LINE:, :100] == far[LINE:, :100]).all() and (near[LINE:, :100] < 255).any()
    assert (near[LINE:, 100:] != far[LINE:, 100:]).any()


@pytest.mark.parametrize("spec", [TaskSpec("normals"), TaskSpec("depth"), TaskSpec("regression", num_channels=2)])
def test_what_has_none(spec):
    assert legend([TaskSummary(spec)], None, 200) is None
