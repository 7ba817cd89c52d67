"""Numbers of the finished runs, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import peft_talora as pt

from .plan import BASELINE, Amount, Entry, Plan


@dataclass(frozen=True)
class Result:
    """One method, trained once with one amount of data.

    Attributes:
        entry: The method.
        amount: The data.
        seed: The seed.
        rate: Its learning rate.
        tasks: {task: {metric: value}}.
        trainable_parameters: Of all its models.
        encoder_parameters: Those of them that the baseline does not train.
        adapter_bytes: Of all its files.
        seconds_per_step: Of a step of all its models.
        delta_b: Percent, over the baseline with the same data and seed; None without one.
    """

    entry: Entry
    amount: Amount
    seed: int
    rate: float
    tasks: dict[str, dict[str, float | None]]
    trainable_parameters: int
    encoder_parameters: int | None
    adapter_bytes: int
    seconds_per_step: float
    delta_b: float | None

    def to_dict(self) -> dict:
        return {
            "method": str(self.entry),
            "images": self.amount.images,
            "one_task_each": self.amount.one_task_each,
            **{name: value for name, value in vars(self).items() if name not in ("entry", "amount")},
        }


def read_result(
    plan: Plan, entry: Entry, rates: Mapping[str, float], amount: Amount, seed: int, split: str = "test"
) -> Result | None:
    """A method's numbers; None while a run of them is not finished."""
    found = [job.result() for job in plan.jobs(entry, rates, amount, seed, split).values()]
    if any(metrics is None for metrics in found):
        return None
    tasks = {task: values for metrics in found for task, values in metrics["tasks"].items()}
    base = next(iter(plan.jobs(Entry(BASELINE), rates, amount, seed, split).values())).result()
    trainable = sum(metrics["trainable_parameters"] for metrics in found)
    return Result(
        entry=entry,
        amount=amount,
        seed=seed,
        rate=rates[entry.name],
        tasks=tasks,
        trainable_parameters=trainable,
        encoder_parameters=None if base is None else trainable - base["trainable_parameters"],
        adapter_bytes=sum(metrics["adapter_bytes"] for metrics in found),
        seconds_per_step=sum(metrics["train_seconds"] / metrics["steps"] for metrics in found),
        delta_b=None if base is None else pt.delta_b(tasks, base["tasks"]),
    )


def of(results: Iterable[Result], entry: Entry, amount: Amount) -> list[Result]:
    """The results of a method with an amount of data, one per seed."""
    return [result for result in results if result.entry == entry and result.amount == amount]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; 0 for one seed."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_differences(results: Iterable[Result], first: Entry, second: Entry, amount: Amount) -> list[float]:
    """How much more Delta_b the first of two methods has, seed by seed."""
    results = list(results)
    others = {result.seed: result.delta_b for result in of(results, second, amount)}
    pairs = [(result.delta_b, others.get(result.seed)) for result in of(results, first, amount)]
    return [own - other for own, other in pairs if own is not None and other is not None]
