"""Label maps on their way in: what is unlabelled, what is doubted, and how masks shrink."""

import warnings

import numpy as np
import pytest
import torch

from peft_talora import MSamProcessor, TaskSpec
from peft_talora.kinds import doubts
from peft_talora.msam.labels import label_tensor, resize_label, square_label

SIZE = (4, 6)


@pytest.fixture(autouse=True)
def nothing_doubted_yet():
    doubts.forget()


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


class TestOneRuleForUnlabelled:
    """What marks unlabelled pixels outside is one value inside."""

    @pytest.mark.parametrize(
        ("spec", "label", "expected"),
        [
            (TaskSpec("semantic", 3), [[0, 2, -1, -7, 255]], [[0, 2, 255, 255, 255]]),
            (TaskSpec("semantic", 3, ignore_index=0), [[0, 1, 2, -1]], [[0, 1, 2, 0]]),
            (TaskSpec("binary"), [[0.0, 1, np.nan, -1, 255]], [[0, 1, 255, 255, 255]]),
            (TaskSpec("depth"), [[2.0, 0, -1, np.nan, np.inf]], [[2, 0, 0, 0, 0]]),
        ],
    )
    def test_marks(self, spec, label, expected):
        label = np.array(label)
        assert label_tensor("task", spec, label, label.shape).reshape(label.shape).tolist() == expected

    @pytest.mark.parametrize("dtype", [np.uint8, np.int64])
    def test_masked_classes(self, dtype):
        label = np.ma.masked_equal(np.array([[0, 1, 2]], dtype=dtype), 1)
        assert label_tensor("task", TaskSpec("semantic", 3), label, (1, 3)).tolist() == [[0, 255, 2]]
        assert label_tensor("task", TaskSpec("semantic", 3, ignore_index=-100), label, (1, 3)).tolist() == [
            [0, -100, 2]
        ]

    def test_masked_values(self):
        mask = [[[True, False]], [[False, False]]]
        label = label_tensor(
            "flow", TaskSpec("regression", 2), np.ma.array(np.ones((2, 1, 2), int), mask=mask), (1, 2)
        )
        assert label[:, 0, 0].isnan().all() and (label[:, 0, 1] == 1).all()
        normals = np.ma.array(np.ones((3, 1, 1)), mask=[[[True]], [[False]], [[False]]])
        assert (label_tensor("normals", TaskSpec("normals"), normals, (1, 1)) == 0).all()

    def test_of_more_than_255_classes_number_255_is_one(self):
        spec = TaskSpec("semantic", 300)
        assert spec.ignore_index == -1
        label = label_tensor("task", spec, np.array([[255, 299, -1]]), (1, 3))
        assert label.tolist() == [[255, 299, -1]] and resize_label(spec, label, (2, 6))[0].tolist()[::2] == [
            255,
            299,
            -1,
        ]
        assert TaskSpec("semantic", 300, ignore_index=7).ignore_index == 7
        assert TaskSpec("semantic", 255).ignore_index == 255
        with pytest.raises(ValueError, match="300 is neither ignore_index"):
            label_tensor("task", spec, np.array([[300]]), (1, 1))


class TestThinPositives:
    """Nothing of a line of one pixel gets lost when a mask is made smaller."""

    @pytest.mark.parametrize("new", [200, 128, 100, 64, 40])
    @pytest.mark.parametrize("first", [0, 1, 5])
    def test_straight_lines(self, new, first):
        mask = torch.zeros(1, 256, 256)
        mask[0, first::32] = 1
        small = resize_label(TaskSpec("binary"), mask, (new, new))
        rows = ((torch.arange(first, 256, 32) + 0.5) * new / 256).long()
        near = torch.stack([small[0, (rows + step).clamp(0, new - 1)] for step in (-1, 0, 1)]).amax(0)
        assert (near == 1).all()
        # and not much thicker than a pixel
        assert small.mean() <= 2 * len(rows) / new

    def test_a_circle_stays_closed(self):
        y, x = np.mgrid[:256, :256]
        for size in (128, 64):
            radius = np.hypot(y - 128, x - 128)
            circle = torch.from_numpy(((radius > 79.5) & (radius < 80.5)).astype(np.float32))[None]
            small = resize_label(TaskSpec("binary"), circle, (size, size))[0]
            middle = size // 2
            # what can be reached from the centre without crossing the line
            inside = torch.zeros(size, size)
            inside[middle, middle] = 1
            for _ in range(size * 2):
                cross = torch.nn.functional.max_pool2d(inside[None, None], (3, 1), 1, (1, 0))
                cross = cross.maximum(torch.nn.functional.max_pool2d(inside[None, None], (1, 3), 1, (0, 1)))
                inside = cross[0, 0] * (small == 0)
            assert inside[0, 0] == 0 and inside.sum() > 10

    def test_areas_and_what_is_unlabelled_stay(self):
        mask = torch.zeros(1, 64, 64)
        mask[0, 16:48, 16:48] = 1
        mask[0, :8] = 255
        small = resize_label(TaskSpec("binary"), mask, (32, 32))
        assert torch.equal(small, mask[:, ::2, ::2])

    def test_a_stray_pixel_goes(self):
        mask = torch.zeros(1, 64, 64)
        mask[0, 33, 34] = 1
        assert resize_label(TaskSpec("binary"), mask, (16, 16)).sum() == 0

    def test_soft_masks_keep_their_numbers(self):
        mask = torch.full((1, 8, 8), 0.25)
        mask[0, :, 4:] = 0.75
        assert torch.equal(resize_label(TaskSpec("binary"), mask, (4, 4)), mask[:, ::2, ::2])


@pytest.mark.parametrize("size", [(512, 2048), (2048, 512), (96, 2048), (2048, 96)])
def test_no_thin_line_gets_lost_in_a_stretched_square(size):
    # SAM 2's and 3's processors stretch an image to the square: one side may grow and the other one shrink
    for axis in (0, 1):
        mask = torch.zeros(1, *size)
        mask.movedim(1 + axis, 0)[3::64] = 1
        along = square_label(TaskSpec("binary"), mask, 128, to_square=True)[0].movedim(axis, 0).mean(dim=1)
        assert set(along.tolist()) == {0.0, 1.0}
        starts = int((along[1:] > along[:-1]).sum() + (along[0] > 0))
        assert starts == len(range(3, size[axis], 64))
