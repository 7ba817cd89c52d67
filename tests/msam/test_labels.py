"""Masks of 0 and 255 and depth in millimetres are warned of once; nothing that is as it should be is."""

import warnings

import numpy as np
import pytest
import torch

from peft_talora import MSamProcessor, TaskSpec
from peft_talora.msam import labels as labels_module
from peft_talora.msam.labels import label_tensor

SIZE = (4, 6)


@pytest.fixture(autouse=True)
def nothing_doubted_yet(monkeypatch):
    monkeypatch.setattr(labels_module, "_doubted", set())


def filled(*values):
    """A map in which each of the values is, the last one most often."""
    label = np.full(SIZE, values[-1], dtype=np.float64)
    label.flat[: len(values)] = values
    return label


def messages(name, spec, *maps):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for label in maps:
            label_tensor(name, spec, label, SIZE)
    return [str(warning.message) for warning in found]


class TestMasks:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
    @pytest.mark.parametrize("values", [(0, 255), (255, 0)])
    def test_black_and_white(self, dtype, values):
        (message,) = messages("saliency", TaskSpec("binary"), filled(*values).astype(dtype))
        assert "task 'saliency'" in message and "0 and 255 alone" in message and "divide by 255" in message

    @pytest.mark.parametrize("values", [(0,), (1,), (255,), (-1, 0), (0, 1), (0, 1, 255), (1, 255), (-1, 0, 255)])
    def test_no_false_alarm(self, values):
        assert messages("saliency", TaskSpec("binary"), filled(*values)) == []

    def test_where_255_is_no_mark_it_is_an_error_as_before(self):
        with pytest.raises(ValueError, match="255 is neither ignore_index"):
            label_tensor("saliency", TaskSpec("binary", ignore_index=-1), filled(0, 255), SIZE)

    def test_classes_may_be_0_and_255(self):
        assert messages("semantic", TaskSpec("semantic", 3), filled(0, 255).astype(np.int64)) == []


class TestDepth:
    def test_millimetres(self):
        depth = filled(0, np.nan, np.inf, 400, 501)
        (message,) = messages("depth", TaskSpec("depth"), depth)
        assert "median depth is 501" in message and "metres" in message and "1000" in message

    # the median counts, and of labelled pixels alone
    @pytest.mark.parametrize(
        "depth",
        [filled(3), filled(0), filled(-600), filled(np.nan, np.inf), filled(900, 800, 500), np.arange(24) + 488.0],
    )
    def test_no_false_alarm(self, depth):
        assert messages("depth", TaskSpec("depth"), depth.reshape(SIZE)) == []

    def test_other_kinds_have_large_values(self):
        assert messages("flow", TaskSpec("regression", 1), filled(2000)) == []


def test_once_for_a_task():
    depth, spec = filled(2000), TaskSpec("depth")
    assert len(messages("depth", spec, depth, 2 * depth)) == 1
    assert messages("depth", spec, depth) == []
    assert len(messages("far", spec, depth)) == 1


def test_the_processor_warns():
    image, tasks = np.zeros((*SIZE, 3), dtype=np.uint8), {"saliency": TaskSpec("binary"), "depth": TaskSpec("depth")}
    processor = MSamProcessor(8, tasks)
    labels = {"saliency": filled(0, 255).astype(np.uint8), "depth": filled(2000)}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        batch = processor([image] * 2, [labels] * 2)
    assert [str(warning.message).split(":")[0] for warning in found] == [
        "labels of task 'saliency'",
        "labels of task 'depth'",
    ]
    # a warning, nothing more: the labels are what they were
    assert torch.equal(batch["labels"]["depth"].unique(), torch.tensor([0.0, 2000.0]))
