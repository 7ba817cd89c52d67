"""A comparison as Markdown and as a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft_talora.metrics import HIGHER_IS_BETTER

from .methods import BASELINE, METHODS, RATE_FACTORS, Entry
from .plan import Amount
from .results import Noise, Result, interval, mean_and_spread, noise_of, of, paired_differences

# how many decimals tell methods apart
DECIMALS = {"mean_angle": 2, "median_angle": 2}
# columns of the table, from the results of all seeds
COSTS: dict[str, Callable[[Sequence[Result]], str]] = {
    "trained parameters": lambda own: f"{own[0].trainable_parameters:,}",
    "without the decoders'": lambda own: (
        "-" if own[0].encoder_parameters is None else f"{own[0].encoder_parameters:,}"
    ),
    "adapter, MB": lambda own: f"{own[0].adapter_bytes / 1e6:.1f}",
    "s per step": lambda own: (
        ("" if all(result.alone for result in own) else ROUGH)
        + f"{statistics.mean(result.seconds_per_step for result in own):.2f}"
    ),
}
ROUGH = "≈"
Color = tuple[float, float, float]


def markdown(
    results: Sequence[Result], rates: Mapping[str, float], tuned: Sequence[Mapping], repeated: Sequence[Result] = ()
) -> str:
    """Everything that was found, as tables.

    Args:
        results: One per method, amount of data and seed.
        rates: The learning rate of each method.
        tuned: What was tried to find it.
        repeated: Some of the results again, with another number of threads.
    """
    amounts = list(dict.fromkeys(result.amount for result in results))
    noises = {amount: noise_of(results, amount, repeated) for amount in amounts}
    parts = []
    if amounts:
        parts += [f"## {amounts[0]}", metrics_table(results, amounts[0]), f"Noise: {in_words(noises[amounts[0]])}"]
        if any(not result.alone for result in results):
            parts.append(f"{ROUGH}: other runs were beside it, so that its time is a rough measure.")
        parts.append(differences(results, amounts[0]))
    if len(amounts) > 1:
        parts += ["## Delta_b for other amounts of data", amounts_table(results, amounts)]
        parts.append(
            "\n".join(f"- noise with {amount}: {in_words(noises[amount])}" for amount in amounts if noises[amount])
        )
        for amount in amounts[1:]:
            found = differences(results, amount)
            parts += [f"### {amount}", found] if found else []
    if tuned:
        parts += ["## Learning rates that were tried", rates_table(rates, tuned)]
    return "\n\n".join(part for part in parts if part) + "\n"


def in_words(noise: Noise | None) -> str:
    """What size of difference says nothing."""
    if noise is None:
        return "with one seed nothing says which differences it makes."
    text = (
        f"two means of Delta_b that differ by less than {noise.size:.1f} points are not told apart. From seed to seed paired "
        f"differences spread by {noise.spread:.1f} points, over {noise.seeds} seeds."
    )
    if noise.repeated:
        (entry, threads), shifts = noise.repeated, noise.shifts
        text += (
            f" Another number of threads ({threads}) moves the Delta_b of {entry.label} by {statistics.mean(shifts):+.1f} points in "
            f"the mean, and by {max(map(abs, shifts)):.1f} at most in one of {len(shifts)} seeds."
        )
    return text


def metrics_table(results: Sequence[Result], amount: Amount) -> str:
    """A row per method: every metric of every task, Delta_b, and what it costs."""
    entries = [entry for entry in entries_of(results) if of(results, entry, amount)]
    metrics = [
        (task, metric) for task, values in of(results, entries[0], amount)[0].tasks.items() for metric in values
    ]
    titles = [f"{task}: {metric} {'↑' if HIGHER_IS_BETTER[metric] else '↓'}" for task, metric in metrics]
    titles = ["method", *titles, "Delta_b, %", *COSTS]
    lines = [row(titles), row(["---"] * len(titles))]
    for entry in entries:
        own = of(results, entry, amount)
        numbers = [
            spread([result.tasks[task][metric] for result in own], DECIMALS.get(metric, 3)) for task, metric in metrics
        ]
        lines.append(row([entry.label, *numbers, delta(own), *(cost(own) for cost in COSTS.values())]))
    return "\n".join(lines)


def amounts_table(results: Sequence[Result], amounts: Sequence[Amount]) -> str:
    """A row per method, a column per amount of data: Delta_b over the baseline with the same data."""
    lines = [row(["method", *map(str, amounts)]), row(["---"] * (len(amounts) + 1))]
    for entry in entries_of(results):
        lines.append(row([entry.label, *(delta(of(results, entry, amount)) for amount in amounts)]))
    return "\n".join(lines)


def differences(results: Sequence[Result], amount: Amount) -> str:
    """A row and a column per method: how much more Delta_b the row's has, seed by seed, with its confidence interval."""
    entries = [e for e in entries_of(results) if e.name != BASELINE and of(results, e, amount)]
    if len(entries) < 2:
        return ""
    lines = [row(["Delta_b of", *(f"minus {entry.label}" for entry in entries)]), row(["---"] * (len(entries) + 1))]
    for first in entries:
        cells = [difference(paired_differences(results, first, other, amount)) for other in entries]
        cells[entries.index(first)] = ""
        lines.append(row([first.label, *cells]))
    return (
        "Paired differences in points, seed by seed: mean ± half of the 95 % confidence interval (Student's t), in bold where it "
        "leaves out zero.\n\n" + "\n".join(lines)
    )


def difference(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    if len(values) == 1:
        return f"{mean:+.1f} (one seed)"
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def rates_table(rates: Mapping[str, float], tuned: Sequence[Mapping]) -> str:
    """What the validation split said of every learning rate, the chosen one in bold."""
    lines = [row(["method", *(f"{factor:g} x default" for factor in RATE_FACTORS)]), row(["---"] * 4)]
    for name in dict.fromkeys(trial["method"] for trial in tuned):
        own = [trial for trial in tuned if trial["method"] == name]
        cells = [own[0]["label"]]
        for trial in own:
            gains = list(trial["delta_b"].values())
            gain = spread(gains, 1, "+") + " %" if gains else "-"
            text = f"{trial['rate']:g}: {gain}"
            cells.append(f"**{text}**" if trial["rate"] == rates.get(name) else text)
        lines.append(row(cells))
    seeds = max(len(trial["delta_b"]) for trial in tuned)
    return "\n".join(lines) + (
        f"\n\nDelta_b on validation images, over {seeds} seeds. A rate is taken instead of the default where it is better by more "
        "than the seeds differ."
    )


def entries_of(results: Sequence[Result]) -> list[Entry]:
    return list(dict.fromkeys(result.entry for result in results))


def delta(results: Sequence[Result]) -> str:
    return spread([result.delta_b for result in results], 1, "+")


def spread(values: Sequence[float | None], decimals: int, sign: str = "") -> str:
    """ "mean ± standard deviation", the mean alone of one seed."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, deviation = mean_and_spread(known)
    text = f"{mean:{sign}.{decimals}f}"
    return text if len(known) == 1 else f"{text} ± {deviation:.{decimals}f}"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(results: Sequence[Result], path: Path) -> None:
    """Delta_b against the number of the encoder's trained parameters and, with several amounts of data, against that."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    amounts = list(dict.fromkeys(result.amount for result in results))
    numbers = [amount for amount in amounts if not amount.one_task_each]
    panels = 1 + (len(numbers) > 1)
    figure, axes = pyplot.subplots(1, panels, figsize=(6.4 * panels, 4.4), squeeze=False)
    # a method's ranks are points of one line; METHODS come first, so that they have the same colours in every plot
    lines = dict.fromkeys([*map(Entry, METHODS), *(entry.line for entry in entries_of(results))])
    # the strong tones of ten colours, then their light ones
    tones = pyplot.colormaps["tab20"].colors
    colors = dict(zip(lines, itertools.cycle((*tones[::2], *tones[1::2])), strict=False))
    draw_parameters(axes[0, 0], results, amounts[0], colors)
    if panels == 2:
        draw_amounts(axes[0, 1], results, sorted(numbers, key=lambda amount: amount.images), colors)
    for axis in axes[0]:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("Delta_b over decoders only, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_parameters(axis, results: Sequence[Result], amount: Amount, colors: Mapping[Entry, Color]) -> None:
    numbers: list[int] = []
    for line, color in colors.items():
        places = []
        for entry in entries_of(results):
            own = [result for result in of(results, entry, amount) if result.delta_b is not None]
            # decoders alone have no place on a logarithmic axis
            if entry.line == line and own and own[0].encoder_parameters:
                places.append((own[0].encoder_parameters, *mean_and_spread([r.delta_b for r in own])))
        if places:
            x, y, error = zip(*sorted(places), strict=True)
            numbers.extend(x)
            axis.errorbar(x, y, error, marker="o", capsize=3, color=color, label=line.label)
    set_parameter_axis(axis, numbers)
    axis.set_xlabel("trained parameters, without the decoders'")
    axis.set_title(str(amount), fontsize=10)


def set_parameter_axis(axis, numbers: Sequence[int]) -> None:
    """A logarithmic axis, unless the numbers are so much alike that it would have no number written at it."""
    if numbers and max(numbers) >= 10 * min(numbers):
        axis.set_xscale("log")
        return
    axis.margins(x=0.3)
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def draw_amounts(axis, results: Sequence[Result], amounts: Sequence[Amount], colors: Mapping[Entry, Color]) -> None:
    for entry in entries_of(results):
        places = []
        for amount in amounts:
            gains = [result.delta_b for result in of(results, entry, amount) if result.delta_b is not None]
            if gains:
                places.append((amount.images, *mean_and_spread(gains)))
        if len(places) > 1 and entry.rank is None and entry.name != BASELINE:
            x, y, error = zip(*places, strict=True)
            axis.errorbar(x, y, error, marker="o", capsize=3, color=colors[entry], label=entry.label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([amount.images for amount in amounts], [str(amount.images) for amount in amounts])
    axis.set_xlabel("images to train on")
