"""Numbers of the finished runs, and what they say together."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

import peft_talora as pt

from .methods import Entry
from .plan import Amount, Cell, Plan


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
        alone: No other run was beside it when its seconds were taken.
        threads: CPU threads, where it is a repetition with another number of them.
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
    alone: bool
    threads: int | None = None

    def to_dict(self) -> dict:
        return {
            "method": str(self.entry),
            "images": self.amount.images,
            "one_task_each": self.amount.one_task_each,
            **{name: value for name, value in vars(self).items() if name not in ("entry", "amount")},
        }


def read_result(plan: Plan, cell: Cell, rates: Mapping[str, float]) -> Result | None:
    """A method's numbers; None while a run of them is not finished."""
    jobs = plan.jobs(cell, rates).values()
    runs = [job.result() for job in jobs]
    if any(metrics is None for metrics in runs):
        return None
    tasks = {task: values for metrics in runs for task, values in metrics["tasks"].items()}
    base = next(iter(plan.jobs(cell.baseline, rates).values())).result()
    trainable = sum(metrics["trainable_parameters"] for metrics in runs)
    return Result(
        entry=cell.entry,
        amount=cell.amount,
        seed=cell.seed,
        rate=rates[str(cell.entry.line)],
        tasks=tasks,
        trainable_parameters=trainable,
        encoder_parameters=None if base is None else trainable - base["trainable_parameters"],
        adapter_bytes=sum(metrics["adapter_bytes"] for metrics in runs),
        seconds_per_step=sum(metrics["train_seconds"] / metrics["steps"] for metrics in runs),
        delta_b=None if base is None else pt.delta_b(tasks, base["tasks"]),
        alone=all(job.alone for job in jobs),
        threads=cell.threads,
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


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t; infinite for one value."""
    mean, deviation = mean_and_spread(values)
    return mean, half_width(deviation, len(values), level)


def half_width(deviation: float, number: int, level: float = 0.95) -> float:
    """Half the width of the confidence interval of a mean of `number` values; infinite for one."""
    if number < 2:
        return math.inf
    return float(stats.t.ppf((1 + level) / 2, number - 1)) * deviation / math.sqrt(number)


@dataclass(frozen=True)
class Noise:
    """How large a difference of two means can be that says nothing.

    Attributes:
        seeds: How many there are.
        spread: Standard deviation of paired differences from seed to seed, pooled over all pairs of methods.
        shifts: What another number of threads changes in Delta_b, seed by seed.
        repeated: The method that was repeated with them, and their number.
    """

    seeds: int
    spread: float
    shifts: tuple[float, ...] = ()
    repeated: tuple[Entry, int] | None = None

    @property
    def size(self) -> float:
        """Points of Delta_b, in the mean over the seeds."""
        from_seeds = half_width(self.spread, self.seeds)
        return max(from_seeds, abs(statistics.mean(self.shifts))) if self.shifts else from_seeds


def noise_of(results: Sequence[Result], amount: Amount, repeated: Sequence[Result] = ()) -> Noise | None:
    """How noisy a table is; None where no two methods have two seeds in common."""
    entries = list(dict.fromkeys(result.entry for result in results if result.amount == amount))
    pairs = (paired_differences(results, *pair, amount) for pair in itertools.combinations(entries, 2))
    differences = [found for found in pairs if len(found) > 1]
    if not differences:
        return None
    spread = math.sqrt(statistics.mean(statistics.variance(found) for found in differences))
    seeds = min(len(found) for found in differences)
    own = {(result.entry, result.seed): result.delta_b for result in results if result.amount == amount}
    both = [(result.delta_b, own.get((result.entry, result.seed))) for result in repeated if result.amount == amount]
    shifts = tuple(new - old for new, old in both if new is not None and old is not None)
    return Noise(seeds, spread, shifts, (repeated[0].entry, repeated[0].threads) if shifts else None)
