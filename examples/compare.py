"""Compare the methods at equal steps, each with its own learning rate, over several seeds.

    python examples/compare.py                # the table: six methods, five seeds; hours on a CPU
    python examples/compare.py --few-labels   # the same for 16, 64 and 256 images and for images labelled for one task each
    python examples/compare.py --report       # tables and plot of what is finished, without a run

Every number comes from a run of train_multitask.py with its own folder in OUTPUT_DIR/runs. What is finished is not run
again, and what was interrupted is resumed, so that the same command, or one that asks for more, can be given any time.
Three learning rates of a method are tried on the validation split with two seeds: its default times 0.4, 1 and 2.5. The
default is taken unless another is better by more than the seeds differ. The decoders' is chosen first, by decoder-only
training, and serves all methods. Adapters have the rank at which they have as many parameters as TA-LoRA; one LoRA per task,
all of them together; Conv-LoRA has the published rank, and convlora_equal the other one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import extras  # noqa: F401

# isort: split
import torch

sys.path.insert(0, str(Path(__file__).parent))
from comparison.jobs import Job, run_if_missing
from comparison.plan import (
    BASELINE,
    METHODS,
    ROWS,
    Amount,
    Cell,
    Entry,
    Plan,
    check_common,
    matching_ranks,
    split_common,
)
from comparison.rates import tune
from comparison.report import draw, markdown
from comparison.results import Result, read_result
from training.data import load_data
from training.options import OneLineParser, count, whole
from training.stopping import run_script

from peft_talora.saving.directory import written_aside

FEW_IMAGES = (16, 64, 256)
# where few labels are compared: those between which somebody with few labels would choose
FEW_METHODS = ("lora", "lora_per_task", "talora")
# five seeds for the table, three for what goes beyond it
SEEDS, FEW_SEEDS = 5, 3
# of rendered scenes; of any other dataset all that it has
SCENES = 512


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that go to the training script as they are."""
    parser = OneLineParser(
        prog="compare.py",
        description=__doc__.splitlines()[0],
        epilog="Other options go to train_multitask.py: --steps 400 --dataset folder:rooms",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", type=Entry.parse, default=[Entry(name) for name in ROWS],
        help=f"rows of the table: {' '.join(METHODS)}, or with a rank of their own: talora:8 (default: the first {len(ROWS)})")  # fmt: skip
    add(
        "--seeds",
        nargs="+",
        type=whole(0),
        default=list(range(SEEDS)),
        help=f"every number is a mean over these (default: {' '.join(map(str, range(SEEDS)))})",
    )
    add("--num-train", "--max-train-images", type=count, metavar="N", help=f"images of the table (default: {SCENES} scenes, or "
        "all that another dataset has)")  # fmt: skip
    add("--few-labels", action="store_true", help=f"also {FEW_IMAGES} images, as far as there are more, and images labelled for "
        "one task each")  # fmt: skip
    add("--few-seeds", nargs="+", type=whole(0), help=f"seeds of --few-labels (default: the first {FEW_SEEDS} of the "
        "table)")  # fmt: skip
    add("--rate-seeds", nargs="+", type=whole(0), help="seeds with which learning rates are chosen, at least two (default: the first "
        "two of the table)")  # fmt: skip
    add("--noise", type=count, metavar="THREADS", help="repeat decoders only and TA-LoRA (else the last method) with another number "
        "of CPU threads, to see what that changes")  # fmt: skip
    add("--tasks", nargs="+", help="the tasks (default: those of the dataset, for scenes semantic depth normals)")
    add("--base", default="tiny_sam", help="the SAM: tiny_sam, a path, or a Hub id such as facebook/sam-vit-base (default: "
        "%(default)s)")  # fmt: skip
    add("--rank", type=count, default=32, help="rank of TA-LoRA; the LoRAs' follows from it (default: %(default)s)")
    add("--no-tuning", action="store_true", help="take the methods' default learning rates")
    add("--jobs", type=count, default=1, help="runs at once (default: %(default)s)")
    add("--num-threads", type=count, help="CPU threads of a run (default: the training script's)")
    add(
        "--output-dir", type=Path, default=Path("runs/comparison"), help="where everything goes (default: %(default)s)"
    )
    add("--report", action="store_true", help="run nothing: tables and plot of what is finished")
    args, common = parser.parse_known_args(argv)
    if Entry(BASELINE) not in args.methods:
        args.methods.insert(0, Entry(BASELINE))
    args.few_seeds = args.few_seeds or args.seeds[:FEW_SEEDS]
    args.rate_seeds = (
        args.rate_seeds or (args.seeds if len(args.seeds) > 1 else [args.seeds[0], args.seeds[0] + 1])[:2]
    )
    if len(set(args.rate_seeds)) < 2 and not args.no_tuning:
        parser.error("--rate-seeds: one seed says nothing of the noise, give at least two, or --no-tuning")
    if args.noise is not None and args.noise == (args.num_threads or torch.get_num_threads()):
        parser.error(f"--noise {args.noise} is the number of threads that all runs have: give another one")
    args.training = check_common(common)
    return args, common


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
    entries = [Entry(BASELINE), *(entry for entry in args.methods if str(entry) in FEW_METHODS)]
    return table + [Cell(entry, amount, seed) for seed in args.few_seeds for amount in amounts for entry in entries]


def repetitions(args: argparse.Namespace, images: int) -> list[Cell]:
    """What is run again with another number of threads."""
    if args.noise is None:
        return []
    entry = Entry("talora") if Entry("talora") in args.methods else args.methods[-1]
    entries = dict.fromkeys((Entry(BASELINE), entry))
    return [Cell(one, Amount(images), seed, threads=args.noise) for seed in args.seeds for one in entries]


def write(
    output_dir: Path, settings: dict, results: list[Result], rates: dict, tuned: list[dict], repeated: list[Result]
) -> None:
    content = {
        "settings": settings,
        "rates": rates,
        "tuning": tuned,
        "results": [result.to_dict() for result in results],
        "repeated": [result.to_dict() for result in repeated],
    }
    with written_aside(output_dir) as aside:
        (aside / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
        (aside / "comparison.md").write_text(markdown(results, rates, tuned, repeated))
        if results:
            draw(results, aside / "comparison.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the arguments say: 1 where a run failed, else 0."""
    args, rest = parse_args(argv)
    tasks, images = look_at_data(args)
    base = str(Path(__file__).parent / "tiny_sam") if args.base == "tiny_sam" else args.base
    common, special = split_common(("--base", base, *rest), args.training)
    names = list(dict.fromkeys([BASELINE, *(entry.name for entry in args.methods)]))
    ranks = matching_ranks(base, args.rank, tasks, names)
    plan = Plan(args.output_dir, tasks, ranks, common, args.training.steps, special)
    failures: list[str] = []

    def run(what: str, jobs: list[Job]) -> None:
        if not args.report:
            failures.extend(run_if_missing(what, jobs, args.jobs, args.num_threads))

    def results_of(what: str, wanted: list[Cell]) -> list[Result]:
        run(what, [job for cell in wanted for job in plan.jobs(cell, rates).values()])
        results = [read_result(plan, cell, rates) for cell in wanted]
        return [result for result in results if result is not None]

    rates, tuned = {name: METHODS[name].default_rate for name in names}, []
    if not args.no_tuning:
        rates, tuned = tune(plan, names, Amount(images), args.rate_seeds, run)
    wanted = cells(args, images)
    results = results_of("comparison", wanted)
    again = results_of("another number of threads", repetitions(args, images))
    repeated = [result for result in again if result.entry != Entry(BASELINE)]
    settings = {
        "seeds": args.seeds,
        "tasks": tasks,
        "base": args.base,
        "ranks": ranks,
        "num_train": images,
        "training": rest,
    }
    write(args.output_dir, settings, results, rates, tuned, repeated)
    print((args.output_dir / "comparison.md").read_text())
    print(f"{len(results)} of {len(wanted)} results are in {args.output_dir}: comparison.json, .md and .png")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(run_script(main))
