"""The adapter that was best on validation images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

import peft_talora as pt


class WantedMetric(NamedTuple):
    """What --keep-best means."""

    task: str
    name: str
    higher_is_better: bool


def find_metric(wanted: str, tasks: Mapping[str, pt.TaskSpec]) -> WantedMetric:
    """The metric that is called METRIC or TASK/METRIC.

    Raises:
        ValueError: There is none of that name, or several; the message names those that there are.
    """
    known = [
        WantedMetric(task, name, higher)
        for task, spec in tasks.items()
        for name, higher in spec.task_kind.higher_is_better.items()
    ]
    found = [metric for metric in known if wanted in (metric.name, f"{metric.task}/{metric.name}")]
    if len(found) != 1:
        names = ", ".join(f"{metric.task}/{metric.name}" for metric in known)
        raise ValueError(
            f"--keep-best {wanted}: {'several' if found else 'no'} metrics are called so; there are {names}"
        )
    return found[0]


class BestAdapter:
    """Keeps the weights that had the best value so far.

    Args:
        metric: What decides.
        patience: After how many evaluations in a row without a better value training is to stop; None: never.
    """

    def __init__(self, metric: WantedMetric, patience: int | None = None) -> None:
        self.metric = metric
        self.patience = patience
        self.step: int | None = None
        self.value = -math.inf if metric.higher_is_better else math.inf
        self.weights: dict[str, torch.Tensor] = {}
        self.evaluations_since = 0

    def offer(self, step: int, results: Mapping[str, Mapping[str, float | None]], model: PeftModel) -> None:
        """Take the model's weights if their value is better than all before. One that is not finite never is."""
        value = results[self.metric.task][self.metric.name]
        value = math.nan if value is None else value
        if value > self.value if self.metric.higher_is_better else value < self.value:
            self.step, self.value, self.evaluations_since = step, value, 0
            weights = get_peft_model_state_dict(model)
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            self.evaluations_since += 1

    @property
    def gave_up(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def restore(self, model: PeftModel) -> None:
        """Put the best weights into the model, where there are any."""
        if self.weights:
            set_peft_model_state_dict(model, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: getattr(self, name) for name in ("step", "value", "weights", "evaluations_since")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        vars(self).update(state)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {"metric": f"{self.metric.task}/{self.metric.name}", "step": self.step, "value": self.value}
