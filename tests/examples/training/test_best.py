"""Which adapter is kept as the best one."""

import pytest
import torch
from peft import get_peft_model
from training.best import BestAdapter, WantedMetric, find_metric

from peft_talora import MSamForMultiTask, TALoraConfig
from peft_talora.msam.tasks import parse_tasks

TASKS = parse_tasks({"depth": {"kind": "depth"}, "edges": {"kind": "binary"}, "parts": {"kind": "parts", "num_channels": 3},
                     "saliency": {"kind": "binary"}})  # fmt: skip
DEPTH = WantedMetric("depth", "rmse", False)


def value(number):
    return {"depth": {"rmse": number}}


@pytest.fixture
def model(sam):
    return get_peft_model(MSamForMultiTask.from_sam(sam, {"depth": {"kind": "depth"}}), TALoraConfig(r=2, r_task=1))


def fill(model, number):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "talora_U3" in name:
                parameter.fill_(number)


def filled(model):
    return {p.flatten()[0].item() for name, p in model.named_parameters() if "talora_U3" in name}


class TestMetric:
    def test_by_name(self):
        assert find_metric("miou", TASKS) == WantedMetric("parts", "miou", True)
        assert find_metric("depth/rmse", TASKS) == DEPTH
        assert find_metric("saliency/iou", TASKS) == WantedMetric("saliency", "iou", True)

    def test_none_or_several(self):
        with pytest.raises(ValueError, match=r"--keep-best iou: several .*edges/iou.*saliency/iou"):
            find_metric("iou", TASKS)
        with pytest.raises(ValueError, match=r"--keep-best loss: no metrics.*depth/abs_err"):
            find_metric("loss", TASKS)


class TestBest:
    def test_the_best_weights_come_back(self, model):
        best = BestAdapter(DEPTH)
        for step, number in enumerate([0.5, 0.2, 0.3, float("nan"), 0.2, None], start=1):
            fill(model, step)
            best.offer(step, value(number), model)
        assert best.summary() == {"metric": "depth/rmse", "step": 2, "value": 0.2} and best.evaluations_since == 4
        best.restore(model)
        assert filled(model) == {2}

    def test_higher_is_better_where_it_is(self, model):
        best = BestAdapter(WantedMetric("parts", "miou", True))
        for step, number in enumerate([0.5, 0.7, 0.6], start=1):
            best.offer(step, {"parts": {"miou": number}}, model)
        assert best.step == 2

    def test_nothing_to_restore(self, model):
        fill(model, 7)
        best = BestAdapter(DEPTH)
        best.offer(1, value(None), model)
        best.restore(model)
        assert filled(model) == {7} and best.step is None

    def test_patience(self, model):
        best, forever = BestAdapter(DEPTH, patience=2), BestAdapter(DEPTH)
        gave_up = []
        for step, number in enumerate([0.5, 0.6, 0.4, 0.5, 0.4], start=1):
            best.offer(step, value(number), model)
            forever.offer(step, value(number), model)
            gave_up.append(best.gave_up)
        assert gave_up == [False, False, False, False, True] and not forever.gave_up

    def test_a_checkpoint_keeps_it(self, model, tmp_path):
        best = BestAdapter(DEPTH, patience=2)
        fill(model, 5)
        best.offer(1, value(0.1), model)
        best.offer(2, value(0.2), model)
        torch.save(best.state_dict(), tmp_path / "state.pt")
        fill(model, 6)
        resumed = BestAdapter(DEPTH, patience=2)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        resumed.offer(3, value(0.3), model)
        assert resumed.gave_up and resumed.summary() == {"metric": "depth/rmse", "step": 1, "value": 0.1}
        resumed.restore(model)
        assert filled(model) == {5}
