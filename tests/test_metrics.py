"""Metrics against numpy over all labelled pixels at once, fed batch by batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peft_talora.metrics import HIGHER_IS_BETTER, MultiTaskMetrics, TaskMetrics, delta_b
from peft_talora.msam.tasks import TaskSpec


def run(spec, logits, labels, batch=2):
    """Metrics of float64 logits at the labels' resolution, in batches."""
    metrics = TaskMetrics(spec)
    for start in range(0, len(logits), batch):
        metrics.update(logits[start : start + batch], labels[start : start + batch])
    return metrics.compute()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_classes():
    spec = TaskSpec("semantic", 6)
    logits = random(5, 6, 8, 9)
    logits[:, 4:] = -10.0  # never predicted
    labels = torch.randint(0, 4, (5, 8, 9), generator=torch.Generator().manual_seed(1))
    labels[0, 0, :3] = 4  # true but never predicted; class 5 is in neither and must not count
    labels[0, 1], labels[1, :, 2], labels[4] = -1, 255, 255
    predicted, truth = logits.argmax(1).numpy(), labels.numpy()
    known = (truth >= 0) & (truth != 255)
    predicted, truth = predicted[known], truth[known]
    ious = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in range(5)]
    assert run(spec, logits, labels) == pytest.approx(
        {"miou": np.mean(ious), "pixel_accuracy": (predicted == truth).mean()}, rel=1e-9
    )


def test_binary():
    logits, labels = random(4, 1, 8, 9), (random(4, 1, 8, 9, seed=1) > 0.3).double()
    labels[0, :, :2], labels[1, :, 3], labels[2, :, 4], labels[3] = 255, torch.nan, -1, 255
    known = (labels == 0) | (labels == 1)
    predicted, truth = (logits > 0)[known].numpy(), labels[known].numpy() == 1
    expected = (predicted & truth).sum() / (predicted | truth).sum()
    assert run(TaskSpec("binary"), logits, labels) == pytest.approx({"iou": expected}, rel=1e-9)


def test_nothing_to_find_and_nothing_found():
    assert run(TaskSpec("binary"), torch.full((1, 1, 4, 4), -1.0), torch.zeros(1, 1, 4, 4)) == {"iou": 1.0}


def test_depth():
    logits, labels = random(4, 1, 8, 9), random(4, 1, 8, 9, seed=1).abs() + 0.5
    labels[0, :, :2], labels[1, :, 3], labels[2, :, 4], labels[3] = 0, torch.nan, -1, torch.inf
    known = torch.isfinite(labels) & (labels > 0)
    error = (logits.clamp(min=0) - labels)[known].numpy()
    expected = {
        "abs_err": np.abs(error).mean(),
        "rel_err": (np.abs(error) / labels[known].numpy()).mean(),
        "rmse": np.sqrt((error**2).mean()),
    }
    assert run(TaskSpec("depth"), logits, labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pixels", [1, 2, 77, 72])
def test_normals(pixels):
    truth = F.normalize(random(1, 3, 11, 9, seed=1), dim=1)
    logits = 3 * truth + random(1, 3, 11, 9, seed=2)
    labels = truth.flatten(2)
    labels[..., pixels:] = 0
    labels[..., -1] = torch.nan
    a, b = F.normalize(logits, dim=1).flatten(2)[0, :, :pixels], labels[0, :, :pixels]
    angles = np.degrees(np.arccos((a * b).sum(0).numpy()))
    expected = {
        "mean_angle": angles.mean(),
        "median_angle": np.median(angles),
        "within_11": (angles < 11.25).mean(),
        "within_22": (angles < 22.5).mean(),
        "within_30": (angles < 30).mean(),
    }
    found = run(TaskSpec("normals"), logits, labels.reshape(1, 3, 11, 9))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found["mean_angle"] == pytest.approx(expected["mean_angle"], rel=1e-7)


def test_small_and_opposite_angles_are_exact():
    angle = math.radians(1e-3)
    labels = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    logits = torch.tensor([math.sin(angle), 0.0, math.cos(angle)]).reshape(1, 3, 1, 1)
    assert run(TaskSpec("normals"), logits, labels)["mean_angle"] == pytest.approx(1e-3, rel=1e-3)
    assert run(TaskSpec("normals"), -labels, labels)["median_angle"] == pytest.approx(180, abs=1e-3)


def test_regression():
    logits, labels = random(3, 2, 8, 9), random(3, 2, 8, 9, seed=1)
    labels[0, 1, :2], labels[2] = torch.nan, torch.inf
    known = torch.isfinite(labels).all(1, keepdim=True).expand_as(labels)
    expected = (logits - labels)[known].abs().mean().item()
    assert run(TaskSpec("regression", 2), logits, labels) == pytest.approx({"mae": expected}, rel=1e-6)
    single = run(TaskSpec("regression", 1), logits[:1, :1], labels[:1, :1])
    assert single["mae"] == pytest.approx((logits - labels)[:1, :1].nan_to_num(torch.nan).abs().nanmean().item())


def test_logits_are_resized_before_the_activation():
    spec = TaskSpec("depth")
    logits, labels = random(2, 1, 4, 4), random(2, 1, 10, 7, seed=1).abs() + 0.1
    resized = F.interpolate(logits, size=(10, 7), mode="bilinear", align_corners=False)
    assert run(spec, logits, labels) == run(spec, resized, labels)
    # activating first gives something else
    assert run(spec, logits.clamp(min=0), labels) != run(spec, resized, labels)


def test_masks_are_resized_before_the_sigmoid():
    # two thirds of the way from 9 to -2 the logit is 1.7, a positive; of their probabilities it would be 0.41, a negative
    logits = torch.tensor([9.0, -2.0, -2.0, 9.0]).reshape(1, 1, 1, 4)
    labels = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]).reshape(1, 1, 1, 12)
    assert run(TaskSpec("binary"), logits, labels) == {"iou": 1.0}


@pytest.mark.filterwarnings("error")
def test_none_where_nothing_is_labelled():
    specs = {"a": TaskSpec("semantic", 3), "b": TaskSpec("depth"), "c": TaskSpec("normals"), "d": TaskSpec("binary")}
    metrics = MultiTaskMetrics(specs)
    logits = {name: torch.randn(2, spec.num_channels, 4, 4) for name, spec in specs.items()}
    labels = {"a": torch.full((2, 4, 4), 255), "b": torch.zeros(2, 1, 4, 4), "c": torch.zeros(2, 3, 4, 4)}
    metrics.update(logits, labels)  # nothing at all for d
    found = metrics.compute()
    assert set(found["c"]) == {"mean_angle", "median_angle", "within_11", "within_22", "within_30"}
    assert all(value is None for task in found.values() for value in task.values())


def test_a_wrong_prediction_does_not_hide_as_none():
    found = run(TaskSpec("depth"), torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 1, 2, 2))
    assert math.isnan(found["abs_err"])


def test_reset():
    metrics = MultiTaskMetrics({"far": TaskSpec("depth")})
    metrics.update({"far": torch.ones(1, 1, 2, 2)}, {"far": torch.full((1, 1, 2, 2), 9.0)})
    metrics.reset()
    metrics.update({"far": torch.ones(1, 1, 2, 2)}, {"far": torch.full((1, 1, 2, 2), 2.0)})
    assert metrics.compute()["far"] == pytest.approx({"abs_err": 1.0, "rel_err": 0.5, "rmse": 1.0})


def test_sums_do_not_stall():
    metrics = TaskMetrics(TaskSpec("depth"))
    metrics.metrics["abs_err"].sum_abs_error += 2.0**25  # beyond it, float32 has no odd numbers
    metrics.metrics["abs_err"].total += 2**25
    metrics.update(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert metrics.metrics["abs_err"].sum_abs_error.item() == 2.0**25 + 1


def test_labels_are_checked():
    with pytest.raises(ValueError, match="'sem'"):
        TaskMetrics(TaskSpec("semantic", 2), "sem").update(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 2))


def test_delta_b_by_hand():
    results = {"semantic": {"miou": 0.6, "pixel_accuracy": 0.8}, "depth": {"abs_err": 0.3, "rel_err": 0.2}}
    baseline = {"semantic": {"miou": 0.5, "pixel_accuracy": 1.0}, "depth": {"abs_err": 0.4, "rel_err": 0.1}}
    # semantic: (+20 % - 20 %) / 2 = 0; depth: (+25 % - 100 %) / 2 = -37.5 %
    assert delta_b(results, baseline) == pytest.approx(-37.5 / 2)


def test_every_task_counts_alike_in_delta_b_however_many_metrics_it_has():
    results = {"semantic": {"miou": 0.6}, "depth": {"abs_err": 0.3, "rel_err": 0.2, "rmse": 1.0}}
    baseline = {"semantic": {"miou": 0.5}, "depth": {"abs_err": 0.4, "rel_err": 0.1, "rmse": 1.0}}
    # semantic: +20 %; depth: (25 - 100 + 0) / 3 = -25 %; the mean of all four metrics would be -13.75 %
    assert delta_b(results, baseline) == pytest.approx((20 - 25) / 2)


def test_delta_b_leaves_out_what_cannot_be_compared():
    results = {"semantic": {"miou": 0.6, "loss": 3.0}, "depth": {"abs_err": None}, "edges": {"iou": 0.2}, "new": {}}
    baseline = {"semantic": {"miou": 0.5, "loss": 1.0}, "depth": {"abs_err": 0.4}, "edges": {"iou": 0.0}}
    assert delta_b(results, baseline) == pytest.approx(20.0)
    assert delta_b({"depth": {"abs_err": None}}, baseline) is None
    with pytest.raises(ValueError, match=r"\['other'\].*'semantic'"):
        delta_b({"other": {"miou": 1.0}}, baseline)


def test_better_is_positive_for_every_metric():
    for name, higher in HIGHER_IS_BETTER.items():
        assert delta_b({"t": {name: 1.1 if higher else 0.9}}, {"t": {name: 1.0}}) == pytest.approx(10.0)
