"""Compare the methods at equal steps, each with its own learning rate, over several seeds.

    python examples/compare.py                # the table: seven methods, five seeds; hours on a CPU
    python examples/compare.py --few-labels   # the same for 16, 64 and 256 images and for images labelled for one task each
    python examples/compare.py --report       # tables and plot of what is finished, without a run

Every number comes from a run of train_multitask.py with its own folder in OUTPUT_DIR/runs. What is finished is not run
again, and what was interrupted is resumed, so that the same command, or one that asks for more, can be given any time.
Three learning rates of a method, and of one with fields of its own, are tried on the validation split with two seeds: its default times 0.4, 1 and 2.5. The
default is taken unless another is better by more than the seeds differ. The decoders' is chosen first, by decoder-only
training, and serves all methods. Adapters have the rank at which they have as many parameters as TA-LoRA of `--rank` on every qkv; one LoRA per
task, all of them together; Conv-LoRA has the published rank, and convlora_equal the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import extras  # noqa: F401
from comparison.options import FEW_IMAGES, FEW_METHODS, SCENES, parse_args

if __name__ == "__main__":
    # what is wrong with them is said before the imports below, which take seconds
    parse_args(None, __doc__.splitlines()[0])

sys.path.insert(0, str(Path(__file__).parent))
from bases import base_path
from comparison.jobs import Job, run_if_missing
from comparison.methods import BASELINE, Entry, default_rates
from comparison.plan import Amount, Cell, Plan, check_fields, matching_ranks
from comparison.rates import tried, tune
from comparison.report import draw, markdown
from comparison.results import Result, read_result
from training.data import load_data
from training.stopping import run_script

from peft_talora.saving.directory import written_aside


def look_at_data(args: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """The tasks, and how many images there are to train on.

    Raises:
        ValueError: There are fewer than a comparison with few labels needs.
    """
    training = args.training
    if training.dataset == "scenes":
        return tuple(args.tasks or ("semantic", "depth", "normals")), args.num_train or SCENES
    training.tasks, training.max_train_images = args.tasks, args.num_train
    data = load_data(training, 0)
    if args.num_train is not None and len(data.train) < args.num_train:
        raise ValueError(f"--num-train {args.num_train}: {training.dataset} has {len(data.train)} images to train on")
    if args.few_labels and len(data.train) <= min(FEW_IMAGES):
        raise ValueError(
            f"--few-labels compares {FEW_IMAGES} images with more, {training.dataset} has {len(data.train)}"
        )
    return tuple(data.tasks), len(data.train)


def cells(args: argparse.Namespace, images: int) -> list[Cell]:
    """Everything that is to be known: the table first, then few labels."""
    table = [Cell(entry, Amount(images), seed) for seed in args.seeds for entry in args.methods]
    if not args.few_labels:
        return table
    amounts = [Amount(images, one_task_each=True), *(Amount(number) for number in FEW_IMAGES if number < images)]
    entries = [Entry(BASELINE), *(entry for entry in args.methods if entry.rank is None and entry.name in FEW_METHODS)]
    return table + [Cell(entry, amount, seed) for seed in args.few_seeds for amount in amounts for entry in entries]


def repetitions(args: argparse.Namespace, images: int) -> list[Cell]:
    """What is run again with another number of threads."""
    if args.noise is None:
        return []
    entry = Entry("talora") if Entry("talora") in args.methods else args.methods[-1]
    entries = dict.fromkeys((Entry(BASELINE), entry))
    return [Cell(one, Amount(images), seed, threads=args.noise) for seed in args.seeds for one in entries]


@dataclass(frozen=True)
class Compared:
    """What the finished runs say."""

    rates: dict[str, float]
    tuned: list[dict]
    results: list[Result]
    repeated: list[Result]


def write(output_dir: Path, settings: dict, compared: Compared) -> None:
    results, repeated = compared.results, compared.repeated
    content = {
        "settings": settings,
        "rates": compared.rates,
        "tuning": compared.tuned,
        "results": [result.to_dict() for result in results],
        "repeated": [result.to_dict() for result in repeated],
    }
    with written_aside(output_dir) as aside:
        (aside / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
        (aside / "comparison.md").write_text(markdown(results, compared.rates, compared.tuned, repeated))
        if results:
            draw(results, aside / "comparison.png")


def compare(
    args: argparse.Namespace, plan: Plan, lines: Sequence[Entry], images: int, run: Callable[[str, list[Job]], None]
) -> Compared:
    """Have `run` make what is missing, the learning rates first, and read it."""

    def results_of(what: str, wanted: list[Cell]) -> list[Result]:
        run(what, [job for cell in wanted for job in plan.jobs(cell, rates).values()])
        results = [read_result(plan, cell, rates) for cell in wanted]
        return [result for result in results if result is not None]

    rates, tuned = default_rates(lines), []
    if not args.no_tuning:
        rates, tuned = tune(plan, lines, Amount(images), args.rate_seeds, run)
    results = results_of("comparison", cells(args, images))
    again = results_of("another number of threads", repetitions(args, images))
    return Compared(rates, tuned, results, [result for result in again if result.entry != Entry(BASELINE)])


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the arguments say: 1 where a run failed, else 0."""
    args, rest = parse_args(argv, __doc__.splitlines()[0])
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--report"]
    missing = f"this makes what is missing: {shlex.join(['python', os.path.relpath(__file__), *given])}"
    if args.report and not any(args.output_dir.glob("runs/**/metrics.json")):
        raise ValueError(f"--report: {args.output_dir} has no finished run; {missing}")
    check_fields(args.methods)
    tasks, images = look_at_data(args)
    base = base_path(args.base)
    lines = list(dict.fromkeys([Entry(BASELINE), *(entry.line for entry in args.methods)]))
    ranks = matching_ranks(base, args.rank, tasks, dict.fromkeys(line.name for line in lines))
    plan = Plan(args.output_dir, tasks, ranks, ("--base", base, *rest), args.training.steps)
    failures: list[str] = []

    def run(what: str, jobs: list[Job]) -> None:
        if not args.report:
            failures.extend(run_if_missing(what, jobs, args.jobs, args.num_threads))

    if not args.report:
        print(ahead(args, plan, lines, images), flush=True)
    compared = compare(args, plan, lines, images, run)
    settings = {
        "seeds": args.seeds,
        "tasks": tasks,
        "base": args.base,
        "ranks": ranks,
        "num_train": images,
        "training": rest,
    }
    write(args.output_dir, settings, compared)
    print((args.output_dir / "comparison.md").read_text())
    done, wanted = len(compared.results), len(cells(args, images))
    rest_of_it = "" if done == wanted else f"; {missing}"
    print(f"{done} of {wanted} results are in {args.output_dir}: comparison.json, .md and .png{rest_of_it}")
    return min(len(failures), 1)


def ahead(args: argparse.Namespace, plan: Plan, lines: Sequence[Entry], images: int) -> str:
    """What there is to do, in a line, before hours are spent on it.

    What is finished with learning rates that were chosen is not counted: which they are is not known yet.
    """
    rates = default_rates(lines)
    wanted = [(cell, rates) for cell in (*cells(args, images), *repetitions(args, images))]
    if not args.no_tuning:
        wanted += tried(lines, Amount(images), args.rate_seeds, rates)
    jobs = {job.folder: job for cell, with_rates in wanted for job in plan.jobs(cell, with_rates).values()}
    finished = sum(job.is_finished for job in jobs.values())
    more = " or more" if finished and not args.no_tuning else ""
    seeds = f"seeds {' '.join(map(str, args.seeds))}"
    if len(set(args.seeds)) == 1:
        seeds = f"one seed, number {args.seeds[0]}: no intervals, --seeds 0 1 2 would be three seeds"
    return f"{len(jobs)} runs, {finished}{more} of them finished, in {args.output_dir}; {seeds}"


if __name__ == "__main__":
    sys.exit(run_script(main))
