"""Which learning rate each method gets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import peft_talora as pt

from .jobs import Job
from .methods import BASELINE, Entry, default_rates
from .plan import Amount, Cell, Plan
from .results import mean_and_spread, read_result

Gains = Mapping[float, Mapping[int, float]]


def tune(
    plan: Plan, lines: Sequence[Entry], amount: Amount, seeds: Sequence[int], run: Callable[[str, list[Job]], None]
) -> tuple[dict[str, float], list[dict]]:
    """The learning rate of each line, and what the validation split said of those that were tried.

    Args:
        plan: What all runs have in common.
        lines: The methods, with fields of their own or without; the first is the baseline.
        amount: The data.
        seeds: At least two.
        run: Makes the runs that are missing.
    """
    rates = default_rates(lines)
    baselines = [Cell(Entry(BASELINE), amount, seed, "validation") for seed in seeds]
    trials: list[dict] = []
    # the decoders' rate is part of every other run
    for group in ([Entry(BASELINE)], [line for line in lines if line != Entry(BASELINE)]):
        of_group = tried(group, amount, seeds, rates)
        # what Delta_b compares with
        compared = [(cell, rates) for cell in baselines]
        run("learning rates", [job for each in (*of_group, *compared) for job in plan.jobs(*each).values()])
        base = {cell.seed: read_result(plan, cell, rates) for cell in baselines}
        gains: dict[Entry, dict[float, dict[int, float]]] = {line: {} for line in group}
        for cell, changed in of_group:
            reference = base[cell.seed]
            of_rate = gains[cell.entry].setdefault(changed[str(cell.entry)], {})
            result = read_result(plan, cell, changed)
            if result is not None and reference is not None:
                of_rate[cell.seed] = pt.delta_b(result.tasks, reference.tasks)
        for line, by_rate in gains.items():
            name = {"method": str(line), "label": line.label}
            trials += [{**name, "rate": rate, "delta_b": by_seed} for rate, by_seed in by_rate.items()]
            rates[str(line)] = choose_rate(rates[str(line)], by_rate)
    return rates, trials


def tried(
    lines: Iterable[Entry], amount: Amount, seeds: Sequence[int], rates: Mapping[str, float]
) -> list[tuple[Cell, dict[str, float]]]:
    """What is trained to choose the learning rates of some lines, each with the rates of all."""
    return [
        (Cell(line, amount, seed, "validation"), {**rates, str(line): rate})
        for line in lines
        for rate in line.method.rates
        for seed in seeds
    ]


def choose_rate(default: float, gains: Gains) -> float:
    """The best rate, if it is better than the default by more than the seeds differ; else the default.

    How much they differ is the largest standard deviation over the seeds: of either rate's Delta_b, and of the paired
    differences. A rate with a seed that failed is not taken, the default included.

    Args:
        default: What counts unless something is better.
        gains: {rate: {seed: Delta_b}}.
    """
    seeds = max(map(len, gains.values()), default=0)
    complete = {rate: own for rate, own in gains.items() if len(own) == seeds > 1}
    if default not in complete:
        return max(complete, key=lambda rate: statistics.mean(complete[rate].values()), default=default)
    own, best, most = complete.pop(default), default, 0.0
    for rate, others in complete.items():
        differences = [others[seed] - own[seed] for seed in own]
        spread = max(mean_and_spread(values)[1] for values in (own.values(), others.values(), differences))
        if statistics.mean(differences) > max(spread, most):
            best, most = rate, statistics.mean(differences)
    return best
